"""Parameters come out on their shardings, while a host holds one stored tensor at a time."""

import dataclasses
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from latent_deliberation.model.checkpoints import google, hugging_face
from latent_deliberation.model.checkpoints.layout import LAYERED
from latent_deliberation.model.checkpoints.source import assemble
from latent_deliberation.model.decoder import boxed_shapes
from tests.model.checkpoints import foreign

# Gemma 3, whose norms of heads are not split, with every kind of parameter.
CONFIG = foreign.FAMILIES['gemma3']


class Recorded(foreign.MemorySource):
  """A Source that keeps what was read, and how many arrays were there just before."""

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
  """A loaded decoder and the way there."""
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


def test_parameters_come_out_to_the_bit_and_on_their_shardings(assembled):
  expected = traverse_util.flatten_dict(foreign.params_of('gemma3'), sep='/')
  foreign.assert_same(assembled.params, expected)
  assert {path: leaf.sharding for path, leaf in assembled.params.items()} == assembled.shardings


def test_one_stored_tensor_is_held_at_a_time(assembled):
  firsts = {entry.name.format(0) for entry in assembled.layout.values()}
  started = 0
  for (name, _), live in zip(assembled.source.pieces, assembled.source.live_before, strict=True):
    started += name in firsts
    # What is finished, and the stack that is being filled: no tensor that was read before.
    assert live - assembled.live_at_first <= started, f'before {name}'
  assert started == len(assembled.layout)


def test_the_largest_tensor_comes_while_nothing_else_is_held(assembled):
  largest = max(assembled.source.arrays, key=lambda name: assembled.source.arrays[name].nbytes)
  assert assembled.source.pieces[0][0] == largest
  assert assembled.source.live_before[0] == assembled.live_at_first


def test_every_device_reads_what_it_will_hold_and_no_more(assembled):
  read = dict(assembled.source.pieces)
  for path, entry in assembled.layout.items():
    layered = path.startswith(LAYERED)
    for shard in assembled.params[path].addressable_shards:
      held = np.asarray(shard.data)
      for layer, ours in enumerate(held if layered else [held]):
        theirs = read[entry.name.format(layer)][shard.device]
        theirs = theirs if entry.part is None else theirs[entry.part]
        assert sorted(theirs.ravel()) == sorted(ours.ravel()), path


def test_weights_that_can_be_split_are_read_in_parts(assembled):
  read = dict(assembled.source.pieces)
  split = {}
  for path, entry in assembled.layout.items():
    shape = assembled.source.arrays[entry.name.format(0)].shape
    piece, = {part.shape for part in read[entry.name.format(0)].values()}
    split[path] = math.prod(piece) / math.prod(shape)
  matrices = {path: part for path, part in split.items() if not path.endswith('/scale')}
  assert len(matrices) == 8 and all(part < 0.27 for part in matrices.values()), matrices


def test_layers_of_several_dtypes_meet_in_the_one_that_holds_them_all():
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
