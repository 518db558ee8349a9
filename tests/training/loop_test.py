"""The loop resumes exactly, logs and saves at its cadences, and never saves a bad state."""

import itertools
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.training import loop
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.metrics import read_lines, read_metrics
from latent_deliberation.training.utilisation import TimeLedger
from tests.training.toy_run import JITTED_STEP, ToyBatches, run, saved_steps


def kill_at(step):
  """A train step that fails at the update after `step`, as a crash would."""
  def train_step(state, batch):
    if int(state.step) == step:
      raise KeyboardInterrupt('killed')
    return JITTED_STEP(state, batch)
  return train_step


def losses(workdir):
  return {row['step']: row['loss'] for row in read_metrics(workdir / METRICS_FILE) if 'loss' in row}


def test_resume_is_exact(tmp_path):
  """A run that was killed and resumed equals one that was not."""
  whole = run(tmp_path / 'whole', save_every=3)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'cut', save_every=3, train_step=kill_at(5))
  batches = ToyBatches()
  resumed = run(tmp_path / 'cut', save_every=3, batches=batches)
  assert batches.restored == 3
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
  assert sorted(losses(tmp_path / 'cut')) == [1, 2, 3, 4, 5, 6]


def test_last_step(tmp_path):
  """The last step is always saved, and a finished run trains no more."""
  run(tmp_path, num_steps=5, save_every=2)
  assert saved_steps(tmp_path) == [4, 5]
  state = run(tmp_path, num_steps=5, train_step=None)
  assert int(state.step) == 5


def test_log_every(tmp_path, caplog):
  """Metrics are logged at the cadence and at the end."""
  with caplog.at_level(logging.INFO, logger='absl'):
    run(tmp_path, num_steps=5, log_every=2, checkpoints=False)
  rows = read_metrics(tmp_path / METRICS_FILE)
  assert [row['step'] for row in rows] == [2, 4, 5]
  assert all(row['grad_norm'] > 0 and row['tokens_per_second'] > 0 for row in rows)
  assert 'step 4/5  loss ' in caplog.text and 'ETA ' in caplog.text and ' GiB  ' in caplog.text
  assert not any(row['step'] == 1 for row in rows) and 'step 1/5' not in caplog.text


def test_seconds_of_a_run(tmp_path, caplog, monkeypatch):
  """The lines of the metrics hold every second of a launch, by kind; the log ends with goodput."""
  clock = itertools.count(0, 1)
  monkeypatch.setattr(loop, 'TimeLedger', lambda begun: TimeLedger(begun, lambda: next(clock)))
  with caplog.at_level(logging.INFO, logger='absl'):
    run(tmp_path, num_steps=4, log_every=2, save_every=2, eval_every=4,
        evaluators={'held_out': lambda params: {'one': 1.0}})
  lines = [line for line in read_lines(tmp_path / METRICS_FILE) if 'time/from' in line]
  assert [(line['time/from'], line['step']) for line in lines] == [(0, 2), (2, 4), (4, 4)]
  spent = {key: sum(line.get(key, 0.0) for line in lines)
           for line in lines for key in line if key.startswith('time/') and key != 'time/from'}
  # Each look at the clock is a second later.
  assert sum(spent.values()) == next(clock) - 1
  assert spent['time/start'] == spent['time/compile'] == spent['time/evaluation'] == 1
  assert spent['time/save'] == 3  # two, and the wait for the last
  assert spent['time/step'] >= 7  # dispatched three times, read four times
  assert sum(bool(re.match(r'goodput [\d.]+% of \d+s in 1 launch: start 1s, ', message))
             for message in caplog.messages) == 1


def test_saves_are_no_time_of_training(tmp_path, monkeypatch):
  """Speed begins anew after a save, as after an evaluation."""
  begun = []

  class Watched(loop.Pace):
    def start(self, step):
      begun.append(step)
      super().start(step)

  monkeypatch.setattr(loop, 'Pace', Watched)
  run(tmp_path, num_steps=7, log_every=7, save_every=3, eval_every=7)
  assert begun == [1, 3, 6, 7, 7, 7]  # the first step compiles; 7 is logged, saved and evaluated


def test_log_seconds(tmp_path, caplog, monkeypatch):
  """Slow steps have lines between those of the cadence, and the metrics stay at the cadence."""
  clock = itertools.count(0, 20)
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  with caplog.at_level(logging.INFO, logger='absl'):
    run(tmp_path, num_steps=6, log_every=6, checkpoints=False)
  lines = [line for line in caplog.messages if line.startswith('step ')]
  assert [line.split()[1] for line in lines] == ['2/6', '4/6', '6/6']
  assert [row['step'] for row in read_metrics(tmp_path / METRICS_FILE)] == [6]


def test_eval_every(tmp_path):
  """Evaluators get the parameters at the cadence and at the end."""
  def evaluate(params):
    return {'first': params['w'][0]}

  state = run(tmp_path, num_steps=5, eval_every=2, log_every=100, save_every=2,
              evaluators={'held_out': evaluate})
  rows = {row['step']: row['held_out/first'] for row in read_metrics(tmp_path / METRICS_FILE)}
  assert sorted(rows) == [2, 4, 5]
  assert rows[5] == float(state.params['w'][0])
  assert len(set(rows.values())) == 3


def test_lost_evaluation(tmp_path):
  """An evaluation that a crash cut off is repeated."""
  def crash(params):
    raise KeyboardInterrupt('killed')

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, num_steps=4, eval_every=2, save_every=2, evaluators={'held_out': crash})
  assert saved_steps(tmp_path) == [2]
  run(tmp_path, num_steps=4, eval_every=2, save_every=2,
      evaluators={'held_out': lambda params: {'one': 1.0}})
  rows = read_metrics(tmp_path / METRICS_FILE)
  assert [row['step'] for row in rows if 'held_out/one' in row] == [2, 4]


@pytest.mark.parametrize('name, value', [('loss', np.nan), ('grad_norm', np.inf)])
@pytest.mark.parametrize('save_every', [1, 2, 4])
def test_not_finite(tmp_path, name, value, save_every):
  """A number that is not finite stops the run and is never saved."""
  def train_step(state, batch):
    step = int(state.step) + 1
    state, scalars = JITTED_STEP(state, batch)
    return state, {**scalars, name: jnp.float32(value if step >= 4 else 1.0)}

  good = {1: 3, 2: 2, 4: None}[save_every]
  last = rf'{tmp_path}\S*/{good}\.' if good else 'no checkpoint'
  with pytest.raises(UserError, match=rf'{name} = {value}.*step 4\..*{last}'):
    run(tmp_path, num_steps=8, train_step=train_step, save_every=save_every)
  assert max(saved_steps(tmp_path), default=None) == good
  assert max(losses(tmp_path)) == 3


def skipping(spikes):
  """A train step that skips the updates of some steps."""
  skipped = [0, 0]

  def train_step(state, batch):
    step = int(state.step) + 1
    state, scalars = JITTED_STEP(state, batch)
    skipped[:] = [skipped[0] + 1, skipped[1] + 1] if step in spikes else [skipped[0], 0]
    if step in spikes:
      scalars['loss'] = jnp.float32(np.nan)
    return state, {**scalars, 'skipped_updates': np.int32(skipped[0]),
                   'skipped_in_a_row': np.int32(skipped[1])}

  return train_step


def test_skipped_updates(tmp_path, caplog):
  """Spikes are told and counted, also those that are not finite, and the run goes on."""
  run(tmp_path, num_steps=6, train_step=skipping({3, 5}), checkpoints=False)
  rows = read_metrics(tmp_path / METRICS_FILE)
  assert [row['skipped_updates'] for row in rows] == [0, 0, 1, 1, 2, 2]
  assert [row['step'] for row in rows if 'loss' not in row] == [3, 5]
  assert [message.partition(':')[0] for message in caplog.messages
          if 'is skipped' in message] == ['step 3', 'step 5']


def test_skipped_in_a_row(tmp_path):
  """Too many in a row stop the run."""
  many = loop.MOST_SKIPPED
  with pytest.raises(UserError, match=f'{many} updates in a row .* step {many + 2}.*skip_spikes'):
    run(tmp_path, num_steps=99, train_step=skipping(range(3, 99)), checkpoints=False)


class Clock:
  """A clock that a process moves on."""
  now = 0.0

  def __call__(self):
    return self.now


def test_saves_by_time():
  """A save is due when its time has passed, whatever steps cost, and not before."""
  clock = Clock()
  saves, saved = loop.TimedSaves(60.0, 0, clock), []
  for step in range(1, 61):
    clock.now += 1.0 if step < 30 else 7.0
    if saves.is_due(step):
      saves.note_save(step)
      saved.append(clock.now)
  gaps = np.diff([0.0, *saved])
  # It is asked at half of what seems left, so steps that slow down make it late once.
  assert len(saved) >= 3 and all(gaps >= 60) and all(gaps[1:] <= 67)
  assert not any(loop.TimedSaves(0.0, 0, clock).is_due(step) for step in range(1, 9))


def test_first_step_after_a_save():
  """It is only dispatched when the clock is read, so its time says nothing of the pace."""
  clock = Clock()
  saves, saved, waited_at = loop.TimedSaves(600.0, 0, clock), [], 0
  for step in range(1, 1001):
    # Dispatch a step. Then wait for the one before, unless a save has waited for it.
    clock.now += 0.005
    clock.now += 2.5 * (step - 1 - waited_at)
    waited_at = step - 1
    if saves.is_due(step):
      clock.now += 2.5
      waited_at = step
      saves.note_save(step)
      saved.append(clock.now)
  assert len(saved) == 4 and max(np.diff([0.0, *saved])) <= 610


def test_processes_save_at_the_same_step(monkeypatch):
  """Process 0's clock counts, and few steps ask it."""
  answers, asked = [], []

  def tell(value):
    answers.append(value)
    return value

  def hear(value):
    return asked.pop(0)

  def saved_by(pace, exchange):
    monkeypatch.setattr(loop, 'from_process_zero', exchange)
    clock = Clock()
    saves, saved = loop.TimedSaves(100.0, 0, clock), []
    for step in range(1, 400):
      clock.now += pace
      if saves.is_due(step):
        saves.note_save(step)
        saved.append(step)
    return saved

  first = saved_by(1.0, tell)
  asked[:] = answers
  assert first == [100, 200, 300] and len(answers) < 60
  assert saved_by(17.0, hear) == first and not asked


def test_save_minutes(tmp_path, monkeypatch):
  """Checkpoints come by the clock as well as by steps."""
  clock = itertools.count(0, 20)
  timed = loop.TimedSaves
  monkeypatch.setattr(loop, 'TimedSaves',
                      lambda seconds, step: timed(seconds, step, lambda: next(clock)))
  run(tmp_path, num_steps=9, save_every=8, config={'save_minutes': 1.0, 'keep': 9})
  assert saved_steps(tmp_path) == [3, 6, 8, 9]


def test_keep_every(tmp_path):
  """Multiples are saved, and kept when newer ones come."""
  run(tmp_path, num_steps=9, save_every=4, config={'keep_every': 3, 'keep': 1})
  assert saved_steps(tmp_path) == [3, 6, 9]
  assert sorted(path.name for path in (tmp_path / 'checkpoints/data').iterdir()) == ['3', '6', '9']


def test_scalars_read_late(tmp_path):
  """Scalars are read during the next step, so devices never wait."""
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


def test_state_past_end(tmp_path):
  """A state past the end is refused."""
  run(tmp_path, num_steps=5)
  with pytest.raises(UserError, match='step 5.*num_steps = 4'):
    run(tmp_path, num_steps=4)


@pytest.mark.parametrize('field', ['num_steps', 'log_every', 'eval_every', 'save_every', 'keep',
                                   'log_seconds'])
def test_cadence_below_one(field):
  """A length or cadence below 1 is refused."""
  with pytest.raises(UserError, match=f'{field} = 0'):
    LoopConfig(**{**dict(num_steps=1, log_every=1, eval_every=1, save_every=1, keep=1), field: 0})


@pytest.mark.parametrize('field, value', [
    ('save_minutes', -1.0), ('save_minutes', float('inf')), ('keep_every', -1),
    ('keep_every', 1.5)])
def test_save_cadence_below_zero(field, value):
  """So are cadences of saves below 0, which is none."""
  with pytest.raises(UserError, match=f'{field} = {value}'):
    LoopConfig(1, 1, 1, 1, 1, **{field: value})
