"""What a study measured: arms by seeds, on the same questions or the same text.

    summary = summarise_study(StudyResult(...))     from evaluation.study_report
    write_study(summary, directory)                 from evaluation.study_page
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.evaluation.bootstrap import AheadNLL, check_paired
from latent_deliberation.evaluation.controls import BASELINE, CONTROLS, OWN
from latent_deliberation.studies.outcomes import Outcomes, check_same_items


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm of a study: what it cost, and what it scored with every seed.

  Attributes:
    kind: a label, such as 'coprocessor', for the reader.
    trained: parameters that learn.
    total: parameters in use.
    flops_per_token: of evaluation, for each predicted token.
    train_flops: of training, for one seed.
    seeds: of training.
    seconds: wall-clock time for each seed, of training and of scoring with all controls; of the
      frozen decoder, of its training alone.
    outcomes: answers to questions, for each seed; empty in a study of text.
    text: scores on text, for each seed; empty in a study of questions.
    note: a free sentence, such as whether its budget is that of the other arms.
  """
  kind: str
  trained: int
  total: int
  flops_per_token: float
  train_flops: float
  seeds: tuple[int, ...]
  seconds: tuple[float, ...]
  outcomes: tuple[Outcomes, ...] = ()
  text: tuple[AheadNLL, ...] = ()
  note: str = ''

  def __post_init__(self):
    if not 0 < self.flops_per_token < math.inf or not 0 <= self.train_flops < math.inf:
      raise ValueError(f'flops_per_token = {self.flops_per_token}, train_flops = '
                       f'{self.train_flops}: must be finite, the first above 0')
    if bool(self.outcomes) == bool(self.text):
      raise ValueError(f'an arm has {len(self.outcomes)} outcomes and {len(self.text)} scores on '
                       'text: give one of both, for each seed')
    runs = len(self.outcomes) + len(self.text)
    if not runs == len(self.seeds) == len(self.seconds):
      raise ValueError(f'an arm has {runs} runs, {len(self.seeds)} seeds and {len(self.seconds)} '
                       'seconds: give one of each for every seed')


@dataclasses.dataclass(frozen=True)
class StudyResult:
  """What a study measured.

  Attributes:
    name: of the study.
    arms: by name, 'frozen' first. 'shuffled', 'zero' and 'mean' are controls of 'own'; those of
      another arm 'x' are 'x/shuffled', 'x/zero' and 'x/mean'.
    config: of the study; values that JSON has no form for are written as str.
    git_commit: of the source tree.
    command: that ran the study.
    machine: in words.
    seconds: wall-clock time of the whole study.
    difficulty: int [items], such as the hops of each question; None where they are all alike.
    positions: ahead positions of the table, from 1, increasing; None in a study of questions.
    diagnostics: by arm, or arm and seed: rows of {'step': ..., name of a quantity: ...}.
  """
  name: str
  arms: Mapping[str, Arm]
  config: Mapping[str, Any]
  git_commit: str
  command: str
  machine: str
  seconds: float
  difficulty: np.ndarray | None = None
  positions: tuple[int, ...] | None = None
  diagnostics: Mapping[str, Sequence[Mapping[str, float]]] | None = None

  def __post_init__(self):
    if next(iter(self.arms), None) != BASELINE:
      raise ValueError(f'arms {list(self.arms)}: the first must be {BASELINE!r}, to which the '
                       'others are compared')
    for name in self.arms:
      if (arm := controlled_arm(name)) is not None and arm not in self.arms:
        raise ValueError(f'{name!r} is a control of {arm!r}, which is not among the arms '
                         f'{list(self.arms)}: name it after its arm, as in ARM/shuffled')
    of_text = [name for name, arm in self.arms.items() if arm.text]
    if of_text and len(of_text) < len(self.arms):
      raise ValueError(f'of the arms {list(self.arms)} only {of_text} have scores on text, the '
                       'others have answers to questions: report them as two studies')
    if of_text:
      self._check_text()
    else:
      self._check_questions()

  def _check_questions(self):
    check_same_items({name: arm.outcomes for name, arm in self.arms.items()})
    items = len(self.arms[BASELINE].outcomes[0].nll)
    if self.positions is not None:
      raise ValueError(f'positions = {self.positions}, but the arms answered questions: leave '
                       'them None')
    if self.difficulty is None:
      return
    if self.difficulty.shape != (items,) or self.difficulty.dtype.kind not in 'iu':
      raise ValueError(f'difficulty is {self.difficulty.dtype} {list(self.difficulty.shape)}, '
                       f'expected an integer for each of the {items} items')
    levels, counts = np.unique(self.difficulty, return_counts=True)
    if counts.min() < 2:
      raise ValueError(f'difficulty {levels[counts.argmin()]} has 1 item, an interval needs at '
                       'least 2: evaluate on more questions')

  def _check_text(self):
    check_paired({f'{name}, seed {seed}': run for name, arm in self.arms.items()
                  for seed, run in zip(arm.seeds, arm.text, strict=True)})
    if self.difficulty is not None:
      raise ValueError('difficulty is given, but the arms were scored on text: leave it None')
    length = self.arms[BASELINE].text[0].count.shape[1]
    if not self.positions or list(self.positions) != sorted(
        set(self.positions) & set(range(1, length + 1))):
      raise ValueError(f'positions = {self.positions}: must be increasing, from 1 to the {length} '
                       'ahead positions that were scored')


def controlled_arm(name: str) -> str | None:
  """The arm that an arm of this name is a control of; None where it is not a control."""
  arm, _, control = name.rpartition('/')
  return (arm or OWN) if control in CONTROLS else None


def control_name(arm: str, control: str) -> str:
  """What a control of an arm is called, the other way round."""
  return control if arm == OWN else f'{arm}/{control}'
