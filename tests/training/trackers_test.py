"""Trackers get the metrics, are checked before long work, and never end a run."""

import subprocess
import sys
import types

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training import trackers
from latent_deliberation.training.metrics import MetricsWriter, parse_trackers, read_metrics
from latent_deliberation.training.train import describe_training
from tests import finished


def write(directory, names, *steps, config=None):
  writer = MetricsWriter(directory, names, config)
  for step in steps:
    writer.write(step, {'loss': float(step)})
  writer.close()


class FakeSummaryWriter:
  """Keeps what it is told; on a disk that is full it fails at step 2."""
  events = []
  is_full = False

  def __init__(self, directory):
    self.events.append(directory)

  def add_scalar(self, name, value, step):
    if self.is_full and step == 2:
      raise OSError(28, 'No space left on device')
    self.events.append((name, value, step))

  def flush(self):
    pass

  def close(self):
    self.events.append('closed')


@pytest.fixture
def events(monkeypatch):
  """Events of TensorBoard, as if tensorboardX were installed."""
  monkeypatch.setattr(FakeSummaryWriter, 'events', [])
  monkeypatch.setitem(sys.modules, 'tensorboardX', types.SimpleNamespace(
      SummaryWriter=FakeSummaryWriter, __spec__=types.SimpleNamespace()))
  return FakeSummaryWriter.events


@pytest.mark.parametrize('names', ['auto', 'tensorboard'])
def test_tensorboard(tmp_path, events, names):
  """TensorBoard gets the same scalars; 'auto' is TensorBoard where it is installed."""
  write(tmp_path, names, 7)
  assert events == [str(tmp_path / 'tensorboard'), ('loss', 7.0, 7), 'closed']


def test_tensorboard_of_this_machine(tmp_path):
  """tensorboardX takes what we give it."""
  pytest.importorskip('tensorboardX')
  write(tmp_path, 'tensorboard', 1, 2)
  file, = (tmp_path / 'tensorboard').iterdir()
  assert b'loss' in file.read_bytes()


def test_no_trackers(tmp_path, events):
  """Without trackers there is metrics.jsonl alone."""
  write(tmp_path, '', 1)
  assert not events and [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_tracker_that_fails(tmp_path, events, monkeypatch, caplog):
  """It is dropped with a warning, and metrics.jsonl has every number."""
  monkeypatch.setattr(FakeSummaryWriter, 'is_full', True)
  write(tmp_path, 'tensorboard', 1, 2, 3)
  assert events[1:] == [('loss', 1.0, 1)]
  assert [row['step'] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
  assert caplog.text.count('tensorboard failed and gets no more') == 1


@pytest.mark.parametrize('text, names', [
    ('', ()), ('wandb', ('wandb',)), ('tensorboard, wandb', ('tensorboard', 'wandb'))])
def test_names(text, names):
  """Names stand between commas."""
  assert parse_trackers(text) == names


def test_unknown_tracker():
  """An unknown one is refused with its key."""
  with pytest.raises(UserError, match="config.training.trackers = 'mlflow'"):
    finished.bind({**finished.config_of('tiny'), 'training': {
        **finished.config_of('tiny').training, 'trackers': 'mlflow'}})


@pytest.mark.parametrize('name, module', [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')])
def test_tracker_that_is_not_installed(tmp_path, monkeypatch, name, module):
  """It is refused with its extra, before anything is loaded."""
  monkeypatch.setitem(sys.modules, module, None)
  experiment = finished.experiment(training__trackers=name)
  run = describe_training(experiment, tmp_path, make_mesh(experiment.mesh))
  with pytest.raises(UserError, match=f"'{name}'.*{module} is not installed.*'.\\[{name}\\]'"):
    run.check()


class FakeWandB(types.ModuleType):
  """A wandb whose server cannot be reached."""

  def login(self, verify=False):
    if verify:
      raise ConnectionError('no route to host')


def test_tracker_without_network(tmp_path, monkeypatch):
  """wandb without network is refused before anything is loaded, with the way to do without."""
  monkeypatch.setitem(sys.modules, 'wandb', FakeWandB('wandb'))
  experiment = finished.experiment(training__trackers='wandb')
  run = describe_training(experiment, tmp_path, make_mesh(experiment.mesh))
  with pytest.raises(UserError, match="trackers names 'wandb'.*no route to host.*WANDB_MODE=offl"):
    run.check()


def test_end_of_wandb_has_a_limit(tmp_path, monkeypatch, caplog):
  """Numbers that cannot be sent end with a warning: the result of the run is written after it."""
  wandb = pytest.importorskip('wandb')
  begun = []

  class Run:
    define_metric = log = lambda *given, **named: None

    def finish(self):
      raise TimeoutError('Timed out finishing run.')

  def init(**named):
    begun.append(named['settings'])
    return Run()

  monkeypatch.setattr(wandb, 'init', init)
  write(tmp_path, 'wandb', 1)
  assert 0 < begun[0].finish_timeout <= 120 and begun[0].finish_timeout_raises
  assert 'wandb failed' in caplog.text and 'Timed out finishing' in caplog.text


# wandb keeps a process of its own, and settings that only a new process reads.
LAUNCH = """
import pathlib, sys
from latent_deliberation.training.metrics import MetricsWriter, check_trackers
check_trackers('wandb')
writer = MetricsWriter(pathlib.Path(sys.argv[1]), 'wandb', {'seed': 4})
for step in map(int, sys.argv[2:]):
  writer.write(step, {'loss': float(step)})
writer.close()
"""


def test_wandb_offline(tmp_path):
  """Two launches are one run of wandb, with the config and every step, and need no network."""
  pytest.importorskip('wandb')
  for steps in (('1', '2'), ('2', '3')):
    process = subprocess.run(
        [sys.executable, '-c', LAUNCH, str(tmp_path), *steps], capture_output=True, text=True,
        timeout=120, env={**finished.environment(), 'WANDB_MODE': 'offline'})
    assert process.returncode == 0, process.stderr
  name = (tmp_path / trackers.WANDB_ID).read_text()
  # A launch may fall into the second of the one before, whose folder it then continues.
  files = sorted((tmp_path / 'wandb').glob(f'offline-run-*-{name}/run-{name}.wandb'))
  content = b''.join(file.read_bytes() for file in files)
  assert files and content.count(b'loss') >= 4 and content.count(b'seed') >= 2
  assert [row['step'] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
