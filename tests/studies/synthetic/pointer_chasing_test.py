import collections

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.pointer_chasing import PointerChasing


def follow(context, start, hops):
  """The node k arrows on, read off the text of a context."""
  assert context[-1] == ';'
  arrows = dict(zip(context[:-1:2], context[1:-1:2], strict=True))
  for _ in range(hops):
    start = arrows[start]
  return start


@pytest.mark.parametrize('task', [
    PointerChasing(), PointerChasing(nodes=26, hops=9), PointerChasing(nodes=2, hops=1)])
def test_answer_follows_the_arrows(task):
  rng = np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for _ in range(5):
      for asked in task.ask(rng, 20, difficulty):
        assert asked.answer == follow(asked.context, asked.question[1].lower(), asked.difficulty)
        assert asked.question[0] == str(asked.difficulty)
        assert difficulty in (None, asked.difficulty)


def test_context_is_one_cycle():
  for seed in range(20):
    context = PointerChasing(nodes=7).ask(np.random.default_rng(seed), 1)[0].context
    assert len(context) == 15
    assert {follow(context, 'a', hops) for hops in range(7)} == set('abcdefg')


@pytest.mark.parametrize('difficulty', [1, 4, 5])
def test_answers_are_uniform(difficulty):
  task, rng = PointerChasing(nodes=6, hops=5), np.random.default_rng(0)
  answers = collections.Counter()
  for _ in range(6000):
    asked, = task.ask(rng, 1, difficulty)
    answers[asked.question[1].lower() + asked.answer] += 1
  assert len(answers) == 30 and not any(pair[0] == pair[1] for pair in answers)
  # 200 +- 14 are expected of each, and chi-squared with 29 degrees of freedom stays below 64.
  assert sum((count - 200) ** 2 / 200 for count in answers.values()) < 64


def test_places_of_pairs_are_random():
  rng, places = np.random.default_rng(0), collections.Counter()
  for _ in range(4000):
    asked, = PointerChasing(nodes=8).ask(rng, 1, 1)
    places[asked.context.index(asked.question[1].lower() + asked.answer) // 2] += 1
  assert set(places) == set(range(8)) and max(places.values()) < 600


@pytest.mark.parametrize(('skew', 'ratio'), [(0.0, 1.0), (1.0, np.e), (-1.0, 1 / np.e)])
def test_skew(skew, ratio):
  asked = PointerChasing(nodes=5, hops=3, skew=skew).ask(np.random.default_rng(0), 30_000)
  counts = collections.Counter(question.difficulty for question in asked)
  assert counts[1] / counts[2] == pytest.approx(ratio, rel=0.1)
  assert counts[2] / counts[3] == pytest.approx(ratio, rel=0.1)


def test_questions_take_turns():
  """No question comes twice before all of its difficulty have come."""
  for seed in range(20):
    asked = PointerChasing(nodes=8).ask(np.random.default_rng(seed), 8, 3)
    assert len({question.question for question in asked}) == 8


@pytest.mark.parametrize(('options', 'message'), [
    ({'nodes': 27}, 'nodes = 27: .*2 and 26'),
    ({'nodes': 8.0}, 'nodes = 8.0: .*integer'),
    ({'nodes': 5}, 'hops = 5: .*1 and 4, .*nodes = 5'),
    ({'nodes': 26, 'hops': 10}, 'hops = 10: .*1 and 9'),
    ({'hops': 0}, 'hops = 0'),
    ({'skew': 'steep'}, "skew = 'steep': .*number"),
    ({'skew': float('nan')}, 'skew = nan: .*-10 and 10'),
])
def test_bad_option_is_named(options, message):
  with pytest.raises(UserError, match=message):
    PointerChasing(**options)
