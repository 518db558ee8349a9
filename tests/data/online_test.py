import dataclasses
import json

import numpy as np
import pytest

from latent_deliberation.data import online
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.online import OnlineBatches
from latent_deliberation.data.sources import build_source, read_texts
from latent_deliberation.data.vocabularies import ByteVocabulary
from latent_deliberation.errors import UserError
from tests import tiny_tokenizer


@pytest.fixture
def config(corpus_directory):
  return DataConfig(source='text', files=(str(corpus_directory),), vocabulary='byte', length=32,
                    mode='online')


def assert_equal(first, second):
  for part in ('tokens', 'segments', 'positions'):
    np.testing.assert_array_equal(getattr(first, part), getattr(second, part))


def test_batches_are_like_packed_rows(config, tmp_path):
  batch = OnlineBatches(config, tmp_path, 4, seed=0)(0)
  for part in (batch.tokens, batch.segments, batch.positions):
    assert (type(part), part.dtype, part.shape) == (np.ndarray, np.int32, (4, 32))
  starts = (batch.positions == 0) & (batch.segments > 0)
  assert starts[:, 0].all()
  np.testing.assert_array_equal(starts, batch.tokens == 2)
  assert ((batch.tokens == 0) == (batch.segments == 0)).all()


def test_stream_repeats_all_tokens(config, tmp_path):
  """The stream holds every token of the training split about equally often."""
  texts = read_texts(build_source(config), 'train', 'text', 0)
  epoch = sum(np.bincount(ByteVocabulary().encode(text), minlength=260) for text in texts)
  batches = OnlineBatches(config, tmp_path, 8, seed=0)
  seen = sum(np.bincount(batches(step).tokens.ravel(), minlength=260) for step in range(400))
  # Only about, since the shuffle buffer holds back some rows of the latest epochs.
  epochs = seen[4:].sum() / epoch[4:].sum()
  assert epochs > 10
  np.testing.assert_allclose(seen[4:], epochs * epoch[4:], rtol=0.1, atol=epochs)


def test_seed_determines_the_stream(config, tmp_path):
  first, same, other = (OnlineBatches(config, tmp_path, 4, seed) for seed in (0, 0, 1))
  assert first.fingerprint == same.fingerprint != other.fingerprint
  batch = first(0)
  assert_equal(batch, same(0))
  assert (batch.tokens != other(0).tokens).any()


@pytest.mark.parametrize('kind', ['byte', 'json'])
def test_resume_is_exact(config, tmp_path, kind):
  """A restored stream continues with exactly the same batches."""
  if kind == 'json':
    config = dataclasses.replace(config, vocabulary='sentencepiece',
                                 vocabulary_path=str(tiny_tokenizer.write(tmp_path / 'given')))
  batches = OnlineBatches(config, tmp_path, 4, seed=0)
  for step in range(3):
    batches(step)
  batches.save(tmp_path / 'state', 3)
  expected = [batches(step) for step in range(3, 60)]
  restored = OnlineBatches(config, tmp_path, 4, seed=0)
  restored.restore(tmp_path / 'state', 3)
  for step, batch in enumerate(expected, 3):
    assert_equal(restored(step), batch)


def test_each_host_restores_its_share(config, tmp_path):
  hosts = [OnlineBatches(config, tmp_path, 4, 0, index, 2) for index in range(2)]
  firsts = [host(0) for host in hosts]
  assert firsts[0].tokens.shape == (2, 32)
  assert (firsts[0].tokens != firsts[1].tokens).any()
  assert hosts[0].fingerprint == hosts[1].fingerprint
  for host in hosts:
    host.save(tmp_path / 'state', 1)
  for index, host in enumerate(hosts):
    restored = OnlineBatches(config, tmp_path, 4, 0, index, 2)
    restored.restore(tmp_path / 'state', 1)
    assert_equal(restored(1), host(1))


@pytest.mark.parametrize(('arguments', 'message'), [
    ((8, 0), 'batch_size: 4 saved, 8 now'),
    ((4, 1), 'seed: 0 saved, 1 now'),
    ((4, 0, 0, 2), 'process_count: 1 saved, 2 now'),
])
def test_state_of_another_stream(config, tmp_path, arguments, message):
  """It is refused, and the error has both values."""
  batches = OnlineBatches(config, tmp_path, 4, 0)
  batches(0)
  batches.save(tmp_path / 'state', 1)
  with pytest.raises(UserError, match=message):
    OnlineBatches(config, tmp_path, *arguments).restore(tmp_path / 'state', 1)


def test_resume_in_directory_with_brackets(config, tmp_path):
  """TensorFlow would take the directory for a pattern."""
  batches = OnlineBatches(config, tmp_path, 4, seed=0)
  batches(0)
  batches.save(tmp_path / 'sweep lr[1e-2]', 1)
  resumed = OnlineBatches(config, tmp_path, 4, seed=0)
  resumed.restore(tmp_path / 'sweep lr[1e-2]', 1)
  assert_equal(resumed(1), batches(1))


def test_state_of_fewer_hosts(config, tmp_path):
  """It is refused also by processes that did not exist when it was saved."""
  batches = OnlineBatches(config, tmp_path, 4, 0)
  batches.save(tmp_path / 'state', 0)
  later = OnlineBatches(config, tmp_path, 4, 0, 1, 2)
  assert later.fingerprint == batches.fingerprint
  with pytest.raises(UserError, match='process_count: 1 saved, 2 now'):
    later.restore(tmp_path / 'state', 0)


def test_missing_state_is_named(config, tmp_path):
  with pytest.raises(UserError, match='no data state for step 5'):
    OnlineBatches(config, tmp_path, 4, 0).restore(tmp_path / 'state', 5)


def test_steps_come_in_order(config, tmp_path):
  batches = OnlineBatches(config, tmp_path, 4, 0)
  with pytest.raises(ValueError, match='step = 1, .*at 0'):
    batches(1)
  batches(0)
  with pytest.raises(ValueError, match='step = 0, .*at 1'):
    batches(0)
  with pytest.raises(ValueError, match='step = 5 cannot be saved.*at 1'):
    batches.save(tmp_path / 'state', 5)


def test_saving_twice(config, tmp_path):
  """Saving a step again changes nothing, and never overwrites another run."""
  batches = OnlineBatches(config, tmp_path, 4, 0)
  batches(0)
  batches.save(tmp_path / 'state', 1)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'state').rglob('*')}
  batches.save(tmp_path / 'state', 1)
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'state').rglob('*')} == before
  other = OnlineBatches(config, tmp_path, 4, 1)
  other(0)
  with pytest.raises(UserError, match='seed: 0 saved, 1 now'):
    other.save(tmp_path / 'state', 1)


def test_saved_state_is_complete(config, tmp_path, monkeypatch):
  batches = OnlineBatches(config, tmp_path, 4, 0)

  def full(path, content):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(online, 'write_whole', full)
    with pytest.raises(OSError, match='No space'):
      batches.save(tmp_path / 'state', 0)
  with pytest.raises(UserError, match='no data state for step 0'):
    batches.restore(tmp_path / 'state', 0)
  batches.save(tmp_path / 'state', 0)
  batches.restore(tmp_path / 'state', 0)
  assert json.loads((tmp_path / 'state/stream-0-host-0/state.json').read_text())['step'] == 0


def test_batch_must_divide_among_hosts(config, tmp_path):
  with pytest.raises(UserError, match='batch_size = 4.*3 processes'):
    OnlineBatches(config, tmp_path, 4, 0, 0, 3)
