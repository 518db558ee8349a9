"""Weights in int8 with a scale for each output channel, converted back where they are used."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Params

LARGEST = 127


@struct.dataclass
class Quantised:
  """The matrix values * scale; it stands in a tree of parameters where the matrix stood.

  Attributes:
    values: int8, of the shape of the matrix.
    scale: float32, of that shape without the axes that a product contracts.
    contracted: those axes, counted from the last one, so that they are the same in a stack of
      layers and in a layer of it.
  """
  values: Array
  scale: Array
  contracted: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """Entries of the matrix."""
    return self.values.size

  def astype(self, dtype: DTypeLike) -> Array:
    """The matrix itself, rounded once."""
    scale = jnp.expand_dims(self.scale, self.contracted)
    return (self.values.astype(jnp.float32) * scale).astype(dtype)


def input_axes(name: str) -> int:
  """Leading axes of a weight that its product contracts, by the name of the block's projection."""
  return 2 if name == 'out' else 1  # heads and what is in them are contracted together


def quantise(params: Params) -> Params:
  """A decoder with Quantised matrices, its table included; norms stay as they are.

  A scale is the largest absolute value of its channel over 127, so that an entry is off by half a
  scale at most.

  Args:
    params: of a decoder, boxed with logical axes or not.
  """
  return _quantise_tree(params, inputs=1)


def _quantise_tree(params: Params, inputs: int) -> Params:
  quantised = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      quantised[name] = _quantise_tree(child, input_axes(name))
    elif name == 'table':
      quantised[name] = _quantise_matrix(child, (-1,))
    elif name == 'w':
      first = 1 - nn.unbox(child).ndim  # behind the axis of layers
      quantised[name] = _quantise_matrix(child, tuple(range(first, first + inputs)))
    else:
      quantised[name] = child
  return quantised


def _quantise_matrix(matrix: Array | nn.Partitioned, contracted: tuple[int, ...]) -> Quantised:
  if isinstance(matrix, nn.Partitioned):
    bare, axes = _quantise_matrix(matrix.value, contracted), len(matrix.names)
    names = tuple(name for axis, name in enumerate(matrix.names) if axis - axes not in contracted)
    return bare.replace(values=matrix.replace(value=bare.values),
                        scale=matrix.replace(value=bare.scale, names=names))
  wide = matrix.astype(jnp.float32)
  largest = jnp.max(jnp.abs(wide), axis=contracted)
  scale = jnp.where(largest > 0, largest / LARGEST, 1)
  values = jnp.round(wide / jnp.expand_dims(scale, contracted)).astype(jnp.int8)
  return Quantised(values, scale, contracted)
