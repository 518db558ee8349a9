"""Checkpoints are compared with their config, read from orbax, and assembled tensor by tensor."""

import dataclasses
import gc
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import google, hugging_face, source
from latent_deliberation.model.checkpoints.layout import LAYERED
from latent_deliberation.model.checkpoints.source import (
  OrbaxSource,
  Stored,
  assemble,
  check_tensors,
  is_orbax,
  refuse_pickles,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.model.checkpoints import foreign

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def check(arrays, expected, padded=(), is_foreign=lambda name: False):
  check_tensors(foreign.MemorySource(arrays), expected, padded, is_foreign)


def test_matching_tensors():
  """Tensors that match are accepted."""
  check({'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float16)}, {'a': (2, 3), 'b': (4,)})


def test_all_mismatches_are_listed():
  """All tensors that do not match are listed, with both shapes."""
  arrays = {'a': np.ones((3, 2), np.float32), 'b': np.ones(4, np.float32),
            'c': np.ones((), np.float32), 'd': np.ones(4, np.int8), 'e': np.ones((2, 5), np.int8)}
  with pytest.raises(UserError, match='/memory') as error:
    check(arrays, {'a': (2, 3), 'c': (1,), 'd': (4,), 'e': (5,), 'f': (7, 8)})
  dtypes = "expected one of ('float32', 'bfloat16', 'float16')"
  assert [line.strip() for line in str(error.value).split('\n')[1:-1]] == [
      'a: has shape [3, 2], expected [2, 3]', 'c: has shape [], expected [1]',
      'e: has shape [2, 5], expected [5]', 'f: missing, expected [7, 8]',
      'b: not expected, has shape [4]',
      f'd: has dtype int8, {dtypes}', f'e: has dtype int8, {dtypes}']


@pytest.mark.parametrize('copies', [1, 8])
def test_memory(monkeypatch, copies):
  """Parameters that free memory cannot hold for all devices are refused with both sizes."""
  boxed = boxed_shapes(tiny.CONFIG)
  mesh = make_mesh(MeshConfig(data=copies), jax.devices()[:copies])
  placed = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), nn.unbox(boxed))
  needed = 2 * copies * sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed)))
  monkeypatch.setattr(source, 'free_memory', lambda: needed - 1)
  with pytest.raises(UserError, match=f'decoder: .* {needed:,} bytes .* {needed - 1:,} are free'):
    source.check_memory('decoder', boxed, placed, 2)
  monkeypatch.setattr(source, 'free_memory', lambda: needed)
  source.check_memory('decoder', boxed, placed, 2)


def test_padded_rows():
  """A padded tensor may have more rows than expected, never fewer."""
  check({'a': np.ones((5, 3), np.float32)}, {'a': (4, 3)}, padded=['a'])
  for shape, padded in (((5, 3), []), ((3, 3), ['a']), ((5, 4), ['a']), ((), ['a'])):
    with pytest.raises(UserError, match=re.escape(f'a: has shape {list(shape)}, expected [4, 3]')):
      check({'a': np.ones(shape, np.float32)}, {'a': (4, 3)}, padded)


def test_foreign_tensors():
  """Only tensors of known other parts are left out."""
  arrays = {'a': np.ones(2, np.float32), 'vision': np.ones(3, np.float64)}
  check(arrays, {'a': (2,)}, is_foreign=lambda name: name == 'vision')
  with pytest.raises(UserError, match='vision: not expected'):
    check(arrays, {'a': (2,)})


@pytest.mark.parametrize('dtype, nbytes', [('float32', 24), ('bfloat16', 12), ('float16', 12)])
def test_stored_bytes(dtype, nbytes):
  """The size of a tensor is that of its values."""
  assert Stored((2, 3), dtype).nbytes == nbytes


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'model.pt', 'model.pth', 'model.ckpt', 'params.pkl',
    'pytorch_model-00001-of-00002.bin'])
@pytest.mark.parametrize('with_config', [True, False])
def test_pickles_are_refused(tmp_path, name, with_config):
  """Pickled weights are refused; the error says how to convert them."""
  (tmp_path / name).write_bytes(b'\x80\x04.')
  if with_config:
    (tmp_path / 'config.json').write_text('{"model_type": "gemma2"}')
  with pytest.raises(UserError, match=f'{tmp_path} .*{name}.*save_pretrained'):
    weights.open_checkpoint(tmp_path)


def test_pickles_next_to_safetensors(tmp_path):
  """Pickles next to safetensors do no harm."""
  tensors = foreign.hf_tensors(foreign.params_of('gemma1'))
  foreign.write_hf(tmp_path, foreign.HF_CONFIGS['gemma1'], tensors)
  (tmp_path / 'optimizer.pt').write_bytes(b'')
  weights.open_checkpoint(tmp_path).check()


def test_no_pickles(tmp_path):
  """A directory without pickles is accepted."""
  (tmp_path / 'tokenizer.model').write_bytes(b'')
  refuse_pickles(tmp_path)


def test_no_decoder_directory(tmp_path):
  """A path that is no directory of a decoder is named."""
  with pytest.raises(UserError, match=f'{tmp_path} .*no decoder'):
    weights.open_checkpoint(tmp_path)
  with pytest.raises(UserError, match=f'{tmp_path}/gone .*not exist'):
    weights.open_checkpoint(tmp_path / 'gone')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  with pytest.raises(UserError, match='model.safetensors is a file'):
    weights.open_checkpoint(tmp_path / 'model.safetensors')


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
  gc.collect()  # abandoned reads of orbax warn when they are collected: here, warnings are ignored


def test_orbax_names_and_values(saved):
  """Arrays are named by their joined keys and read as stored."""
  assert is_orbax(saved)
  source = open_source(saved)
  assert {name: (stored.shape, stored.dtype) for name, stored in source.tensors.items()} == {
      'a/b/w': ((8, 4), 'float32'), 'c/d': ((6,), 'bfloat16'), 'c/e': ((2, 2, 2), 'float16')}
  foreign.assert_same(foreign.read_all(source, source.tensors), BY_NAME)


def test_orbax_padded_array(saved):
  """A padded array is read without its padding, onto a mesh."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  sharding = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
  array = open_source(saved).read('a/b/w', (6, 4), sharding)
  assert array.sharding == sharding and array.shape == (6, 4)
  foreign.assert_same(array, BY_NAME['a/b/w'][:6])


def test_orbax_old_checkpoint(copied):
  """A checkpoint of an older orbax is read."""
  (copied / '_CHECKPOINT_METADATA').unlink()
  (copied / 'commit_success.txt').unlink()
  source = open_source(copied)
  foreign.assert_same(foreign.read_all(source, source.tensors), BY_NAME)


def test_orbax_reads_one_array(tmp_path):
  """Reading one array touches no other."""
  directory = foreign.write_orbax(tmp_path / 'checkpoint', ARRAYS, use_ocdbt=False)
  for name in ('c.d/0', 'c.e/0.0.0'):
    (directory / name).write_bytes(b'')
  source = open_source(directory)
  foreign.assert_same(foreign.read_all(source, ['a/b/w']), {'a/b/w': BY_NAME['a/b/w']})
  with pytest.raises(UserError, match=f'c/e of {directory}') as error:
    foreign.read_all(source, ['c/e'])
  assert len(str(error.value)) < 500  # not the whole specification of a TensorStore
  gc.collect()  # abandoned reads of orbax warn when they are collected: here, warnings are ignored


def test_orbax_duplicate_names(saved):
  """Two arrays of one name are refused; the error has both keys."""
  with pytest.raises(UserError, match=r"same .*\('c', 'd'\).*\('c', 'e'\)"):
    OrbaxSource(saved, lambda name: 'same' if name.startswith('c') else name)


@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_orbax_damaged_metadata(copied, damage):
  """Damaged or missing metadata is refused."""
  path = copied / '_METADATA'
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:40])
  else:
    path.unlink()
  with pytest.raises(UserError, match=f'{copied} .*not a whole') as error:
    open_source(copied)
  assert 'NoneType' not in str(error.value)  # names the cause, not its consequence


def test_is_orbax(tmp_path):
  """Any other directory is not an orbax checkpoint."""
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'checkpoint').mkdir()
  assert not is_orbax(tmp_path)


# A Gemma 3 has every kind of parameter; its norms of heads are not split.
CONFIG = foreign.FAMILIES['gemma3']


class Recorded(foreign.MemorySource):
  """A Source that records each read, and the number of live arrays before it."""

  def __init__(self, arrays):
    super().__init__(arrays)
    self.pieces, self.live_before = [], []

  def read(self, name, shape, sharding):
    self.live_before.append(len(jax.live_arrays()))
    piece = super().read(name, shape, sharding)
    self.pieces.append((name, {
        shard.device: np.asarray(shard.data).copy() for shard in piece.addressable_shards}))
    return piece


@dataclasses.dataclass
class Assembled:
  """A loaded decoder, and a record of its loading."""
  source: Recorded
  layout: dict
  params: dict
  shardings: dict
  live_at_first: int


@pytest.fixture(scope='module', params=['hugging face', 'google'])
def assembled(request):
  params = foreign.params_of('gemma3')
  if request.param == 'google':
    source = Recorded({google.plain_name(name): array for name, array in foreign.google_arrays(
        params, transposed=True, padding=4).items()})
    layout = google.find_layout(CONFIG, source.tensors)
  else:
    source = Recorded(foreign.hf_tensors(params))
    layout = hugging_face.find_layout(CONFIG)
  shardings = traverse_util.flatten_dict(
      foreign.mesh_shardings(boxed_shapes(CONFIG)), sep='/')
  del params
  gc.collect()
  live = len(jax.live_arrays())
  loaded = assemble(source, layout, CONFIG, shardings)
  return Assembled(source, layout, traverse_util.flatten_dict(loaded, sep='/'), shardings, live)


def test_assemble_values_and_shardings(assembled):
  """Parameters are exact and on their shardings."""
  expected = traverse_util.flatten_dict(foreign.params_of('gemma3'), sep='/')
  foreign.assert_same(assembled.params, expected)
  assert {path: leaf.sharding for path, leaf in assembled.params.items()} == assembled.shardings


def test_assemble_holds_one_tensor(assembled):
  """A host holds one stored tensor at a time."""
  firsts = {entry.name.format(0) for entry in assembled.layout.values()}
  started = 0
  for (name, _), live in zip(assembled.source.pieces, assembled.source.live_before, strict=True):
    started += name in firsts
    # Finished parameters and the stack that is being filled, but no tensor that was read before.
    assert live - assembled.live_at_first <= started, f'before {name}'
  assert started == len(assembled.layout)


def test_assemble_reads_largest_first(assembled):
  """The largest tensor is read while nothing else is held."""
  largest = max(assembled.source.arrays, key=lambda name: assembled.source.arrays[name].nbytes)
  assert assembled.source.pieces[0][0] == largest
  assert assembled.source.live_before[0] == assembled.live_at_first


def test_assemble_reads_own_shards(assembled):
  """Every device reads what it will hold, and no more."""
  read = dict(assembled.source.pieces)
  for path, entry in assembled.layout.items():
    layered = path.startswith(LAYERED)
    for shard in assembled.params[path].addressable_shards:
      held = np.asarray(shard.data)
      for layer, ours in enumerate(held if layered else [held]):
        theirs = read[entry.name.format(layer)][shard.device]
        theirs = theirs if entry.part is None else theirs[entry.part]
        assert sorted(theirs.ravel()) == sorted(ours.ravel()), path


def test_assemble_reads_parts(assembled):
  """Weights that can be split are read in parts."""
  read = dict(assembled.source.pieces)
  split = {}
  for path, entry in assembled.layout.items():
    shape = assembled.source.arrays[entry.name.format(0)].shape
    piece, = {part.shape for part in read[entry.name.format(0)].values()}
    split[path] = math.prod(piece) / math.prod(shape)
  matrices = {path: part for path, part in split.items() if not path.endswith('/scale')}
  assert len(matrices) == 8 and all(part < 0.27 for part in matrices.values()), matrices


def test_assemble_mixed_dtypes():
  """Layers of several dtypes become the dtype that holds them all."""
  arrays = foreign.hf_tensors(foreign.params_of('gemma1'))
  name = 'model.layers.{}.self_attn.k_proj.weight'
  arrays = {key: array.astype('bfloat16') for key, array in arrays.items()}
  arrays[name.format(1)] = arrays[name.format(1)].astype(np.float16)
  config = foreign.FAMILIES['gemma1']
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  layout = hugging_face.find_layout(config)
  params = assemble(foreign.MemorySource(arrays), layout, config, dict.fromkeys(layout, device))
  blocks = params['transformer']['blocks']['attention']
  key = np.asarray(blocks['key']['w'])
  assert key.dtype == np.float32 and blocks['value']['w'].dtype == jnp.bfloat16
  for layer in range(3):
    stored = arrays[name.format(layer)].astype(np.float32)
    np.testing.assert_array_equal(key[layer].reshape(16, 24), stored.T)
