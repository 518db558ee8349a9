"""Questions, the interface of a task that asks them, and what tasks share to draw them."""

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
  """A question: the model reads context + question, and should write answer.

  Attributes:
    context: text that all questions of a document are about; may be ''.
    question: text that ends in an anchor.
    answer: text of a width that the task fixes, or with an end sign that occurs only there.
    difficulty: number of steps that lead to the answer.
  """
  context: str
  question: str
  answer: str
  difficulty: int


class Task(Protocol):
  """A synthetic task: a frozen dataclass of options, which are checked when it is made."""

  @property
  def difficulties(self) -> tuple[int, ...]:
    """All difficulties of its questions, increasing."""

  @property
  def anchors(self) -> str:
    """Characters that end questions. They occur nowhere else in a document."""

  @property
  def contents(self) -> str:
    """Hash of the files that it reads; '' if there are none."""

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """Returns a text to train on: a new context, then `count` questions with their answers.

    Args:
      held_out: whether the text is for validation. Its questions then differ from those of
        training texts, if questions come from a file.
    """

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """Returns the questions of the final test: up to `per_difficulty` of each difficulty."""


class DrawnTask(abc.ABC):
  """A task that draws new questions for every text. Its texts are ASCII."""
  contents = ''

  @abc.abstractmethod
  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """Returns `count` questions about one new context, of one difficulty or of random ones.

    Raises:
      UserError: the task has no such difficulty, or count is not positive.
    """

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """See `Task.document`. Every text is drawn, so `held_out` makes no difference."""
    del held_out
    questions = self.ask(rng, count)
    return questions[0].context + ''.join([asked.question + asked.answer for asked in questions])

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """See `Task.examine`. Each question has its own context."""
    return [self.ask(rng, 1, difficulty)[0] for difficulty in self.difficulties
            for _ in range(per_difficulty)]


def draw_difficulties(rng: np.random.Generator, count: int, choices: tuple[int, ...],
                      difficulty: int | None, skew: float = 0.0) -> list[int]:
  """Returns `count` difficulties: all as given, or each drawn from the choices.

  Args:
    rng: source of randomness.
    count: number of difficulties.
    choices: difficulties to draw from, increasing.
    difficulty: the given difficulty; None draws each.
    skew: decay; the probability of choice k is proportional to exp(-skew * k).

  Raises:
    UserError: `difficulty` is not among the choices, or count is not positive.
  """
  if count < 1:
    raise UserError(f'count = {count}: ask for at least 1 question')
  if difficulty is not None:
    if difficulty not in choices:
      raise UserError(f'difficulty = {difficulty!r}: this task has {choices}')
    return [difficulty] * count
  # Drawn by inversion of the cumulative probabilities.
  bounds = np.exp(-skew * np.array(choices)).cumsum()
  places = bounds[:-1].searchsorted(rng.random(count) * bounds[-1], side='right')
  return [choices[place] for place in places.tolist()]


def take_turns(rng: np.random.Generator, difficulties: Sequence[int],
               sizes: Mapping[int, int]) -> list[int]:
  """Returns a random number of range(sizes[k]) for each difficulty k.

  Equal difficulties get different numbers until all of range(sizes[k]) are used. A question that
  occurs twice in a document could be answered by copying.
  """
  orders = {k: itertools.cycle(rng.permutation(sizes[k]).tolist())
            for k in sorted(set(difficulties))}
  return [next(orders[k]) for k in difficulties]


def first_of_each(questions: Iterable[Question], count: int) -> list[Question]:
  """Returns the first `count` questions of each difficulty, the easiest difficulty first."""
  found = {}
  for question in questions:
    found.setdefault(question.difficulty, []).append(question)
  return [question for difficulty in sorted(found) for question in found[difficulty][:count]]


def check_integer(option: str, value: Any, low: int, high: int, reason: str = '') -> None:
  """Raises UserError unless an option is an integer between two bounds."""
  if not isinstance(value, int) or isinstance(value, bool):
    raise UserError(f'{option} = {value!r}: it must be an integer')
  if not low <= value <= high:
    raise UserError(f'{option} = {value}: it must be between {low} and {high}{reason}')


def check_skew(value: Any) -> None:
  """Raises UserError unless a skew is a number of at most LARGEST_SKEW in size."""
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise UserError(f'skew = {value!r}: it must be a number')
  if not abs(value) <= LARGEST_SKEW:  # NaN fails too
    raise UserError(f'skew = {value}: it must be between {-LARGEST_SKEW} and {LARGEST_SKEW}')
