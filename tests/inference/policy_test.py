"""Where texts deliberate."""

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.inference.policy import NEVER, ONCE, Gate, Policy, calibrate


@pytest.mark.parametrize('policy, stops', [
    (NEVER, []), (ONCE, [0]), (Policy(at=(5, 2, 5)), [2, 5]), (Policy(every=4), [0, 4, 8, 12]),
    (Policy(at=(3,), every=6), [0, 3, 6, 12]), (Policy(threshold=1.0), [])])
def test_stops_follow_one_another(policy, stops):
  found, count = [], 0
  while (stop := policy.next_stop(count)) is not None and stop < 14:
    assert stop >= count
    found.append(stop)
    count = stop + 1
  assert found == stops


def test_only_some_policies_repeat():
  assert [policy.repeats for policy in (
      NEVER, ONCE, Policy(at=(7,)), Policy(at=(0, 7)), Policy(every=3), Policy(threshold=2.0))] == [
          False, False, False, True, True, True]


@pytest.mark.parametrize('budget', [0.0, 0.1, 0.25, 1.0])
def test_a_calibrated_threshold_spends_its_budget(budget):
  entropies = np.random.default_rng(0).exponential(size=4000)
  threshold = calibrate(entropies, budget)
  assert np.mean(entropies > threshold) == pytest.approx(budget, abs=0.001)


@pytest.mark.parametrize('call, message', [
    (lambda: Policy(at=(-1, 2)), r'at = \(-1, 2\)'), (lambda: Policy(every=0), 'every = 0'),
    (lambda: Policy(apart=0), 'apart = 0'), (lambda: Policy(threshold=-1.0), 'threshold = -1.0'),
    (lambda: Policy(threshold=float('nan')), 'threshold = nan'),
    (lambda: Policy(gate=Gate(np.zeros(2), 0.0)), 'a gate without a threshold'),
    (lambda: calibrate([1.0], 1.5), 'budget = 1.5'), (lambda: calibrate([], 0.5), '0 entropies'),
    (lambda: calibrate([1.0, float('nan')], 0.5), '2 entropies, 1 of them finite')])
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()
