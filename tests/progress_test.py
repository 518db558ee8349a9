"""Progress lines show the time left, and times of phases outlive a launch."""

import itertools
import time

import pytest
from absl import logging

from latent_deliberation import progress
from latent_deliberation.progress import PhaseClock, Progress, format_duration


def lines_of(monkeypatch, total, seconds_between):
  """What six updates log that come `seconds_between` after one another."""
  lines, clock = [], itertools.count(0, seconds_between)
  monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(logging, 'info', lambda text, *values: lines.append(text % values))
  packing = Progress('Packing train', 'documents', total)
  for done in range(1, 7):
    packing.update(done)
  return lines


def test_time_left(monkeypatch):
  """The time left follows from the pace so far."""
  lines = lines_of(monkeypatch, 10, 10)
  assert lines[0] == 'Packing train: 1 of 10 documents, 90 s left'
  assert lines[-1] == 'Packing train: 6 of 10 documents, 40 s left'


def test_ten_seconds(monkeypatch):
  """Lines come every ten seconds at most."""
  assert len(lines_of(monkeypatch, 10, 4)) == 2


def test_unknown_total(monkeypatch):
  """Without a known total, a line shows the count alone."""
  for total in (None, float('inf')):
    assert lines_of(monkeypatch, total, 10)[0] == 'Packing train: 1 documents'


@pytest.fixture
def said(monkeypatch):
  """The lines of the log."""
  lines = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: lines.append(text % values))
  return lines


def test_phase_clock(tmp_path, monkeypatch, said):
  """The clock sums over launches until a phase is complete; a failed one does not count."""
  now = itertools.count(0, 10)
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: float(next(now)))

  def launch(error=None, further=False):
    clock = PhaseClock(tmp_path / 'phases.json')
    with clock.phase('decoder', further):
      if error:
        raise error
    return clock.seconds

  with pytest.raises(SystemExit):
    launch(SystemExit(143))
  with pytest.raises(ValueError):
    launch(ValueError())
  said.clear()
  assert launch() == {'decoder': 20}
  assert said == ['=== decoder', '=== decoder: done in 20s']
  assert launch() == {'decoder': 20}
  with pytest.raises(ValueError):
    launch(ValueError(), further=True)
  assert launch() == {'decoder': 30}
  assert launch() == {'decoder': 30}


@pytest.mark.parametrize('error, word', [(SystemExit(143), 'stopped'), (ValueError(), 'failed')])
def test_unfinished_phase(tmp_path, said, error, word):
  """A phase that did not end is not called done."""
  with pytest.raises(type(error)), PhaseClock(tmp_path / 'phases.json').phase('decoder'):
    raise error
  assert [line.split()[2:] for line in said] == [[], [word, 'after', '0s']]


@pytest.mark.parametrize('seconds, text', [
    (0.4, '0s'), (59.6, '1m00s'), (192, '3m12s'), (7500, '2h05m'), (100_800, '1d04h')])
def test_format_duration(seconds, text):
  """A duration shows its two largest units."""
  assert format_duration(seconds) == text
