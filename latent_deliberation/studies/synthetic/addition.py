"""Addition: one digit of a sum, whose carry is decided a known number of columns below."""

import dataclasses
import string

import numpy as np

from latent_deliberation.studies.synthetic.question import (
  DrawnTask,
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
)

FIRST, SECOND = string.digits, string.ascii_lowercase[:10]
MOST_CARRIES = 64


@dataclasses.dataclass(frozen=True)
class Addition(DrawnTask):
  """One digit of a sum: '8h2e4B' adds 428 and 147 and asks for the hundreds digit, '5'.

  There is no context. Numbers are written column by column, the least significant first. The second
  number has letters as digits, from a for 0 to j for 9. Its last digit is a capital and the anchor,
  so the answer is predicted from a digit that it depends on. Higher digits of the sum are left out.

  A column whose digits add up to 9 passes on the carry from below. Any other column decides the
  carry. With random digits a column passes it on one time in ten. Here the difficulty says how far
  below the deciding column is. The digits below that column are random, so that its place has to be
  found.

  Attributes:
    carries: largest difficulty; numbers have carries + 1 digits.
      Difficulty k has k - 1 columns of sum 9 between the asked column and the deciding one.
    skew: decay of difficulties; the probability of k is proportional to exp(-skew * k).
  """
  carries: int = 4
  skew: float = 0.0

  def __post_init__(self):
    check_integer('carries', self.carries, 1, MOST_CARRIES)
    check_skew(self.skew)

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.carries + 1))

  @property
  def anchors(self) -> str:
    return SECOND.upper()

  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """See `DrawnTask.ask`."""
    numbers = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    first, second = rng.integers(10, size=(2, count, self.carries + 1))
    others = rng.integers(1, 10, size=count).tolist()  # added to digits of sum 9
    questions = []
    for above, below, number, other in zip(first, second, numbers, others, strict=True):
      # Columns above the deciding one add up to 9, and the deciding one to anything else.
      deciding = self.carries - number
      below[deciding:-1] = 9 - above[deciding:-1]
      below[deciding] = (below[deciding] + other) % 10
      carry = above[deciding] + below[deciding] > 9
      *signs, last = [FIRST[a] + SECOND[b] for a, b in zip(above, below, strict=True)]
      questions.append(Question('', ''.join(signs) + last.upper(),
                                FIRST[(above[-1] + below[-1] + carry) % 10], number))
    return questions
