"""The mesh, the rules, and the shardings that follow; what cannot be sharded is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from latent_deliberation.errors import UserError
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.models import build_deliberator
from latent_deliberation.sharding import (
  DEFAULT_RULES,
  LOGICAL_AXES,
  MESH_AXES,
  MeshConfig,
  check_batch,
  check_own_rows,
  check_rules,
  make_mesh,
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
def test_a_mesh_spans_all_devices_and_one_axis_takes_what_is_left(config, shape):
  assert tuple(make_mesh(config).shape.items()) == tuple(
      zip(('replica', 'data', 'fsdp', 'tensor'), shape, strict=True))


@pytest.mark.parametrize('config, message', [
    (MeshConfig(4), "'data': 4, 'fsdp': 1, 'tensor': 1} has 4 places for 8 devices"),
    (MeshConfig(8, 2), 'has 16 places for 8 devices'),
    (MeshConfig(8, replica=2), "'replica': 2, 'data': 8, .* has 16 places for 8 devices"),
    (MeshConfig(-1, 3), 'for 8 devices: the sizes must multiply to the number of devices'),
    (MeshConfig(-1, 16), 'for 8 devices'),
    (MeshConfig(-1, -1), "'data': -1, 'fsdp': -1, .* -1 on one axis"),
    (MeshConfig(0), "'data': 0, .*sizes are positive")])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(config, message):
  with pytest.raises(UserError, match=message):
    make_mesh(config)


def test_a_mesh_may_take_some_of_the_devices():
  assert make_mesh(MeshConfig(tensor=2), jax.devices()[:2]).size == 2


def test_a_rule_for_an_unknown_mesh_axis_is_refused():
  with pytest.raises(UserError, match=r"rule 'embed' -> \('model',\): \['model'\] are not mesh"):
    check_rules({**DEFAULT_RULES, 'embed': ['model']})
  assert check_rules({'embed': ['fsdp', 'tensor']}) == {'embed': ('fsdp', 'tensor')}


def test_a_rule_for_an_axis_that_no_tensor_has_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"rule 'emebd' -> \('fsdp',\): .* did you mean 'embed'\? .*"
                     "'activation', 'batch'"):
    check_rules({'emebd': ['fsdp']})


def test_every_axis_that_the_model_names_may_have_a_rule(monkeypatch):
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


def test_a_tensor_is_split_by_the_rules_of_its_axes():
  assert partition_spec(('layers', 'embed', 'heads', None), DEFAULT_RULES) == PartitionSpec(
      None, 'fsdp', 'tensor', None)
  assert partition_spec(('batch',), DEFAULT_RULES) == PartitionSpec(
      ('replica', 'data', 'fsdp'))


def test_two_axes_of_a_tensor_cannot_share_a_mesh_axis():
  rules = {**DEFAULT_RULES, 'head_dim': ('tensor',)}
  with pytest.raises(UserError, match="weight .*'head_dim'.*mesh axis 'tensor' for more than one"):
    partition_spec(('embed', 'heads', 'head_dim'), rules, where='weight')


def test_an_axis_that_does_not_divide_is_named_with_its_size():
  boxed = {'norm': nn.Partitioned(jnp.zeros((6,)), ('embed',))}
  with pytest.raises(UserError, match=r"\['norm'\]: its axis 'embed' of 6 does not divide by the "
                     r"4 shards of mesh axes \('fsdp',\)"):
    shardings_of(boxed, make_mesh(MeshConfig(2, 4)), DEFAULT_RULES)


def test_a_decoder_lies_in_shards_and_what_has_no_axes_lies_everywhere():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  boxed = {**boxed_shapes(tiny.CONFIG), 'step': jax.ShapeDtypeStruct((), jnp.int32)}
  shards = jax.tree.map(lambda sharding, leaf: sharding.shard_shape(leaf.shape),
                        shardings_of(boxed, mesh, DEFAULT_RULES), nn.unbox(boxed))
  assert shards['step'] == ()
  assert shards['embedder']['table'] == (19, 8)
  blocks = shards['transformer']['blocks']
  assert blocks['attention']['query']['w'] == (3, 8, 2, 6)
  assert blocks['attention']['key']['w'] == (3, 8, 1, 6)
  assert blocks['attention']['out']['w'] == (3, 2, 6, 8)
  assert blocks['feed_forward']['down']['w'] == (3, 10, 8)
  assert blocks['attention_in']['scale'] == (3, 16)


def test_a_batch_divides_into_microbatches_over_the_mesh():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  check_batch(16, accumulation=4, mesh=mesh, rules=DEFAULT_RULES)
  with pytest.raises(UserError, match='batch_size = 8 does not divide into 4 microbatches over 4 '
                     'shards .* multiple of 16'):
    check_batch(8, accumulation=4, mesh=mesh, rules=DEFAULT_RULES)


@pytest.mark.parametrize('config', [MeshConfig(2, 2, 2), MeshConfig(1, 2, 2, replica=2)])
def test_a_batch_is_placed_with_its_texts_over_replica_data_and_fsdp(config):
  batch = jax.tree.map(np.asarray, tiny.packed_batch([(7, 4, 8)] * 8))
  placed = place_batch(batch, make_mesh(config), DEFAULT_RULES)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {(2, tiny.LENGTH)}


@dataclasses.dataclass(frozen=True)
class HostDevice:
  """What a mesh needs to know of a device that another process has."""
  id: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  slice_index: int = 0
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def chips(slices):
  """Four chips, 2 x 2, of each of some slices, which take turns in the list."""
  return [HostDevice(4 * number + x + 2 * y, number, 'tpu', 'TPU v5 lite', number, (x, y, 0))
          for y in range(2) for x in range(2) for number in range(slices)]


def mesh_of_processes(processes):
  """A mesh whose devices lie in these processes, in an array [data, fsdp, tensor]."""
  devices = np.empty(np.shape(processes), object)
  for number, (place, process) in enumerate(np.ndenumerate(processes)):
    devices[place] = HostDevice(number, int(process))
  return Mesh(devices[None], MESH_AXES)


@pytest.mark.parametrize('config, inside', [
    (MeshConfig(replica=2), (4, 1, 1)), (MeshConfig(1, 2, 2, replica=-1), (1, 2, 2))])
def test_only_the_replica_axis_goes_from_slice_to_slice(config, inside):
  mesh = make_mesh(config, chips(slices=2))
  assert mesh.devices.shape == (2, *inside)
  for number, devices in enumerate(mesh.devices):
    assert {device.slice_index for device in devices.flat} == {number}


@pytest.mark.parametrize('config, given', [
    (MeshConfig(), 1), (MeshConfig(replica=4, data=2), 4), (MeshConfig(fsdp=8), 1)])
def test_a_replica_axis_that_is_not_the_slices_is_refused(config, given):
  with pytest.raises(UserError, match=f'replica is {given}, but the devices lie in 2 slices: set '
                     'mesh.replica to 2'):
    make_mesh(config, chips(slices=2))


@pytest.mark.parametrize('processes, rows', [
    ([[[0], [0]], [[1], [1]]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([[[0], [1]], [[0], [1]]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ([[[1], [0]], [[0], [1]]], [[2, 3, 4, 5], [0, 1, 6, 7]]),
    ([[[0, 1], [0, 1]]], [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
    ([[[0, 0], [0, 1]], [[1, 1], [2, 2]]], [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7]])])
def test_the_rows_of_a_process_are_those_of_its_devices_in_any_order(processes, rows):
  mesh = mesh_of_processes(processes)
  for process, expected in enumerate(rows):
    assert rows_of_process(8, mesh, DEFAULT_RULES, process).tolist() == expected


def test_rows_of_a_batch_that_does_not_divide_are_refused():
  with pytest.raises(UserError, match='batch_size = 6 does not divide .* over 4 shards'):
    rows_of_process(6, mesh_of_processes([[[0], [0]], [[1], [1]]]), DEFAULT_RULES, 0)


def test_a_stream_is_refused_where_an_axis_that_does_not_divide_the_batch_spans_processes():
  check_own_rows(mesh_of_processes([[[0, 0], [1, 1]]]), DEFAULT_RULES)
  with pytest.raises(UserError, match=r"axes \['tensor'\] .* one process \(2 devices\), or pack"):
    check_own_rows(mesh_of_processes([[[0, 1], [0, 1]]]), DEFAULT_RULES)


def test_rows_that_a_batch_rule_repeats_are_placed_on_every_device_that_needs_them():
  rows = np.arange(8).reshape(4, 2)
  placed = place_batch(rows, make_mesh(MeshConfig(2, 2, 2)), {'batch': ('tensor',)})
  np.testing.assert_array_equal(placed, rows)
  assert len(placed.addressable_shards) == 8
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, rows[shard.index])
