"""What a study measured: arms by seeds, on the same questions or the same text.

    summary = summarise_study(StudyResult(...))     from evaluation.study_report
    write_study(summary, directory)                 from evaluation.study_page
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import (
  BASELINE,
  CONTROLS,
  OWN,
  AheadNLL,
  check_paired,
)


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """What one arm, trained with one seed, did on every question.

  Attributes:
    nll: float64 [items] nats of the whole true answer.
    correct: bool [items], whether every token of the true answer is the likeliest one.
  """
  nll: np.ndarray
  correct: np.ndarray

  def __post_init__(self):
    if self.nll.ndim != 1 or self.nll.shape != self.correct.shape:
      raise UserError(
          f'nll has shape {self.nll.shape}, correct {self.correct.shape}: both must be [items]')
    if self.correct.dtype != bool:
      raise UserError(f'correct is {self.correct.dtype}, expected bool: compare before, such as '
                       'with hits == tokens')
    if not len(self.nll):
      raise UserError('0 items, at least 1 is needed: evaluate on more questions')
    finite = np.isfinite(self.nll)
    if not finite.all():
      item = int(finite.argmin())
      raise UserError(
          f'the nll of item {item} is {self.nll[item]}, expected a finite number: the weights or '
          'the computation are broken')

  def select(self, chosen: np.ndarray) -> 'Outcomes':
    """The outcomes of some questions alone, bool [items]."""
    return Outcomes(self.nll[chosen], self.correct[chosen])


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over questions, with the ends of its 95% interval."""
  value: float
  low: float
  high: float


def accuracy(runs: Sequence[Outcomes], samples: int = 2000, seed: int = 0) -> Estimate:
  """Fraction of questions that are answered right, with a 95% percentile interval.

  Args:
    runs: an arm's outcomes, one for each seed; a question counts with its mean over them.
    samples: draws of the bootstrap (Efron 1979). Each draws as many questions as there are, with
      replacement. Where all answers are alike, all draws are, and the interval has no width.
    seed: of the bootstrap.

  Memory: 16 bytes for each of samples x items.

  Raises: UserError when the runs have different numbers of items, or fewer than 2.
  """
  check_same_items({'runs': runs})
  return _estimate(_correct(runs), samples, seed)


def accuracy_difference(runs: Sequence[Outcomes], baseline_runs: Sequence[Outcomes],
                        samples: int = 2000, seed: int = 0) -> Estimate:
  """Accuracy of an arm minus that of another, a fraction, with a 95% percentile interval.

  A draw takes the same questions for both, so what makes a question hard for both cancels. The
  two may have different numbers of seeds. Arguments and errors are those of `accuracy`.
  """
  check_same_items({'runs': runs, 'baseline_runs': baseline_runs})
  return _estimate(_correct(runs) - _correct(baseline_runs), samples, seed)


def nll(runs: Sequence[Outcomes], samples: int = 2000, seed: int = 0) -> Estimate:
  """Mean nats of an answer; otherwise as `accuracy`."""
  check_same_items({'runs': runs})
  return _estimate(_nats(runs), samples, seed)


def nll_difference(runs: Sequence[Outcomes], baseline_runs: Sequence[Outcomes],
                   samples: int = 2000, seed: int = 0) -> Estimate:
  """Mean nats of an answer, an arm minus another; otherwise as `accuracy_difference`."""
  check_same_items({'runs': runs, 'baseline_runs': baseline_runs})
  return _estimate(_nats(runs) - _nats(baseline_runs), samples, seed)


def mcnemar(one: Outcomes, other: Outcomes) -> tuple[int, int, float]:
  """Exact McNemar test of whether two runs are right equally often.

  Returns: questions that `one` alone has right, those that `other` alone has right, and the
    two-sided p-value: were both as good, the first count of n would be binomial(n, 1/2).

  Raises: UserError when the two have different numbers of items.
  """
  check_same_items({'one': [one], 'other': [other]})
  one_only = int(np.count_nonzero(one.correct & ~other.correct))
  other_only = int(np.count_nonzero(other.correct & ~one.correct))
  discordant = one_only + other_only
  # In integers, which neither overflow nor round; p-values below 1e-308 come out as 0.
  ways = tail = 1
  for at in range(min(one_only, other_only)):
    ways = ways * (discordant - at) // (at + 1)
    tail += ways
  return one_only, other_only, min(1.0, 2 * tail / 2**discordant)


def check_same_items(arms: Mapping[str, Sequence[Outcomes]]) -> None:
  """Raises UserError unless every arm has a run, and all runs have equally many items."""
  for name, runs in arms.items():
    if not runs:
      raise UserError(f'{name} has 0 runs, at least 1 is needed: give the outcomes of a seed')
  first, reference = next((name, len(runs[0].nll)) for name, runs in arms.items())
  for name, runs in arms.items():
    for at, run in enumerate(runs):
      if len(run.nll) != reference:
        raise UserError(
            f'run {at} of {name} has {len(run.nll)} items, run 0 of {first} has {reference}: '
            'evaluate all on the same questions')


def _correct(runs: Sequence[Outcomes]) -> np.ndarray:
  return np.mean([run.correct for run in runs], axis=0)


def _nats(runs: Sequence[Outcomes]) -> np.ndarray:
  return np.mean([run.nll for run in runs], axis=0)


def _estimate(values: np.ndarray, samples: int, seed: int) -> Estimate:
  """Mean of `values`, [items], and the interval that drawing items anew gives it."""
  items = len(values)
  if items < 2:
    raise UserError(
        f'{items} item, an interval needs at least 2: evaluate on more questions')
  low, high = np.percentile(_draw(items, samples, seed) @ values / items, (2.5, 97.5))
  return Estimate(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=1)  # a report asks for the same draws for every arm
def _draw(items: int, samples: int, seed: int) -> np.ndarray:
  """How often each item is drawn, float64 [samples, items]."""
  rng = np.random.default_rng(seed)
  return np.stack([np.bincount(rng.integers(items, size=items), minlength=items)
                   for _ in range(samples)]).astype(np.float64)


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
      raise UserError(f'flops_per_token = {self.flops_per_token}, train_flops = '
                       f'{self.train_flops}: must be finite, the first above 0')
    if bool(self.outcomes) == bool(self.text):
      raise UserError(f'an arm has {len(self.outcomes)} outcomes and {len(self.text)} scores on '
                       'text: give one of both, for each seed')
    runs = len(self.outcomes) + len(self.text)
    if not runs == len(self.seeds) == len(self.seconds):
      raise UserError(f'an arm has {runs} runs, {len(self.seeds)} seeds and {len(self.seconds)} '
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
      raise UserError(f'arms {list(self.arms)}: the first must be {BASELINE!r}, to which the '
                       'others are compared')
    for name in self.arms:
      if (arm := controlled_arm(name)) is not None and arm not in self.arms:
        raise UserError(f'{name!r} is a control of {arm!r}, which is not among the arms '
                         f'{list(self.arms)}: name it after its arm, as in ARM/shuffled')
    of_text = [name for name, arm in self.arms.items() if arm.text]
    if of_text and len(of_text) < len(self.arms):
      raise UserError(f'of the arms {list(self.arms)} only {of_text} have scores on text, the '
                       'others have answers to questions: report them as two studies')
    if of_text:
      self._check_text()
    else:
      self._check_questions()

  def _check_questions(self):
    check_same_items({name: arm.outcomes for name, arm in self.arms.items()})
    items = len(self.arms[BASELINE].outcomes[0].nll)
    if self.positions is not None:
      raise UserError(f'positions = {self.positions}, but the arms answered questions: leave '
                       'them None')
    if self.difficulty is None:
      return
    if self.difficulty.shape != (items,) or self.difficulty.dtype.kind not in 'iu':
      raise UserError(f'difficulty is {self.difficulty.dtype} {list(self.difficulty.shape)}, '
                       f'expected an integer for each of the {items} items')
    levels, counts = np.unique(self.difficulty, return_counts=True)
    if counts.min() < 2:
      raise UserError(f'difficulty {levels[counts.argmin()]} has 1 item, an interval needs at '
                       'least 2: evaluate on more questions')

  def _check_text(self):
    check_paired({f'{name}, seed {seed}': run for name, arm in self.arms.items()
                  for seed, run in zip(arm.seeds, arm.text, strict=True)})
    if self.difficulty is not None:
      raise UserError('difficulty is given, but the arms were scored on text: leave it None')
    length = self.arms[BASELINE].text[0].count.shape[1]
    if not self.positions or list(self.positions) != sorted(
        set(self.positions) & set(range(1, length + 1))):
      raise UserError(f'positions = {self.positions}: must be increasing, from 1 to the {length} '
                       'ahead positions that were scored')


def controlled_arm(name: str) -> str | None:
  """The arm that an arm of this name is a control of; None where it is not a control."""
  arm, _, control = name.rpartition('/')
  return (arm or OWN) if control in CONTROLS else None


def control_name(arm: str, control: str) -> str:
  """What a control of an arm is called, the other way round."""
  return control if arm == OWN else f'{arm}/{control}'
