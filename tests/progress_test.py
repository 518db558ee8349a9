"""Progress lines show the time left, and times of phases outlive a launch."""

import contextlib
import itertools
import threading
import time

import pytest
from absl import logging

from latent_deliberation import progress
from latent_deliberation.errors import UserError
from latent_deliberation.progress import PhaseClock, Progress, announced, format_duration


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
  assert lines[0] == 'Packing train: 1 of 10 documents  ETA 1m30s'
  assert lines[-1] == 'Packing train: 6 of 10 documents  ETA 40s'


def test_time_left_without_the_first(monkeypatch):
  """Units that were finished before do not count as speed."""
  lines = []
  monkeypatch.setattr(time, 'monotonic', itertools.count(0, 10).__next__)
  monkeypatch.setattr(logging, 'info', lambda text, *values: lines.append(text % values))
  scoring = Progress('scoring', 'batches', 10, first=1)
  scoring.update(1)
  scoring.update(2)
  assert lines == ['scoring: 1 batches', 'scoring: 2 of 10 batches  ETA 2m40s']


def test_ten_seconds(monkeypatch):
  """Lines come every ten seconds at most."""
  assert len(lines_of(monkeypatch, 10, 4)) == 2


def test_unknown_total(monkeypatch):
  """Without a known total, a line shows the count alone."""
  for total in (None, float('inf')):
    assert lines_of(monkeypatch, total, 10)[0] == 'Packing train: 1 documents'


def test_announced(monkeypatch):
  """A long task shows that it is at work, and how long it took; a short one stays silent."""
  lines, told = [], threading.Event()

  def log(text, *values):
    lines.append(text % values)
    told.set()

  monkeypatch.setattr(logging, 'info', log)
  with announced('packing', after=60):
    pass
  assert not lines
  with announced('packing', after=0.001):
    assert told.wait(10)
  assert lines == ['packing: at work for 0s', 'packing: took 0s']
  with pytest.raises(KeyError), announced('packing', after=0.001):
    raise KeyError  # a task that failed took no time
  assert lines.count('packing: took 0s') == 1


def test_counted(monkeypatch):
  """All batches come, and work on the first of them is announced."""
  announcements = []
  monkeypatch.setattr(progress, 'announced', lambda task: announcements.append(task)
                      or contextlib.nullcontext())
  assert list(progress.counted('abc', 'scoring')) == ['a', 'b', 'c']
  assert announcements == ['scoring: the first of 3 batches']


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


@pytest.mark.parametrize('content', ['{', '[]', '{"seconds": 3, "complete": []}'])
def test_damaged_phases(tmp_path, content):
  (tmp_path / 'phases.json').write_text(content)
  with pytest.raises(UserError, match='phases.json is damaged .*delete it'):
    PhaseClock(tmp_path / 'phases.json')


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
