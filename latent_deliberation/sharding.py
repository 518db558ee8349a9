"""The mesh, and one table of rules from a tensor's logical axes to mesh axes.

The model names the logical axes of its weights and activations, and knows no mesh. The rules, the
mesh, and the shardings that follow from both are here.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import PyTree
from latent_deliberation.errors import UserError, check_types

MESH_AXES = ('replica', 'data', 'fsdp', 'tensor')

# Every name that the model gives to an axis of its weights and activations.
LOGICAL_AXES = ('activation', 'batch', 'embed', 'gated', 'head_dim', 'heads', 'kv_heads', 'latent',
                'layers', 'length', 'mlp', 'norm', 'rank', 'slot', 'trace', 'vocab')

# Logical axis -> mesh axes. Texts are split over replica, data and fsdp. Weights are stored in fsdp
# shards and split over tensor. Every other axis is replicated.
DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {
    'batch': ('replica', 'data', 'fsdp'),
    'embed': ('fsdp',),
    'vocab': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'mlp': ('tensor',),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Number of devices along each mesh axis. One axis may be -1, for all devices that are left.

  Attributes:
    replica: number of TPU slices, or of nodes where jax reports them, with a slow network between.
      Texts are split over it, weights are not. Only the sum of gradients crosses it, once a step.
    data: number of devices inside a slice that texts are split over, but not weights.
    fsdp: number of devices that texts are split over, and the stored shards of weights.
    tensor: number of devices that heads, feed-forward and vocabulary are split over.
  """
  replica: int = dataclasses.field(default=1, kw_only=True)
  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    check_types(self)


def parse_mesh(text: str) -> MeshConfig:
  """Reads a mesh such as 'data=1,fsdp=256,tensor=1'. An axis that is left out keeps its default.

  Raises:
    UserError: an axis is unknown or comes twice, or a size is not an integer.
  """
  names = [field.name for field in dataclasses.fields(MeshConfig)]
  sizes = {}
  for part in text.split(','):
    name, _, size = part.partition('=')
    if name not in names or not re.fullmatch(r'-1|\d+', size) or name in sizes:
      raise UserError(f'--mesh={text}: {part!r} must be AXIS=SIZE, each of {names} once at most, '
                       'such as data=16,fsdp=16')
    sizes[name] = int(size)
  return MeshConfig(**sizes)


def parse_rules(text: str) -> dict[str, tuple[str, ...]]:
  """Reads changes of the rules such as 'embed=fsdp+tensor,vocab=': logical axis = mesh axes.

  Raises:
    UserError: a part has another form, or an axis comes twice.
  """
  rules = {}
  for part in text.split(','):
    name, equals, axes = part.partition('=')
    if not name or not equals or name in rules:
      raise UserError(f'--rules={text}: {part!r} must be LOGICAL_AXIS=MESH_AXIS+MESH_AXIS, each '
                       'logical axis once, such as embed=fsdp+tensor,vocab=')
    rules[name] = tuple(axes.split('+')) if axes else ()
  return rules


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the (replica, data, fsdp, tensor) mesh over `devices`, by default all of them.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or `replica` is not the number
      of slices of devices in several slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = _fill_sizes([getattr(config, axis) for axis in MESH_AXES], len(devices))
  # Devices of one slice are linked fast, slices by a slow network.
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  if len(slices) < 2:
    return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=types)
  if sizes[0] != len(slices):
    raise UserError(
        f'mesh {_named(sizes)}: replica is {sizes[0]}, but the devices are in {len(slices)} '
        f'slices: set mesh.replica to {len(slices)}, so only gradients cross the network '
        'between slices')
  # One mesh for each slice, since jax orders the devices of a mesh by their links.
  inside = [jax.make_mesh(sizes[1:], MESH_AXES[1:], devices=slices[number]).devices
            for number in sorted(slices)]
  return Mesh(np.stack(inside), MESH_AXES, axis_types=types)


def _fill_sizes(sizes: Sequence[int], num_devices: int) -> list[int]:
  """Returns the sizes, with the number of devices that are left in place of -1."""
  if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise UserError(f'mesh {_named(sizes)}: sizes must be positive, or -1 on one axis for all '
                    'devices that are left')
  known = math.prod(size for size in sizes if size != -1)
  is_filled = -1 in sizes
  if num_devices % known or not is_filled and known != num_devices:
    needs = f'a multiple of {known}' if is_filled else str(known)
    raise UserError(
        f'mesh {_named(sizes)} needs {needs} devices, and not {num_devices}: '
        f'{_advise(sizes, num_devices)}. A run may be resumed with another mesh')
  return [num_devices // known if size == -1 else size for size in sizes]


def _advise(sizes: Sequence[int], num_devices: int) -> str:
  """Returns what to change in a mesh that does not fit the devices: its largest axis, if it can."""
  named = _named(sizes)
  axis = max(('data', 'fsdp', 'tensor', 'replica'), key=named.get)
  size = named[axis]
  others = math.prod(other for other in sizes if other != -1) // size
  if num_devices % others:
    return f'give sizes whose product is {num_devices}, or -1 on one axis'
  left = num_devices // others
  return f'give mesh.{axis}={math.gcd(size, left) if -1 in sizes else left}'


def _named(sizes: Sequence[int]) -> dict[str, int]:
  return dict(zip(MESH_AXES, sizes, strict=True))


def check_rules(rules: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
  """Returns the rules as a plain dict of tuples.

  Raises:
    UserError: a rule names an unknown logical axis or an unknown mesh axis.
  """
  rules = {name: tuple(axes) for name, axes in rules.items()}
  for name, axes in rules.items():
    if name not in LOGICAL_AXES:
      near = difflib.get_close_matches(name, LOGICAL_AXES, n=1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise UserError(f'rule {name!r} -> {axes}: no tensor has an axis of this name; {hint}The '
                      f'logical axes are {LOGICAL_AXES}')
    unknown = sorted(set(axes) - set(MESH_AXES))
    if unknown:
      raise UserError(f'rule {name!r} -> {axes}: {unknown} are not mesh axes; those are '
                      f'{MESH_AXES}')
  return rules


def partition_spec(names: Sequence[str | None], rules: Mapping[str, Sequence[str]],
                   where: str = 'tensor') -> PartitionSpec:
  """Returns the mesh axes of each axis of a tensor with logical axes `names`.

  Args:
    names: logical axes of the tensor; None for an axis that is not split.
    rules: mesh axes of each logical axis.
    where: name of the tensor, for the error message.

  Raises:
    UserError: two axes of the tensor would be split over the same mesh axis.
  """
  entries = [tuple(rules.get(name, ())) for name in names]
  used = [axis for entry in entries for axis in entry]
  twice = sorted({axis for axis in used if used.count(axis) > 1})
  if twice:
    raise UserError(f'{where} {tuple(names)}: the rules use mesh axis {twice[0]!r} for more than '
                    'one of its axes; change the rule of one of them')
  return PartitionSpec(*(entry or None for entry in entries))


def shardings_of(boxed: PyTree, mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> PyTree:
  """Returns a NamedSharding for every leaf of a tree that is boxed with logical axes.

  Leaves without a box, such as step counters, are replicated.

  Raises:
    UserError: two axes of a leaf use one mesh axis, or an axis does not divide over its mesh axes.
  """

  def of_leaf(path: Any, leaf: Any) -> NamedSharding:
    if not isinstance(leaf, nn.Partitioned):
      return NamedSharding(mesh, PartitionSpec())
    where = jax.tree_util.keystr(path)
    # Every axis must divide evenly over its mesh axes.
    spec = partition_spec(leaf.names, rules, where)
    for name, size in zip(leaf.names, leaf.value.shape, strict=True):
      axes = tuple(rules.get(name, ()))
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards:
        raise UserError(
            f'{where}: its axis {name!r} of {size} does not divide by the {shards} shards of mesh '
            f'axes {axes}; change the mesh or the rule of {name!r}')
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
      of_leaf, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def batch_sharding(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> NamedSharding:
  """Returns the sharding of any array whose first axis is the texts of a batch."""
  return NamedSharding(mesh, partition_spec(('batch',), rules))


def batch_shards(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> int:
  """Returns the number of shards that texts are split over. A batch must be a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in rules.get('batch', ()))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh,
                rules: Mapping[str, Sequence[str]], section: str = '') -> None:
  """Raises UserError where a batch does not divide into microbatches over the mesh.

  Args:
    batch_size: number of rows of the global batch.
    accumulation: number of microbatches of a batch.
    mesh: mesh of the run.
    rules: mesh axes of each logical axis.
    section: section of the config with the batch size, for the error message.
  """
  shards = batch_shards(mesh, rules)
  if batch_size % (shards * accumulation):
    key = f'{section}.batch_size' if section else 'batch_size'
    fewer = f', or lower {section}.accumulation' if section and accumulation > 1 else ''
    raise UserError(
        f'{key} = {batch_size} does not divide into {accumulation} microbatches over '
        f'{shards} shards of mesh {dict(mesh.shape)}: make it a multiple of '
        f'{shards * accumulation}{fewer}')


def rows_of_process(batch_size: int, mesh: Mesh, rules: Mapping[str, Sequence[str]],
                    process: int | None = None) -> np.ndarray:
  """Returns the rows of a global batch on the devices of a process, int64 [n], ascending.

  They may have gaps, since a mesh orders devices by their links and not by their hosts. Two
  processes may hold the same rows.

  Args:
    batch_size: number of rows of the global batch.
    mesh: mesh of the run.
    rules: mesh axes of each logical axis.
    process: index of the process; default is this process.

  Raises:
    UserError: the batch does not divide over the mesh.
  """
  check_batch(batch_size, 1, mesh, rules)
  process = jax.process_index() if process is None else process
  slices = batch_sharding(mesh, rules).devices_indices_map((batch_size,))
  return np.unique(np.concatenate([
      np.arange(batch_size)[rows] for device, (rows,) in slices.items()
      if device.process_index == process]))


def check_own_rows(mesh: Mesh | AbstractMesh, rules: Mapping[str, Sequence[str]]) -> None:
  """Raises UserError where two processes hold the same rows of a batch."""
  if isinstance(mesh, AbstractMesh):  # a planner's mesh has no processes
    return
  # Along an axis that does not split the batch, all devices need the same rows.
  process = np.vectorize(lambda device: device.process_index)(mesh.devices)
  shared = [name for axis, name in enumerate(mesh.axis_names)
            if name not in rules.get('batch', ())
            and (process != process.take([0], axis)).any()]
  if shared:
    raise UserError(
        f'mesh {dict(mesh.shape)}: axes {shared} do not divide the batch and span processes. Two '
        "processes need the same texts, which data.mode = 'online' cannot give: keep these axes "
        f'inside one process ({np.bincount(process.ravel()).max()} devices), or set '
        "data.mode = 'packed'")


def place_batch(batch: PyTree, mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> PyTree:
  """Puts a global batch on the devices, of which each process passes its `rows_of_process`."""
  sharding = batch_sharding(mesh, rules)
  shards = batch_shards(mesh, rules)
  # This process's share of the shards gives the size of the global batch.
  own_shards = len(rows_of_process(shards, mesh, rules))  # counted on a batch of one row a shard

  batch = jax.tree.map(np.asarray, batch)
  batch_size = len(jax.tree.leaves(batch)[0]) * shards // own_shards
  rows = rows_of_process(batch_size, mesh, rules)

  def place(leaf: np.ndarray) -> jax.Array:
    # A device asks for rows of the global batch, which are looked up in our own.
    return jax.make_array_from_callback(
        (batch_size, *leaf.shape[1:]), sharding,
        lambda index: leaf[np.searchsorted(rows, np.arange(batch_size)[index[0]])])

  return jax.tree.map(place, batch)
