"""The loop resumes exactly, never saves a bad state, and stops when it is told to.

Run as a script, this file trains slowly, for a test that sends it a signal.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import latent_deliberation
from latent_deliberation.batch import Batch
from latent_deliberation.training.checkpoint import Checkpointer
from latent_deliberation.training.identity import RunIdentity
from latent_deliberation.training.loop import LoopConfig, Preempted, train
from latent_deliberation.training.metrics import FILE_NAME, MetricsWriter, read_metrics
from latent_deliberation.training.state import TrainState

IDENTITY = RunIdentity(job='toy', config={}, decoder='', data='toy')
OPTIMIZER = optax.adam(0.1)


class ToyBatches:
  """Batches drawn from their step; `before(step)` runs ahead of each."""
  fingerprint = 'toy'

  def __init__(self, before=lambda step: None):
    self._before, self.restored = before, None

  def __call__(self, step):
    self._before(step)
    tokens = np.random.default_rng(step).integers(1, 9, (2, 4), dtype=np.int32)
    return Batch(tokens, np.ones_like(tokens), np.arange(8, dtype=np.int32).reshape(2, 4) % 4)

  def save(self, directory, step):
    (directory / 'step.json').write_text(json.dumps(step))

  def restore(self, directory, step):
    self.restored = json.loads((directory / 'step.json').read_text())


def loss_fn(params, batch):
  return jnp.mean((batch.tokens @ params['w'] - batch.tokens.sum(axis=1)) ** 2)


def toy_step(state, batch):
  loss, gradients = jax.value_and_grad(loss_fn)(state.params, batch)
  updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
  state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
  return state, {'loss': loss, 'grad_norm': optax.tree.norm(gradients)}


JITTED_STEP = jax.jit(toy_step, donate_argnums=0)


def new_state():
  return TrainState.create({'w': jnp.zeros(4)}, OPTIMIZER)


def run(workdir, num_steps=6, *, batches=None, train_step=JITTED_STEP, evaluators=None,
        save_every=100, eval_every=100, log_every=1, checkpoints=True):
  """A launch: new objects all through, resuming whatever is in `workdir`."""
  batches = batches or ToyBatches()
  state, checkpointer = new_state(), None
  metrics = MetricsWriter(workdir)
  if checkpoints:
    checkpointer = Checkpointer(workdir / 'checkpoints', keep=2)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state)
    state = checkpointer.restore(abstract, batches, IDENTITY) or state
  try:
    return train(state, train_step, batches, place=jax.device_put, checkpointer=checkpointer,
                 config=LoopConfig(num_steps, log_every, eval_every, save_every, keep=2),
                 identity=IDENTITY, metrics=metrics, evaluators=evaluators or {})
  finally:
    metrics.close()
    if checkpointer is not None:
      checkpointer.close()


def kill_at(step):
  """A train step that fails at the update after `step`, as a crash would."""
  def train_step(state, batch):
    if int(state.step) == step:
      raise KeyboardInterrupt('killed')
    return JITTED_STEP(state, batch)
  return train_step


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()
                if path.name.isdigit())


def losses(workdir):
  return {row['step']: row['loss'] for row in read_metrics(workdir / FILE_NAME) if 'loss' in row}


def test_a_killed_and_resumed_run_equals_one_that_was_not(tmp_path):
  whole = run(tmp_path / 'whole', save_every=3)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'cut', save_every=3, train_step=kill_at(5))
  batches = ToyBatches()
  resumed = run(tmp_path / 'cut', save_every=3, batches=batches)
  assert batches.restored == 3
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
  assert sorted(losses(tmp_path / 'cut')) == [1, 2, 3, 4, 5, 6]


def test_the_last_step_is_always_saved_and_a_finished_run_trains_no_more(tmp_path):
  run(tmp_path, num_steps=5, save_every=2)
  assert saved_steps(tmp_path) == [4, 5]
  state = run(tmp_path, num_steps=5, train_step=None)
  assert int(state.step) == 5


def test_metrics_are_logged_at_the_cadence_and_at_the_end(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger='absl'):
    run(tmp_path, num_steps=5, log_every=2, checkpoints=False)
  rows = read_metrics(tmp_path / FILE_NAME)
  assert [row['step'] for row in rows] == [2, 4, 5]
  assert all(row['grad_norm'] > 0 and row['tokens_per_second'] > 0 for row in rows)
  assert 'step 4/5  loss ' in caplog.text and 'ETA ' in caplog.text


def test_evaluators_see_the_parameters_at_their_steps_and_at_the_end(tmp_path):
  def evaluate(params):
    return {'first': params['w'][0]}

  state = run(tmp_path, num_steps=5, eval_every=2, log_every=100, save_every=2,
              evaluators={'held_out': evaluate})
  rows = {row['step']: row['held_out/first'] for row in read_metrics(tmp_path / FILE_NAME)}
  assert sorted(rows) == [2, 4, 5]
  assert rows[5] == float(state.params['w'][0])
  assert len(set(rows.values())) == 3


def test_an_evaluation_that_a_crash_cut_off_is_made_up_for(tmp_path):
  def crash(params):
    raise KeyboardInterrupt('killed')

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, num_steps=4, eval_every=2, save_every=2, evaluators={'held_out': crash})
  assert saved_steps(tmp_path) == [2]
  run(tmp_path, num_steps=4, eval_every=2, save_every=2,
      evaluators={'held_out': lambda params: {'one': 1.0}})
  rows = read_metrics(tmp_path / FILE_NAME)
  assert [row['step'] for row in rows if 'held_out/one' in row] == [2, 4]


@pytest.mark.parametrize('name, value', [('loss', np.nan), ('grad_norm', np.inf)])
@pytest.mark.parametrize('save_every', [1, 2, 4])
def test_a_number_that_is_not_finite_stops_the_run_and_is_never_saved(
    tmp_path, name, value, save_every):
  def train_step(state, batch):
    step = int(state.step) + 1
    state, scalars = JITTED_STEP(state, batch)
    return state, {**scalars, name: jnp.float32(value if step >= 4 else 1.0)}

  good = {1: 3, 2: 2, 4: None}[save_every]
  last = rf'last good checkpoint is \S+/{good}\.' if good else 'There is no checkpoint in'
  with pytest.raises(FloatingPointError, match=rf'{name} is {value} at step 4\. .*{last}'):
    run(tmp_path, num_steps=8, train_step=train_step, save_every=save_every)
  assert max(saved_steps(tmp_path), default=None) == good
  assert max(losses(tmp_path)) == 3


def test_steps_are_read_one_behind_so_that_the_device_never_waits(tmp_path):
  class Scalar:
    """A scalar that knows how many steps were dispatched when it was read."""
    def __init__(self, step):
      self.step = step

    def __array__(self, dtype=None, copy=None):
      read.append((self.step, dispatched[-1]))
      return np.float32(1.0)

  dispatched, read = [], []

  def train_step(state, batch):
    dispatched.append(len(dispatched) + 1)
    return state, {'loss': Scalar(dispatched[-1]), 'grad_norm': np.float32(1.0)}

  run(tmp_path, num_steps=4, train_step=train_step, checkpoints=False)
  assert read == [(1, 2), (2, 3), (3, 4), (4, 4)]


def test_a_state_past_the_end_is_refused(tmp_path):
  run(tmp_path, num_steps=5)
  with pytest.raises(ValueError, match='at step 5, past num_steps 4'):
    run(tmp_path, num_steps=4)


@pytest.mark.parametrize('field', ['num_steps', 'log_every', 'eval_every', 'save_every', 'keep'])
def test_a_length_or_cadence_below_one_is_refused(field):
  with pytest.raises(ValueError, match=f'{field} is 0; it must be 1 or more'):
    LoopConfig(**{**dict(num_steps=1, log_every=1, eval_every=1, save_every=1, keep=1), field: 0})


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_finished_step_and_the_run_goes_on_from_it(tmp_path, number):
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

  def interrupt(step):
    if step == 2:
      os.kill(os.getpid(), number)

  with pytest.raises(Preempted, match=f'{number.name} at step 3/6. Saved in {tmp_path}'):
    run(tmp_path / 'cut', batches=ToyBatches(interrupt))
  assert saved_steps(tmp_path / 'cut') == [3]
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  resumed, whole = run(tmp_path / 'cut'), run(tmp_path / 'whole')
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path):
  def interrupt(params):
    os.kill(os.getpid(), signal.SIGTERM)
    return {'one': 1.0}

  with pytest.raises(Preempted, match='SIGTERM at step 2/2'):
    run(tmp_path, num_steps=2, evaluators={'held_out': interrupt})
  assert read_metrics(tmp_path / FILE_NAME)[-1]['held_out/one'] == 1.0


def test_a_second_interrupt_acts_at_once(tmp_path):
  def interrupt(step):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, batches=ToyBatches(interrupt))


def test_training_works_outside_the_main_thread(tmp_path):
  states = []
  thread = threading.Thread(target=lambda: states.append(run(tmp_path, num_steps=2)))
  thread.start()
  thread.join()
  assert int(states[0].step) == 2


def test_sigterm_ends_the_process_with_code_zero_and_says_how_to_resume(tmp_path):
  source = Path(latent_deliberation.__file__).parents[1]
  process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, 'PYTHONPATH': str(source)})
  try:
    assert process.stdout.readline() == 'training\n'
    process.terminate()
    _, log = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0, log
  assert 'stopped by SIGTERM' in log and 'the same command goes on from there' in log
  assert len(saved_steps(tmp_path)) == 1


def train_slowly(workdir):
  def before(step):
    if step == 1:
      print('training', flush=True)
    time.sleep(0.05)

  run(workdir, num_steps=1000, batches=ToyBatches(before))


if __name__ == '__main__':
  train_slowly(Path(sys.argv[1]))
