"""A decoder survives the disk to the bit; anything else than what was written is refused."""

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
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def saved(tmp_path_factory, decoder_params):
  directory = tmp_path_factory.mktemp('weights') / 'decoder'
  weights.save(directory, tiny.CONFIG, decoder_params)
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of a saved decoder, to be damaged."""
  yield shutil.copytree(saved, tmp_path / 'decoder')
  gc.collect()  # reads that orbax abandoned complain when collected: here, where it is ignored


def test_what_is_loaded_is_what_was_saved_to_the_bit(saved, decoder_params):
  config, params = weights.load(saved)
  assert config == tiny.CONFIG
  assert weights.open_checkpoint(saved).fingerprint == fingerprint(decoder_params)
  jax.tree.map(np.testing.assert_array_equal, params, decoder_params)


def test_nothing_but_the_decoder_is_left_behind(saved):
  assert [path.name for path in saved.parent.iterdir()] == ['decoder']


def test_weights_are_read_straight_onto_a_mesh(saved, decoder_params):
  mesh = make_mesh(MeshConfig(2, 2, 2))
  _, params = weights.load(
      saved, shardings=lambda boxed: shardings_of(boxed, mesh, DEFAULT_RULES))
  table = params['embedder']['table']
  assert table.addressable_shards[0].data.shape == (19, 8)
  assert fingerprint(params) == fingerprint(decoder_params)


def test_weights_may_be_kept_rounded(saved, decoder_params):
  _, params = weights.load(saved, dtype='bfloat16')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
               params, decoder_params)


def test_bfloat16_weights_survive_the_disk_as_bfloat16(tmp_path, decoder_params):
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder_params)
  weights.save(tmp_path / 'decoder', tiny.CONFIG, rounded)
  _, params = weights.load(tmp_path / 'decoder')
  assert fingerprint(params) == fingerprint(rounded)
  assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.bfloat16, params))


def test_nothing_is_written_over(saved, decoder_params):
  before = (saved / 'decoder.json').read_bytes()
  with pytest.raises(UserError, match=f'{saved} exists already'):
    weights.save(saved, tiny.CONFIG, decoder_params)
  assert (saved / 'decoder.json').read_bytes() == before


@pytest.mark.parametrize('name', ['', 'weights'])
def test_a_directory_without_a_decoder_is_refused(saved, tmp_path, name):
  directory = saved / name if name else tmp_path
  with pytest.raises((FileNotFoundError, ValueError), match=f'{directory} '):
    weights.load(directory)


def edit(directory, **changes):
  path = directory / 'decoder.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_description_that_is_cut_short_is_refused(copied):
  path = copied / 'decoder.json'
  path.write_text(path.read_text()[:-30])
  with pytest.raises(UserError, match='decoder.json is damaged or of another format'):
    weights.load(copied)


@pytest.mark.parametrize('changes', [
    {'config': {'vocab_size': 38}}, {'format': 2},
    {'config': {**dataclasses.asdict(tiny.CONFIG), 'num_kv_heads': 3}}])
def test_a_description_of_another_kind_is_refused(copied, changes):
  edit(copied, **changes)
  with pytest.raises(UserError, match='decoder.json is damaged or of another format'):
    weights.load(copied)


@pytest.mark.parametrize('change, there, here', [
    ({'vocab_size': 40}, [38, 16], [40, 16]),
    ({'num_layers': 2}, [3, 16, 2, 6], [2, 16, 2, 6]),
    ({'hidden_dim': 10}, [3, 20, 16], [3, 10, 16])])
def test_a_description_of_other_sizes_is_refused_with_both(copied, change, there, here):
  edit(copied, config=dataclasses.asdict(dataclasses.replace(tiny.CONFIG, **change)))
  with pytest.raises(UserError, match=re.escape(f'has shape {there}, expected {here}')):
    weights.load(copied)


def test_weights_that_were_exchanged_are_refused(copied, tmp_path, decoder_params):
  other = jax.tree.map(lambda leaf: leaf + 1, decoder_params)
  weights.save(tmp_path / 'other', tiny.CONFIG, other)
  shutil.rmtree(copied / 'weights')
  shutil.move(tmp_path / 'other' / 'weights', copied / 'weights')
  with pytest.raises(UserError, match=f'fingerprint {fingerprint(other)}, decoder.json says '
                     f'{fingerprint(decoder_params)}'):
    weights.load(copied)


def test_weights_that_are_cut_short_or_gone_are_refused(copied):
  largest = max((path for path in (copied / 'weights').rglob('*') if path.is_file()),
                key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  with pytest.raises(UserError, match='cannot be read .* write it again') as error:
    weights.load(copied)
  assert len(str(error.value)) < 500  # not the whole specification of a TensorStore
  shutil.rmtree(copied / 'weights')
  with pytest.raises(UserError, match='is not a whole orbax checkpoint'):
    weights.load(copied)
