import collections
import itertools

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.state_tracking import ITEMS, S5_ROWS, StateTracking


def operations_of(asked):
  """Numbers of the operations of a question, the last of which is its only capital."""
  assert asked.question[:-1].islower() and asked.question[-1].isupper()
  return ['abcdefghijklm'.index(sign) for sign in asked.question[1:].lower()]


def powers_of(rows):
  """All permutations that products of some make."""
  found, new = set(), {tuple(range(len(rows[0])))}
  while new:
    found |= new
    new = {tuple(row[place] for place in known) for known in new for row in rows} - found
  return found


def test_s5_rows_generate_s5():
  assert powers_of(S5_ROWS) == set(itertools.permutations(range(5)))
  assert all(sorted(column) == [0, 1, 2, 3, 4] for column in zip(*S5_ROWS, strict=True))


@pytest.mark.parametrize('task', [StateTracking(length=35), StateTracking(skew=1.0)])
def test_s5_answers(task):
  matrices = [np.eye(5, dtype=int)[list(row)] for row in S5_ROWS]  # [from, to]
  rng = np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for asked in task.ask(rng, 6, difficulty):
      product = np.eye(5, dtype=int)
      for operation in operations_of(asked):
        product = product @ matrices[operation]
      assert ITEMS[product[ITEMS.index(asked.question[0])].argmax()] == asked.answer
      assert len(operations_of(asked)) == asked.difficulty and asked.context == ''
      assert difficulty in (None, asked.difficulty)


@pytest.mark.parametrize('modulus', [2, 5, 13])
def test_zp_answers(modulus):
  task, rng = StateTracking(group='zp', modulus=modulus), np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for asked in task.ask(rng, 6, difficulty):
      added = sum(operations_of(asked))
      assert ord(asked.answer) - ord('n') == (ord(asked.question[0]) - ord('n') + added) % modulus


def test_groups_differ_in_answers_alone():
  pairs = [[StateTracking(group=group).ask(np.random.default_rng(seed), 12)
            for group in ('s5', 'zp')] for seed in range(10)]
  for s5, zp in pairs:
    assert [q.question for q in s5] == [q.question for q in zp]
  assert any(a.answer != b.answer for s5, zp in pairs for a, b in zip(s5, zp, strict=True))


@pytest.mark.parametrize('group', ['s5', 'zp'])
@pytest.mark.parametrize('difficulty', [1, 2, 6])
def test_answers_are_uniform(group, difficulty):
  rng, answers = np.random.default_rng(0), collections.Counter()
  for _ in range(5000):
    asked, = StateTracking(group=group).ask(rng, 1, difficulty)
    answers[asked.question[0] + asked.answer] += 1
  # 200 +- 14 are expected of each, and chi-squared with 24 degrees of freedom stays below 57.
  assert len(answers) == 25
  assert sum((count - 200) ** 2 / 200 for count in answers.values()) < 57


def test_skew():
  asked = StateTracking(length=3, skew=0.5).ask(np.random.default_rng(0), 30_000)
  counts = collections.Counter(question.difficulty for question in asked)
  assert counts[1] / counts[2] == pytest.approx(np.exp(0.5), rel=0.1)
  assert counts[2] / counts[3] == pytest.approx(np.exp(0.5), rel=0.1)


@pytest.mark.parametrize(('options', 'message'), [
    ({'group': 'a5'}, "group = 'a5': choose one of"),
    ({'modulus': 7}, "modulus = 7, .*group = 's5'"),
    ({'group': 'zp', 'modulus': 14}, 'modulus = 14: .*2 and 13'),
    ({'length': 65}, 'length = 65: .*1 and 64'),
    ({'skew': 11}, 'skew = 11: .*-10 and 10'),
    ({'length': True}, 'length = True: .*integer'),
])
def test_bad_option_is_named(options, message):
  with pytest.raises(UserError, match=message):
    StateTracking(**options)
