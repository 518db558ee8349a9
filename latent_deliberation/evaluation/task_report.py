"""The report of benchmarks: from outcomes to JSON values, and from these to tables and a picture.

    summary = summarise(outcomes, identity)     every figure, as in results.json
    write_results(summary, directory)           results.json, results.md and results.png
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.paired import estimate, mcnemar
from latent_deliberation.evaluation.perplexity import (
  CHAIN,
  CONSTANT,
  FEWEST_TEXTS,
  FROZEN,
  MEAN,
  OWN,
  SHUFFLED,
)
from latent_deliberation.evaluation.report import LABELS
from latent_deliberation.evaluation.task_outcomes import ArmOutcomes, TaskOutcomes
from latent_deliberation.files import write_whole
from latent_deliberation.paths import RESULTS
from latent_deliberation.tables import markdown_table, text_table

NAMES = {**LABELS, SHUFFLED: "another example's latents", MEAN: 'mean latents',
         CONSTANT: 'constant soft tokens', CHAIN: 'chain of thought, no latents'}
_AGAINST = (SHUFFLED, CONSTANT)  # controls that own latents are compared with
# Figures of an arm, and whether more is better.
FIGURES = {'correct': True, 'nats': False, 'p': True, 'norm': True}


def summarise(outcomes: Sequence[TaskOutcomes], identity: Mapping[str, Any],
              samples: int = 2000) -> dict[str, Any]:
  """Returns all figures as plain JSON values, with the values of every item.

  A `difference` is an arm minus 'frozen', paired by item; without that arm there is none. A `ci95`
  is [low, high]. `against_shuffled` is own latents minus another example's, and `against_constant`
  is own latents minus constant soft tokens.

  Args:
    outcomes: outcomes of each task.
    identity: what the run depends on.
    samples: draws of the bootstrap.
  """
  return {'identity': dict(identity), 'bootstrap': {'samples': samples, 'seed': 0},
          'tasks': {each.task: _summarise_task(each, samples) for each in outcomes}}


def _summarise_task(outcomes: TaskOutcomes, samples: int) -> dict[str, Any]:
  values = outcomes.to_json()
  frozen = outcomes.arms.get(FROZEN)
  for name, arm in outcomes.arms.items():
    values['arms'][name]['means'] = {key: _interval(getattr(arm, key), samples)
                                     for key in FIGURES if getattr(arm, key)}
    if frozen is not None and name != FROZEN:
      values['arms'][name]['difference'] = _difference(arm, frozen, samples)
  for control in _AGAINST:
    if {OWN, control} <= set(outcomes.arms):
      values[f'against_{control}'] = _difference(outcomes.arms[OWN], outcomes.arms[control],
                                                 samples)
  return values


def _interval(values: Sequence[float], samples: int) -> dict[str, Any]:
  if len(values) < 2:
    return {'value': float(np.mean(values)), 'ci95': None}
  found = estimate(np.array(values), samples)
  return {'value': found.value, 'ci95': [found.low, found.high]}


def _difference(arm: ArmOutcomes, other: ArmOutcomes, samples: int) -> dict[str, Any]:
  """Returns the paired differences of two arms, and McNemar's test of right and wrong."""
  found = {key: _interval(np.subtract(getattr(arm, key), getattr(other, key)), samples)
           for key in FIGURES if getattr(arm, key) and getattr(other, key)}
  # F1 is no yes or no.
  if set(arm.correct) | set(other.correct) <= {0.0, 1.0}:
    only, lost, p = mcnemar(np.array(arm.correct) == 1, np.array(other.correct) == 1)
    found['mcnemar'] = {'only_this': only, 'only_other': lost, 'p': p}
  return found


# --- Tables ---


def _arms_of(summary: Mapping[str, Any]) -> list[str]:
  """Returns the arms of all tasks, in the order of the first that has each."""
  return list(dict.fromkeys(name for task in summary['tasks'].values() for name in task['arms']))


def _percent(value: float | None) -> str:
  return '' if value is None else f'{100 * value:.1f}'


def _change(found: Mapping[str, Any] | None, items: int, scale: float, digits: int) -> str:
  if found is None:
    return ''
  text = f'{scale * found["value"]:+.{digits}f}'
  if found['ci95'] is None or items < FEWEST_TEXTS:
    return text
  low, high = (scale * end for end in found['ci95'])
  return f'{text} [{low:+.{digits}f}, {high:+.{digits}f}]'


def accuracy_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: accuracy in percent, and each arm's difference with its p-value."""
  arms = [name for name in _arms_of(summary) if name != FROZEN]
  header = ['task', 'items', 'shots', 'metric', 'chance', 'majority', NAMES[FROZEN],
            *(NAMES[name] for name in arms)]
  rows = []
  for name, task in summary['tasks'].items():
    items, cells = len(task['items']), []
    for arm in arms:
      if arm not in task['arms']:
        cells.append('')
        continue
      values = task['arms'][arm]
      difference = values.get('difference', {})
      cell = f'{_percent(values["means"]["correct"]["value"])}'
      if 'correct' in difference:
        cell += f': {_change(difference["correct"], items, 100, 1)}'
      if 'mcnemar' in difference:
        cell += f', p = {difference["mcnemar"]["p"]:.2g}'
      cells.append(cell)
    base = task['arms'].get(FROZEN)
    rows.append([name, f'{items:,}', str(task['shots']), task['metric'], _percent(task['chance']),
                 _percent(task['majority']),
                 _percent(base['means']['correct']['value']) if base else '', *cells])
  return header, rows


def nats_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: nats of the gold answer, and differences; below zero is better."""
  arms = [name for name in _arms_of(summary) if name != FROZEN]
  against = [control for control in _AGAINST if control in arms]
  header = ['task', 'items', f'{NAMES[FROZEN]}, nats', 'p(gold)',
            *(f'{NAMES[name]}, nats' for name in arms),
            *(f'own vs {control}, nats' for control in against), 'own, p(gold) in points']
  rows = []
  for name, task in summary['tasks'].items():
    items, base = len(task['items']), task['arms'].get(FROZEN, {}).get('means', {})
    changes = {arm: task['arms'].get(arm, {}).get('difference', {}) for arm in (*arms, OWN)}
    cells = [_change(changes[arm].get('nats'), items, 1, 4) for arm in arms]
    rows.append([
        name, f'{items:,}', f'{base["nats"]["value"]:.3f}' if 'nats' in base else '',
        f'{base["p"]["value"]:.3f}' if 'p' in base else '', *cells,
        *(_change(task.get(f'against_{control}', {}).get('nats'), items, 1, 4)
          for control in against),
        _change(changes[OWN].get('p'), items, 100, 2)])
  return header, rows


def cost_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: tokens and billions of operations of an item, by arm."""
  arms = _arms_of(summary)
  rows = []
  for name, task in summary['tasks'].items():
    cells = []
    for arm in arms:
      cost = task['arms'].get(arm, {}).get('cost')
      cells.append(f'{cost["tokens"]:,.0f} / {cost["flops"] / 1e9:,.1f}' if cost else '')
    rows.append([name, *cells])
  return ['task', *(NAMES[arm] for arm in arms)], rows


def format_table(summary: Mapping[str, Any]) -> str:
  """Returns the table of accuracies, for a terminal."""
  return text_table(*accuracy_table(summary))


def format_page(summary: Mapping[str, Any]) -> str:
  """Returns the whole report as a page of GitHub Markdown."""
  odd = [f'{name}: {task["truncated"]:,} requests cut at the left, {task["merged"]:,} answers '
         f'merged with their context, {task["short"]:,} contexts without room for latents'
         for name, task in summary['tasks'].items()
         if task['truncated'] or task['merged'] or task['short']]
  parts = [
      '# Benchmarks',
      'Accuracy in percent. Each arm has its accuracy, the difference to the frozen decoder in '
      "points with a paired 95% interval, and the p-value of McNemar's exact test. There is no "
      f'interval for fewer than {FEWEST_TEXTS} items.',
      markdown_table(*accuracy_table(summary)),
      'Nats of the gold answer. Below zero is better: the answer has become likelier. p(gold) is '
      'its probability, among the choices where there are any.',
      markdown_table(*nats_table(summary)),
      f'![Differences to the frozen decoder]({RESULTS}.png)',
      'Tokens that the decoder reads, and billions of operations, for an item of each arm alone.',
      markdown_table(*cost_table(summary)),
      *(['Out of the ordinary:\n\n' + '\n'.join(f'- {line}' for line in odd)] if odd else []),
      '## The run',
      '\n'.join(f'- {key}: {json.dumps(value)}' for key, value in summary['identity'].items()),
      _commands(summary['tasks'])]
  return '\n\n'.join(parts) + '\n'


def _commands(tasks: Mapping[str, Any]) -> str:
  """Says how long each task took, and which commit scored it; results of old code have none."""
  known = [task.get('commit') for task in tasks.values()]
  each = (f'{name} {task["seconds"]:,.0f}' + (f' ({commit[:7]})' if commit else '')
          for (name, task), commit in zip(tasks.items(), known, strict=True))
  return (f'Seconds{" and commit" if any(known) else ""} of the command that finished each task: '
          + ', '.join(each))


def write_results(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes results.json, results.md and results.png, each whole or not at all."""
  from latent_deliberation.evaluation.task_plots import plot_tasks
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps(summary, allow_nan=False)
  write_whole(directory / f'{RESULTS}.json', text.encode() + b'\n')
  write_whole(directory / f'{RESULTS}.md', format_page(summary).encode())
  plot_tasks(summary, directory / f'{RESULTS}.png')
