"""A decoder's parameters from the tensors of a foreign checkpoint, one tensor at a time."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import traverse_util
from jax.sharding import Sharding

from latent_deliberation.array_types import Array, Params
from latent_deliberation.model.checkpoints.layout import (
  LAYERED,
  Entry,
  Layout,
  parameter_axes,
  stored_shape,
  stored_sharding,
)
from latent_deliberation.model.checkpoints.source import Source
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.progress import Progress


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
