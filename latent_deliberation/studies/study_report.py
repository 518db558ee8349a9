"""The report of a study: from its result to plain JSON values, and from these to a page.

    summary = summarise_study(StudyResult(...))      every figure, as in results.json
    write_study(summary, directory)                  results.json, results.md and plots
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.perplexity import (
  CONSTANT,
  FEWEST_TEXTS,
  FROZEN,
  MEAN,
  OWN,
  SHUFFLED,
  ZERO,
  AheadNLL,
  Change,
  relative_change,
)
from latent_deliberation.files import write_whole
from latent_deliberation.paths import RESULTS
from latent_deliberation.studies.study_plots import plot_diagnostics, plot_study
from latent_deliberation.studies.study_result import (
  Arm,
  Estimate,
  Outcomes,
  StudyResult,
  accuracy,
  accuracy_difference,
  controlled_arm,
  count_examples,
  mcnemar,
  nll,
  nll_difference,
)
from latent_deliberation.tables import format_estimate, markdown_table


def summarise_study(result: StudyResult, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
  """Returns all figures of a study as plain JSON values.

  A study of questions has `overall` and `by_difficulty`. Its `content_effect` and `mcnemar` are by
  difficulty, with 'overall' as one more. A study of text has `by_position` and `content_effect`.
  With the arm 'constant' it has `against_constant`: the change from its soft tokens to own latents.
  Where other arms have latents beside 'own', `against_own` is the change from the latents of 'own'
  to theirs, and `content_against_own` the change from its content effect to theirs.

  Accuracies are fractions, `nll` is nats of an answer, and a `ci95` is [low, high]. A change is an
  arm minus 'frozen'; a change of perplexity is relative, in percent.

  A content effect compares an arm's own latents with those of another example. `accuracy` is own
  minus shuffled, and `nll_saved` is shuffled minus own: both are above zero if content helps.
  `change_pct` of perplexity is below zero then.

  Args:
    result: the measurements.
    samples: draws of the bootstrap.
    seed: seed of the bootstrap.
  """
  # The same draws serve all arms, so differences between arms are paired.
  draws = {'samples': samples, 'seed': seed}
  summarise = _summarise_questions if result.positions is None else _summarise_text
  return {
    'name': result.name,
    **summarise(result, draws),
    'arms': {name: _describe(arm) for name, arm in result.arms.items()},
    'seeds': {name: [int(seed) for seed in arm.seeds] for name, arm in result.arms.items()},
    'bootstrap': draws,
    'diagnostics': {run: [_describe_row(row) for row in rows]
                    for run, rows in (result.diagnostics or {}).items() if rows},
    'command': result.command,
    'machine': result.machine,
    'seconds': float(result.seconds),
    'git_commit': result.git_commit,
    'config': dict(result.config),
  }


def _describe(arm: Arm) -> dict[str, Any]:
  return {'kind': arm.kind, 'trained': int(arm.trained), 'total': int(arm.total),
          'flops_per_token': float(arm.flops_per_token), 'train_flops': float(arm.train_flops),
          'seconds': [float(seconds) for seconds in arm.seconds], 'note': arm.note}


def _describe_row(row: Mapping[str, float]) -> dict[str, float | None]:
  """Returns a row of diagnostics. Values that are not finite become None, as JSON has no form."""
  return {name: float(value) if math.isfinite(value) else None for name, value in row.items()}


def _shuffled_by_arm(names: Mapping[str, Any]) -> dict[str, str]:
  """Returns {arm: its control with another example's latents}, for arms that have one."""
  return {controlled_arm(name): name for name in names if name.rpartition('/')[2] == SHUFFLED}


def _summarise_questions(result: StudyResult, draws: Mapping[str, int]) -> dict[str, Any]:
  items = len(result.arms[FROZEN].outcomes[0].nll)
  groups = {} if result.difficulty is None else {
    str(level): result.difficulty == level for level in np.unique(result.difficulty)}
  scores, contents, tests = {}, {}, {}
  # Each difficulty by itself, then all questions together.
  for group, chosen in {**groups, 'overall': np.ones(items, bool)}.items():
    runs = {name: [run.select(chosen) for run in arm.outcomes]
            for name, arm in result.arms.items()}
    scores[group] = {name: _score(arm, runs[FROZEN], draws) for name, arm in runs.items()}
    shuffled = _shuffled_by_arm(runs)
    contents[group] = {
      name: _content_effect(runs[name], runs[control], draws) for name, control in shuffled.items()}
    # Own latents against the decoder alone, shuffled latents and constant soft tokens.
    tests[group] = {
      f'{name} vs {other}': _test_seeds(result, name, other, runs)
      for name, control in shuffled.items()
      for other in (FROZEN, control, CONSTANT) if other in runs}
  return {'items': items,
          'items_by_difficulty': {group: int(chosen.sum()) for group, chosen in groups.items()},
          'overall': scores.pop('overall'),
          'by_difficulty': scores,
          'content_effect': contents,
          'mcnemar': tests}


def _score(runs: Sequence[Outcomes], frozen: Sequence[Outcomes],
           draws: Mapping[str, int]) -> dict[str, Any]:
  right = accuracy(runs, **draws)
  return {
    'accuracy': right.value,
    'ci95': [right.low, right.high],
    'by_seed': [float(run.correct.mean()) for run in runs],
    **_flatten('change', accuracy_difference(runs, frozen, **draws)),
    **_flatten('nll', nll(runs, **draws)),
    **_flatten('nll_change', nll_difference(runs, frozen, **draws)),
  }


def _content_effect(own: Sequence[Outcomes], shuffled: Sequence[Outcomes],
                    draws: Mapping[str, int]) -> dict[str, Any]:
  gain = accuracy_difference(own, shuffled, **draws)
  return {'accuracy': gain.value, 'ci95': [gain.low, gain.high],
          **_flatten('nll_saved', nll_difference(shuffled, own, **draws))}


def _flatten(name: str, estimate: Estimate) -> dict[str, Any]:
  return {name: estimate.value, f'{name}_ci95': [estimate.low, estimate.high]}


def _test_seeds(result: StudyResult, one: str, other: str,
                runs: Mapping[str, Sequence[Outcomes]]) -> list[dict[str, Any]]:
  """Runs McNemar's test seed by seed. A single run of `other` meets every run of `one`."""
  others = runs[other] * len(runs[one]) if len(runs[other]) == 1 else runs[other]
  rows = []
  for seed, run, against in zip(result.arms[one].seeds, runs[one], others, strict=False):
    one_only, other_only, p = mcnemar(run, against)
    rows.append({'seed': int(seed), f'{one}_only': one_only, f'{other}_only': other_only, 'p': p})
  return rows


def _summarise_text(result: StudyResult, draws: Mapping[str, int]) -> dict[str, Any]:
  # All seeds have the same targets, so means over seeds stay paired with the decoder's one run.
  pooled = {name: AheadNLL(np.mean([run.total for run in arm.text_scores], axis=0),
                           arm.text_scores[0].count)
            for name, arm in result.arms.items()}
  changes = {name: relative_change(arm, pooled[FROZEN], **draws) for name, arm in pooled.items()}
  # Rows of the tables, by position.
  scores = {}
  for position in result.positions:
    at = position - 1
    scores[str(position)] = {name: {
      'perplexity': float(np.exp(pooled[name].nll[at])),
      **_change_at(changes[name], at),
      'by_seed': [float(np.exp(run.nll[at])) for run in arm.text_scores],
    } for name, arm in result.arms.items()}
  compared = {
    table: {str(position): {name: _change_at(change, position - 1) for name, change in arms.items()}
            for position in result.positions}
    for table, arms in _compare_latents(pooled, draws).items()}
  count = pooled[FROZEN].count
  return {'texts': len(count),
          'targets': {str(position): int(count[:, position - 1].sum())
                      for position in result.positions},
          'reached': {str(position): int(np.count_nonzero(count[:, position - 1]))
                      for position in result.positions},
          'by_position': scores,
          **compared}


def _compare_latents(pooled: Mapping[str, AheadNLL],
                     draws: Mapping[str, int]) -> dict[str, dict[str, Change]]:
  """Compares own latents with other latents: {table: {arm: change}}, the first table always."""
  shuffled = _shuffled_by_arm(pooled)

  def changes(arms: Mapping[str, AheadNLL], baseline: str) -> dict[str, Change]:
    return {name: relative_change(arm, pooled[baseline], **draws) for name, arm in arms.items()}

  latents = {name: pooled[name] for name in shuffled}
  tables = {'content_effect': {name: relative_change(arm, pooled[shuffled[name]], **draws)
                               for name, arm in latents.items()}}
  if CONSTANT in pooled and latents:
    tables['against_constant'] = changes(latents, CONSTANT)
  others = {name: arm for name, arm in latents.items() if name != OWN}
  if OWN in latents and others:
    tables['against_own'] = changes(others, OWN)
    # own + (arm - its shuffled) - (own - its shuffled) differs from own by the two content effects.
    tables['content_against_own'] = changes({
      name: AheadNLL(arm.total - pooled[shuffled[name]].total + pooled[shuffled[OWN]].total,
                     arm.count)
      for name, arm in others.items()}, OWN)
  return tables


def _change_at(change: Change, at: int) -> dict[str, Any]:
  return {'change_pct': float(change.percent[at]),
          'ci95': [float(change.low[at]), float(change.high[at])]}


Cells = dict[str, dict[str, str]]  # {row: {column: text}}, the same columns in every row
DIAGNOSTICS = 'diagnostics.png'


def write_study(summary: Mapping[str, Any], directory: Path) -> None:
  """Writes results.json, results.md and results.png, and diagnostics.png if there are diagnostics.

  Each is written whole or not at all, the JSON first.
  """
  text = json.dumps(summary, indent=2, allow_nan=False, default=str)
  write_whole(directory / f'{RESULTS}.json', text.encode() + b'\n')
  write_whole(directory / f'{RESULTS}.md', format_study(summary).encode())
  plot_study(summary, directory / f'{RESULTS}.png')
  if summary['diagnostics']:
    plot_diagnostics(summary['diagnostics'], directory / DIAGNOSTICS)


def format_study(summary: Mapping[str, Any]) -> str:
  """Returns the whole study as a section of GitHub Markdown."""
  pictures = {f'{RESULTS}.png': 'Results'}
  if summary['diagnostics']:
    pictures[DIAGNOSTICS] = 'Diagnostics during training'
  return '\n\n'.join([f'## {summary["name"]}', *format_parts(summary, pictures)]) + '\n'


def format_parts(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
  """Returns paragraphs: tables, pictures (captions by file name), costs, and the run."""
  format_results = _format_text if 'by_position' in summary else _format_questions
  return [
    *format_results(summary),
    *(f'![{caption}]({file})' for file, caption in pictures.items()),
    '### Arms', _table('arm', _describe_arms(summary)), _format_run(summary)]


def _format_questions(summary: Mapping[str, Any]) -> list[str]:
  # Cells of each table, by difficulty and arm.
  scores = {**summary['by_difficulty'], 'overall': summary['overall']}
  accuracies, changes, losses, effects, tests = ({group: {} for group in scores} for _ in range(5))
  for group, arms in scores.items():
    is_judged = count_examples(summary, group) >= FEWEST_TEXTS
    for name, arm in arms.items():
      accuracies[group][name] = _points(arm['accuracy'], arm['ci95'], is_judged, sign='')
      if name != FROZEN:
        changes[group][name] = _points(arm['change'], arm['change_ci95'], is_judged)
        losses[group][name] = format_estimate(
            arm['nll_change'], arm['nll_change_ci95'] if is_judged else None)
    for name, effect in summary['content_effect'][group].items():
      effects[group][name] = (
          f'{_points(effect["accuracy"], effect["ci95"], is_judged)}; '
          + format_estimate(effect['nll_saved'], effect['nll_saved_ci95'] if is_judged else None)
          + ' nats')
    for pair, seeds in summary['mcnemar'][group].items():
      tests[group][pair] = '<br>'.join(map(_format_test, seeds))
  # The page. A table without columns is left out with its title.
  return [
    f'Every arm answers the same {summary["items"]:,} questions.{_explain_controls(summary)}'
    f'{_name_few(summary, scores, "questions")}',
    f'Accuracy in percent, mean over seeds {_state_interval(summary, "questions")}:',
    _table('difficulty', accuracies),
    *_titled('Change of accuracy against the frozen decoder, in points:', changes),
    *_titled('Change of the loss against the frozen decoder, in nats of an answer. Below zero is '
             'better:', losses),
    *_titled('### Content effect\n\nOwn latents against shuffled ones: points of accuracy gained, '
             'and nats of an answer saved. Both are above zero if content helps:', effects),
    *_titled("### McNemar's exact test\n\nQuestions that only the first arm has right : only the "
             'second, and the two-sided p-value, seed by seed:', tests),
  ]


def _format_text(summary: Mapping[str, Any]) -> list[str]:
  # Cells of both tables, by position and arm.
  changes = {
    position: {name: f'{arm["perplexity"]:.3f}' if name == FROZEN
               else _relative(arm, count_examples(summary, position) >= FEWEST_TEXTS)
               for name, arm in arms.items()}
    for position, arms in summary['by_position'].items()}

  def cells(key: str) -> Cells:
    return {position: {name: _relative(effect, count_examples(summary, position) >= FEWEST_TEXTS)
                       for name, effect in arms.items()}
            for position, arms in summary.get(key, {}).items()}

  position, targets = next(iter(summary['targets'].items()))
  return [
    f'Every arm reads the same {summary["texts"]:,} texts, with {targets:,} targets at ahead '
    f'position {position}.{_explain_controls(summary)}'
    f'{_name_few(summary, changes, "texts")}',
    'Perplexity of the frozen decoder, and its relative change in percent (below zero is better), '
    f'mean over seeds {_state_interval(summary, "texts")}:',
    _table('ahead', changes),
    *_titled('### Content effect\n\nRelative change of perplexity, in percent, from shuffled '
             'latents to own ones. Below zero, content helps:', cells('content_effect'), 'ahead'),
    *_titled('### Against constant soft tokens\n\nRelative change of perplexity, in percent, from '
             "the arm 'constant' to own latents. Below zero, own latents are better:",
             cells('against_constant'), 'ahead'),
    *_titled("### Against the arm 'own'\n\nRelative change of perplexity, in percent, from the "
             "latents of the arm 'own' to those of another arm. Below zero, the other arm's are "
             'better:', cells('against_own'), 'ahead'),
    *_titled("The same of the content effect. Below zero, content helps more than in 'own':",
             cells('content_against_own'), 'ahead'),
  ]


def _name_few(summary: Mapping[str, Any], rows: Iterable[str], examples: str) -> str:
  """Returns a sentence about the rows that are over too few examples for an interval, or none."""
  counts = {row: count_examples(summary, row) for row in rows}
  few = [f'{row} ({count})' for row, count in counts.items() if count < FEWEST_TEXTS]
  return f' Too few {examples} for an interval: {", ".join(few)}.' if few else ''


def _explain_controls(summary: Mapping[str, Any]) -> str:
  """Returns a sentence about the controls that the study has, or nothing."""
  example = 'text' if 'by_position' in summary else 'question'
  meanings = {SHUFFLED: f"those of another {example}", ZERO: 'none', MEAN: 'their average'}
  used = {name.rpartition('/')[2] for name in summary['arms'] if controlled_arm(name)}
  told = [f"'{name}' is {meaning}" for name, meaning in meanings.items() if name in used]
  return f" In the controls something replaces own latents: {', '.join(told)}." if told else ''


def _describe_arms(summary: Mapping[str, Any]) -> Cells:
  # Operations are shown relative to the frozen decoder's. Controls cost what their arm costs.
  frozen = summary['arms'][FROZEN]['flops_per_token']
  return {name: {
    'kind': arm['kind'],
    'trained': f'{arm["trained"]:,}',
    'parameters': f'{arm["total"]:,}',
    'FLOPs per predicted token, frozen = 1': f'{arm["flops_per_token"] / frozen:.2f}',
    'FLOPs of training': f'{arm["train_flops"]:.2e}',
    'seconds, with scoring': ', '.join(f'{seconds:,.0f}' for seconds in arm['seconds']),
    'seeds': ', '.join(map(str, summary['seeds'][name])),
    'note': arm['note'],
  } for name, arm in summary['arms'].items() if not controlled_arm(name)}


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


def _points(fraction: float, ends: list[float], is_judged: bool, sign: str = '+') -> str:
  interval = f' [{100 * ends[0]:{sign}.1f}, {100 * ends[1]:{sign}.1f}]' if is_judged else ''
  return f'{100 * fraction:{sign}.1f}{interval}'


def _relative(change: Mapping[str, Any], is_judged: bool) -> str:
  low, high = map(_percent, change['ci95'])
  return _percent(change['change_pct']) + (f' [{low}, {high}]' if is_judged else '')


def _percent(value: float) -> str:
  # Latents of a wrong form can multiply perplexity by thousands.
  return f'{value:+.2f}' if abs(value) < 1000 else f'{value:+.1e}'


def _titled(title: str, cells: Cells, corner: str = 'difficulty') -> list[str]:
  """Returns a title and its table, or nothing if the table has no columns."""
  return [title, _table(corner, cells)] if any(cells.values()) else []


def _table(corner: str, cells: Cells) -> str:
  columns = list(next(iter(cells.values())))
  return markdown_table(
      [corner, *columns], [[row, *texts.values()] for row, texts in cells.items()])
