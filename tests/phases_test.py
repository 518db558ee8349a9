"""Times of phases outlive the launch that measured them."""

import itertools

import pytest

from latent_deliberation import progress
from latent_deliberation.progress import PhaseClock


def test_the_clock_sums_over_launches_until_a_phase_is_complete(tmp_path, monkeypatch):
  now = itertools.count(0, 10)
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: float(next(now)))

  def launch(error=None):
    clock = PhaseClock(tmp_path / 'phases.json')
    with clock.phase('decoder'):
      if error:
        raise error
    return clock.seconds

  with pytest.raises(SystemExit):
    launch(SystemExit(0))
  assert launch() == {'decoder': 20}
  assert launch() == {'decoder': 20}
