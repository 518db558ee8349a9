"""A decoder's parameters from the tensors of a foreign checkpoint, one tensor at a time."""

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
from latent_deliberation.model.config import TransformerConfig
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
  pattern = f'{entry.axes} -> {axes}'
  sizes = {'H': config.head_dim} if '(' in pattern else {}

  def arrange(piece: Array) -> Array:
    return rearrange(piece if entry.part is None else piece[entry.part], pattern, **sizes)

  def read(layer: int) -> Array:
    return source.read(entry.name.format(layer), shape, stored)

  if not path.startswith(LAYERED):
    return jax.jit(arrange, out_shardings=sharding, donate_argnums=0)(read(0))

  def put(stack: Array, piece: Array, layer: Array) -> Array:
    # In place, unlike stack.at[layer].set(...), of which XLA makes a copy on CPU in bfloat16.
    return jax.lax.dynamic_update_index_in_dim(stack, arrange(piece).astype(stack.dtype), layer, 0)

  names = [entry.name.format(layer) for layer in range(config.num_layers)]
  dtype = jnp.result_type(*{source.tensors[name].dtype for name in names})
  one = jax.eval_shape(arrange, jax.ShapeDtypeStruct(shape, dtype)).shape
  stack = jax.jit(lambda: jnp.zeros((config.num_layers, *one), dtype), out_shardings=sharding)()
  put = jax.jit(put, out_shardings=sharding, donate_argnums=0)
  for layer in range(config.num_layers):
    # One at a time: pieces that wait to be put would pile up.
    stack = jax.block_until_ready(put(stack, read(layer), layer))
  return stack
