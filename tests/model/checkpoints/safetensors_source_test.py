"""Safetensors are read shard by shard; files that are damaged, absent or contradict are refused."""

import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints import safetensors_io
from latent_deliberation.model.checkpoints.safetensors_io import SafetensorsSource
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests.model.checkpoints import foreign

ARRAYS = {'a': np.arange(32, dtype=np.float32).reshape(8, 4), 'b': np.arange(3, dtype=np.float16),
          'c': np.arange(24).reshape(2, 3, 4).astype('bfloat16')}


def open_source(directory, rename=lambda name: name):
  return SafetensorsSource(directory, rename)


@pytest.fixture(params=[1, 2])
def directory(request, tmp_path):
  return foreign.write_hf(tmp_path, {}, ARRAYS, files=request.param)


def test_tensors_are_found_by_their_new_names_and_read_as_stored(directory):
  source = open_source(directory, str.upper)
  assert {name: (stored.shape, stored.dtype) for name, stored in source.tensors.items()} == {
      'A': ((8, 4), 'float32'), 'B': ((3,), 'float16'), 'C': ((2, 3, 4), 'bfloat16')}
  foreign.assert_same(foreign.read_all(source, 'ABC'),
                      {name.upper(): array for name, array in ARRAYS.items()})


def test_the_leading_part_of_a_tensor_can_be_read_alone(directory):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  part = open_source(directory).read('a', (5, 4), device)
  foreign.assert_same(part, ARRAYS['a'][:5])


class Counted:
  """A slice of a safetensors file that counts the elements taken from it."""

  def __init__(self, stored, taken):
    self.stored, self.taken = stored, taken

  def __getitem__(self, index):
    piece = self.stored[index]
    self.taken.append(piece.size)
    return piece


def test_each_device_reads_its_shard_and_no_more(directory, monkeypatch):
  taken, real = [], safetensors_io.safe_open

  class Spy:
    """safe_open, whose slices are counted; to take a whole tensor is an error."""

    def __init__(self, path, framework):
      self.file = real(path, framework)

    def __enter__(self):
      self.inside = self.file.__enter__()
      return self

    def __exit__(self, *error):
      return self.file.__exit__(*error)

    def get_slice(self, name):
      return Counted(self.inside.get_slice(name), taken)

  source = open_source(directory)
  monkeypatch.setattr(safetensors_io, 'safe_open', Spy)
  mesh = make_mesh(MeshConfig(2, 2, 2))
  sharding = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
  array = source.read('a', (8, 4), sharding)
  assert array.sharding == sharding
  assert set(taken) == {8} and len(taken) <= 8  # (8 / 2) x (4 / 2) for each of eight devices
  foreign.assert_same(array, ARRAYS['a'])


def test_tensors_that_are_there_twice_are_all_refused_with_both_places(tmp_path):
  b = ARRAYS['b']
  foreign.write_hf(tmp_path, {}, {'a': b, 'b': b, 'd': b}, files=3)
  first, second, third = sorted(tmp_path.glob('*.safetensors'))
  save_file({'a': b, 'b': b}, second)
  save_file({'d': b, 'D': b}, third)
  with pytest.raises(UserError, match=f'{tmp_path} has tensors twice') as error:
    open_source(tmp_path, str.lower)
  lines = [line.strip() for line in str(error.value).split('\n')[1:-1]]
  assert sorted(lines) == sorted([
      f'a in {first.name}, a in {second.name}', f'D in {third.name}, d in {third.name}'])


@pytest.mark.parametrize('kept', [0, 5, 20, -1])
def test_a_file_that_is_cut_short_is_refused_with_its_name_and_size(directory, kept):
  path = sorted(directory.glob('*.safetensors'))[-1]
  content = path.read_bytes()[:kept]
  path.write_bytes(content)
  with pytest.raises(UserError, match=re.escape(f'{path} ({len(content)} bytes) is not a whole '
                                                 'safetensors file')):
    open_source(directory)


def test_a_pointer_in_the_place_of_a_large_file_is_refused(directory):
  path = sorted(directory.glob('*.safetensors'))[0]
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n')
  with pytest.raises(UserError, match=f'{path} .* is not a whole safetensors file'):
    open_source(directory)


def test_an_index_that_names_absent_files_is_refused_with_all_of_them(tmp_path):
  foreign.write_hf(tmp_path, {}, ARRAYS, files=3)
  gone = [tmp_path / f'model-0000{number}-of-00003.safetensors' for number in (1, 3)]
  for path in gone:
    path.unlink()
  with pytest.raises(UserError, match='index.json names files that .* does not have') as e:
    open_source(tmp_path)
  assert str([path.name for path in gone]) in str(e.value)


@pytest.mark.parametrize('content', ['{"weight_map": {', '{}', '[]', '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_refused(tmp_path, content):
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  (tmp_path / 'model.safetensors.index.json').write_text(content)
  with pytest.raises(UserError, match='model.safetensors.index.json is damaged'):
    open_source(tmp_path)


def test_files_that_the_index_does_not_name_are_left(tmp_path):
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  save_file({'z': ARRAYS['a']}, tmp_path / 'adapter.safetensors')
  assert set(open_source(tmp_path).tensors) == set('abc')


def test_several_files_without_an_index_are_refused(tmp_path):
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  index.unlink()
  with pytest.raises(UserError, match='but no model.safetensors.index.json') as error:
    open_source(tmp_path)
  assert all(name in str(error.value) for name in content['weight_map'].values())


def test_one_file_may_have_any_name(tmp_path):
  save_file(ARRAYS, tmp_path / 'gemma.safetensors')
  assert set(open_source(tmp_path).tensors) == set('abc')


def test_a_directory_without_weights_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=f'{tmp_path} holds neither model.safetensors nor '):
    open_source(tmp_path)


def test_a_dtype_that_is_not_read_is_told_by_name(tmp_path):
  save_file({'a': np.ones(2, np.int8), 'b': np.ones(2, np.float64)}, tmp_path / 'model.safetensors')
  assert {name: stored.dtype for name, stored in open_source(tmp_path).tensors.items()} == {
      'a': 'int8', 'b': 'float64'}
