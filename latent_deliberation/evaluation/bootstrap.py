"""Did perplexity change, and how sure is that? Paired bootstrap over texts, by ahead position."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from latent_deliberation.errors import UserError


@dataclasses.dataclass(frozen=True)
class AheadNLL:
  """What one arm of an evaluation scored on every text.

  Attributes:
    total: float64 [texts, A] nats, summed over the traces of a text, at each ahead position.
    count: [texts, A] targets in that sum; 0 where none of the text's traces reaches so far.
  """
  total: np.ndarray
  count: np.ndarray

  def __post_init__(self):
    if self.total.ndim != 2 or self.total.shape != self.count.shape:
      raise UserError(
          f'total has shape {self.total.shape}, count {self.count.shape}: both must be [texts, A]')
    targets = self.count.sum(axis=0)
    if not targets.all():
      raise UserError(
          f'ahead position {int(targets.argmin()) + 1} has no target in any of '
          f'{len(self.count)} texts, at least 1 is needed: evaluate on more or longer texts, or '
          'on fewer ahead positions')
    finite = np.isfinite(self.total).all(axis=0)
    if not finite.all():
      position = int(finite.argmin())
      text = int(np.isfinite(self.total[:, position]).argmin())
      raise UserError(
          f'the loss of text {text} at ahead position {position + 1} is '
          f'{self.total[text, position]}, expected a finite number: the weights or the '
          'computation are broken')

  @property
  def nll(self) -> np.ndarray:
    """Mean nats per target at each ahead position, [A]."""
    return self.total.sum(axis=0) / self.count.sum(axis=0)

  def merged(self, labels: np.ndarray) -> 'AheadNLL':
    """The same sums with rows of equal label, int [texts], taken together as one text."""
    groups, member = np.unique(labels, return_inverse=True)
    sums = np.zeros((2, len(groups), self.count.shape[1]))
    np.add.at(sums, (slice(None), member), np.stack([self.total, self.count]))
    return AheadNLL(sums[0], sums[1].astype(self.count.dtype))


@dataclasses.dataclass(frozen=True)
class Change:
  """Change of perplexity in percent at each ahead position, [A], with the ends of its interval."""
  percent: np.ndarray
  low: np.ndarray
  high: np.ndarray


def check_paired(arms: Mapping[str, AheadNLL]) -> None:
  """Raises UserError unless all arms scored the same targets of the same texts."""
  (first, reference), *others = arms.items()
  for name, arm in others:
    if arm.count.shape != reference.count.shape:
      raise UserError(
          f'{name} has [texts, A] = {list(arm.count.shape)}, {first} has '
          f'{list(reference.count.shape)}: evaluate both on the same texts and ahead positions')
    if not np.array_equal(arm.count, reference.count):
      text, position = np.argwhere(arm.count != reference.count)[0]
      raise UserError(
          f'text {text} has {arm.count[text, position]} targets at ahead position {position + 1} '
          f'in {name} and {reference.count[text, position]} in {first}: evaluate both on the '
          'same traces')


def relative_change(arm: AheadNLL, baseline: AheadNLL, samples: int = 2000,
                    seed: int = 0) -> Change:
  """Relative change of perplexity from `baseline` to `arm`, with a 95% percentile interval.

  100 * (exp(nll_arm - nll_baseline) - 1), nll being the mean over all targets. In each of
  `samples` draws the texts are drawn anew, with replacement and the same for both arms, so
  what makes a text hard for both cancels (paired percentile bootstrap, Efron 1979). Texts and
  not targets are drawn, because targets of one text are not independent.

  Where few texts reach a position, a draw may hold none of them; such draws are left out there.
  Memory: 16 bytes for each of samples x texts.

  Raises: UserError when the arms did not score the same targets, or when a position has targets
  in one text only.
  """
  check_paired({'arm': arm, 'baseline': baseline})
  texts = len(arm.count)
  reached = np.count_nonzero(arm.count, axis=0)
  if reached.min() < 2:
    raise UserError(
        f'ahead position {int(reached.argmin()) + 1} has targets in 1 of {texts} texts, an '
        'interval needs at least 2: evaluate on more texts, or on fewer ahead positions')
  rng = np.random.default_rng(seed)
  weights = rng.multinomial(texts, np.full(texts, 1 / texts), size=samples).astype(np.float64)
  difference, count = weights @ (arm.total - baseline.total), weights @ arm.count
  drawn = np.where(count > 0, difference, np.nan) / np.maximum(count, 1)
  low, high = _to_percent(np.nanpercentile(drawn, (2.5, 97.5), axis=0))
  return Change(_to_percent(arm.nll - baseline.nll), low, high)


def _to_percent(difference: np.ndarray) -> np.ndarray:
  return 100 * np.expm1(difference)
