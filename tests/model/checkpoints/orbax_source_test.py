"""Arrays of an orbax checkpoint are read one by one into their shards; a damaged one is named."""

import gc
import shutil

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.source import OrbaxSource, is_orbax
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests.model.checkpoints import foreign

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

ARRAYS = {'a/b': {'w': np.arange(32, dtype=np.float32).reshape(8, 4)},
          'c': {'d': np.arange(6).astype('bfloat16'), 'e': np.ones((2, 2, 2), np.float16)}}
BY_NAME = {'a/b/w': ARRAYS['a/b']['w'], 'c/d': ARRAYS['c']['d'], 'c/e': ARRAYS['c']['e']}


def open_source(directory):
  return OrbaxSource(directory, lambda name: name)


@pytest.fixture(scope='module', params=['one store', 'a folder per array'])
def saved(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp('orbax') / 'checkpoint'
  return foreign.write_orbax(directory, ARRAYS, use_ocdbt=request.param == 'one store')


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of it, to be damaged."""
  yield shutil.copytree(saved, tmp_path / 'checkpoint')
  gc.collect()  # reads that orbax abandoned complain when collected: here, where it is ignored


def test_arrays_are_found_by_their_joined_keys_and_read_as_stored(saved):
  assert is_orbax(saved)
  source = open_source(saved)
  assert {name: (stored.shape, stored.dtype) for name, stored in source.tensors.items()} == {
      'a/b/w': ((8, 4), 'float32'), 'c/d': ((6,), 'bfloat16'), 'c/e': ((2, 2, 2), 'float16')}
  foreign.assert_same(foreign.read_all(source, source.tensors), BY_NAME)


def test_a_padded_array_is_read_without_its_padding_and_onto_a_mesh(saved):
  mesh = make_mesh(MeshConfig(2, 2, 2))
  sharding = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
  array = open_source(saved).read('a/b/w', (6, 4), sharding)
  assert array.sharding == sharding and array.shape == (6, 4)
  foreign.assert_same(array, BY_NAME['a/b/w'][:6])


def test_a_checkpoint_of_an_older_orbax_is_read(copied):
  (copied / '_CHECKPOINT_METADATA').unlink()
  (copied / 'commit_success.txt').unlink()
  source = open_source(copied)
  foreign.assert_same(foreign.read_all(source, source.tensors), BY_NAME)


def test_reading_one_array_touches_no_other(tmp_path):
  directory = foreign.write_orbax(tmp_path / 'checkpoint', ARRAYS, use_ocdbt=False)
  for name in ('c.d/0', 'c.e/0.0.0'):
    (directory / name).write_bytes(b'')
  source = open_source(directory)
  foreign.assert_same(foreign.read_all(source, ['a/b/w']), {'a/b/w': BY_NAME['a/b/w']})
  with pytest.raises(UserError, match=f'c/e of {directory} cannot be read') as error:
    foreign.read_all(source, ['c/e'])
  assert len(str(error.value)) < 500  # not the whole specification of a TensorStore
  gc.collect()  # reads that orbax abandoned complain when collected: here, where it is ignored


def test_an_array_that_is_there_twice_is_refused_with_both_keys(saved):
  with pytest.raises(UserError, match=r"has same twice, under \('c', 'd'\) and \('c', 'e'\)"):
    OrbaxSource(saved, lambda name: 'same' if name.startswith('c') else name)


@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_a_damaged_description_is_refused(copied, damage):
  path = copied / '_METADATA'
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:40])
  else:
    path.unlink()
  with pytest.raises(UserError, match=f'{copied} is not a whole orbax checkpoint') as error:
    open_source(copied)
  assert 'NoneType' not in str(error.value)  # says what is wrong, not what that led to


def test_any_other_directory_is_no_orbax_checkpoint(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'checkpoint').mkdir()
  assert not is_orbax(tmp_path)
