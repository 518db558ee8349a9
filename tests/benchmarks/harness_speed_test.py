"""The benchmark against lm-evaluation-harness refuses what it cannot time, before it times."""

from types import SimpleNamespace

import jax
import pytest

pytest.importorskip('lm_eval')

from latent_deliberation.benchmarks import harness_speed
from latent_deliberation.errors import UserError
from latent_deliberation.inference.tokenizer import ByteTokenizer
from tests.evaluation import task_examples

SPEED = {'limit': 3, 'repeats': 1, 'dtype': 'float32', 'hf_dtype': 'float32', 'hf_batch_size': 4}


@pytest.fixture
def no_weights(monkeypatch):
  """A model without weights, which must not be timed."""
  model = SimpleNamespace(
      tokenizer=ByteTokenizer(), max_length=256, config=None, params=None, dtype='float32')
  monkeypatch.setattr(harness_speed, '_open', lambda *given: model)
  monkeypatch.setattr(harness_speed.weights, 'save', lambda *given, **named: pytest.fail('begun'))
  monkeypatch.setattr(harness_speed, 'describe_turns', lambda repeats: {})


def test_tasks_are_read_first(no_weights, tmp_path):
  """A task without choices is refused before another one is timed, or compared."""
  data = str(task_examples.write(tmp_path / 'data', 'piqa', 'gsm8k'))
  with pytest.raises(UserError, match='gsm8k has no choices'):
    harness_speed.benchmark('', '', data, ['piqa', 'gsm8k'], tmp_path / 'a.json', **SPEED)
  with pytest.raises(UserError, match='gsm8k has no choices'):
    harness_speed.compare('', data, ['piqa', 'gsm8k'], tmp_path / 'a.json', limit=3,
                          hf_batch_size=4)


def test_other_backend(no_weights, tmp_path, monkeypatch):
  """On another device than torch's, times cannot be compared."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(UserError, match='gpu.*JAX_PLATFORMS=cpu'):
    harness_speed.benchmark('', '', '', ['piqa'], tmp_path / 'a.json', **SPEED)


def test_threads(no_weights, tmp_path, monkeypatch):
  """Torch has as many threads as this process has cores, which JAX takes."""
  given = []

  class Baseline:
    def __init__(self, *arguments):
      given.append(arguments[-1])
      raise UserError('stop')

  monkeypatch.setattr(harness_speed, 'Baseline', Baseline)
  monkeypatch.setattr(harness_speed.weights, 'save', lambda *given, **named: None)
  monkeypatch.setattr(harness_speed.os, 'sched_getaffinity', lambda process: set(range(7)))
  data = str(task_examples.write(tmp_path / 'data', 'piqa'))
  with pytest.raises(UserError, match='stop'):
    harness_speed.benchmark('', '', data, ['piqa'], tmp_path / 'a.json', **SPEED)
  assert given == [7]
