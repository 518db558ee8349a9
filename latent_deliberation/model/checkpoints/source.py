"""Checkpoints as named tensors (`Source`), checked, read one by one and assembled into parameters.

`OrbaxSource` is here; SafetensorsSource is in safetensors_io.py. The layouts of tensors are in
hugging_face.py and google.py.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from einops import rearrange
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path, list_directory, path_for_orbax
from latent_deliberation.host_memory import free_memory
from latent_deliberation.model.checkpoints.layout import (
  LAYERED,
  Entry,
  Layout,
  parameter_axes,
  stored_shape,
  stored_sharding,
)
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.progress import Progress

READABLE = ('float32', 'bfloat16', 'float16')
# Suffixes of pickled weights. Reading them would run code.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
_MARKS = ('_METADATA', 'manifest.ocdbt', 'checkpoint')  # files of an orbax checkpoint


@dataclasses.dataclass(frozen=True)
class Stored:
  """The shape of a tensor on disk, and the name of its dtype."""
  shape: tuple[int, ...]
  dtype: str

  @property
  def nbytes(self) -> int:
    """Number of bytes of its values."""
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Source(Protocol):
  """A checkpoint that is open for reading.

  Attributes:
    directory: directory of the checkpoint.
    tensors: all tensors that it has, by name.
  """
  directory: Path
  tensors: Mapping[str, Stored]

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """Returns the leading `shape` of a tensor, as stored; each host reads only its own shards."""


def is_orbax(directory: Path) -> bool:
  """Whether a directory looks like an orbax checkpoint."""
  return any((directory / mark).is_file() for mark in _MARKS)


class OrbaxSource:
  """A Source of an orbax checkpoint. Opening it reads only metadata.

  Args:
    directory: directory of the checkpoint.
    rename: function from the keys of an array, joined by '/', to its name in `tensors`.

  Raises:
    UserError: the checkpoint cannot be read, or two arrays get the same name.
  """

  def __init__(self, directory: Path, rename: Callable[[str], str]):
    self.directory = as_path(directory).absolute()
    self._path = path_for_orbax(self.directory)
    self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
      metadata = self._checkpointer.metadata(self._path).item_metadata
    except Exception as error:  # orbax raises many classes for truncated or missing files
      raise UserError(f'{directory} is not a whole orbax checkpoint ({_short(error)}): download '
                      'or write it again') from error
    if metadata is None:  # orbax logs a failure to read it, and returns nothing
      raise UserError(f'{directory} is not a whole orbax checkpoint (its _METADATA is missing or '
                      'damaged): download or write it again')
    # Names, shapes and dtypes of all arrays, under the names of the layout.
    self.tensors: dict[str, Stored] = {}
    self._keys: dict[str, tuple[str, ...]] = {}
    for keys, leaf in traverse_util.flatten_dict(metadata.tree).items():
      name = rename('/'.join(map(str, keys)))
      if name in self.tensors:
        raise UserError(f'{directory} has {name} twice, under {self._keys[name]} and {keys}: '
                        'write it again with one of the two')
      self.tensors[name] = Stored(tuple(leaf.shape), str(leaf.dtype))
      self._keys[name] = keys

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """See Source."""
    return self.read_several({name: (shape, sharding)})[name]

  def read_several(self, wanted: Mapping[str, tuple[tuple[int, ...], Sharding]]
                   ) -> dict[str, Array]:
    """Returns tensors of these shapes and shardings, with as few requests as `read` takes for one.

    All of them are read at once, which takes more memory than one after the other.
    """
    # Restore these arrays alone. Without `strict`, orbax cuts them to the wanted shapes.
    leaves, items = {}, {}
    for name, (shape, sharding) in wanted.items():
      leaves[self._keys[name]] = ocp.ArrayRestoreArgs(
          sharding=sharding, global_shape=shape, strict=False)
      items[self._keys[name]] = jax.ShapeDtypeStruct(
          shape, self.tensors[name].dtype, sharding=sharding)
    try:
      restored = self._checkpointer.restore(self._path, args=ocp.args.PyTreeRestore(
          item=traverse_util.unflatten_dict(items),
          restore_args=traverse_util.unflatten_dict(leaves), partial_restore=True))
    except Exception as error:  # as above
      raise UserError(f'{", ".join(wanted)} of {self.directory} cannot be read ({_short(error)}): '
                      'the checkpoint is damaged; download or write it again') from error
    flat = traverse_util.flatten_dict(restored)
    return {name: flat[self._keys[name]] for name in wanted}


def _short(error: Exception) -> str:
  """Returns the message of an error, cut before the long specification of a TensorStore."""
  return textwrap.shorten(str(error), 200)


def refuse_pickles(directory: Path) -> None:
  """Raises UserError if a directory holds pickled weights; call it if there are no others."""
  pickles = [path.name for path in list_directory(directory) if path.suffix in PICKLES]
  if pickles:
    raise UserError(
        f'{directory} holds pickled weights {pickles}, which are refused because unpickling runs '
        'code: load them with transformers and write them with save_pretrained, which makes '
        'safetensors')


def check_tensors(source: Source, expected: Mapping[str, tuple[int, ...]], padded: Collection[str],
                  is_foreign: Callable[[str], bool]) -> None:
  """Compares the tensors of a checkpoint with those of a decoder.

  Args:
    source: checkpoint.
    expected: name -> shape of the decoder's tensors.
    padded: names of tensors that may have additional rows, which are not read.
    is_foreign: whether a name belongs to another part, such as a vision tower.

  Raises:
    UserError: tensors are missing, unexpected, or of another shape or dtype; all are listed.
  """
  # Tensors of the decoder that are missing, or have another shape or dtype.
  lines, unreadable = [], []
  for name, shape in expected.items():
    if name not in source.tensors:
      lines.append(_difference(name, None, shape))
      continue
    stored = source.tensors[name]
    rows = max(stored.shape[0], shape[0]) if name in padded and stored.shape else shape[0]
    if stored.shape != (rows, *shape[1:]):
      lines.append(_difference(name, stored.shape, shape))
    if stored.dtype not in READABLE:
      unreadable.append(f'  {name}: has dtype {stored.dtype}, expected one of {READABLE}')
  # Tensors that belong to no known part of a model.
  lines += [_difference(name, stored.shape, None)
            for name, stored in source.tensors.items()
            if name not in expected and not is_foreign(name)]
  if lines or unreadable:
    remedy = ('Its weights and its config belong to different models, or files are missing: '
              'download or write the directory again.')
    if not lines:
      remedy = 'Convert it to one of these with the library that wrote it.'
    raise UserError('\n'.join([
        f'{source.directory} does not hold the decoder that its config describes:',
        *lines, *unreadable, remedy]))


def shape_differences(found: Mapping[str, tuple[int, ...]],
                      expected: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Returns a line for each tensor that is missing, unexpected or of another shape."""
  return [_difference(path, found.get(path), expected.get(path))
          for path in sorted(found.keys() | expected) if found.get(path) != expected.get(path)]


def _difference(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> str:
  if found is None:
    return f'  {name}: missing, expected {list(expected)}'
  if expected is None:
    return f'  {name}: not expected, has shape {list(found)}'
  return f'  {name}: has shape {list(found)}, expected {list(expected)}'


def on_first_device(boxed: PyTree) -> PyTree:
  """Returns the default shardings of boxed shapes: all on the first device."""
  device = SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: device, nn.unbox(boxed))


def check_memory(directory: Path, boxed: PyTree, shardings: PyTree, value_bytes: float) -> None:
  """Compares the memory that parameters take on CPU devices with the memory that is free.

  Args:
    directory: directory of the checkpoint, for the message.
    boxed: boxed shapes of the parameters.
    shardings: sharding of each.
    value_bytes: bytes of a value.

  Raises:
    UserError: the parameters of this process do not fit, even before anything else is held.
  """
  def count(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> int:
    devices = [device for device in sharding.addressable_devices if device.platform == 'cpu']
    return len(devices) * math.prod(sharding.shard_shape(leaf.shape))

  values = sum(jax.tree.leaves(jax.tree.map(count, nn.unbox(boxed), shardings)))
  needed, free = int(values * value_bytes), free_memory()
  if needed > free:
    raise UserError(
        f'{directory}: the weights take {needed:,} bytes of memory, and {free:,} are free: free '
        'some, use a larger machine, or another decoder. From float32, launch/convert.py with '
        '--dtype=bfloat16 writes a decoder of half the size')


def assemble(source: Source, layout: Layout, config: TransformerConfig,
             shardings: Mapping[str, Sharding], dtype: DTypeLike | None = None) -> Params:
  """Returns the parameters, each on its sharding.

  A host holds its share of the finished parameters and one stored tensor, never a second copy of a
  stack of layers. Call `check_tensors` before.

  Args:
    source: checkpoint.
    layout: tensor of each parameter.
    config: architecture.
    shardings: path -> sharding of each parameter.
    dtype: dtype to cast each tensor to as it is read; default is that of the checkpoint.
  """
  axes = parameter_axes(config)
  # The table comes first: it is the largest tensor by far, and nothing else is held yet.
  paths = sorted(axes, key=lambda path: not axes[path].startswith('V'))
  progress = Progress('reading weights', 'tensors', len(paths))
  flat = {}
  for path in paths:
    flat[path] = _read_parameter(source, layout[path], path, axes[path], config, shardings[path],
                                 dtype)
    progress.update(len(flat))
  return traverse_util.unflatten_dict(flat, sep='/')


def _read_parameter(source: Source, entry: Entry, path: str, axes: str, config: TransformerConfig,
                    sharding: Sharding, dtype: DTypeLike | None) -> Array:
  """Returns one parameter; if it has layers, they are read one by one into a stack."""
  shape = stored_shape(entry, config)
  stored = stored_sharding(entry, path, axes, sharding)
  arranged = {'pattern': f'{entry.axes} -> {axes}', 'part': entry.part,
              'head_dim': config.head_dim}
  if not path.startswith(LAYERED):
    whole = _arrange(source.read(entry.name, shape, stored), **arranged)
    return whole if dtype is None else whole.astype(dtype)
  # Layers go one by one into a stack that starts as zeros on its own shards.
  names = [entry.name.format(layer) for layer in range(config.num_layers)]
  if dtype is None:
    dtype = jnp.result_type(*{source.tensors[name].dtype for name in names})
  one = jax.eval_shape(functools.partial(_arrange, **arranged), jax.ShapeDtypeStruct(shape, dtype))
  stack = jnp.zeros((config.num_layers, *one.shape), dtype, device=sharding)
  for layer, name in enumerate(names):
    # Waiting bounds memory: without it, pieces would be read faster than they are put.
    stack = jax.block_until_ready(
        _put(stack, source.read(name, shape, stored), layer, **arranged))
  return stack


_STATIC = ('pattern', 'part', 'head_dim')


@functools.partial(jax.jit, static_argnames=_STATIC)
def _arrange(piece: Array, pattern: str, part: int | None, head_dim: int) -> Array:
  """Returns a stored tensor, or a part of it, with its axes in our order."""
  merged = {'H': head_dim} if '(' in pattern else {}
  return rearrange(piece if part is None else piece[part], pattern, **merged)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames='stack')
def _put(stack: Array, piece: Array, layer: Array, pattern: str, part: int | None,
         head_dim: int) -> Array:
  """Returns the stack with one more layer in it."""
  value = _arrange(piece, pattern, part, head_dim).astype(stack.dtype)
  # This works in place. stack.at[layer].set(...) makes a copy of bfloat16 on CPUs.
  return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
