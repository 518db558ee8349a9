"""Questions about a context, what a task that asks them offers, and how it draws them."""

import abc
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from latent_deliberation.errors import UserError

LARGEST_SKEW = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
  """The model reads context + question, and is to write answer.

  Attributes:
    context: what all questions of a document are about.
    question: ends in an anchor.
    answer: of a width that the task fixes, or ended by a character found at its end alone.
    difficulty: steps that lead to the answer.
  """
  context: str
  question: str
  answer: str
  difficulty: int


class Task(Protocol):
  """A frozen dataclass of options, checked when it is made."""

  @property
  def difficulties(self) -> tuple[int, ...]:
    """All difficulties of its questions, increasing."""

  @property
  def anchors(self) -> str:
    """Characters one of which ends every question; they occur nowhere else in a document."""

  @property
  def contents(self) -> str:
    """Hash of the files that it reads, '' where there is none."""

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """A text to train on: a fresh context, then `count` questions, each with its answer.

    Args:
      held_out: the text is for validation, and may hold no question of a text that is not.
    """

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """What is asked in the end: so many questions of each difficulty, where there are as many."""


class DrawnTask(abc.ABC):
  """A task that draws fresh questions for every text. Its text is ASCII."""
  contents = ''

  @abc.abstractmethod
  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """`count` questions about one fresh context, of one difficulty or of random ones.

    Raises:
      UserError: the task has no such difficulty, or count is not positive.
    """

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """See `Task.document`; drawn anew, no text is like another."""
    del held_out
    questions = self.ask(rng, count)
    return questions[0].context + ''.join([asked.question + asked.answer for asked in questions])

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """See `Task.examine`; each question has a context of its own."""
    return [self.ask(rng, 1, difficulty)[0] for difficulty in self.difficulties
            for _ in range(per_difficulty)]


def draw_difficulties(rng: np.random.Generator, count: int, choices: tuple[int, ...],
                      difficulty: int | None, skew: float = 0.0) -> list[int]:
  """`count` times the difficulty that is given, or one of the choices.

  Args:
    rng: what to draw from.
    count: how many.
    choices: increasing.
    difficulty: None to draw each.
    skew: the probability of a choice k is proportional to exp(-skew * k).

  Raises:
    UserError: `difficulty` is not among the choices, or count is not positive.
  """
  if count < 1:
    raise UserError(f'{count} questions: ask for at least 1')
  if difficulty is not None:
    if difficulty not in choices:
      raise UserError(f'difficulty = {difficulty!r}: this task has {choices}')
    return [difficulty] * count
  bounds = np.exp(-skew * np.array(choices)).cumsum()
  places = bounds[:-1].searchsorted(rng.random(count) * bounds[-1], side='right')
  return [choices[place] for place in places.tolist()]


def take_turns(rng: np.random.Generator, difficulties: Sequence[int],
               sizes: Mapping[int, int]) -> list[int]:
  """For each difficulty k one of range(sizes[k]), at random.

  Equal difficulties get different numbers until all of sizes[k] have come, since a question that
  comes again in a document can be answered by copying.
  """
  orders = {k: itertools.cycle(rng.permutation(sizes[k]).tolist())
            for k in sorted(set(difficulties))}
  return [next(orders[k]) for k in difficulties]


def first_of_each(questions: Iterable[Question], count: int) -> list[Question]:
  """The first `count` questions of each difficulty, the easiest before all others."""
  found = {}
  for question in questions:
    found.setdefault(question.difficulty, []).append(question)
  return [question for difficulty in sorted(found) for question in found[difficulty][:count]]


def check_integer(option: str, value: Any, low: int, high: int, reason: str = '') -> None:
  """Raises UserError unless an option is an integer between two bounds."""
  if not isinstance(value, int) or isinstance(value, bool):
    raise UserError(f'{option} = {value!r} is not an integer')
  if not low <= value <= high:
    raise UserError(f'{option} = {value}: it must lie between {low} and {high}{reason}')


def check_skew(value: Any) -> None:
  """Raises UserError unless a skew is a number of moderate size."""
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise UserError(f'skew = {value!r} is not a number')
  if not abs(value) <= LARGEST_SKEW:  # a NaN fails, too
    raise UserError(f'skew = {value}: it must lie between {-LARGEST_SKEW} and {LARGEST_SKEW}')
