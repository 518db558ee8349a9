"""Rotary embedding in one pass over memory: the function of model/rotary.py as a TPU kernel.

XLA on a TPU writes the two halves of each head separately, and reads them again to join them. The
kernel reads and writes whole heads, in the layout that fused attention takes.
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

ROWS = 1024  # of a block: 0.5 MB of bfloat16 heads of 256, enough to hide the cost of a grid step
LANES = 128  # of a TPU's registers; half of a head must fill whole ones


@typed
def rotate(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    frequencies: Float[Array, 'half'],
    scale: float = 1.0,
) -> tuple[Float[Array, 'B M Q N H'], Float[Array, 'B M Q K H']]:
  """The function of rotary.rotate; a kernel if half of a head is a multiple of 128 wide.

  The kernel runs on TPUs and is interpreted on CPUs. GPUs run the plain form. Under a mesh, each
  device rotates its own texts and heads. The logical-axis rules must divide both evenly.
  """
  if queries.shape[-1] % (2 * LANES):
    return rotary.rotate(queries, keys, positions, frequencies, scale)
  sin, cos = rotary.sines(positions, frequencies)
  return (_rotate_over_mesh('heads', scale, queries, sin, cos),
          _rotate_over_mesh('kv_heads', 1.0, keys, sin, cos))


def _rotate_over_mesh(axis: str, scale: float, heads: Array, sin: Array, cos: Array) -> Array:
  """`_rotate`; under a mesh, each device rotates its own texts and heads.

  Args:
    axis: logical name of the axis of heads.
  """
  rotate_own = functools.partial(_rotate, scale)
  if jax.sharding.get_abstract_mesh().empty:
    return rotate_own(heads, sin, cos)
  of_heads = nn.logical_to_mesh_axes(('batch', 'trace', None, axis))
  of_rows = PartitionSpec(*of_heads[:2])
  return jax.shard_map(rotate_own, in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
                       check_vma=False)(heads, sin, cos)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(scale: float, heads: Array, sin: Array, cos: Array) -> Array:
  """Rotates [B, M, Q, N or K, H] by the angles of [B, M, Q, H / 2], times scale."""

  def in_kernel(heads: Array, *angles: Array, interpret: bool = False) -> Array:
    batch, traces, length, count, width = heads.shape
    # The kernel takes the heads first, and the tokens of all traces as one axis.
    rows = jnp.moveaxis(heads, 3, 1).reshape(batch, count, traces * length, width)
    angles = (x.reshape(batch, traces * length, width // 2) for x in angles)
    rotated = rotate_heads(rows, *angles, scale, interpret)
    return jnp.moveaxis(rotated.reshape(batch, count, traces, length, width), 1, 3)

  def plain(heads: Array, *angles: Array) -> Array:
    return rotary.rotate_pairs(heads, *(x[..., None, :] for x in angles), scale)

  return jax.lax.platform_dependent(
      heads, sin, cos, tpu=in_kernel, cpu=functools.partial(in_kernel, interpret=True),
      default=plain)


def _rotate_forward(scale: float, heads: Array, sin: Array,
                    cos: Array) -> tuple[Array, tuple[Array, Array]]:
  return _rotate(scale, heads, sin, cos), (sin, cos)


def _rotate_backward(scale: float, angles: tuple[Array, Array],
                     cotangent: Array) -> tuple[Array, None, None]:
  # The transpose of a rotation is the rotation by the opposite angle.
  sin, cos = angles
  return _rotate(scale, cotangent, -sin, cos), None, None  # positions have no gradient


_rotate.defvjp(_rotate_forward, _rotate_backward)


def rotate_heads(heads: Array, sin: Array, cos: Array, scale: float,
                 interpret: bool = False) -> Array:
  """Rotates heads [B, N or K, R, H] by sin and cos, float32 [B, R, H / 2], times scale.

  The grid visits all heads of a block of rows in turn, and loads its sines once.

  Args:
    heads: queries or keys; on a TPU, H / 2 must be a multiple of 128.
    interpret: whether to run as ordinary operations, on any platform.
  """
  batch, count, length, width = heads.shape
  rows = min(ROWS, length)
  # Heads are the innermost axis of the grid, so a block of sines stays while they change.
  of_heads = pl.BlockSpec((None, None, rows, width), lambda b, i, n: (b, n, i, 0))
  of_rows = pl.BlockSpec((None, rows, width // 2), lambda b, i, n: (b, i, 0))
  return pl.pallas_call(
      functools.partial(_rotate_kernel, scale=scale), name='rotary', interpret=interpret,
      grid=(batch, pl.cdiv(length, rows), count),
      in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
      out_shape=jax.ShapeDtypeStruct(heads.shape, heads.dtype),
      cost_estimate=pl.CostEstimate(
          flops=4 * heads.size, transcendentals=0,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in (heads, heads, sin, cos))),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(heads, sin, cos)


def _rotate_kernel(heads, sin, cos, rotated, *, scale: float):
  """Writes one block: heads [R, H], rotated by sin and cos [R, H / 2]."""
  rotated[...] = rotary.rotate_pairs(heads[...], sin[...], cos[...], scale)
