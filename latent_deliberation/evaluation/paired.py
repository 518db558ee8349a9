"""Paired statistics over items: means with bootstrap intervals, and McNemar's test."""

import dataclasses

import numpy as np
from scipy.stats import binomtest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import bootstrap_weights


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over items, with the ends of its 95% interval."""
  value: float
  low: float
  high: float


def estimate(values: np.ndarray, samples: int = 2000, seed: int = 0) -> Estimate:
  """Returns the mean of `values`, [items], with its 95% percentile interval from draws of items.

  Differences of two arms give a paired interval: a draw takes the same items for both.

  Args:
    values: one for each item.
    samples: draws of the bootstrap; memory is 16 bytes for each draw and item.
    seed: seed of the bootstrap.

  Raises:
    UserError: there are fewer than 2 items.
  """
  items = len(values)
  if items < 2:
    raise UserError(f'{items} item, and an interval needs 2: score more items')
  # A draw weighs each item by how often it holds it.
  low, high = np.percentile(bootstrap_weights(items, samples, seed) @ values / items, (2.5, 97.5))
  return Estimate(float(values.mean()), float(low), float(high))


def mcnemar(one: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
  """Tests whether two arms are right equally often: McNemar's test, exact.

  If both are equally good, the first of the counts below is binomial(sum of the counts, 1/2).

  Args:
    one, other: bool [items] whether an arm has each item right.

  Returns: the number of items that only `one` has right, the number that only `other` has right,
    and the two-sided p-value.
  """
  one_only = int(np.count_nonzero(one & ~other))
  other_only = int(np.count_nonzero(other & ~one))
  discordant = one_only + other_only
  # A p-value below 1e-308 comes out as 0.
  p = float(binomtest(one_only, discordant).pvalue) if discordant else 1.0
  return one_only, other_only, p
