import collections
import re

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.arithmetic import Arithmetic


@pytest.mark.parametrize('operation', ['+', '*'])
@pytest.mark.parametrize('reverse', [True, False])
def test_answers_are_right(operation, reverse):
  task, rng = Arithmetic(operation, digits=9, reverse=reverse), np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for asked in task.ask(rng, 30, difficulty):
      first, second = re.fullmatch(r'(\d+)[+*](\d+)=', asked.question).groups()
      assert asked.answer[-1] == ';'
      written = asked.answer[-2::-1] if reverse else asked.answer[:-1]
      assert written == str(eval(asked.question[:-1]))
      assert len(first) == len(second) == asked.difficulty
      assert difficulty in (None, asked.difficulty)


def test_all_numbers_of_a_width_occur():
  asked = Arithmetic().ask(np.random.default_rng(0), 3000, 2)
  assert {int(question.question[:2]) for question in asked} == set(range(10, 100))
  asked = Arithmetic().ask(np.random.default_rng(0), 300, 1)
  assert {int(question.question[0]) for question in asked} == set(range(10))


def test_skew():
  asked = Arithmetic(digits=3, skew=0.5).ask(np.random.default_rng(0), 30_000)
  counts = collections.Counter(question.difficulty for question in asked)
  assert counts[1] / counts[2] == pytest.approx(np.exp(0.5), rel=0.1)
  assert counts[2] / counts[3] == pytest.approx(np.exp(0.5), rel=0.1)


@pytest.mark.parametrize(('options', 'message'), [
    ({'operation': '-'}, r"operation = '-': .*\('\+', '\*'\)"),
    ({'digits': 10}, 'digits = 10: .*1 and 9'),
    ({'skew': 11}, 'skew = 11: .*-10 and 10'),
    ({'reverse': 1}, 'reverse = 1: .*True or False'),
])
def test_bad_option_is_named(options, message):
  with pytest.raises(UserError, match=message):
    Arithmetic(**options)
