"""The mesh, the rules, and the shardings that follow from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from latent_deliberation.build import build_deliberator
from latent_deliberation.errors import UserError
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.sharding import (
  DEFAULT_RULES,
  LOGICAL_AXES,
  MESH_AXES,
  MeshConfig,
  check_batch,
  check_own_rows,
  check_rules,
  make_mesh,
  parse_mesh,
  parse_rules,
  partition_spec,
  place_batch,
  rows_of_process,
  shardings_of,
)
from tests import finished, tiny


@pytest.mark.parametrize('config, shape', [
    (MeshConfig(), (1, 8, 1, 1)), (MeshConfig(2, 2, 2), (1, 2, 2, 2)),
    (MeshConfig(data=2, fsdp=-1), (1, 2, 4, 1)), (MeshConfig(1, -1, 8), (1, 1, 1, 8)),
    (MeshConfig(replica=2, fsdp=2), (2, 2, 2, 1))])
def test_mesh_shape(config, shape):
  """A mesh spans all devices, and one axis may take the devices that are left."""
  assert tuple(make_mesh(config).shape.items()) == tuple(
      zip(('replica', 'data', 'fsdp', 'tensor'), shape, strict=True))


@pytest.mark.parametrize('config, message', [
    (MeshConfig(4), "'data': 4, 'fsdp': 1, 'tensor': 1} needs 4 .* not 8: give mesh.data=8"),
    (MeshConfig(1), 'needs 1 .* not 8: give mesh.data=8'),
    (MeshConfig(8, 2), 'needs 16 .* not 8: give mesh.data=4'),
    (MeshConfig(8, replica=2), "'replica': 2, 'data': 8, .* 16 .* not 8: give mesh.data=4"),
    (MeshConfig(-1, 3), "'data': -1, 'fsdp': 3, .*a multiple of 3 .* not 8: give mesh.fsdp=1"),
    (MeshConfig(-1, 16), "'data': -1, 'fsdp': 16, .*a multiple of 16 .* 8: give mesh.fsdp=8"),
    (MeshConfig(-1, 6, 3), 'a multiple of 18 .* 8: give sizes whose product is 8'),
    (MeshConfig(-1, -1), "'data': -1, 'fsdp': -1.*one axis"),
    (MeshConfig(0), "'data': 0.*positive")])
def test_mesh_of_wrong_size(config, message):
  """A mesh that the devices do not fill is refused."""
  with pytest.raises(UserError, match=message):
    make_mesh(config)


def test_mesh_of_some_devices():
  """A mesh may take some of the devices."""
  assert make_mesh(MeshConfig(tensor=2), jax.devices()[:2]).size == 2


def test_rule_for_unknown_mesh_axis():
  """A rule for an unknown mesh axis is refused."""
  with pytest.raises(UserError, match=r"rule 'embed'.*\['model'\]"):
    check_rules({**DEFAULT_RULES, 'embed': ['model']})
  assert check_rules({'embed': ['fsdp', 'tensor']}) == {'embed': ('fsdp', 'tensor')}


def test_rule_for_unknown_axis():
  """A rule for an unknown logical axis is refused with the nearest known one."""
  with pytest.raises(UserError, match="rule 'emebd'.*'embed'.*'activation', 'batch'"):
    check_rules({'emebd': ['fsdp']})


def test_all_axes_may_have_rules(monkeypatch):
  """Every axis that the model names may have a rule."""
  named = set()
  constrain = nn.with_logical_constraint

  def note(x, names, *args, **kwargs):
    named.update(names)
    return constrain(x, names, *args, **kwargs)

  monkeypatch.setattr(nn, 'with_logical_constraint', note)
  for choices in ({}, {'trainable': 'lora'}, {'latents': 'refining', 'gate': 'matrix'}):
    experiment = finished.experiment(**{f'deliberation__{key}': value
                                        for key, value in choices.items()})
    deliberator = build_deliberator(experiment)
    boxed = boxed_shapes(experiment.decoder), jax.eval_shape(
        deliberator.coprocessor.init, jax.random.key(0), nn.unbox(boxed_shapes(experiment.decoder)))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    named.update(name for box in boxes for name in box.names)
  assert {'embed', 'gated', 'rank', 'latent', 'activation', 'trace'} <= named - {None}
  assert named - {None} <= set(LOGICAL_AXES)


def test_partition_spec():
  """A tensor is split by the rules of its axes."""
  assert partition_spec(('layers', 'embed', 'heads', None), DEFAULT_RULES) == PartitionSpec(
      None, 'fsdp', 'tensor', None)
  assert partition_spec(('batch',), DEFAULT_RULES) == PartitionSpec(
      ('replica', 'data', 'fsdp'))


def test_shared_mesh_axis():
  """Two axes of a tensor cannot share a mesh axis."""
  rules = {**DEFAULT_RULES, 'head_dim': ('tensor',)}
  with pytest.raises(UserError, match="weight .*'head_dim'.*'tensor'"):
    partition_spec(('embed', 'heads', 'head_dim'), rules, where='weight')


def test_axis_does_not_divide():
  """An axis that does not divide is named with its size."""
  boxed = {'norm': nn.Partitioned(jnp.zeros((6,)), ('embed',))}
  with pytest.raises(UserError, match=r"\['norm'\].*'embed' of 6.* 4 .*'fsdp'"):
    shardings_of(boxed, make_mesh(MeshConfig(2, 4)), DEFAULT_RULES)


def test_shards_of_decoder():
  """A decoder is sharded, and a leaf without axes is replicated."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  boxed = {**boxed_shapes(tiny.LLAMA), 'step': jax.ShapeDtypeStruct((), jnp.int32)}
  shards = jax.tree.map(lambda sharding, leaf: sharding.shard_shape(leaf.shape),
                        shardings_of(boxed, mesh, DEFAULT_RULES), nn.unbox(boxed))
  assert shards['step'] == ()
  assert shards['embedder']['table'] == shards['embedder']['head'] == (19, 8)
  blocks = shards['transformer']['blocks']
  assert blocks['attention']['query'] == {'w': (3, 8, 2, 6), 'b': (3, 2, 6)}
  assert blocks['attention']['key']['w'] == (3, 8, 1, 6)
  assert blocks['attention']['out']['w'] == (3, 2, 6, 8)
  assert blocks['feed_forward']['down']['w'] == (3, 10, 8)
  assert blocks['attention_in']['scale'] == (3, 16)


def test_check_batch():
  """A batch must divide into microbatches over the mesh."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  check_batch(16, accumulation=4, mesh=mesh, rules=DEFAULT_RULES)
  with pytest.raises(UserError, match='batch_size = 8 .* 4 .* 4 .* 16'):
    check_batch(8, accumulation=4, mesh=mesh, rules=DEFAULT_RULES)
  with pytest.raises(UserError, match='multiple of 16, or lower training.accumulation'):
    check_batch(8, accumulation=4, mesh=mesh, rules=DEFAULT_RULES, section='training')


@pytest.mark.parametrize('config', [MeshConfig(2, 2, 2), MeshConfig(1, 2, 2, replica=2)])
def test_place_batch(config):
  """The texts of a batch are split over replica, data and fsdp."""
  batch = jax.tree.map(np.asarray, tiny.packed_batch([(7, 4, 8)] * 8))
  placed = place_batch(batch, make_mesh(config), DEFAULT_RULES)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {(2, tiny.LENGTH)}


@dataclasses.dataclass(frozen=True)
class HostDevice:
  """A device of another process, with the attributes that a mesh reads."""
  id: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  slice_index: int = 0
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def chips(slices):
  """Four chips, 2 x 2, of each slice; the list goes round the slices."""
  return [HostDevice(4 * number + x + 2 * y, number, 'tpu', 'TPU v5 lite', number, (x, y, 0))
          for y in range(2) for x in range(2) for number in range(slices)]


def mesh_of_processes(processes):
  """A mesh whose devices are in these processes, in an array [data, fsdp, tensor]."""
  devices = np.empty(np.shape(processes), object)
  for number, (place, process) in enumerate(np.ndenumerate(processes)):
    devices[place] = HostDevice(number, int(process))
  return Mesh(devices[None], MESH_AXES)


@pytest.mark.parametrize('config, inside', [
    (MeshConfig(replica=2), (4, 1, 1)), (MeshConfig(1, 2, 2, replica=-1), (1, 2, 2))])
def test_replica_axis(config, inside):
  """Only the replica axis crosses slices."""
  mesh = make_mesh(config, chips(slices=2))
  assert mesh.devices.shape == (2, *inside)
  for number, devices in enumerate(mesh.devices):
    assert {device.slice_index for device in devices.flat} == {number}


@pytest.mark.parametrize('config, given', [
    (MeshConfig(), 1), (MeshConfig(replica=4, data=2), 4), (MeshConfig(fsdp=8), 1)])
def test_wrong_replica_axis(config, given):
  """A replica axis that is not the number of slices is refused."""
  with pytest.raises(UserError, match=f'replica is {given}.* 2 slices'):
    make_mesh(config, chips(slices=2))


@pytest.mark.parametrize('processes, rows', [
    ([[[0], [0]], [[1], [1]]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([[[0], [1]], [[0], [1]]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ([[[1], [0]], [[0], [1]]], [[2, 3, 4, 5], [0, 1, 6, 7]]),
    ([[[0, 1], [0, 1]]], [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
    ([[[0, 0], [0, 1]], [[1, 1], [2, 2]]], [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7]])])
def test_rows_of_process(processes, rows):
  """The rows of a process are those of its devices, in any order of devices."""
  mesh = mesh_of_processes(processes)
  for process, expected in enumerate(rows):
    assert rows_of_process(8, mesh, DEFAULT_RULES, process).tolist() == expected


def test_rows_of_bad_batch():
  """A batch that does not divide has no rows for a process."""
  with pytest.raises(UserError, match='batch_size = 6 .* 4 shards'):
    rows_of_process(6, mesh_of_processes([[[0], [0]], [[1], [1]]]), DEFAULT_RULES, 0)


def test_check_own_rows():
  """Two processes that need the same texts of a stream are refused."""
  check_own_rows(mesh_of_processes([[[0, 0], [1, 1]]]), DEFAULT_RULES)
  with pytest.raises(UserError, match=r"\['tensor'\].*'online'.*\(2 devices\)"):
    check_own_rows(mesh_of_processes([[[0, 1], [0, 1]]]), DEFAULT_RULES)


def test_place_repeated_rows():
  """Rows that several devices need are placed on each of them."""
  rows = np.arange(8).reshape(4, 2)
  placed = place_batch(rows, make_mesh(MeshConfig(2, 2, 2)), {'batch': ('tensor',)})
  np.testing.assert_array_equal(placed, rows)
  assert len(placed.addressable_shards) == 8
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, rows[shard.index])


def test_parse():
  """A mesh and rules are read from flags."""
  assert parse_mesh('data=1,fsdp=256') == MeshConfig(data=1, fsdp=256)
  assert parse_mesh('fsdp=-1,data=2') == MeshConfig(data=2, fsdp=-1)
  assert parse_rules('embed=fsdp+tensor,vocab=') == {'embed': ('fsdp', 'tensor'), 'vocab': ()}


@pytest.mark.parametrize('read, text, part', [
    (parse_mesh, 'model=2', 'model=2'), (parse_mesh, 'fsdp', 'fsdp'),
    (parse_mesh, 'fsdp=x', 'fsdp=x'),
    (parse_mesh, 'fsdp=2,fsdp=4', 'fsdp=4'), (parse_mesh, '', ''), (parse_rules, 'embed', 'embed'),
    (parse_rules, 'embed=,embed=fsdp', 'embed=fsdp')])
def test_parse_bad_form(read, text, part):
  """A mesh or rules of another form are refused."""
  with pytest.raises(UserError, match=f"={text}: '{part}'"):
    read(text)
