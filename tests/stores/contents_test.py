"""What a run reads and writes comes back from a store bit for bit: checkpoints, decoders, rows."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_deliberation.data.packing import RowFiles
from latent_deliberation.data.rows import MANIFEST_FILE, Framing, Manifest, PackedRows, Recipe
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import StoreError, UserError
from latent_deliberation.files import (
  as_path,
  at_hand,
  list_directory,
  path_for_orbax,
  write_whole,
)
from latent_deliberation.inference.tokenizer import tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.metrics import MetricsWriter, read_metrics
from latent_deliberation.training.run_identity import RunIdentity, claim_workdir
from tests import tiny, tiny_tokenizer
from tests.stores.object_store import Fault
from tests.training.checkpointer_test import Position, abstract, make_state

_RECIPE = Recipe(task='t', split='train', source_fingerprint='s', vocabulary_hash='v',
                 vocabulary_size=100, length=6, seed=0, max_tokens=0)


def is_written(method, path):
  """Whether a request writes or removes."""
  return method not in ('GET', 'HEAD')


def upload(directory: Path, place: Path) -> None:
  """Copies a directory of this machine to a store, as people do."""
  for file in directory.rglob('*'):
    if file.is_file():
      write_whole(place.joinpath(*file.relative_to(directory).parts), file.read_bytes())


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def save(place, *steps, keep=10):
  checkpointer = Checkpointer(place, keep)
  try:
    for step in steps:
      checkpointer.save(step, make_state(step, 64), Position())
  finally:
    checkpointer.close()


def restore(place):
  """Returns the newest state and the position of the data."""
  checkpointer, batches = Checkpointer(place, 10), Position()
  try:
    state = checkpointer.restore(abstract(make_state(0, 64)), batches)
  finally:
    checkpointer.close()
  return state, batches.restored


def test_checkpoints(place):
  """The newest comes back with the position of the data, and old ones are removed."""
  save(place, 1, 2)
  save(place, 3, keep=1)
  state, position = restore(place)
  same(state, make_state(3, 64))
  assert position == (3, 3)
  assert [path.name for path in list_directory(place)] == ['3', 'data']
  assert [path.name for path in list_directory(place / 'data')] == ['3']


def test_checkpoint_of_a_killed_process(place, caplog):
  """A step without orbax's last file is none, and makes room for the next of its number."""
  save(place, 1, 2)
  (place / '2/commit_success.txt').unlink()
  state, position = restore(place)
  assert f'{place}/2 is removed' in caplog.text
  same(state, make_state(1, 64))
  assert position == (1, 1) and not (place / '2').objects()
  write_whole(place / 'notes/mine.txt', b'kept')
  save(place, 2)
  same(restore(place)[0], make_state(2, 64))
  assert (place / 'notes/mine.txt').exists()


@pytest.mark.parametrize('has_metadata', [True, False])
def test_first_checkpoint_of_a_killed_process(place, has_metadata):
  """A run that was killed in its first save, or while it removed that, begins anew."""
  save(place, 1)
  cut_off(place / '1', has_metadata)
  assert restore(place) == (None, None)
  assert not (place / '1').objects()


def test_older_checkpoint_of_a_killed_process(place):
  """What is left of a step before the last whole one is removed, too."""
  save(place, 1, 2)
  cut_off(place / '1', has_metadata=False)
  assert restore(place)[1] == (2, 2)
  assert not (place / '1').objects()


def cut_off(step, has_metadata):
  (step / 'commit_success.txt').unlink()
  metadata = step / '_CHECKPOINT_METADATA'
  about = json.loads(metadata.read_bytes())
  metadata.unlink()
  if has_metadata:
    metadata.write_text(json.dumps({**about, 'commit_timestamp_nsecs': None}))


def test_checkpoints_of_an_older_orbax(place, tmp_path):
  """A run that was copied to a store loses nothing, and goes on once its last step is marked."""
  save(tmp_path, 1, 2)
  for step in (1, 2):
    (tmp_path / f'{step}/commit_success.txt').unlink()
  upload(tmp_path, place)
  before = list(place.objects())
  with pytest.raises(UserError, match=f'(?s){place} has .*steps 1, 2, .*{place}/2/commit_success'):
    restore(place)
  assert list(place.objects()) == before
  write_whole(place / '2/commit_success.txt', b'whole')
  state, position = restore(place)
  same(state, make_state(2, 64))
  assert position == (2, 2)
  save(place, 3)
  assert (place / '1/about').is_dir()


def test_checkpoints_and_faults(store, place):
  """Errors that pass, slow answers and cut connections change nothing."""
  store.faults = {'fail': Fault(status=503, times=2),
                  'slow': Fault(is_written, times=1, seconds=1)}
  save(place, 1)
  assert all(fault.seen for fault in store.faults.values())
  store.faults = {'fail': Fault(status=500, times=2),
                  'cut': Fault(lambda method, path: '/d/' in path or '%2Fd%2F' in path, times=1,
                               cut_after=100)}
  state, _ = restore(place)
  assert all(fault.seen for fault in store.faults.values())
  same(state, make_state(1, 64))


@pytest.mark.parametrize('passed', [0, 3, 9])
def test_save_without_permission(store, place, passed):
  """It is an error with the checkpoints that there are, of which none is lost."""
  save(place, 1)
  store.faults = {'pass': Fault(is_written, times=passed), 'refuse': Fault(is_written, status=403)}
  with pytest.raises(UserError, match=f'(?s)step 2 could not be written to {place}: .*: 1.'):
    save(place, 2)
  store.faults.clear()
  same(restore(place)[0], make_state(1, 64))


def test_missing_object(place):
  """A checkpoint that lacks one is named, and the one before it."""
  save(place, 1, 2)
  for rest in (place / '2').objects():
    if '/d/' in rest:
      (place / '2' / rest).unlink()
  with pytest.raises(UserError, match=f'(?s){place}/2 cannot be read.*: 1. .*remove {place}/2'):
    restore(place)


def test_orbax_of_another_version(monkeypatch):
  """Where s3:// cannot be put into orbax, an error says which version can."""
  from orbax.checkpoint._src.serialization import tensorstore_utils
  monkeypatch.delattr(tensorstore_utils, 'build_kvstore_tspec')
  with pytest.raises(UserError, match='orbax-checkpoint.*s3://: install'):
    path_for_orbax(as_path('s3://bucket/run'))


def test_store_that_refuses_to_list(store, place):
  """A run whose checkpoints cannot be seen does not begin anew."""
  save(place, 1)
  store.faults['refuse'] = Fault(status=403)
  with pytest.raises(StoreError, match=f'{place}.*no permission'):
    restore(place)


def test_decoder(place, tmp_path):
  """Our own format is read in place, Hugging Face's from a copy; both with their tokenizers."""
  config = dataclasses.replace(tiny.CONFIG, vocab_size=300, query_scale=0.5)
  params, tokenizer = tiny.decoder_params(config), tiny_tokenizer.write(tmp_path)
  for form in weights.FORMATS:
    weights.save(str(place / form), config, params, format=form, tokenizer=tokenizer)
    found, loaded = weights.load(str(place / form))
    assert found == config and fingerprint(loaded) == fingerprint(params)
    assert tokenizer_of(weights.open_checkpoint(place / form)).size == 265
  assert weights.open_checkpoint(place / 'native').directory == place / 'native'
  with pytest.raises(UserError, match=f'{place}/native exists'):
    weights.save(place / 'native', config, params)
  with pytest.raises(UserError, match=f'{place} holds no decoder itself, but 2 in its folders'):
    weights.open_checkpoint(place)


def test_decoder_that_was_not_finished(store, place, decoder_params):
  """It is no decoder, and the next one takes its place."""
  store.faults = {'pass': Fault(is_written, times=8), 'refuse': Fault(is_written, status=403)}
  with pytest.raises(Exception, match='403|no permission'):
    weights.save(place, tiny.CONFIG, decoder_params)
  store.faults.clear()
  assert not place.exists()
  weights.save(place, tiny.CONFIG, decoder_params)
  assert fingerprint(weights.load(place)[1]) == fingerprint(decoder_params)


@pytest.mark.skipif(importlib.util.find_spec('gguf') is None, reason='needs the gguf library')
def test_gguf(place, tmp_path):
  """A GGUF file, by its path or its directory."""
  from tests.model.checkpoints import gguf_io_test
  config = gguf_io_test.CONFIGS['gemma3']
  params = gguf_io_test.random_params(config)
  gguf_io_test.write(tmp_path / 'model.gguf', 'gemma3', config, params)
  upload(tmp_path, place)
  for path in (place, place / 'model.gguf'):
    assert fingerprint(weights.load(path)[1]) == fingerprint(weights.load(tmp_path)[1])


def test_coprocessor(place, decoder_params):
  """It is found in the work directory of its run, and is the same bit for bit."""
  deliberator = tiny.deliberator()
  checkpoint = CoprocessorCheckpoint(
      decoder_config=tiny.CONFIG, config=tiny.CHOICES, decoder_fingerprint='f',
      vocabulary_hash='v', steps=3, params=tiny.coprocessor_params(deliberator, decoder_params))
  coprocessor_checkpoint.save(place / 'coprocessor', checkpoint)
  found = coprocessor_checkpoint.locate_coprocessor(str(place))
  assert found == place / 'coprocessor'
  same(coprocessor_checkpoint.load(found).params, checkpoint.params)


def test_rows(place):
  """Packed rows are written file by file, and read from a copy."""
  rows = [(np.array([2, number, 3, 2, 5, 0]), np.array([1, 1, 1, 2, 2, 0]))
          for number in range(10, 20)]
  files = RowFiles(place, _RECIPE, Framing(2, 1), np.ones(100, np.int32))
  for start in range(0, 10, 4):
    files.write(rows[start:start + 4])
  manifest = Manifest(recipe=_RECIPE, rows=10, tokens=files.tokens, documents=1,
                      text_bytes=files.text_bytes, rows_per_file=4,
                      content_hash=files.content_hash, bos_id=2)
  with pytest.raises(UserError, match=f'no packed rows in {place}'):
    PackedRows(place)
  write_whole(place / MANIFEST_FILE, manifest.to_json())
  taken = PackedRows(place).take(np.array([9, 0, 5]))
  assert taken.tokens[:, 1].tolist() == [19, 10, 15]
  (place / 'tokens-00001.npy').unlink()
  with pytest.raises(UserError, match='tokens-00001.npy is missing'):
    PackedRows(place)


def test_identity(place):
  """run.json is written once, and keeps another run out."""
  claim_workdir(place, RunIdentity('train', {'a': 1}, 'd', 'r'))
  claim_workdir(place, RunIdentity('train', {'a': 1}, 'd', 'r'))
  with pytest.raises(UserError, match=f'{place} belongs to another run:\n  config.a: 1 saved, 2'):
    claim_workdir(place, RunIdentity('train', {'a': 2}, 'd', 'r'))


def test_metrics(place):
  """Lines of two launches come one after the other."""
  for step in (1, 2):
    writer = MetricsWriter(place)
    writer.write(step, {'loss': float(step)})
    assert writer.has_evaluation(step, ['loss'])
    writer.close()
  assert [row['loss'] for row in read_metrics(place / 'metrics.jsonl')] == [1.0, 2.0]


@pytest.mark.skipif(importlib.util.find_spec('seqio') is None, reason='needs seqio')
def test_stream(place, tmp_path):
  """The vocabulary is kept in the store, and the position of a stream comes back."""
  from latent_deliberation.data.data_config import DataConfig
  from latent_deliberation.data.online import OnlineBatches
  (tmp_path / 'texts').mkdir()
  for number in range(8):
    (tmp_path / f'texts/{number}.txt').write_text(f'Document {number} of eight. ' * 20)
  config = DataConfig(source='text', files=(str(tmp_path / 'texts'),),
                      vocabulary='sentencepiece', vocabulary_size=290, length=32, mode='online',
                      validation_percent=20)
  batches = OnlineBatches(config, place, 2, 0, 0, 1)
  kept = (place / 'vocabulary.model').read_bytes()
  batches(0)
  batches.save(place, 1)
  expected = batches(1)
  again = OnlineBatches(config, place, 2, 0, 0, 1)
  assert (place / 'vocabulary.model').read_bytes() == kept
  again.restore(place, 1)
  np.testing.assert_array_equal(again(1).tokens, expected.tokens)
  shutil.rmtree(at_hand(place / 'stream-1-host-0'))
  assert json.loads((place / 'stream-1-host-0/state.json').read_bytes())['step'] == 1
