"""The kernel that turns heads for the rotary embedding on TPUs, and its grid."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from latent_deliberation.array_types import Array
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
