"""The figures of a study as plain JSON values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.evaluation.bootstrap import AheadNLL, Change, relative_change
from latent_deliberation.evaluation.controls import BASELINE
from latent_deliberation.studies.outcomes import (
  Estimate,
  Outcomes,
  accuracy,
  accuracy_difference,
  mcnemar,
  nll,
  nll_difference,
)
from latent_deliberation.studies.study_result import Arm, StudyResult, controlled_arm


def summarise_study(result: StudyResult, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
  """All figures of a study as plain JSON values.

  A study of questions has `overall`, `by_difficulty`, `content_effect`, `mcnemar` (the last two by
  difficulty and 'overall'), one of text has `by_position` and `content_effect`. Accuracies are
  fractions, `nll` is nats of an answer, a `ci95` is [low, high]. Changes are an arm minus
  'frozen'; that of perplexity is relative, in percent. A content effect compares an arm to itself
  with another example's latents: `accuracy` is own minus shuffled and `nll_saved` shuffled minus
  own, both above zero where content helps; `change_pct` of perplexity is below zero there.

  Args:
    result: what was measured.
    samples: draws of the bootstrap.
    seed: of the bootstrap.
  """
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
  """A row of diagnostics, None where a value is not finite: JSON has no form for it."""
  return {name: float(value) if math.isfinite(value) else None for name, value in row.items()}


def _shuffled_by_arm(names: Mapping[str, Any]) -> dict[str, str]:
  """{arm: its control by another example's latents}, where there is one."""
  return {controlled_arm(name): name for name in names if name.rpartition('/')[2] == 'shuffled'}


def _summarise_questions(result: StudyResult, draws: Mapping[str, int]) -> dict[str, Any]:
  items = len(result.arms[BASELINE].outcomes[0].nll)
  groups = {} if result.difficulty is None else {
    str(level): result.difficulty == level for level in np.unique(result.difficulty)}
  scores, contents, tests = {}, {}, {}
  for group, chosen in {**groups, 'overall': np.ones(items, bool)}.items():
    runs = {name: [run.select(chosen) for run in arm.outcomes]
            for name, arm in result.arms.items()}
    scores[group] = {name: _score(arm, runs[BASELINE], draws) for name, arm in runs.items()}
    shuffled = _shuffled_by_arm(runs)
    contents[group] = {
      name: _content_effect(runs[name], runs[control], draws) for name, control in shuffled.items()}
    tests[group] = {
      f'{name} vs {other}': _test_seeds(result, name, other, runs)
      for name, control in shuffled.items()
      for other in (BASELINE, control, 'constant') if other in runs}
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
  """McNemar's test, seed by seed in order; an arm of one run meets every run of `one`."""
  others = runs[other] * len(runs[one]) if len(runs[other]) == 1 else runs[other]
  rows = []
  for seed, run, against in zip(result.arms[one].seeds, runs[one], others, strict=False):
    one_only, other_only, p = mcnemar(run, against)
    rows.append({'seed': int(seed), f'{one}_only': one_only, f'{other}_only': other_only, 'p': p})
  return rows


def _summarise_text(result: StudyResult, draws: Mapping[str, int]) -> dict[str, Any]:
  # All seeds scored the same targets, so means over seeds stay paired with a decoder of one run.
  pooled = {name: AheadNLL(np.mean([run.total for run in arm.text], axis=0), arm.text[0].count)
            for name, arm in result.arms.items()}
  changes = {name: relative_change(arm, pooled[BASELINE], **draws) for name, arm in pooled.items()}
  contents = {name: relative_change(pooled[name], pooled[control], **draws)
              for name, control in _shuffled_by_arm(pooled).items()}
  scores, effects = {}, {}
  for position in result.positions:
    at = position - 1
    scores[str(position)] = {name: {
      'perplexity': float(np.exp(pooled[name].nll[at])),
      **_change_at(changes[name], at),
      'by_seed': [float(np.exp(run.nll[at])) for run in arm.text],
    } for name, arm in result.arms.items()}
    effects[str(position)] = {name: _change_at(content, at) for name, content in contents.items()}
  count = pooled[BASELINE].count
  return {'texts': len(count),
          'targets': {str(position): int(count[:, position - 1].sum())
                      for position in result.positions},
          'by_position': scores,
          'content_effect': effects}


def _change_at(change: Change, at: int) -> dict[str, Any]:
  return {'change_pct': float(change.percent[at]),
          'ci95': [float(change.low[at]), float(change.high[at])]}
