import collections

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.addition import Addition


def numbers_of(asked):
  """Digits of both numbers of a question, the least significant first."""
  assert asked.question[:-1].islower() and asked.question[-1].isupper()
  signs = asked.question.lower()
  return [int(sign) for sign in signs[::2]], ['abcdefghij'.index(sign) for sign in signs[1::2]]


@pytest.mark.parametrize('task', [Addition(), Addition(17), Addition(1)])
def test_answer_is_a_digit_of_the_sum(task):
  """The answer is the digit of the sum in the last column."""
  rng = np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for asked in task.ask(rng, 20, difficulty):
      first, second = (sum(digit * 10**place for place, digit in enumerate(digits))
                       for digits in numbers_of(asked))
      assert asked.answer == str((first + second) // 10**task.carries % 10)
      assert asked.context == '' and difficulty in (None, asked.difficulty)


def test_difficulty_is_depth_of_carry():
  rng = np.random.default_rng(1)
  for difficulty in Addition().difficulties:
    for asked in Addition().ask(rng, 50, difficulty):
      below = [a + b for a, b in zip(*numbers_of(asked), strict=True)][-2::-1]
      assert below[:difficulty - 1] == [9] * (difficulty - 1) and below[difficulty - 1] != 9


@pytest.mark.parametrize('difficulty', [1, 4])
def test_carry_is_needed(difficulty):
  """Without the carry half of the answers are right. All digits occur."""
  asked = Addition().ask(np.random.default_rng(2), 4000, difficulty)
  digits = collections.Counter()
  carried = 0
  for each in asked:
    first, second = numbers_of(each)
    digits.update(first)
    carried += (first[-1] + second[-1]) % 10 != int(each.answer)
  assert abs(carried - 2000) < 5 * np.sqrt(1000)
  # 2,000 +- 42 are expected of each, and chi-squared with 9 degrees of freedom stays below 34.
  assert sum((digits[digit] - 2000) ** 2 / 2000 for digit in range(10)) < 34


def test_skew():
  asked = Addition(3, skew=0.5).ask(np.random.default_rng(0), 30_000)
  counts = collections.Counter(question.difficulty for question in asked)
  assert counts[1] / counts[2] == pytest.approx(np.exp(0.5), rel=0.1)
  assert counts[2] / counts[3] == pytest.approx(np.exp(0.5), rel=0.1)


@pytest.mark.parametrize(('options', 'message'), [
    ({'carries': 0}, 'carries = 0: .*1 and 64'),
    ({'carries': True}, 'carries = True: .*integer'),
    ({'skew': 11}, 'skew = 11: .*-10 and 10'),
])
def test_bad_option_is_named(options, message):
  with pytest.raises(UserError, match=message):
    Addition(**options)
