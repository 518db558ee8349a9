"""A run that gets a signal saves the finished step, says how to resume, and resumes from there.

Run as a script, this file trains slowly, for a test that sends it a signal.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.training import loop
from latent_deliberation.training.loop import Preempted
from latent_deliberation.training.metrics import read_metrics
from tests.training.toy_run import ToyBatches, run, saved_steps


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resumes(tmp_path, number, capfd):
  """A signal is answered at once, saves the finished step, and the run resumes from it."""
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

  def interrupt(step):
    if step == 2:
      os.kill(os.getpid(), number)

  with pytest.raises(Preempted, match=f'{number.name}.*3/6.*{tmp_path}') as stopped:
    run(tmp_path / 'cut', batches=ToyBatches(interrupt))
  assert number.name in capfd.readouterr().err
  assert stopped.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
  assert saved_steps(tmp_path / 'cut') == [3]
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  resumed, whole = run(tmp_path / 'cut'), run(tmp_path / 'whole')
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_signal_in_last_evaluation(tmp_path):
  """A signal during the last evaluation is not lost."""
  def interrupt(params):
    os.kill(os.getpid(), signal.SIGTERM)
    return {'one': 1.0}

  with pytest.raises(Preempted, match='SIGTERM.*2/2'):
    run(tmp_path, num_steps=2, evaluators={'held_out': interrupt})
  assert read_metrics(tmp_path / METRICS_FILE)[-1]['held_out/one'] == 1.0


def test_processes_ask_by_a_growing_number(tmp_path, monkeypatch):
  """The runtime chooses a number after the highest one so far, which must come in every run.

  Steps would not do: those of a resumed run are far ahead, and a second run begins at 1 again.
  """
  asked = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(loop.orbax_utils, 'reached_preemption', lambda number: asked.append(number))
  for _ in range(2):
    with loop._StopRequests() as stop:
      stop.requested()
      stop.requested()
  assert asked == list(range(asked[0], asked[0] + 4))


def test_second_interrupt(tmp_path):
  """A second interrupt acts at once."""
  def interrupt(step):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, batches=ToyBatches(interrupt))


def test_other_thread(tmp_path):
  """Training works outside the main thread."""
  states = []
  thread = threading.Thread(target=lambda: states.append(run(tmp_path, num_steps=2)))
  thread.start()
  thread.join()
  assert int(states[0].step) == 2


def test_sigterm_of_a_process(tmp_path):
  """SIGTERM ends the process with code 143, and it says how to resume."""
  process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])})
  try:
    assert process.stdout.readline() == 'training\n'
    process.terminate()
    _, log = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 143, log
  assert 'SIGTERM' in log and 'the same command' in log
  assert len(saved_steps(tmp_path)) == 1


def train_slowly(workdir):
  def before(step):
    if step == 1:
      print('training', flush=True)
    time.sleep(0.05)

  run(workdir, num_steps=1000, batches=ToyBatches(before))


if __name__ == '__main__':
  train_slowly(Path(sys.argv[1]))
