"""Programs in a process of their own, timed in turns."""

import os
import threading
import time

import pytest

from latent_deliberation.benchmarks.baseline import Baseline, alternate
from latent_deliberation.errors import UserError


def build_sleepers(short: float, long: float):
  return {'short': lambda: time.sleep(short), 'long': lambda: time.sleep(long)}


def build_faults():
  return {'raise': lambda: [][0], 'end': lambda: os._exit(3)}


def build_one_that_soon_ends():
  threading.Timer(0.2, os._exit, (3,)).start()
  return {'never': lambda: None}


def refuse():
  raise OSError('no such weights')


def test_program_is_timed():
  """The seconds are those in the other process."""
  with Baseline(build_sleepers, 0.0, 0.3) as baseline:
    short, long = baseline.seconds('short'), baseline.seconds('long')
  assert short < long and 0.3 <= long


def test_failure_is_reported():
  """An error in the other process is raised here."""
  with pytest.raises(UserError, match='OSError: no such weights'):
    Baseline(refuse)
  with Baseline(build_faults) as baseline, pytest.raises(UserError, match='IndexError'):
    baseline.seconds('raise')
  with Baseline(build_faults) as baseline, pytest.raises(UserError, match='exit code 3'):
    baseline.seconds('end')


def test_end_between_turns():
  """A process that ended between two turns is reported, too."""
  with Baseline(build_one_that_soon_ends) as baseline:
    time.sleep(1.0)
    with pytest.raises(UserError, match='exit code 3'):
      baseline.seconds('never')


def test_turns_alternate():
  """Programs alternate after a first run of each."""
  runs = []

  def program(name: str):
    runs.append(name)
    return float(len(runs))

  seconds = alternate({'a': lambda: program('a'), 'b': lambda: program('b')}, 2)
  assert runs == ['a', 'b'] * 3
  assert seconds == {'a': [3.0, 5.0], 'b': [4.0, 6.0]}
