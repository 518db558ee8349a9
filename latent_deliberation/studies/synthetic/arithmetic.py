"""Arithmetic: sums and products of numbers of several digits, answered digit by digit."""

import dataclasses
import operator

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.question import (
  DrawnTask,
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
)

OPERATIONS = {'+': operator.add, '*': operator.mul}
END = ';'
MOST_DIGITS = 9  # a product of two such numbers fits into 64 bits


@dataclasses.dataclass(frozen=True)
class Arithmetic(DrawnTask):
  """A sum or product: '47+18=' asks for '56;', the digits of 65 from the last to the first.

  There is no context. Carries come from the less significant digits. If those are written first,
  each digit follows from two digits and one carry. Written the usual way, the first digit needs all
  of them at once (Lee et al., Teaching Arithmetic to Small Transformers, 2023).

  Attributes:
    operation: '+' or '*'.
    digits: largest difficulty; at difficulty k both operands have k digits, without a leading 0.
    reverse: whether answers begin with the least significant digit; operands never do.
    skew: decay of difficulties; the probability of k is proportional to exp(-skew * k).
  """
  operation: str = '+'
  digits: int = 3
  reverse: bool = True
  skew: float = 0.0

  def __post_init__(self):
    if self.operation not in OPERATIONS:
      raise UserError(f'operation = {self.operation!r}: choose one of {tuple(OPERATIONS)}')
    check_integer('digits', self.digits, 1, MOST_DIGITS)
    if not isinstance(self.reverse, bool):
      raise UserError(f'reverse = {self.reverse!r}: it must be True or False')
    check_skew(self.skew)

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.digits + 1))

  @property
  def anchors(self) -> str:
    return '='

  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """See `DrawnTask.ask`."""
    digits = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    # Numbers of k digits without a leading 0; of one digit, 0 is one.
    high = 10 ** np.array(digits)
    low = np.where(high == 10, 0, high // 10)
    first, second = rng.integers(low, high, size=(2, count))
    results = OPERATIONS[self.operation](first, second).tolist()
    order = slice(None, None, -1 if self.reverse else 1)
    return [Question('', f'{a}{self.operation}{b}=', str(result)[order] + END, k)
            for a, b, result, k in zip(first.tolist(), second.tolist(), results, digits,
                                       strict=True)]
