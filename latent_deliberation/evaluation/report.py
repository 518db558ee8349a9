"""What an evaluation measured, and the figures that follow from it as plain JSON values.

    summary = summarise(Report(...))
    print(format_table(summary))          from evaluation.page
    write_report(summary, workdir)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from latent_deliberation.evaluation.bootstrap import (
  AheadNLL,
  Change,
  check_paired,
  relative_change,
)
from latent_deliberation.evaluation.controls import BASELINE, OWN

LABELS = {
  BASELINE: 'frozen decoder',
  OWN: 'own latents',
  'shuffled': "another text's latents",
  'constant': 'constant soft tokens',
  'zero': 'zero latents',
}
# Ahead positions at which own latents must be below the other arm for a gain to be called shown.
BELOW_FROZEN = (1, 2, 4)
BELOW_SHUFFLED = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Report:
  """What an evaluation measured.

  Attributes:
    arms: scores by arm, 'frozen' and any others of LABELS, on the same traces.
    positions: ahead positions of the table, from 1, increasing.
    num_ahead: N_A, the last ahead position that training had a loss on.
    decoder_fingerprints: of the frozen weights, before training and after evaluation.
    parameters: number of parameters by name.
    seconds: wall-clock time by phase.
    peak_memory_bytes: of this process.
    git_commit: of the source tree.
    config: of the run; values that JSON has no form for are written as str.
    pictures: caption by file name, in the report's directory.
    notes: free sentences.
  """
  arms: Mapping[str, AheadNLL]
  positions: tuple[int, ...]
  num_ahead: int
  decoder_fingerprints: tuple[str, str]
  parameters: Mapping[str, int]
  seconds: Mapping[str, float]
  peak_memory_bytes: int
  git_commit: str
  config: Mapping[str, Any]
  pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  def __post_init__(self):
    if BASELINE not in self.arms or not set(self.arms) <= set(LABELS):
      raise ValueError(
          f'arms {sorted(self.arms)}: {BASELINE!r} is needed, and others must be among '
          f'{list(LABELS)}')
    check_paired(self.arms)
    length = self.arms[BASELINE].count.shape[1]
    if not self.positions or list(self.positions) != sorted(
        set(self.positions) & set(range(1, length + 1))):
      raise ValueError(
          f'positions = {self.positions}: must be increasing, from 1 to the {length} ahead '
          'positions that were scored')


def summarise(report: Report, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
  """All figures of a report as plain JSON values; arms are in the order of LABELS.

  Args:
    report: what was measured.
    samples: draws of the bootstrap.
    seed: of the bootstrap.
  """
  baseline = report.arms[BASELINE]
  names = [name for name in LABELS if name in report.arms]
  changes = {
    name: relative_change(report.arms[name], baseline, samples, seed) for name in names}
  curves = {name: _arm(report.arms[name], changes[name]) for name in names}
  shown = [position - 1 for position in report.positions]
  content = None
  if {OWN, 'shuffled'} <= set(names):
    content = relative_change(report.arms[OWN], report.arms['shuffled'], samples, seed)
  before, after = report.decoder_fingerprints
  return {
    'positions': list(report.positions),
    'num_ahead': report.num_ahead,
    'arms': {name: _pick(curve, shown) for name, curve in curves.items()},
    'content_effect': None if content is None else _pick(_change(content), shown),
    'bar': None if content is None else _bar(changes[OWN], content),
    'texts': len(baseline.count),
    'targets': [int(baseline.count[:, at].sum()) for at in shown],
    'all_positions': curves,
    'bootstrap': {'samples': samples, 'seed': seed},
    'parameters': {name: int(count) for name, count in report.parameters.items()},
    'seconds': {name: float(seconds) for name, seconds in report.seconds.items()},
    'peak_memory_bytes': int(report.peak_memory_bytes),
    'decoder_unchanged': before == after,
    'decoder_fingerprint': {'before': before, 'after': after},
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


def _bar(own: Change, content: Change) -> dict[str, Any]:
  """Where own latents are below the frozen decoder (whole interval), and below shuffled ones.

  Against shuffled latents the bar asks for the point estimate alone; the interval is stated too.
  A position that was not scored is absent, and then the bar is not passed.
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
