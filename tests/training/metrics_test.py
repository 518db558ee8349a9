"""Metrics survive crashes and resumption."""

import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.training import metrics
from latent_deliberation.training.metrics import MetricsWriter, format_metric, read_metrics


def write(directory, *rows):
  writer = MetricsWriter(directory)
  for step, values in rows:
    writer.write(step, values)
  writer.close()
  return directory / METRICS_FILE


def test_lines(tmp_path):
  """Each line is a JSON object with step and seconds."""
  path = write(tmp_path / 'run', (10, {'loss': 2.5}), (20, {'loss': 2.25}))
  first, second = map(json.loads, path.read_text().splitlines())
  assert (first['step'], first['loss']) == (10, 2.5)
  assert second['seconds'] >= first['seconds'] > 1.7e9


def test_lines_are_flushed(tmp_path):
  """A line is on disk before the writer is closed."""
  writer = MetricsWriter(tmp_path)
  writer.write(1, {'loss': 2.0})
  assert read_metrics(tmp_path / METRICS_FILE)[0]['loss'] == 2.0
  writer.close()


def test_torn_line(tmp_path):
  """A line that a crash cut off is skipped, and later lines are kept."""
  path = write(tmp_path, (1, {'loss': 3.0}), (2, {'loss': 2.0}))
  path.write_bytes(path.read_bytes()[:-5])
  assert [row['step'] for row in read_metrics(path)] == [1]
  write(tmp_path, (2, {'loss': 2.0}), (3, {'loss': 1.0}))
  assert [row['loss'] for row in read_metrics(path)] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize('damage', [
    b'{"step": 2, "seco', b'7', b'"text"', b'{"loss": 1.0}', b'\xff{',
    b'{"step": "2", "seconds": 1.0}'])
def test_damaged_line(tmp_path, damage):
  """A line that is none of ours is skipped."""
  path = write(tmp_path, (1, {'loss': 3.0}))
  path.write_bytes(damage + b'\n' + path.read_bytes())
  assert [row['loss'] for row in read_metrics(path)] == [3.0]


def test_lines_of_a_step(tmp_path):
  """Lines of a step are joined, and a resumed run overwrites its steps."""
  path = write(tmp_path, (1, {'loss': 3.0}), (1, {'validation/nll': 5.0}), (2, {'loss': 2.0}))
  write(tmp_path, (1, {'loss': 4.0}))
  rows = read_metrics(path)
  assert [row['step'] for row in rows] == [1, 2]
  assert (rows[0]['loss'], rows[0]['validation/nll']) == (4.0, 5.0)


def test_only_process_zero_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  assert not write(tmp_path / 'run', (1, {'loss': 3.0})).parent.exists()


def test_full_disk(tmp_path):
  """A disk that is full is named; the error of a value that is no number stays as it is."""
  class FullDisk:
    def write(self, content):
      raise OSError(28, 'No space left on device')

  writer = MetricsWriter(tmp_path)
  with pytest.raises(TypeError):
    writer.write(1, {'loss': object()})
  writer.close()
  writer._file = FullDisk()
  with pytest.raises(UserError, match=f'{tmp_path}.*No space left'):
    writer.write(1, {'loss': 1.0})


@pytest.mark.parametrize('name, value, text', [
    ('validation/loss', 3.2, 'validation/loss 3.2000 nats/token'),
    ('validation/gain', 0.01234, 'validation/gain +0.0123 nats/token'),
    ('latents/effective_rank', 12.0, 'latents/effective_rank 12.0000 directions'),
    ('latents/gate', 0.5, 'latents/gate 0.5000')])
def test_format_metric(name, value, text):
  """A number has its unit, and a gain its sign."""
  assert format_metric(name, value) == text
