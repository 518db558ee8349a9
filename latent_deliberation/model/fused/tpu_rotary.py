"""The kernel that turns heads for the rotary embedding on TPUs, and its grid."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from latent_deliberation.array_types import Array

ROWS = 1024  # of a block; fewer would be loaded in less time than a step of the grid takes


def turn_kernel(heads, sin, cos, turned):
  """One block: heads [R, H] in halves, sin and cos [R, H / 2]."""
  half = sin.shape[-1]
  first, second = (heads[:, part].astype(jnp.float32)
                   for part in (slice(None, half), slice(half, None)))
  turned[:, :half] = (first * cos[...] - second * sin[...]).astype(turned.dtype)
  turned[:, half:] = (second * cos[...] + first * sin[...]).astype(turned.dtype)


def turn(heads: Array, sin: Array, cos: Array, interpret: bool = False) -> Array:
  """Heads [B, N or K, R, H] turned by sin and cos, float32 [B, R, H / 2], over blocks of rows.

  Heads of a block of rows come one behind the other, so that its sines are loaded once.
  """
  batch, count, length, width = heads.shape
  rows = min(ROWS, length)
  of_heads = pl.BlockSpec((None, None, rows, width), lambda b, i, n: (b, n, i, 0))
  of_rows = pl.BlockSpec((None, rows, width // 2), lambda b, i, n: (b, i, 0))
  return pl.pallas_call(
      turn_kernel, name='rotary', grid=(batch, pl.cdiv(length, rows), count), interpret=interpret,
      in_specs=(of_heads, of_rows, of_rows), out_specs=of_heads,
      out_shape=jax.ShapeDtypeStruct(heads.shape, heads.dtype),
      cost_estimate=pl.CostEstimate(
          flops=3 * heads.size, transcendentals=0,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in (heads, heads, sin, cos))),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(heads, sin, cos)
