"""Checkpoints as named tensors, read one at a time and assembled into a decoder's parameters."""

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

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.errors import UserError
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
# Weights that were pickled run code when they are read.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor on disk: its shape, and the name of its dtype."""
  shape: tuple[int, ...]
  dtype: str

  @property
  def nbytes(self) -> int:
    """Size of its values."""
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Source(Protocol):
  """A checkpoint that is open for reading.

  Attributes:
    directory: where it lies.
    tensors: all it has, by name.
  """
  directory: Path
  tensors: Mapping[str, Stored]

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """The leading `shape` of a tensor, as stored; each host reads its own shards alone."""


def refuse_pickles(directory: Path) -> None:
  """Raises UserError where a directory holds pickled weights; call it where no others are."""
  pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
  if pickles:
    raise UserError(
        f'{directory} holds pickled weights {pickles}, which are not read, since unpickling runs '
        'code: load them with transformers and write them with save_pretrained, which makes '
        'safetensors')


def check_tensors(source: Source, expected: Mapping[str, tuple[int, ...]], padded: Collection[str],
                  is_foreign: Callable[[str], bool]) -> None:
  """Compares the tensors that are there with those that a decoder has.

  Args:
    expected: name -> shape.
    padded: names that may have more rows than expected, which are left out.
    is_foreign: whether a name belongs to what is no part of the decoder, such as a vision tower.

  Raises:
    UserError: names every tensor that is missing, too many, or of another shape or dtype.
  """
  lines, unreadable = [], []
  for name, shape in expected.items():
    if name not in source.tensors:
      lines.append(f'  {name}: missing, expected {list(shape)}')
      continue
    stored = source.tensors[name]
    rows = max(stored.shape[0], shape[0]) if name in padded and stored.shape else shape[0]
    if stored.shape != (rows, *shape[1:]):
      lines.append(f'  {name}: has shape {list(stored.shape)}, expected {list(shape)}')
    if stored.dtype not in READABLE:
      unreadable.append(f'  {name}: has dtype {stored.dtype}, expected one of {READABLE}')
  lines += [f'  {name}: not expected, has shape {list(stored.shape)}'
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


def shape_differences(there: Mapping[str, tuple[int, ...]],
                      expected: Mapping[str, tuple[int, ...]]) -> list[str]:
  """A line for every tensor that is missing, too many, or of another shape."""
  def show(shapes: Mapping[str, tuple[int, ...]], path: str) -> str:
    return str(list(shapes[path])) if path in shapes else '(nothing)'

  return [f'  {path}: {show(there, path)} there, {show(expected, path)} expected'
          for path in sorted(there.keys() | expected) if there.get(path) != expected.get(path)]


def on_first_device(boxed: PyTree) -> PyTree:
  """Shardings of boxed shapes where nothing else is asked for."""
  device = SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: device, nn.unbox(boxed))


def assemble(source: Source, layout: Layout, config: TransformerConfig,
             shardings: Mapping[str, Sharding]) -> Params:
  """Parameters in the dtype of the checkpoint, each on its sharding.

  A host holds its shares of what is done and one stored tensor, never a second copy of a stack of
  layers. `check_tensors` comes before.

  Args:
    shardings: by path.
  """
  axes = parameter_axes(config)
  # The largest tensor by far comes while nothing else is held.
  paths = sorted(axes, key=lambda path: not axes[path].startswith('V'))
  progress = Progress('reading weights', 'parameters', len(paths))
  flat = {}
  for path in paths:
    flat[path] = _read_parameter(source, layout[path], path, axes[path], config, shardings[path])
    progress.update(len(flat))
  return traverse_util.unflatten_dict(flat, sep='/')


def _read_parameter(source: Source, entry: Entry, path: str, axes: str, config: TransformerConfig,
                    sharding: Sharding) -> Array:
  """One of our parameters, layer by layer into a stack where it has layers."""
  shape = stored_shape(entry, config)
  stored = stored_sharding(entry, path, axes, sharding)
  arranged = {'pattern': f'{entry.axes} -> {axes}', 'part': entry.part,
              'head_dim': config.head_dim}
  if not path.startswith(LAYERED):
    return _arrange(source.read(entry.name, shape, stored), **arranged)
  names = [entry.name.format(layer) for layer in range(config.num_layers)]
  dtype = jnp.result_type(*{source.tensors[name].dtype for name in names})
  one = jax.eval_shape(functools.partial(_arrange, **arranged), jax.ShapeDtypeStruct(shape, dtype))
  stack = jnp.zeros((config.num_layers, *one.shape), dtype, device=sharding)
  for layer, name in enumerate(names):
    # One at a time: pieces that wait to be put would pile up.
    stack = jax.block_until_ready(
        _put(stack, source.read(name, shape, stored), layer, **arranged))
  return stack


_STATIC = ('pattern', 'part', 'head_dim')


@functools.partial(jax.jit, static_argnames=_STATIC)
def _arrange(piece: Array, pattern: str, part: int | None, head_dim: int) -> Array:
  """A stored tensor, or a part of it, with its axes in our order."""
  merged = {'H': head_dim} if '(' in pattern else {}
  return rearrange(piece if part is None else piece[part], pattern, **merged)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames='stack')
def _put(stack: Array, piece: Array, layer: Array, pattern: str, part: int | None,
         head_dim: int) -> Array:
  """The stack with one more layer in it."""
  value = _arrange(piece, pattern, part, head_dim).astype(stack.dtype)
  # In place, unlike stack.at[layer].set(...), of which XLA makes a copy on CPU in bfloat16.
  return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


_MARKS = ('_METADATA', 'manifest.ocdbt', 'checkpoint')


def is_orbax(directory: Path) -> bool:
  """Whether a directory looks like an orbax checkpoint."""
  return any((directory / mark).is_file() for mark in _MARKS)


class OrbaxSource:
  """A Source. Opening it reads metadata only.

  Args:
    rename: from the keys of an array, joined by '/', to its name in `tensors`.

  Raises:
    UserError: the checkpoint cannot be read, or an array is there twice.
  """

  def __init__(self, directory: Path, rename: Callable[[str], str]):
    self.directory = Path(directory).absolute()
    self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
      metadata = self._checkpointer.metadata(self.directory).item_metadata
    except Exception as error:  # orbax raises many kinds for files that are cut short or missing
      raise UserError(f'{directory} is not a whole orbax checkpoint ({_short(error)}): download '
                       'or write it again') from error
    if metadata is None:  # orbax only logs what it could not read
      raise UserError(f'{directory} is not a whole orbax checkpoint (its _METADATA is missing or '
                       'damaged): download or write it again')
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
    keys = self._keys[name]
    leaf = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, strict=False)
    wanted = jax.ShapeDtypeStruct(shape, self.tensors[name].dtype, sharding=sharding)
    try:
      restored = self._checkpointer.restore(self.directory, args=ocp.args.PyTreeRestore(
          item=traverse_util.unflatten_dict({keys: wanted}),
          restore_args=traverse_util.unflatten_dict({keys: leaf}), partial_restore=True))
    except Exception as error:  # as above
      raise UserError(f'{name} of {self.directory} cannot be read ({_short(error)}): the '
                       'checkpoint is damaged; download or write it again') from error
    return traverse_util.flatten_dict(restored)[keys]


def _short(error: Exception) -> str:
  """What an error says, without the whole specification of a TensorStore."""
  return textwrap.shorten(str(error), 200)
