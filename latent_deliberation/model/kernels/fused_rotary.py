"""Rotary embedding in one pass over memory on TPUs: the same function as the plain one.

There XLA writes the halves of heads out apart, and reads them again to join them. The kernel leaves
heads in the layout that fused attention takes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array, Float, RowTokens, typed
from latent_deliberation.model import rotary

ROWS = 1024  # of a block, 0.5 MB of heads of 256 in bfloat16: a step of the grid does not show


def _turn_kernel(heads, sin, cos, turned, *, scale: float):
  """One block: heads [R, H] and sin, cos [R, H / 2] to turned [R, H]."""
  turned[...] = rotary.turn(heads[...], sin[...], cos[...], scale)


def turn_heads(heads: Array, sin: Array, cos: Array, scale: float,
               interpret: bool = False) -> Array:
  """Heads [B, N or K, R, H] turned by sin and cos, float32 [B, R, H / 2], times scale.

  Heads of a block of rows come one behind the other, so that its sines are loaded once.

  Args:
    heads: on a TPU H / 2 must be a multiple of 128.
    interpret: run as ordinary operations, on any platform.
  """
  batch, count, length, width = heads.shape
  rows = min(ROWS, length)
  of_heads = pl.BlockSpec((None, None, rows, width), lambda b, i, n: (b, n, i, 0))
  of_rows = pl.BlockSpec((None, rows, width // 2), lambda b, i, n: (b, i, 0))
  return pl.pallas_call(
      functools.partial(_turn_kernel, scale=scale), name='rotary', interpret=interpret,
      grid=(batch, pl.cdiv(length, rows), count),
      in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
      out_shape=jax.ShapeDtypeStruct(heads.shape, heads.dtype),
      cost_estimate=pl.CostEstimate(
          flops=4 * heads.size, transcendentals=0,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in (heads, heads, sin, cos))),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(heads, sin, cos)


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

  It runs on TPUs and is interpreted on CPUs; on GPUs it is the plain form. Under a mesh, each
  device turns its own texts and heads, by the logical-axis rules, which must divide them.
  """
  if queries.shape[-1] % (2 * LANES):
    return rotary.rotate(queries, keys, positions, frequencies, scale)
  sin, cos = rotary.sines(positions, frequencies)
  return (_turn_over_mesh('heads', scale, queries, sin, cos),
          _turn_over_mesh('kv_heads', 1.0, keys, sin, cos))


def _turn_over_mesh(axis: str, scale: float, heads: Array, sin: Array, cos: Array) -> Array:
  """`_turn`, on each device's own texts and heads, whose logical axis is named, under a mesh."""
  turn = functools.partial(_turn, scale)
  if jax.sharding.get_abstract_mesh().empty:
    return turn(heads, sin, cos)
  of_heads = nn.logical_to_mesh_axes(('batch', 'trace', None, axis))
  of_rows = PartitionSpec(*of_heads[:2])
  return jax.shard_map(turn, in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
                       check_vma=False)(heads, sin, cos)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(scale: float, heads: Array, sin: Array, cos: Array) -> Array:
  """[B, M, Q, N or K, H], turned by [B, M, Q, H / 2], times scale."""

  def in_kernel(heads: Array, *angles: Array, interpret: bool = False) -> Array:
    batch, traces, length, count, width = heads.shape
    rows = jnp.moveaxis(heads, 3, 1).reshape(batch, count, traces * length, width)
    angles = (x.reshape(batch, traces * length, width // 2) for x in angles)
    turned = turn_heads(rows, *angles, scale, interpret)
    return jnp.moveaxis(turned.reshape(batch, count, traces, length, width), 1, 3)

  def plain(heads: Array, *angles: Array) -> Array:
    return rotary.turn(heads, *(x[..., None, :] for x in angles), scale)

  return jax.lax.platform_dependent(
      heads, sin, cos, tpu=in_kernel, cpu=functools.partial(in_kernel, interpret=True),
      default=plain)


def _turn_forward(scale: float, heads: Array, sin: Array,
                  cos: Array) -> tuple[Array, tuple[Array, Array]]:
  return _turn(scale, heads, sin, cos), (sin, cos)


def _turn_backward(scale: float, angles: tuple[Array, Array],
                   cotangent: Array) -> tuple[Array, None, None]:
  sin, cos = angles
  return _turn(scale, cotangent, -sin, cos), None, None  # where tokens stand is no variable


_turn.defvjp(_turn_forward, _turn_backward)
