"""Safetensors are read shard by shard, damaged files are refused, and arrays survive to the bit."""

import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints import safetensors_io
from latent_deliberation.model.checkpoints.safetensors_io import (
  SafetensorsSource,
  gather,
  write_tensors,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests.model.checkpoints import foreign

ARRAYS = {'a': np.arange(32, dtype=np.float32).reshape(8, 4), 'b': np.arange(3, dtype=np.float16),
          'c': np.arange(24).reshape(2, 3, 4).astype('bfloat16')}


def open_source(directory, rename=str):
  return SafetensorsSource(directory, lambda names: {name: rename(name) for name in names})


@pytest.fixture(params=[1, 2])
def directory(request, tmp_path):
  return foreign.write_hf(tmp_path, {}, ARRAYS, files=request.param)


def test_read_names_and_values(directory):
  """Tensors get new names and are read as stored."""
  source = open_source(directory, str.upper)
  assert {name: (stored.shape, stored.dtype) for name, stored in source.tensors.items()} == {
      'A': ((8, 4), 'float32'), 'B': ((3,), 'float16'), 'C': ((2, 3, 4), 'bfloat16')}
  foreign.assert_same(foreign.read_all(source, 'ABC'),
                      {name.upper(): array for name, array in ARRAYS.items()})


def test_full_disk(tmp_path, monkeypatch):
  """safetensors has a class of its own for it."""
  def save(*_, **__):
    raise SafetensorError('No space left on device')
  monkeypatch.setattr(safetensors_io, 'save_file', save)
  with pytest.raises(OSError, match='No space left'):
    write_tensors(tmp_path, 'model', {'a': 128}, [('a', ARRAYS['a'])])


def test_read_leading_part(directory):
  """The leading part of a tensor can be read alone."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  part = open_source(directory).read('a', (5, 4), device)
  foreign.assert_same(part, ARRAYS['a'][:5])


class Counted:
  """A slice of a safetensors file that counts the elements that are read."""

  def __init__(self, stored, taken):
    self.stored, self.taken = stored, taken

  def __getitem__(self, index):
    piece = self.stored[index]
    self.taken.append(piece.size)
    return piece


def test_read_own_shards(directory, monkeypatch):
  """Each device reads its shard, and no more."""
  taken, real = [], safetensors_io.safe_open

  class Spy:
    """safe_open with counted slices; reading a whole tensor is an error."""

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


def test_duplicate_tensors(tmp_path):
  """All duplicate tensors are listed, with both places."""
  b = ARRAYS['b']
  foreign.write_hf(tmp_path, {}, {'a': b, 'b': b, 'd': b}, files=3)
  first, second, third = sorted(tmp_path.glob('*.safetensors'))
  save_file({'a': b, 'b': b}, second)
  save_file({'d': b, 'D': b}, third)
  with pytest.raises(UserError, match=str(tmp_path)) as error:
    open_source(tmp_path, str.lower)
  lines = [line.strip() for line in str(error.value).split('\n')[1:-1]]
  assert sorted(lines) == sorted([
      f'a in {first.name}, a in {second.name}', f'D in {third.name}, d in {third.name}'])


@pytest.mark.parametrize('kept', [0, 5, 20, -1])
def test_truncated_file(directory, kept):
  """A truncated file is refused, with its name and size."""
  path = sorted(directory.glob('*.safetensors'))[-1]
  content = path.read_bytes()[:kept]
  path.write_bytes(content)
  with pytest.raises(UserError, match=re.escape(f'{path} ({len(content)} bytes)')):
    open_source(directory)


def test_git_lfs_pointer(directory):
  """A Git LFS pointer in place of a file is refused."""
  path = sorted(directory.glob('*.safetensors'))[0]
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n')
  with pytest.raises(UserError, match=f'{path} .*not a whole'):
    open_source(directory)


def test_index_of_missing_files(tmp_path):
  """All files of the index that are missing are listed."""
  foreign.write_hf(tmp_path, {}, ARRAYS, files=3)
  gone = [tmp_path / f'model-0000{number}-of-00003.safetensors' for number in (1, 3)]
  for path in gone:
    path.unlink()
  with pytest.raises(UserError, match='index.json') as error:
    open_source(tmp_path)
  assert str([path.name for path in gone]) in str(error.value)


@pytest.mark.parametrize('content', ['{"weight_map": {', '{}', '[]', '{"weight_map": ["a"]}'])
def test_damaged_index(tmp_path, content):
  """A damaged index is refused."""
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  (tmp_path / 'model.safetensors.index.json').write_text(content)
  with pytest.raises(UserError, match='index.json is damaged'):
    open_source(tmp_path)


def test_files_outside_index(tmp_path):
  """Files that the index does not name are not read."""
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  save_file({'z': ARRAYS['a']}, tmp_path / 'adapter.safetensors')
  assert set(open_source(tmp_path).tensors) == set('abc')


def test_single_file_beside_an_index(tmp_path, caplog):
  """As in transformers, the single file is read."""
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  save_file({'z': ARRAYS['a']}, tmp_path / 'model.safetensors')
  assert set(open_source(tmp_path).tensors) == {'z'}
  assert 'model.safetensors.index.json' in caplog.text


def test_index_with_a_byte_order_mark(tmp_path):
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(index.read_text(), encoding='utf-8-sig')
  assert set(open_source(tmp_path).tensors) == set('abc')


@pytest.mark.parametrize('name', ['._gemma.safetensors', '.nfs1.safetensors', '~$a.safetensors'])
def test_stray_file_beside_the_weights(tmp_path, name):
  save_file(ARRAYS, tmp_path / 'gemma.safetensors')
  (tmp_path / name).write_bytes(b'\0\5\x16\7')
  assert set(open_source(tmp_path).tensors) == set('abc')


@pytest.mark.parametrize('name', ['consolidated.safetensors', 'adapter_model.safetensors'])
def test_file_of_no_whole_decoder(tmp_path, name):
  """It is refused alone, and not read beside the weights."""
  save_file({'z': ARRAYS['a']}, tmp_path / name)
  with pytest.raises(UserError, match=name):
    open_source(tmp_path)
  save_file(ARRAYS, tmp_path / 'model.safetensors')
  assert set(open_source(tmp_path).tensors) == set('abc')


def test_files_without_index(tmp_path):
  """Several files without an index are refused."""
  foreign.write_hf(tmp_path, {}, ARRAYS, files=2)
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  index.unlink()
  with pytest.raises(UserError, match='no model.safetensors.index.json') as error:
    open_source(tmp_path)
  assert all(name in str(error.value) for name in content['weight_map'].values())


def test_one_file_of_any_name(tmp_path):
  """A single file may have any name."""
  save_file(ARRAYS, tmp_path / 'gemma.safetensors')
  assert set(open_source(tmp_path).tensors) == set('abc')


def test_directory_without_weights(tmp_path):
  """A directory without weights is refused."""
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=f'{tmp_path} .*neither model.safetensors'):
    open_source(tmp_path)


def test_unreadable_dtypes_have_names(tmp_path):
  """Dtypes that cannot be loaded are listed by name."""
  save_file({'a': np.ones(2, np.int8), 'b': np.ones(2, np.float64)}, tmp_path / 'model.safetensors')
  assert {name: stored.dtype for name, stored in open_source(tmp_path).tensors.items()} == {
      'a': 'int8', 'b': 'float64'}


WRITTEN = {'a': np.arange(24, dtype=np.float32).reshape(4, 6).T,  # 96 bytes, not in C order
          'b': np.arange(8).astype('bfloat16'), 'c': np.arange(4, dtype=np.float16),  # 16, 8 bytes
          'd': np.ones(1, np.float32), 'e': np.arange(10, dtype=np.float32)}  # 4, 40 bytes


def write(directory, limit):
  write_tensors(directory, 'model', {name: array.nbytes for name, array in WRITTEN.items()},
                iter(WRITTEN.items()), limit)


def read_back(directory):
  source = open_source(directory)
  return foreign.read_all(source, source.tensors)


@pytest.mark.parametrize('limit, files', [
    (1, ['a', 'b', 'c', 'd', 'e']), (24, ['a', 'bc', 'd', 'e']), (40, ['a', 'bcd', 'e']),
    (68, ['a', 'bcde']), (112, ['ab', 'cde']), (163, ['abcd', 'e'])])
def test_write_splits_files(tmp_path, limit, files):
  """A new file begins before a file would grow too large."""
  write(tmp_path, limit)
  names = [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
  assert sorted(path.name for path in tmp_path.glob('*.safetensors')) == names
  assert [''.join(sorted(load_file(tmp_path / name))) for name in names] == files
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index == {'metadata': {'total_size': 164}, 'weight_map': {
      tensor: name for tensors, name in zip(files, names, strict=True) for tensor in tensors}}
  foreign.assert_same(read_back(tmp_path), WRITTEN)


def test_one_file_has_no_index(tmp_path):
  """Tensors that fit one file have no index."""
  write(tmp_path, 164)
  assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
  foreign.assert_same(read_back(tmp_path), WRITTEN)


def test_write_scalar(tmp_path):
  """A single number keeps its shape."""
  write_tensors(tmp_path, 'model', {'n': 4}, [('n', np.array(7, np.float32))])
  foreign.assert_same(read_back(tmp_path), {'n': np.array(7, np.float32)})


def test_files_name_a_format(tmp_path):
  """Files name a format, without which transformers refuses them."""
  write(tmp_path, 40)
  for path in tmp_path.glob('*.safetensors'):
    with safe_open(path, 'numpy') as file:
      assert file.metadata() == {'format': 'pt'}


def test_only_process_zero_writes(tmp_path, monkeypatch):
  """Only process 0 writes files."""
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write(tmp_path, 40)
  assert not list(tmp_path.iterdir())


def test_write_holds_one_file(tmp_path):
  """The tensors of one file are held at a time."""
  written = []

  def tensors():
    for name, array in WRITTEN.items():
      written.append(len(list(tmp_path.glob('*.safetensors'))))
      yield name, array

  write_tensors(tmp_path, 'model', {name: array.nbytes for name, array in WRITTEN.items()},
                tensors(), 40)
  assert written == [0, 1, 1, 1, 2]


def test_gather_from_mesh():
  """An array on a mesh is gathered whole."""
  config = foreign.FAMILIES['gemma2']
  table = foreign.params_of('gemma2')['embedder']['table']
  sharding = foreign.mesh_shardings(boxed_shapes(config))['embedder']['table']
  foreign.assert_same(gather(jax.device_put(table, sharding)), table)
