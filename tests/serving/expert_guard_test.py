"""Latents come from a thread, and every fault of an expert ends in a report."""

import time

import numpy as np
import pytest

from latent_deliberation.serving.expert_guard import ExpertGuard
from tests.inference.small import PROMPTS
from tests.serving.faults import FaultyExperts, Fixed


def ask(experts, choice, timeout=20, guard=None):
  deliberation = (guard or ExpertGuard(experts, timeout)).begin(
      choice, 'a', experts.engine.read([PROMPTS[1]]))
  while not deliberation.is_ready:
    time.sleep(0.01)
  return deliberation.finish(), deliberation.report


def test_healthy_experts():
  """The latents are those that the experts make."""
  experts = FaultyExperts()
  for choice, mix in (('stars', {'stars': 1.0}), ({'stars': 0.5, 'law': 0.5},) * 2):
    latents, report = ask(experts, choice)
    expected = experts.augment(experts.engine.read([PROMPTS[1]]), [mix])
    np.testing.assert_array_equal(latents.logits, expected.logits)
    assert (report.experts, report.kind, report.fault, report.scores) == (mix, '', '', None)
  latents, report = ask(experts, None)
  assert latents is None and not report.experts and not report.fault


def test_router_chooses():
  for scores, mix in (((2.0, -1.0), {'stars': 1.0}), ((-2.0, -np.inf), {})):
    latents, report = ask(FaultyExperts(Fixed(['stars', 'law'], *scores)), 'auto')
    assert report.experts == mix and (latents is not None) == bool(mix) and not report.fault
    assert report.scores == {name: score for name, score in zip(['stars', 'law'], scores,
                                                                strict=True) if score > -9}


@pytest.mark.parametrize('choice, faults, kind, fault', [
    ('stars', {'stars': 'fails'}, 'failed', r"the expert 'stars' failed \(RuntimeError\)$"),
    ('stars', {'stars': 'lost'}, 'failed', r"'stars' could not join \(RuntimeError\)"),
    ('stars', {'stars': 'nan'}, 'not_finite', "'stars' are not finite"),
    ('stars', {'stars': 'hangs'}, 'hangs', "'stars' took longer than 2 s"),
    ({'law': 0.5, 'stars': 0.5}, {'stars': 'fails'}, 'failed', "'law', the expert 'stars' failed"),
    ('auto', {}, 'failed', r'the router failed \(ValueError\)')])
def test_faults_are_reported(choice, faults, kind, fault):
  """There are no latents then; the report says why, and no detail of the error is in it."""
  experts = FaultyExperts(Fixed(['stars', 'law']), **faults)
  experts.augment(experts.engine.read([PROMPTS[1]]), [{'law': 1.0}])  # compiled
  latents, report = ask(experts, choice, timeout=2)
  assert latents is None and report.experts == {} and report.kind == kind
  with pytest.raises(AssertionError, match=fault):
    raise AssertionError(report.fault)
  experts.released.set()


def test_removed_expert():
  """An expert that is detached after a text has named it gives a fault of its own."""
  experts = FaultyExperts()
  state = experts.engine.read([PROMPTS[1]])
  experts.detach('stars')
  deliberation = ExpertGuard(experts, 5).begin('stars', 'a', state)
  assert deliberation.finish() is None
  assert (deliberation.report.kind, deliberation.report.fault) == (
      'removed', "the expert 'stars' was removed")


def test_expert_that_came_after_the_text_was_read():
  """Its latents have no room in the cache that has read the text, which stays plain."""
  experts = FaultyExperts()
  engine = experts.engine
  state = engine.read([PROMPTS[1]])
  deliberation = ExpertGuard(experts, 20).begin('stars', 'a', state, engine)
  while not deliberation.is_ready:
    time.sleep(0.01)
  experts.engine = experts._build(experts.latents)  # as attaching the first expert does
  assert deliberation.finish() is None
  assert deliberation.report.kind == 'removed' and not deliberation.report.experts


def test_hanging_expert_is_not_asked_again():
  """Until its thread ends: then it is asked again."""
  experts = FaultyExperts(stars='hangs')
  guard = ExpertGuard(experts, 0.3)
  assert ask(experts, 'stars', guard=guard)[1].kind == 'hangs'
  begun = experts.begun
  for choice in ('stars', {'law': 1.0, 'stars': 1.0}):
    _, report = ask(experts, choice, guard=guard)
    assert report.kind == 'busy' and 'still hangs' in report.fault
  assert experts.begun == begun
  experts.faults.clear()
  experts.released.set()
  guard.timeout = 20
  for _ in range(200):
    _, report = ask(experts, 'stars', guard=guard)
    if not report.fault:
      break
    time.sleep(0.02)
  assert report.experts == {'stars': 1.0}


def test_router_that_chooses_a_hanging_expert():
  """The expert is not asked again, whether its name or a router asked first."""
  experts = FaultyExperts(Fixed(['stars', 'law'], 2.0, -1.0), stars='hangs')
  experts.augment(experts.engine.read([PROMPTS[1]]), [{'law': 1.0}])  # compiled
  guard = ExpertGuard(experts, 5)
  assert ask(experts, 'auto', guard=guard)[1].kind == 'hangs'
  begun = experts.begun
  _, report = ask(experts, 'auto', guard=guard)
  assert (report.kind, report.fault) == (
      'busy', "the expert 'stars' still hangs in an earlier text")
  assert experts.begun == begun and report.scores == {'stars': 2.0, 'law': -1.0}
  experts.released.set()
