"""Answers to questions, right or wrong: accuracies, paired differences and McNemar's test.

A question stands alone in its context, so questions are independent and the bootstrap draws them.
Seeds are not drawn: there are too few of them for an interval, and reports show each one.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np


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
      raise ValueError(
          f'nll has shape {self.nll.shape}, correct {self.correct.shape}: both must be [items]')
    if self.correct.dtype != bool:
      raise ValueError(f'correct is {self.correct.dtype}, expected bool: compare before, such as '
                       'with hits == tokens')
    if not len(self.nll):
      raise ValueError('0 items, at least 1 is needed: evaluate on more questions')
    finite = np.isfinite(self.nll)
    if not finite.all():
      item = int(finite.argmin())
      raise ValueError(
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

  Raises: ValueError when the runs have different numbers of items, or fewer than 2.
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

  Raises: ValueError when the two have different numbers of items.
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
  """Raises ValueError unless every arm has a run, and all runs have equally many items."""
  for name, runs in arms.items():
    if not runs:
      raise ValueError(f'{name} has 0 runs, at least 1 is needed: give the outcomes of a seed')
  first, reference = next((name, len(runs[0].nll)) for name, runs in arms.items())
  for name, runs in arms.items():
    for at, run in enumerate(runs):
      if len(run.nll) != reference:
        raise ValueError(
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
    raise ValueError(
        f'{items} item, an interval needs at least 2: evaluate on more questions')
  low, high = np.percentile(_draw(items, samples, seed) @ values / items, (2.5, 97.5))
  return Estimate(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=1)  # a report asks for the same draws for every arm
def _draw(items: int, samples: int, seed: int) -> np.ndarray:
  """How often each item is drawn, float64 [samples, items]."""
  rng = np.random.default_rng(seed)
  return np.stack([np.bincount(rng.integers(items, size=items), minlength=items)
                   for _ in range(samples)]).astype(np.float64)
