"""Rotary embedding in one pass over memory on TPUs: the same function as the plain one.

There XLA writes the halves of heads out apart, and reads them again to join them. The kernel leaves
heads in the layout that fused attention takes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array, Float, RowTokens, typed
from latent_deliberation.model import rotary
from latent_deliberation.model.fused import tpu_rotary

LANES = 128  # of a TPU's registers: a half must fill whole ones


@typed
def rotate(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    frequencies: Float[Array, 'half'],
    scale: float = 1.0,
) -> tuple[Float[Array, 'B M Q N H'], Float[Array, 'B M Q K H']]:
  """The function of rotary.rotate; a kernel where halves of heads are multiples of 128 wide.

  It runs on TPUs and is interpreted on CPUs; on GPUs XLA does as well. Under a mesh, each device
  turns its own texts and heads, by the logical-axis rules.
  """
  if queries.shape[-1] % (2 * LANES):
    return rotary.rotate(queries, keys, positions, frequencies, scale)
  sin, cos = rotary.sines(positions, frequencies)
  return (_over_mesh('heads', queries, scale * sin, scale * cos),
          _over_mesh('kv_heads', keys, sin, cos))


def _over_mesh(axis: str, heads: Array, sin: Array, cos: Array) -> Array:
  """`_turn`, on each device's own texts and heads where there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return _turn(heads, sin, cos)
  of_heads = nn.logical_to_mesh_axes(('batch', 'trace', None, axis))
  of_rows = PartitionSpec(*of_heads[:2])
  return jax.shard_map(_turn, in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
                       check_vma=False)(heads, sin, cos)


@jax.custom_vjp
def _turn(heads: Array, sin: Array, cos: Array) -> Array:
  """[B, M, Q, N or K, H], turned by [B, M, Q, H / 2]."""
  batch, traces, length, count, width = heads.shape
  rows = jnp.moveaxis(heads, 3, 1).reshape(batch, count, traces * length, width)
  angles = (x.reshape(batch, traces * length, width // 2) for x in (sin, cos))
  turned = jax.lax.platform_dependent(
      rows, *angles, tpu=tpu_rotary.turn,
      cpu=functools.partial(tpu_rotary.turn, interpret=True),
      default=lambda rows, *angles: rotary.turn(rows, *(x[:, None] for x in angles)))
  return jnp.moveaxis(turned.reshape(batch, count, traces, length, width), 1, 3)


def _turn_forward(heads: Array, sin: Array, cos: Array) -> tuple[Array, tuple[Array, Array]]:
  return _turn(heads, sin, cos), (sin, cos)


def _turn_backward(angles: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
  sin, cos = angles
  return _turn(cotangent, -sin, cos), None, None  # where tokens stand is no variable


_turn.defvjp(_turn_forward, _turn_backward)
