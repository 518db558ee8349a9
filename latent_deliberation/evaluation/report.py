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
  CONSTANT,
  FEWEST_TEXTS,
  FROZEN,
  OWN,
  SHUFFLED,
  ZERO,
  AheadNLL,
  Change,
  check_paired,
  check_positions,
  relative_change,
)
from latent_deliberation.files import write_whole
from latent_deliberation.paths import REPORT
from latent_deliberation.tables import markdown_table, text_table

LABELS = {
  FROZEN: 'frozen decoder',
  OWN: 'own latents',
  SHUFFLED: "another text's latents",
  CONSTANT: 'constant soft tokens',
  ZERO: 'zero latents',
}
# A gain counts as shown if own latents have a lower perplexity than the other arm at all of these
# ahead positions: than the frozen decoder with the whole interval, than shuffled ones by the mean.
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
    peak_memory_bytes: peak memory of all launches that the report is about.
    git_commit: commit of the source tree.
    config: configuration of the run; values without a JSON form are written as str.
    pictures: captions by file name, in the directory of the report.
    notes: free sentences.
    rows: number of packed rows that the texts consist of; None if each row is a text.
    documents: number of documents that are held out; None where that is not known.
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
  rows: int | None = None
  documents: int | None = None

  def __post_init__(self):
    if FROZEN not in self.arms or not set(self.arms) <= set(LABELS):
      raise ValueError(f'arms = {sorted(self.arms)}: give {FROZEN!r}, and others only from '
                       f'{list(LABELS)}')
    check_paired(self.arms)
    check_positions(self.positions, self.arms[FROZEN].count.shape[1])


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
  if {OWN, SHUFFLED} <= set(names):
    content = relative_change(report.arms[OWN], report.arms[SHUFFLED], samples, seed)
  reached = np.count_nonzero(frozen.count, axis=0)
  # 'arms' has the positions of the table, 'all_positions' and 'reached' all of them. 'reached' is
  # the number of texts with targets.
  return {
    'positions': list(report.positions),
    'num_ahead': report.num_ahead,
    'arms': {name: _pick(curve, shown) for name, curve in curves.items()},
    'content_effect': None if content is None else _pick(_change(content), shown),
    'bar': None if content is None else _gain(changes[OWN], content, reached, report.documents),
    'texts': len(frozen.count),
    'rows': report.rows or len(frozen.count),
    'documents': report.documents,
    'reached': reached.tolist(),
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


def _gain(own: Change, content: Change, reached: np.ndarray,
          documents: int | None) -> dict[str, Any]:
  """Returns whether own latents are below the frozen decoder and below shuffled latents.

  Against the frozen decoder the whole interval must be below zero. Against shuffled latents the
  point estimate is enough; the interval is stated too. No gain is shown if a position was not
  scored, and is then absent, or if fewer than FEWEST_TEXTS texts reach it, or documents are held
  out.
  """
  scored = len(own.percent)
  frozen = {str(at): bool(own.high[at - 1] < 0) for at in BELOW_FROZEN if at <= scored}
  shuffled = {
    str(at): {'point': bool(content.percent[at - 1] < 0),
              'interval': bool(content.high[at - 1] < 0)}
    for at in BELOW_SHUFFLED if at <= scored}
  passed = (len(frozen) == len(BELOW_FROZEN) and len(shuffled) == len(BELOW_SHUFFLED)
            and all(frozen.values()) and all(below['point'] for below in shuffled.values())
            and bool(reached[:max(BELOW_SHUFFLED)].min() >= FEWEST_TEXTS)
            and (documents is None or documents >= FEWEST_TEXTS))
  return {'passed': passed, 'own_below_frozen': frozen, 'own_below_shuffled': shuffled}


def texts_at(summary: Mapping[str, Any]) -> list[int]:
  """Returns the number of texts with targets at each ahead position, from 1."""
  # Older reports have the number of all texts alone.
  return summary.get('reached') or [summary['texts']] * len(
      summary['all_positions'][FROZEN]['change_pct'])


def state_gain(summary: Mapping[str, Any]) -> str:
  """Returns short sentences: whether a gain is shown, which positions fail, and which must pass."""
  gain = summary['bar']
  if gain is None:
    return 'Gain not measured: it needs the arms with own and with shuffled latents.'
  fewest = min(texts_at(summary)[:max(BELOW_SHUFFLED)])
  if fewest < FEWEST_TEXTS:
    return (f'Too few texts for an interval: {fewest}. Whether latents gain can be told from '
            f'{FEWEST_TEXTS} texts on. Raise evaluation.num_texts, the number of rows, or lower '
            'evaluation.rows_per_text.')
  documents = summary.get('documents')  # reports of earlier code do not have it
  if documents is not None and documents < FEWEST_TEXTS:
    return (f'Too few documents to tell whether latents gain: {documents} are held out, and '
            f'{FEWEST_TEXTS} are needed. The {fewest} texts are parts of them, so intervals are '
            'too narrow. Add documents, or raise data.validation_percent.')
  if gain['passed']:
    return (f'Gain shown. Own latents are below the frozen decoder at {_name(BELOW_FROZEN)}, with '
            "the whole interval. They are below another text's latents at "
            f'{_name(BELOW_SHUFFLED)}.')
  # Keys of JSON are strings. A position that was not scored is absent.
  frozen = [at for at in BELOW_FROZEN if gain['own_below_frozen'].get(str(at)) is False]
  shuffled = [at for at in BELOW_SHUFFLED
              if not gain['own_below_shuffled'].get(str(at), {'point': True})['point']]
  absent = [at for at in BELOW_SHUFFLED if str(at) not in gain['own_below_shuffled']]
  return ' '.join([
    'Gain not shown.',
    *([f'Against the frozen decoder, own latents fail at {_name(frozen)}.'] if frozen else []),
    *([f"Against another text's latents, own latents fail at {_name(shuffled)}."]
      if shuffled else []),
    *([f'There is no score at {_name(absent)}.'] if absent else []),
    f'To pass, own latents must be below the frozen decoder at {_name(BELOW_FROZEN)}, with the '
    "whole interval. They must also be below another text's latents at "
    f'{_name(BELOW_SHUFFLED)}.'])


def _name(positions: Sequence[int]) -> str:
  """Returns positions in words, such as 'positions 1, 2 and 4'."""
  *others, last = map(str, positions)
  return f'positions {", ".join(others)} and {last}' if others else f'position {last}'


def _table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: position, frozen perplexity, change of every other arm."""
  arms = summary['arms']
  compared = {LABELS[name]: arm for name, arm in arms.items() if name != FROZEN}
  if summary['content_effect'] is not None:
    compared["own vs another text's"] = summary['content_effect']
  header = ['ahead', 'perplexity', *(f'{name}, %' for name in compared)]
  reached, rows = texts_at(summary), []
  for at, position in enumerate(summary['positions']):
    # Training had no loss at these positions.
    beyond = '†' if position > summary['num_ahead'] else ''
    cells = [f'{arm["change_pct"][at]:+.2f}' + (
        f' [{arm["ci95"][at][0]:+.2f}, {arm["ci95"][at][1]:+.2f}]'
        if reached[position - 1] >= FEWEST_TEXTS else '') for arm in compared.values()]
    rows.append([f'{position}{beyond}', f'{arms[FROZEN]["perplexity"][at]:.3f}', *cells])
  return header, rows


def _legend(summary: Mapping[str, Any]) -> str:
  texts, rows = summary['texts'], summary.get('rows', summary['texts'])
  over = f'{texts:,} texts' + (f' of {rows:,} packed rows' if rows != texts else '')
  interval = (f'with a 95% interval (paired bootstrap over {over})' if texts >= FEWEST_TEXTS
              else f'over {over}')
  text = (f'Perplexity of the frozen decoder, and its relative change in percent {interval}. '
          f'Below zero is better. There are {summary["targets"][0]:,} targets at ahead position '
          f'{summary["positions"][0]}.')
  if SHUFFLED in summary['arms']:
    text += " Another text's latents are also called 'shuffled'."
  if summary['positions'][-1] > summary['num_ahead']:
    text += f' † beyond the {summary["num_ahead"]} ahead tokens of training.'
  return text


def format_table(summary: Mapping[str, Any]) -> str:
  """Returns the table, its legend and the gain, for a terminal or a log."""
  return '\n'.join([text_table(*_table(summary)), _legend(summary), state_gain(summary)])


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


def write_report(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.md, each whole or not at all."""
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps(summary, indent=2, allow_nan=False, default=str)
  write_whole(directory / f'{REPORT}.json', text.encode() + b'\n')
  write_whole(directory / f'{REPORT}.md', format_page(summary).encode())
