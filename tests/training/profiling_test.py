"""A profile holds the steps that were asked for, with our names in it, and never ends a run."""

import contextlib
import itertools
from pathlib import Path

import jax
import pytest

from latent_deliberation.build import build_deliberator
from latent_deliberation.errors import UserError
from latent_deliberation.planning.compile import batch_shapes
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training import profiling
from latent_deliberation.training.loop import Preempted
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.profiling import StepProfile, parse_range
from latent_deliberation.training.train import describe_training
from tests import finished
from tests.training.toy_run import JITTED_STEP, run


def traced_steps(directory: Path) -> list[list[int]]:
  """Numbers of the steps in each trace of a directory, in order."""
  found = []
  for path in sorted(directory.rglob('*.xplane.pb')):
    events = itertools.chain.from_iterable(
        line.events for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines)
    found.append([number for event in events if event.name == 'step'
                  for name, number in event.stats if name == 'step_num'])
  return found


def test_steps_of_a_profile(tmp_path, caplog):
  """The steps that were asked for are traced, those before and after are not."""
  with caplog.at_level('INFO', logger='absl'):
    run(tmp_path, checkpoints=False, profile=StepProfile(tmp_path, parse_range('3:5', 6)))
  assert traced_steps(tmp_path) == [[3, 4]]
  assert f'xprof --logdir={tmp_path}' in caplog.text


def test_run_that_ends_in_a_profile(tmp_path, caplog):
  """What was traced until then is written, and the log says up to which step."""
  def train_step(state, batch):
    if int(state.step) == 3:
      raise Preempted('stopped', 15)
    return JITTED_STEP(state, batch)

  profile = StepProfile(tmp_path, range(2, 9))
  with pytest.raises(Preempted):
    run(tmp_path, num_steps=9, checkpoints=False, train_step=train_step, profile=profile)
  with caplog.at_level('INFO', logger='absl'):
    profile.close()
  assert traced_steps(tmp_path) == [[2, 3, 4]] and 'a profile of steps up to 3 is in' in caplog.text


def test_profile_that_cannot_be_written(tmp_path, monkeypatch, caplog):
  """It is a warning, and the run ends as without a profile."""
  def fail():
    stop()
    raise OSError(28, 'No space left on device')

  stop = jax.profiler.stop_trace
  monkeypatch.setattr(jax.profiler, 'stop_trace', fail)
  profile = StepProfile(tmp_path, range(2, 4))
  state = run(tmp_path, checkpoints=False, profile=profile)
  assert int(state.step) == 6 and f'no profile in {tmp_path}' in caplog.text


def test_profile_that_cannot_begin(tmp_path, monkeypatch, caplog):
  """What was opened for it, as the copy to a bucket, is closed again."""
  closed = []

  @contextlib.contextmanager
  def open_files(directory):
    try:
      yield directory
    finally:
      closed.append(directory)

  def fail(*args, **options):
    raise RuntimeError('no profiler')

  monkeypatch.setattr(profiling, 'growing_files', open_files)
  monkeypatch.setattr(jax.profiler, 'start_trace', fail)
  run(tmp_path, checkpoints=False, profile=StepProfile(tmp_path, range(2, 4)))
  assert closed == [tmp_path] and 'no profile in' in caplog.text


def test_second_profiler(tmp_path, caplog):
  """A profiler that is at work already is a warning, too."""
  with jax.profiler.trace(str(tmp_path / 'other')):
    run(tmp_path, checkpoints=False, profile=StepProfile(tmp_path / 'ours', range(2, 4)))
  assert 'no profile in' in caplog.text and not (tmp_path / 'ours').exists()


@pytest.mark.parametrize('text', ['5', '5:', 'a:b', '0:3', '5:5', '7:6', '3:12', '-1:4', '1:2:3'])
def test_range_outside_of_the_run(text):
  """A range that the run does not have is refused with its key and value."""
  with pytest.raises(UserError, match=f'profile = {text!r}: .*1 to loop.num_steps = 10'):
    parse_range(text, 10)
  with pytest.raises(UserError, match=f'profile = {text!r}'):
    finished.experiment(training__loop__num_steps=10, training__profile=text)


def test_ranges():
  """The first and the last step of a run can be profiled."""
  assert parse_range('1:11', 10) == range(1, 11)
  assert not parse_range('', 10)


def test_scopes_of_a_step(one_device):
  """Every pass of a step has its name, and so has its gradient."""
  experiment = finished.experiment()
  described = describe_training(experiment, Path(), make_mesh(experiment.mesh))
  step = described.make_step(augmentation(build_deliberator(experiment), 16),
                             described.frozen_shapes)
  text = step.lower(described.abstract, batch_shapes(experiment, described.mesh)).as_text(
      debug_info=True)
  for scope in ('jvp(prefill)', 'jvp(coprocess)', 'jvp(second_pass)', 'jvp(loss)', 'optimizer',
                'transpose(jvp(coprocess))', 'transpose(jvp(second_pass))'):
    assert f'/{scope}/' in text, scope
