"""The report of an evaluation: from scores to plain JSON values, and from these to a page.

    summary = summarise(Report(...))      every figure, as in report.json
    print(format_table(summary))          for a terminal
    write_report(summary, directory)      report.json and report.md
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.perplexity import (
  FROZEN,
  OWN,
  AheadNLL,
  Change,
  check_paired,
  relative_change,
)
from latent_deliberation.files import write_whole
from latent_deliberation.paths import REPORT

LABELS = {
  FROZEN: 'frozen decoder',
  OWN: 'own latents',
  'shuffled': "another text's latents",
  'constant': 'constant soft tokens',
  'zero': 'zero latents',
}
# A gain counts as shown if own latents have a lower perplexity than the other arm at all of these
# ahead positions.
BELOW_FROZEN = (1, 2, 4)
BELOW_SHUFFLED = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Report:
  """The measurements of an evaluation.

  Attributes:
    arms: scores by arm, 'frozen' and others of LABELS, on the same traces.
    positions: ahead positions of the table, from 1, increasing.
    num_ahead: N_A, the last ahead position that training had a loss on.
    decoder_fingerprint: fingerprint of the frozen weights.
    parameters: number of parameters by name.
    seconds: wall-clock time by phase.
    peak_memory_bytes: peak memory of this process.
    git_commit: commit of the source tree.
    config: configuration of the run; values without a JSON form are written as str.
    pictures: captions by file name, in the directory of the report.
    notes: free sentences.
  """
  arms: Mapping[str, AheadNLL]
  positions: tuple[int, ...]
  num_ahead: int
  decoder_fingerprint: str
  parameters: Mapping[str, int]
  seconds: Mapping[str, float]
  peak_memory_bytes: int
  git_commit: str
  config: Mapping[str, Any]
  pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  def __post_init__(self):
    if FROZEN not in self.arms or not set(self.arms) <= set(LABELS):
      raise ValueError(f'arms = {sorted(self.arms)}: give {FROZEN!r}, and others only from '
                       f'{list(LABELS)}')
    check_paired(self.arms)
    length = self.arms[FROZEN].count.shape[1]
    if not self.positions or list(self.positions) != sorted(
        set(self.positions) & set(range(1, length + 1))):
      raise ValueError(f'positions = {self.positions}: must increase, from 1 to the {length} '
                       'scored ahead positions')


def summarise(report: Report, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
  """Returns all figures of a report as plain JSON values, with arms in the order of LABELS.

  Args:
    report: the measurements.
    samples: draws of the bootstrap.
    seed: seed of the bootstrap.
  """
  # Every arm against the frozen decoder, at all ahead positions.
  frozen = report.arms[FROZEN]
  names = [name for name in LABELS if name in report.arms]
  changes = {
    name: relative_change(report.arms[name], frozen, samples, seed) for name in names}
  curves = {name: _arm(report.arms[name], changes[name]) for name in names}
  shown = [position - 1 for position in report.positions]
  # The content effect: own latents against those of another text.
  content = None
  if {OWN, 'shuffled'} <= set(names):
    content = relative_change(report.arms[OWN], report.arms['shuffled'], samples, seed)
  # 'arms' has the positions of the table, 'all_positions' all of them.
  return {
    'positions': list(report.positions),
    'num_ahead': report.num_ahead,
    'arms': {name: _pick(curve, shown) for name, curve in curves.items()},
    'content_effect': None if content is None else _pick(_change(content), shown),
    'bar': None if content is None else _gain(changes[OWN], content),
    'texts': len(frozen.count),
    'targets': [int(frozen.count[:, at].sum()) for at in shown],
    'all_positions': curves,
    'bootstrap': {'samples': samples, 'seed': seed},
    'parameters': {name: int(count) for name, count in report.parameters.items()},
    'seconds': {name: float(seconds) for name, seconds in report.seconds.items()},
    'peak_memory_bytes': int(report.peak_memory_bytes),
    'decoder_fingerprint': report.decoder_fingerprint,
    'git_commit': report.git_commit,
    'config': dict(report.config),
    'pictures': dict(report.pictures),
    'notes': list(report.notes),
  }


def _arm(scores: AheadNLL, change: Change) -> dict[str, list]:
  return {'nll': scores.nll.tolist(), 'perplexity': np.exp(scores.nll).tolist(), **_change(change)}


def _change(change: Change) -> dict[str, list]:
  return {'change_pct': change.percent.tolist(),
          'ci95': np.stack([change.low, change.high], axis=1).tolist()}


def _pick(curve: Mapping[str, list], indices: Iterable[int]) -> dict[str, list]:
  return {name: [values[at] for at in indices] for name, values in curve.items()}


def _gain(own: Change, content: Change) -> dict[str, Any]:
  """Returns whether own latents are below the frozen decoder and below shuffled latents.

  Against the frozen decoder the whole interval must be below zero. Against shuffled latents the
  point estimate is enough; the interval is stated too. A position that was not scored is absent,
  and then no gain is shown.
  """
  scored = len(own.percent)
  frozen = {str(at): bool(own.high[at - 1] < 0) for at in BELOW_FROZEN if at <= scored}
  shuffled = {
    str(at): {'point': bool(content.percent[at - 1] < 0),
              'interval': bool(content.high[at - 1] < 0)}
    for at in BELOW_SHUFFLED if at <= scored}
  passed = (len(frozen) == len(BELOW_FROZEN) and len(shuffled) == len(BELOW_SHUFFLED)
            and all(frozen.values()) and all(below['point'] for below in shuffled.values()))
  return {'passed': passed, 'own_below_frozen': frozen, 'own_below_shuffled': shuffled}


def state_gain(summary: Mapping[str, Any]) -> str:
  """Returns short sentences: whether a gain is shown, and at which positions."""
  gain = summary['bar']
  if gain is None:
    return 'Gain not measured: it needs the arms with own and with shuffled latents.'
  shuffled = gain['own_below_shuffled']
  frozen = _where(gain['own_below_frozen'], BELOW_FROZEN)
  point = _where({at: below['point'] for at, below in shuffled.items()}, BELOW_SHUFFLED)
  interval = _where({at: below['interval'] for at, below in shuffled.items()}, BELOW_SHUFFLED)
  return (f'Gain {"shown" if gain["passed"] else "not shown"}. Own latents are below the frozen '
          f'decoder, with an interval below zero, {frozen}. They are below another text\'s latents '
          f'{point}; the interval is below zero {interval}.')


def _where(below: Mapping[str, bool], wanted: Iterable[int]) -> str:
  """Returns the positions in words, such as 'at 1, 2 but not at 4 (8 not scored)'."""
  # JSON keys are strings. None is a position that was not scored.
  outcomes = {str(at): below.get(str(at)) for at in wanted}
  held, failed, absent = (
    ', '.join(at for at, outcome in outcomes.items() if outcome is value)
    for value in (True, False, None))
  words = f'at {held}' if held else 'at none'
  if held and failed:
    words += f' but not at {failed}'
  elif failed:
    words += f' of {failed}'
  return words + (f' ({absent} not scored)' if absent else '')


def _table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: position, frozen perplexity, change of every other arm."""
  arms = summary['arms']
  compared = {LABELS[name]: arm for name, arm in arms.items() if name != FROZEN}
  if summary['content_effect'] is not None:
    compared["own vs another text's"] = summary['content_effect']
  header = ['ahead', 'perplexity', *compared]
  rows = []
  for at, position in enumerate(summary['positions']):
    # Training had no loss at these positions.
    beyond = '†' if position > summary['num_ahead'] else ''
    cells = [f'{arm["change_pct"][at]:+.2f} [{arm["ci95"][at][0]:+.2f}, {arm["ci95"][at][1]:+.2f}]'
             for arm in compared.values()]
    rows.append([f'{position}{beyond}', f'{arms[FROZEN]["perplexity"][at]:.3f}', *cells])
  return header, rows


def _legend(summary: Mapping[str, Any]) -> str:
  text = ('Perplexity of the frozen decoder, and its relative change in percent with a 95% '
          f'interval (paired bootstrap over {summary["texts"]:,} texts). There are '
          f'{summary["targets"][0]:,} targets at ahead position {summary["positions"][0]}.')
  if 'shuffled' in summary['arms']:
    text += " Another text's latents are also called 'shuffled'."
  if summary['positions'][-1] > summary['num_ahead']:
    text += f' † beyond the {summary["num_ahead"]} ahead tokens of training.'
  return text


def format_table(summary: Mapping[str, Any]) -> str:
  """Returns the table, its legend and the gain, for a terminal or a log."""
  header, rows = _table(summary)
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  lines = ['  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
           for row in (header, *rows)]
  return '\n'.join([*lines, _legend(summary), state_gain(summary)])


def format_page(summary: Mapping[str, Any]) -> str:
  """Returns the whole report as a page of GitHub Markdown."""
  parts = ['# Perplexity by ahead position', *format_parts(summary, summary['pictures'])]
  return '\n\n'.join(parts) + '\n'


def format_parts(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
  """Returns paragraphs: table, gain, pictures (captions by file name), and the run."""
  return [
    markdown_table(*_table(summary)),
    _legend(summary),
    f'**{state_gain(summary)}**',
    *(f'![{caption}]({file})' for file, caption in pictures.items()),
    *summary['notes'],
    '## The run',
    '\n'.join([
      *([f'- command: `{summary["command"]}`'] if 'command' in summary else []),
      *([f'- machine: {summary["machine"]}'] if 'machine' in summary else []),
      f'- decoder weights: fingerprint {summary["decoder_fingerprint"]}, frozen',
      *(f'- parameters, {name}: {count:,}' for name, count in summary['parameters'].items()),
      *(f'- seconds, {name}: {seconds:,.1f}' for name, seconds in summary['seconds'].items()),
      f'- peak memory: {summary["peak_memory_bytes"] / 2**30:.2f} GiB',
      f'- git commit: {summary["git_commit"]}',
    ]),
  ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = '--:') -> str:
  """Returns a table of GitHub Markdown. `align` is '--:' for right, '---' for left."""
  lines = [header, [align] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def write_report(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.md, each whole or not at all."""
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps(summary, indent=2, allow_nan=False, default=str)
  write_whole(directory / f'{REPORT}.json', text.encode() + b'\n')
  write_whole(directory / f'{REPORT}.md', format_page(summary).encode())
