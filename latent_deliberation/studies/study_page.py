"""A study for people: results.md and its plots; and results.json for programs.

Everything here reads the dict of `summarise_study`, so a stored results.json renders again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.evaluation.controls import BASELINE
from latent_deliberation.files import write_whole
from latent_deliberation.studies.study_plots import plot_diagnostics, plot_study

Cells = dict[str, dict[str, str]]  # {row: {column: text}}, the same columns in every row


def write_study(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes results.json, results.md, results.png, and diagnostics.png where there are any.

  Each is written whole or not at all, the figures first.
  """
  text = json.dumps(summary, indent=2, allow_nan=False, default=str)
  write_whole(directory / 'results.json', text.encode() + b'\n')
  write_whole(directory / 'results.md', format_study(summary).encode())
  plot_study(summary, directory / 'results.png')
  if summary['diagnostics']:
    plot_diagnostics(summary['diagnostics'], directory / 'diagnostics.png')


def format_study(summary: Mapping[str, Any]) -> str:
  """The whole study as a section of GitHub markdown."""
  format_results = _format_text if 'by_position' in summary else _format_questions
  parts = [f'## {summary["name"]}', *format_results(summary), '![Results](results.png)']
  if summary['diagnostics']:
    parts.append('![Diagnostics during training](diagnostics.png)')
  parts += ['### Arms', _table('arm', _describe_arms(summary)), _format_run(summary)]
  return '\n\n'.join(parts) + '\n'


def _format_questions(summary: Mapping[str, Any]) -> list[str]:
  scores = {**summary['by_difficulty'], 'overall': summary['overall']}
  accuracies, changes, losses, effects, tests = ({group: {} for group in scores} for _ in range(5))
  for group, arms in scores.items():
    for name, arm in arms.items():
      accuracies[group][name] = _points(arm['accuracy'], arm['ci95'], sign='')
      if name != BASELINE:
        changes[group][name] = _points(arm['change'], arm['change_ci95'])
        losses[group][name] = _nats(arm['nll_change'], arm['nll_change_ci95'])
    for name, effect in summary['content_effect'][group].items():
      effects[group][name] = (f'{_points(effect["accuracy"], effect["ci95"])}; '
                              f'{_nats(effect["nll_saved"], effect["nll_saved_ci95"])} nats')
    for pair, seeds in summary['mcnemar'][group].items():
      tests[group][pair] = '<br>'.join(map(_format_test, seeds))
  return [
    f'Every arm answers the same {summary["items"]:,} questions. Accuracy in percent, mean over '
    f'seeds {_state_interval(summary, "questions")}:',
    _table('difficulty', accuracies),
    *_titled('Change of accuracy against the frozen decoder, in points:', changes),
    *_titled('Change of the loss against the frozen decoder, nats of an answer (below zero is '
             'better):', losses),
    *_titled("### Content effect\n\nOwn latents against another example's: points of accuracy "
             'gained, and nats of an answer saved (both above zero where content helps):', effects),
    *_titled("### McNemar's exact test\n\nQuestions that the first arm alone has right : the "
             'second alone, and the two-sided p-value, seed by seed:', tests),
  ]


def _format_text(summary: Mapping[str, Any]) -> list[str]:
  changes = {
    position: {name: f'{arm["perplexity"]:.3f}' if name == BASELINE else _relative(arm)
               for name, arm in arms.items()}
    for position, arms in summary['by_position'].items()}
  effects = {position: {name: _relative(effect) for name, effect in arms.items()}
             for position, arms in summary['content_effect'].items()}
  position, targets = next(iter(summary['targets'].items()))
  return [
    f'Every arm reads the same {summary["texts"]:,} texts, with {targets:,} targets at ahead '
    f'position {position}. Perplexity of the frozen decoder, and its relative change in percent, '
    f'mean over seeds {_state_interval(summary, "texts")}:',
    _table('ahead', changes),
    *_titled('### Content effect\n\nRelative change of perplexity, in percent, from another '
             "text's latents to own ones (below zero where content helps):", effects, 'ahead'),
  ]


def _describe_arms(summary: Mapping[str, Any]) -> Cells:
  frozen = summary['arms'][BASELINE]['flops_per_token']
  return {name: {
    'kind': arm['kind'],
    'trained': f'{arm["trained"]:,}',
    'parameters': f'{arm["total"]:,}',
    'FLOPs per predicted token, frozen = 1': f'{arm["flops_per_token"] / frozen:.2f}',
    'FLOPs of training': f'{arm["train_flops"]:.2e}',
    'seconds, with scoring': ', '.join(f'{seconds:,.0f}' for seconds in arm['seconds']),
    'seeds': ', '.join(map(str, summary['seeds'][name])),
    'note': arm['note'],
  } for name, arm in summary['arms'].items()}


def _format_run(summary: Mapping[str, Any]) -> str:
  return '\n'.join([
    f'- command: `{summary["command"]}`',
    f'- machine: {summary["machine"]}',
    f'- seconds, whole study: {summary["seconds"]:,.0f}',
    f'- git commit: {summary["git_commit"]}',
  ])


def _state_interval(summary: Mapping[str, Any], drawn: str) -> str:
  bootstrap = summary['bootstrap']
  return (f'[95% interval: paired bootstrap over {drawn}, {bootstrap["samples"]:,} draws, '
          f'seed {bootstrap["seed"]}]')


def _format_test(row: Mapping[str, Any]) -> str:
  first, second = (count for name, count in row.items() if name.endswith('_only'))
  return f'{first}:{second}, p = {row["p"]:.2g}'


def _points(fraction: float, ends: list[float], sign: str = '+') -> str:
  return f'{100 * fraction:{sign}.1f} [{100 * ends[0]:{sign}.1f}, {100 * ends[1]:{sign}.1f}]'


def _nats(value: float, ends: list[float]) -> str:
  return f'{value:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]'


def _relative(change: Mapping[str, Any]) -> str:
  return (f'{_percent(change["change_pct"])} '
          f'[{_percent(change["ci95"][0])}, {_percent(change["ci95"][1])}]')


def _percent(value: float) -> str:
  # Latents of the wrong form can multiply perplexity by thousands.
  return f'{value:+.2f}' if abs(value) < 1000 else f'{value:+.1e}'


def _titled(title: str, cells: Cells, corner: str = 'difficulty') -> list[str]:
  """A title and its table, or nothing where the table has no columns."""
  return [title, _table(corner, cells)] if any(cells.values()) else []


def _table(corner: str, cells: Cells) -> str:
  columns = list(next(iter(cells.values())))
  lines = [[corner, *columns], ['--:'] * (len(columns) + 1),
           *([row, *texts.values()] for row, texts in cells.items())]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
