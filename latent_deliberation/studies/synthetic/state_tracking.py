"""State tracking: where operations take an item, in a solvable group or one that is not."""

import dataclasses
import string

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.question import (
  DrawnTask,
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
)

# Each row says where an operation takes the items 0 to 4. The cube of the second row swaps 0 and 1,
# and any item can be taken to any place. A transposition and a transitive group on 5 items give S5.
S5_ROWS = ((0, 1, 2, 3, 4), (1, 0, 3, 4, 2), (2, 3, 4, 0, 1), (3, 4, 1, 2, 0), (4, 2, 0, 1, 3))
GROUPS = ('s5', 'zp')
OPERATIONS, ITEMS = string.ascii_lowercase[:13], string.ascii_lowercase[13:]
LONGEST = 64


@dataclasses.dataclass(frozen=True)
class StateTracking(DrawnTask):
  """Operations in a row: 'nbdE' asks where b, then d, then e take the item n, one letter.

  There is no context. The last operation is a capital: the answer is then predicted from an
  operation, and no operation before it looks like the end.

  Operations form a Latin square. For either group, a random operation takes every item everywhere
  equally often, so answers are uniform at every difficulty. The groups differ only in the square.
  In Z_p operation a adds 0, b adds 1 and so on, and the answer is the running sum from the asked
  item. The rows for S5 generate the group, and sums do not help: its word problem is NC1-complete
  (Barrington 1989).

  Attributes:
    group: 's5' or 'zp'.
    modulus: p of 'zp', the number of items and of operations; 5 for S5.
    length: largest difficulty; difficulty k has k operations.
    skew: decay of difficulties; the probability of k is proportional to exp(-skew * k).
  """
  group: str = 's5'
  modulus: int = 5
  length: int = 6
  skew: float = 0.0

  def __post_init__(self):
    if self.group not in GROUPS:
      raise UserError(f'group = {self.group!r}: choose one of {GROUPS}')
    check_integer('modulus', self.modulus, 2, len(ITEMS), ', the number of letters for items')
    if self.group == 's5' and self.modulus != 5:
      raise UserError(f"modulus = {self.modulus}, but group = 's5' acts on 5 items: leave it at "
                      "5, or set group = 'zp'")
    check_integer('length', self.length, 1, LONGEST)
    check_skew(self.skew)

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.length + 1))

  @property
  def anchors(self) -> str:
    return OPERATIONS[:self.modulus].upper()

  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """See `DrawnTask.ask`."""
    numbers = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    rows, items = self._rows(), rng.integers(self.modulus, size=count).tolist()
    questions = []
    for item, number in zip(items, numbers, strict=True):
      *early, last = operations = rng.integers(self.modulus, size=number).tolist()
      # The answer is the place that the item is taken to.
      place = item
      for operation in operations:
        place = rows[operation][place]
      asked = ''.join([OPERATIONS[operation] for operation in early]) + OPERATIONS[last].upper()
      questions.append(Question('', ITEMS[item] + asked, ITEMS[place], number))
    return questions

  def _rows(self) -> tuple[tuple[int, ...], ...]:
    """Returns where each operation takes each item, [operation][item]."""
    if self.group == 's5':
      return S5_ROWS
    return tuple(tuple((item + added) % self.modulus for item in range(self.modulus))
                 for added in range(self.modulus))
