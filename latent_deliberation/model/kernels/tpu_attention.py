"""The kernels for TPUs over their grid: which blocks each step holds, and what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from latent_deliberation.array_types import Array
from latent_deliberation.model.kernels.tiles import Keys, Rows, Tiles
from latent_deliberation.model.kernels.tpu_kernels import backward_kernel, forward_kernel

VMEM_BYTES = 32 * 2**20  # a TPU core has 64 MiB or more, of which a kernel gets 16 unless it asks


def _specs(tiles: Tiles, shared: Keys, own: Keys | tuple[()]):
  """Which block of each array a step of the grid (text, row block, kv head, key block) holds."""
  group, width, rows = tiles.group, tiles.width, tiles.rows

  def key_block(text, row, step, begin, end):
    # Past the last block that is seen this stays where it is, and nothing is loaded.
    last = jnp.maximum(end[text, row] - 1, 0)
    return jnp.minimum(begin[text, row] + step, last)

  heads = pl.BlockSpec((1, group, rows, width), lambda b, i, k, j, *_: (b, k, i, 0))
  of_rows = pl.BlockSpec((1, 1, rows, width), lambda b, i, k, j, *_: (b, k, i, 0))
  keys = pl.BlockSpec((1, 1, tiles.keys, width),
                      lambda b, i, k, j, begin, end: (b, k, key_block(b, i, j, begin, end), 0))
  of_shared = Keys(keys, keys, pl.BlockSpec(
      (1, 1, 2, tiles.keys),
      lambda b, i, k, j, begin, end: (b, key_block(b, i, j, begin, end), 0, 0)))
  of_own = own and Keys(of_rows, of_rows, pl.BlockSpec(
      (1, rows // tiles.chunk, 2, tiles.chunk), lambda b, i, k, j, *_: (b, i, 0, 0)))
  index = pl.BlockSpec((1, 1, 4, rows), lambda b, i, k, j, *_: (b, i, 0, 0))
  lse = pl.BlockSpec((1, 1, 1, group, rows), lambda b, i, k, j, *_: (b, i, k, 0, 0))
  return heads, of_rows, index, lse, of_shared, of_own


def _cost(tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()],
          products: tuple[int, int], touched: tuple[Array, ...]) -> pl.CostEstimate:
  """What runs where horizons rise evenly from the beginning of the shared keys to their end.

  Args:
    products: matrix products with shared and with own keys.
    touched: arrays that are read or written once.
  """
  batch, row_blocks = rows.begin.shape
  key_blocks = shared.index.shape[1]
  pairs = batch * tiles.kv_heads * sum(
      math.ceil((number + 1) / row_blocks * key_blocks) for number in range(row_blocks))
  scores = pairs * tiles.keys * products[0]
  own_scores = batch * tiles.kv_heads * row_blocks * tiles.chunk * products[1] if own else 0
  heads = tiles.group * tiles.rows
  loaded = pairs * tiles.keys * tiles.width * 2 * shared.keys.dtype.itemsize
  exponentials = pairs * tiles.keys + own_scores // products[1]
  return pl.CostEstimate(
      flops=2 * heads * tiles.width * (scores + own_scores),
      transcendentals=heads * exponentials * (1 if tiles.cap is None else 2),
      bytes_accessed=loaded + sum(x.size * x.dtype.itemsize for x in touched))


def _call(kernel, name: str, tiles: Tiles, rows: Rows, shared: Keys, *, in_specs, out_specs,
          out_shape, cost: pl.CostEstimate):
  """A kernel over the grid, with scratch for the index, two statistics of each head, and sums."""
  batch, row_blocks = rows.begin.shape
  column = pltpu.VMEM((tiles.rows, tiles.group), jnp.float32)
  return pl.pallas_call(
      functools.partial(kernel, tiles=tiles),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(batch, row_blocks, tiles.kv_heads, shared.index.shape[1]),
          in_specs=in_specs, out_specs=out_specs,
          scratch_shapes=[pltpu.VMEM((tiles.rows, 4), jnp.int32), column, column,
                          pltpu.VMEM((tiles.group, tiles.rows, tiles.width), jnp.float32)]),
      out_shape=out_shape, cost_estimate=cost, interpret=tiles.interpret, name=name,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=VMEM_BYTES))


def forward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()]) -> tuple[Array, Array]:
  """Attention of all rows, [B, N, I * R, H], and log-sum-exp of their scores [B, I, K, G, R]."""
  heads, _, index, lse, of_shared, of_own = _specs(tiles, shared, own)
  batch, row_blocks = rows.begin.shape
  out_shape = (
      jax.ShapeDtypeStruct(rows.queries.shape, rows.queries.dtype),
      jax.ShapeDtypeStruct((batch, row_blocks, tiles.kv_heads, tiles.group, tiles.rows),
                           jnp.float32))
  touched = (rows.queries, rows.index, *own, *out_shape)
  return _call(
      forward_kernel, 'attention', tiles, rows, shared,
      in_specs=(heads, index, of_shared, of_own), out_specs=(heads, lse), out_shape=out_shape,
      cost=_cost(tiles, rows, shared, own, (2, 2), touched),
  )(rows.begin, rows.end, rows.queries, rows.index, shared, own)


def backward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys, mixed: Array, lse: Array,
             cotangent: Array) -> tuple[Array, tuple[Array, Array]]:
  """Gradients of the queries and of (own keys, own values); the shared keys are constants.

  Args:
    mixed, lse: results of `forward`.
    cotangent: gradient of `mixed`.
  """
  heads, of_rows, index, of_lse, of_shared, of_own = _specs(tiles, shared, own)
  out_shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                           (rows.queries, (own.keys, own.values)))
  touched = (rows.queries, rows.index, *own, mixed, lse, cotangent, *jax.tree.leaves(out_shape))
  return _call(
      backward_kernel, 'attention_gradient', tiles, rows, shared,
      in_specs=(heads, index, of_shared, of_own, heads, of_lse, heads),
      out_specs=(heads, (of_rows, of_rows)), out_shape=out_shape,
      cost=_cost(tiles, rows, shared, own, (3, 5), touched),
  )(rows.begin, rows.end, rows.queries, rows.index, shared, own, mixed, lse, cotangent)
