"""A decoder survives saving and loading, bit by bit; damaged checkpoints are refused."""

import dataclasses
import gc
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import source
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


WRITABLE = dataclasses.replace(tiny.CONFIG, query_scale=0.5)  # as Hugging Face's


@pytest.fixture(scope='module')
def saved(tmp_path_factory, decoder_params):
  directory = tmp_path_factory.mktemp('weights') / 'decoder'
  weights.save(directory, tiny.CONFIG, decoder_params)
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of a saved decoder, to be damaged."""
  yield shutil.copytree(saved, tmp_path / 'decoder')
  gc.collect()  # abandoned reads of orbax warn when they are collected: here, warnings are ignored


def test_load_returns_what_save_wrote(saved, decoder_params):
  """Loaded weights equal saved weights, bit by bit."""
  config, params = weights.load(saved)
  assert config == tiny.CONFIG
  assert weights.open_checkpoint(saved).fingerprint == fingerprint(decoder_params)
  jax.tree.map(np.testing.assert_array_equal, params, decoder_params)


@pytest.mark.parametrize('format, dtype, factor', [
    ('native', None, 1), ('native', 'bfloat16', 1), ('huggingface', None, 1),
    ('huggingface', 'bfloat16', 0.5)])
def test_too_little_memory(tmp_path, decoder_params, monkeypatch, format, dtype, factor):
  """A decoder that free memory cannot hold is refused before a weight is read.

  Our format is held as it is stored until its fingerprint is known. Of others, each tensor is
  rounded as it is read.
  """
  path = tmp_path / 'decoder'
  weights.save(path, dataclasses.replace(tiny.CONFIG, query_scale=None), decoder_params,
               format=format)
  needed = int(factor * sum(leaf.nbytes for leaf in jax.tree.leaves(decoder_params)))
  monkeypatch.setattr(source, 'free_memory', lambda: needed - 1)
  with pytest.raises(UserError, match=f'{path}: .* {needed:,} bytes .* {needed - 1:,} are free'):
    weights.load(path, dtype)


@pytest.mark.parametrize('dtype', ['bf16', 'int8'])
def test_unreadable_dtype_is_named(saved, dtype):
  with pytest.raises(UserError, match=f"dtype = '{dtype}': set one of"):
    weights.load(saved, dtype)


def test_llama_survives_native(tmp_path):
  """So do the switches of Llama, a head of its own and biases."""
  params = tiny.decoder_params(tiny.LLAMA)
  weights.save(tmp_path / 'decoder', tiny.LLAMA, params)
  config, loaded = weights.load(tmp_path / 'decoder')
  assert config == tiny.LLAMA
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_save_leaves_no_other_file(saved):
  """Saving leaves nothing but the decoder."""
  assert [path.name for path in saved.parent.iterdir()] == ['decoder']


def test_load_onto_mesh(saved, decoder_params):
  """Weights are read straight onto a mesh."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  _, params = weights.load(
      saved, shardings=lambda boxed: shardings_of(boxed, mesh, DEFAULT_RULES))
  table = params['embedder']['table']
  assert table.addressable_shards[0].data.shape == (19, 8)
  assert fingerprint(params) == fingerprint(decoder_params)


def test_load_rounds_to_dtype(saved, decoder_params):
  """Weights are rounded to the dtype that is given."""
  _, params = weights.load(saved, dtype='bfloat16')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
               params, decoder_params)


def test_bfloat16_weights_stay_bfloat16(tmp_path, decoder_params):
  """Weights in bfloat16 come back in bfloat16, bit by bit."""
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder_params)
  weights.save(tmp_path / 'decoder', tiny.CONFIG, rounded)
  _, params = weights.load(tmp_path / 'decoder')
  assert fingerprint(params) == fingerprint(rounded)
  assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.bfloat16, params))


def test_save_never_overwrites(saved, decoder_params):
  """An existing directory is refused and stays as it is."""
  before = (saved / 'decoder.json').read_bytes()
  with pytest.raises(UserError, match=f'{saved} exists'):
    weights.save(saved, tiny.CONFIG, decoder_params)
  assert (saved / 'decoder.json').read_bytes() == before


@pytest.mark.parametrize('name', ['', 'weights'])
def test_directory_without_decoder(saved, tmp_path, name):
  """A directory without a decoder is refused."""
  directory = saved / name if name else tmp_path
  with pytest.raises(UserError, match=f'{directory} '):
    weights.load(directory)


def test_directory_with_brackets(tmp_path, decoder_params):
  """It is a path, and no pattern."""
  weights.save(tmp_path / 'sweep lr[1e-2]' / 'decoder', tiny.CONFIG, decoder_params)
  _, loaded = weights.load(tmp_path / 'sweep lr[1e-2]' / 'decoder')
  jax.tree.map(np.testing.assert_array_equal, loaded, decoder_params)


def test_directory_with_backslash(tmp_path, copied, decoder_params):
  with pytest.raises(UserError, match='backslash'):
    weights.save(tmp_path / 'a\\b', tiny.CONFIG, decoder_params)
  with pytest.raises(UserError, match='backslash'):
    weights.load(copied.rename(tmp_path / 'c\\d'))


@pytest.mark.parametrize('name', ['decoder', 'study/decoder', 'snapshots/0123abc',
                                  'models--org--name/snapshots/0123abc'])
def test_directory_one_level_off(saved, tmp_path, name):
  """The only decoder inside a directory is taken, as below Hugging Face's models--org--name."""
  shutil.copytree(saved, tmp_path / name)
  (tmp_path / '.DS_Store').touch()
  (tmp_path / 'checkpoints').mkdir()
  assert weights.open_checkpoint(tmp_path).directory == tmp_path / name


def test_run_that_went_further(saved, tmp_path, monkeypatch):
  """The decoder of a run is meant, and not those of fewer steps beside it."""
  for name in ('decoder', 'decoder_4'):
    shutil.copytree(saved, tmp_path / name)
  monkeypatch.setenv('HOME', str(tmp_path.parent))
  for path in (tmp_path, f'~/{tmp_path.name}'):
    assert weights.open_checkpoint(path).directory == tmp_path / 'decoder'


def test_several_decoders_inside(saved, tmp_path):
  for name in ('one', 'two'):
    shutil.copytree(saved, tmp_path / 'snapshots' / name)
  with pytest.raises(UserError, match=f'no decoder .*2 .*{tmp_path}/snapshots/one, .*two'):
    weights.open_checkpoint(tmp_path)


def test_part_of_a_decoder(saved):
  with pytest.raises(UserError, match=f'{saved}/weights .*give {saved}$'):
    weights.open_checkpoint(saved / 'weights')


def test_coprocessor_in_place_of_decoder(tmp_path):
  for name in ('coprocessor.json', 'coprocessor.safetensors'):
    (tmp_path / name).touch()
  with pytest.raises(UserError, match=f'{tmp_path} holds a coprocessor'):
    weights.open_checkpoint(tmp_path)


def test_two_formats_in_a_directory(copied, tmp_path, decoder_params):
  """Native and Hugging Face files of different decoders are not guessed between."""
  weights.save(tmp_path / 'other', WRITABLE, decoder_params, format='huggingface')
  for path in (tmp_path / 'other').iterdir():
    shutil.copy(path, copied)
  with pytest.raises(UserError, match=rf"{copied} .*\['native', 'huggingface'\]"):
    weights.open_checkpoint(copied)


def test_gguf_beside_hugging_face(tmp_path, decoder_params):
  """A GGUF file is read only if it is named, or if there is nothing else."""
  weights.save(tmp_path / 'hf', WRITABLE, decoder_params, format='huggingface')
  (tmp_path / 'hf' / 'model-q4.gguf').write_bytes(b'')
  assert weights.open_checkpoint(tmp_path / 'hf').format == 'huggingface'
  (tmp_path / 'hf' / 'model.safetensors').unlink()
  with pytest.raises(UserError, match='model-q4.gguf'):
    weights.open_checkpoint(tmp_path / 'hf')


def edit(directory, **changes):
  path = directory / 'decoder.json'
  content = {**json.loads(path.read_text()), **changes}
  del content['checksum']  # as somebody who changes it on purpose does
  path.write_text(json.dumps(content))


def test_truncated_description(copied):
  """A truncated decoder.json is refused."""
  path = copied / 'decoder.json'
  path.write_text(path.read_text()[:-30])
  with pytest.raises(UserError, match='decoder.json is damaged'):
    weights.load(copied)


@pytest.mark.parametrize('changes', [
    {'config': {'vocab_size': 38}}, {'format': 2},
    {'config': {**dataclasses.asdict(tiny.CONFIG), 'num_kv_heads': 3}}])
def test_description_of_another_kind(copied, changes):
  """A decoder.json with wrong keys, version or sizes is refused."""
  edit(copied, **changes)
  with pytest.raises(UserError, match='decoder.json is damaged'):
    weights.load(copied)


@pytest.mark.parametrize('change, found, expected', [
    ({'vocab_size': 40}, [38, 16], [40, 16]),
    ({'num_layers': 2}, [3, 16, 2, 6], [2, 16, 2, 6]),
    ({'hidden_dim': 10}, [3, 20, 16], [3, 10, 16])])
def test_description_of_other_sizes(copied, change, found, expected):
  """Sizes that differ from the weights are refused; the error has both shapes."""
  edit(copied, config=dataclasses.asdict(dataclasses.replace(tiny.CONFIG, **change)))
  with pytest.raises(UserError, match=re.escape(f'{found}, expected {expected}')):
    weights.load(copied)


def test_exchanged_weights(copied, tmp_path, decoder_params):
  """Weights with another fingerprint than that in decoder.json are refused."""
  other = jax.tree.map(lambda leaf: leaf + 1, decoder_params)
  weights.save(tmp_path / 'other', tiny.CONFIG, other)
  shutil.rmtree(copied / 'weights')
  shutil.move(tmp_path / 'other' / 'weights', copied / 'weights')
  with pytest.raises(UserError, match=f'{fingerprint(other)}.*{fingerprint(decoder_params)}'):
    weights.load(copied)


def test_truncated_or_missing_weights(copied):
  """Truncated and missing weights are refused, in a short message."""
  largest = max((path for path in (copied / 'weights').rglob('*') if path.is_file()),
                key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  with pytest.raises(UserError, match=f'{copied}/weights .*again') as error:
    weights.load(copied)
  assert len(str(error.value)) < 500  # not the whole specification of a TensorStore
  shutil.rmtree(copied / 'weights')
  with pytest.raises(UserError, match=f'{copied}/weights .*not a whole'):
    weights.load(copied)
