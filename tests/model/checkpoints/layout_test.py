"""The tables list every parameter of a decoder; shards of stored tensors are shards of ours."""

import math

import jax
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from latent_deliberation.model.checkpoints import hugging_face, native
from latent_deliberation.model.checkpoints.layout import (
  LAYERED,
  Entry,
  parameter_axes,
  stored_shape,
  stored_shapes,
  stored_sharding,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests.model.checkpoints import foreign

CONFIG = foreign.FAMILIES['gemma2']  # V 38, D 16, L 3, N 4, K 2, H 6, F 20
PATH = 'transformer/blocks/attention/query/w'


@pytest.mark.parametrize('config', [*PRESETS.values(), *foreign.ALL.values()])
def test_parameter_axes_are_complete(config):
  """Every parameter of a decoder is listed, with its shape."""
  shapes = traverse_util.flatten_dict(nn.unbox(boxed_shapes(config)), sep='/')
  assert native.shapes(config) == {path: leaf.shape for path, leaf in shapes.items()}


@pytest.mark.parametrize('family', foreign.ALL)
def test_stored_shapes_are_complete(family):
  """Every tensor that transformers stores is listed, with its shape."""
  config = foreign.ALL[family]
  tensors = foreign.hf_tensors(foreign.params_of(family))
  assert stored_shapes(hugging_face.find_layout(config), config) == {
      name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize('entry, shape', [
    (Entry('', 'V D'), (38, 16)), (Entry('', '(N H) D'), (24, 16)), (Entry('', 'H'), (6,)),
    (Entry('', 'D (K H)'), (16, 12)), (Entry('', 'K D H', 1, 2), (2, 2, 16, 6)),
    (Entry('', 'F D', 0, 2), (2, 20, 16))])
def test_stored_shape(entry, shape):
  """Merged axes multiply, and the axis of parts comes first."""
  assert stored_shape(entry, CONFIG) == shape


@pytest.mark.parametrize('entry, axes, spec, expected', [
    (Entry('', 'N D H'), 'D N H', ('x', 'fsdp', 'tensor', None), ('tensor', 'fsdp', None)),
    (Entry('', '(N H) D'), 'D N H', (None, 'fsdp', 'tensor'), ('tensor', 'fsdp')),
    (Entry('', 'D (N H)'), 'N H D', (None, 'tensor', None, 'fsdp'), ('fsdp', 'tensor')),
    (Entry('', 'D (N H)'), 'N H D', (None, None, 'tensor', 'fsdp'), ('fsdp', None)),
    (Entry('', 'F D', 1, 2), 'D F', (None, ('data', 'fsdp'), 'tensor'),
     (None, 'tensor', ('data', 'fsdp'))),
    (Entry('', 'D'), 'D', (), (None,))])
def test_stored_sharding(entry, axes, spec, expected):
  """Axes keep their shards, wherever they are stored."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  spec = PartitionSpec(*(None if axis == 'x' else axis for axis in spec))
  stored = stored_sharding(entry, PATH, axes, NamedSharding(mesh, spec))
  assert stored == NamedSharding(mesh, PartitionSpec(*expected))


def test_stored_sharding_without_layers():
  """A parameter without layers has no layer axis to leave out."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  ours = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
  assert stored_sharding(Entry('', 'V D'), 'embedder/table', 'V D', ours) == ours


def test_stored_sharding_without_mesh():
  """A sharding without a mesh stays as it is."""
  device = SingleDeviceSharding(jax.devices()[3])
  assert stored_sharding(Entry('', '(N H) D'), PATH, 'D N H', device) is device


def test_27b_is_read_in_shards():
  """Each device reads an eighth of 27 billion weights."""
  config, mesh = PRESETS['gemma2_27b'], make_mesh(MeshConfig(1, 4, 2))
  layout, axes = hugging_face.find_layout(config), parameter_axes(config)
  placed = traverse_util.flatten_dict(
      shardings_of(boxed_shapes(config), mesh, DEFAULT_RULES), sep='/')
  total = a_device = 0
  for path, entry in layout.items():
    layers = config.num_layers if path.startswith(LAYERED) else 1
    shape = stored_shape(entry, config)
    share = stored_sharding(entry, path, axes[path], placed[path]).shard_shape(shape)
    total += layers * math.prod(shape)
    a_device += layers * math.prod(share)
  assert total == 27_227_128_320
  assert a_device < 1.001 * total / 8  # only norms are on every device
