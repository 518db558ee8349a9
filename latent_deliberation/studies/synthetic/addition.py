"""Sums of two numbers, of which one digit is asked: how far down must one look for its carry?"""

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
  """'8h2e4B' adds 428 to 147 and asks for the hundreds digit of the sum, '5'. No context.

  Numbers are written column by column, the least significant first, with letters from a for 0 to j
  for 9 as the digits of the second number. The last one is a capital: the token that the answer is
  predicted from is a digit that it depends on. What exceeds the last column is left out.

  A column whose digits add up to 9 passes the carry from below on, and any other one decides it.
  Digits drawn alone would pass it on one time in ten: here the difficulty says how far down the
  column lies that decides. Below it digits are random, so that its place has to be found.

  Attributes:
    carries: numbers have carries + 1 digits, and difficulty k has k - 1 columns of sum 9 between
      the asked column and the one that decides, 1 to carries.
    skew: the probability of difficulty k is proportional to exp(-skew * k).
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
    others = rng.integers(1, 10, size=count).tolist()  # added to what would make a sum of 9
    questions = []
    for above, below, number, other in zip(first, second, numbers, others, strict=True):
      deciding = self.carries - number
      below[deciding:-1] = 9 - above[deciding:-1]
      below[deciding] = (below[deciding] + other) % 10
      carry = above[deciding] + below[deciding] > 9
      *signs, last = [FIRST[a] + SECOND[b] for a, b in zip(above, below, strict=True)]
      questions.append(Question('', ''.join(signs) + last.upper(),
                                FIRST[(above[-1] + below[-1] + carry) % 10], number))
    return questions
