import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.addition import Addition
from latent_deliberation.studies.synthetic.arithmetic import Arithmetic
from latent_deliberation.studies.synthetic.graphs import Graphs
from latent_deliberation.studies.synthetic.pointer_chasing import PointerChasing
from latent_deliberation.studies.synthetic.state_tracking import StateTracking

TASKS = [
    PointerChasing(), PointerChasing(nodes=26, hops=9), StateTracking(), StateTracking(length=35),
    StateTracking('zp', 13), Graphs(), Graphs(nodes=26, steps=11), Arithmetic(),
    Arithmetic('*', reverse=False), Addition(), Addition(17)]


@pytest.mark.parametrize('task', TASKS)
def test_anchors_end_questions_only(task):
  for seed in range(20):
    asked = task.ask(np.random.default_rng(seed), 12)
    text = task.document(np.random.default_rng(seed), 12)
    assert sum(character in task.anchors for character in text) == 12
    assert all(question.question[-1] in task.anchors for question in asked)


@pytest.mark.parametrize('task', TASKS)
def test_document(task):
  """It is its context, then questions with answers."""
  asked = task.ask(np.random.default_rng(3), 5)
  assert len({question.context for question in asked}) == 1
  text = task.document(np.random.default_rng(3), 5)
  assert text == asked[0].context + ''.join(q.question + q.answer for q in asked)
  assert text.isascii() and text.isprintable()


@pytest.mark.parametrize('task', TASKS)
def test_all_difficulties_are_drawn(task):
  asked = task.ask(np.random.default_rng(0), 1000)
  assert {question.difficulty for question in asked} == set(task.difficulties)


@pytest.mark.parametrize('task', TASKS)
def test_bad_request_is_named(task):
  rng = np.random.default_rng(0)
  beyond = task.difficulties[-1] + 1
  with pytest.raises(UserError, match=rf'difficulty = {beyond}: .*\(1, '):
    task.ask(rng, 1, beyond)
  with pytest.raises(UserError, match='count = 0: .*at least 1'):
    task.ask(rng, 0)
