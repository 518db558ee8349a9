"""A report for people: a plain table for logs, a page of markdown; and report.json for programs.

Everything here reads the dict of `report.summarise`, so a stored report.json renders again.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.evaluation.controls import BASELINE
from latent_deliberation.evaluation.report import (
  BELOW_FROZEN,
  BELOW_SHUFFLED,
  LABELS,
)
from latent_deliberation.files import write_whole


def state_bar(summary: Mapping[str, Any]) -> str:
  """The bar's outcome in one sentence, by position."""
  bar = summary['bar']
  if bar is None:
    return 'Gain not measured: it needs the own and the shuffled latents.'
  shuffled = bar['own_below_shuffled']
  frozen = _where(bar['own_below_frozen'], BELOW_FROZEN)
  point = _where({at: below['point'] for at, below in shuffled.items()}, BELOW_SHUFFLED)
  interval = _where({at: below['interval'] for at, below in shuffled.items()}, BELOW_SHUFFLED)
  return (f'Gain {"shown" if bar["passed"] else "not shown"}: own latents below the frozen '
          f'decoder, with an interval that excludes zero, {frozen}; below another text\'s latents '
          f'{point}, with an interval that excludes zero {interval}.')


def _where(below: Mapping[str, bool], wanted: Iterable[int]) -> str:
  """'at 1, 2 but not at 4 (8 not scored)'."""
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
  """Header and rows: position, perplexity of the baseline, then one change for each other arm."""
  arms = summary['arms']
  compared = {LABELS[name]: arm for name, arm in arms.items() if name != BASELINE}
  if summary['content_effect'] is not None:
    compared["own vs another text's"] = summary['content_effect']
  header = ['ahead', 'perplexity', *compared]
  rows = []
  for at, position in enumerate(summary['positions']):
    beyond = '†' if position > summary['num_ahead'] else ''
    cells = [f'{arm["change_pct"][at]:+.2f} [{arm["ci95"][at][0]:+.2f}, {arm["ci95"][at][1]:+.2f}]'
             for arm in compared.values()]
    rows.append([f'{position}{beyond}', f'{arms[BASELINE]["perplexity"][at]:.3f}', *cells])
  return header, rows


def _legend(summary: Mapping[str, Any]) -> str:
  text = ('Perplexity of the frozen decoder, and its relative change in percent [95% interval: '
          f'paired bootstrap over {summary["texts"]:,} texts, {summary["targets"][0]:,} targets at '
          f'ahead position {summary["positions"][0]}].')
  if summary['positions'][-1] > summary['num_ahead']:
    text += f' † beyond the {summary["num_ahead"]} ahead tokens of training.'
  return text


def format_table(summary: Mapping[str, Any]) -> str:
  """The table, its legend and the bar, for a terminal or a log."""
  header, rows = _table(summary)
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  lines = ['  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
           for row in (header, *rows)]
  return '\n'.join([*lines, _legend(summary), state_bar(summary)])


def format_page(summary: Mapping[str, Any]) -> str:
  """The whole report as a page of GitHub markdown."""
  header, rows = _table(summary)
  table = [header, ['--:'] * len(header), *rows]
  fingerprint = summary['decoder_fingerprint']
  decoder = (f'bit-identical before and after ({fingerprint["before"]})'
             if summary['decoder_unchanged'] else
             f'CHANGED, from {fingerprint["before"]} to {fingerprint["after"]}')
  parts = [
    '# Perplexity by ahead position',
    '\n'.join(f'| {" | ".join(row)} |' for row in table),
    _legend(summary),
    f'**{state_bar(summary)}**',
    *(f'![{caption}]({file})' for file, caption in summary['pictures'].items()),
    *summary['notes'],
    '## The run',
    '\n'.join([
      f'- decoder weights: {decoder}',
      *(f'- parameters, {name}: {count:,}' for name, count in summary['parameters'].items()),
      *(f'- seconds, {name}: {seconds:,.1f}' for name, seconds in summary['seconds'].items()),
      f'- peak memory: {summary["peak_memory_bytes"] / 2**30:.2f} GiB',
      f'- git commit: {summary["git_commit"]}',
    ]),
  ]
  return '\n\n'.join(parts) + '\n'


def write_report(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes report.json and report.md, each whole or not at all."""
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps(summary, indent=2, allow_nan=False, default=str)
  write_whole(directory / 'report.json', text.encode() + b'\n')
  write_whole(directory / 'report.md', format_page(summary).encode())
