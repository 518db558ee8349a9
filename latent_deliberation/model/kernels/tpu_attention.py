"""Fused attention on TPUs: the bodies of the forward and backward kernels, and their grid.

The grid is (text, row block, kv head, key block). Its last axis runs in order: the kernels keep
their sums in scratch memory, begin at its first step and write results at its last one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import MASKED
from latent_deliberation.model.kernels.tiling import Keys, Rows, Tiles, masked_scores, product


def _shared_visible(index: Array, keys: Array, block: Array, tiles: Tiles) -> Array:
  """Returns which keys of a shared block the rows see, [R, keys]; see attention.cached_mask."""
  order = jax.lax.broadcasted_iota(jnp.int32, (tiles.rows, tiles.keys), 1)
  return ((keys[0:1] == index[:, 0:1]) & (keys[1:2] > index[:, 1:2])
          & (order < index[:, 2:3] - block * tiles.keys))


def _own_visible(index: Array, keys: Array, tiles: Tiles) -> Array:
  """Returns which own keys the rows of a chunk see, [chunk, chunk]; see attention.fresh_mask."""
  row = jax.lax.broadcasted_iota(jnp.int32, (tiles.chunk, tiles.chunk), 0)
  order = jax.lax.broadcasted_iota(jnp.int32, (tiles.chunk, tiles.chunk), 1)
  return ((keys[0:1] == index[:, 0:1]) & (keys[1:2] > index[:, 1:2])
          & (order >= index[:, 3:4]) & (order <= row))


def forward_kernel(begin, end, queries, index, shared, own, mixed, lse, places, peak, total,
                   summed, *, tiles: Tiles):
  """One step of the grid, over the blocks of `_specs`.

  Scratch: `places` [R, 4], the index as columns; `peak` and `total` [R, G], the largest score and
  the total of the weights so far; `summed` [G, R, H], the weighted sum of values so far.
  """
  text, row_block, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

  # Adds a block of keys to the sums of these rows, head by head.
  def see(keys, values, visible, rows=slice(None)):
    for g in range(tiles.group):
      scores, _ = masked_scores(tiles, queries[0, g, rows], keys, visible)
      at = rows, slice(g, g + 1)
      # A running softmax: a larger score shrinks the sums so far. Capped scores need none.
      if not tiles.bounded:
        highest = jnp.maximum(peak[at], scores.max(axis=-1, keepdims=True))
        shrink = jnp.exp(peak[at] - highest)
        peak[at] = highest
        total[at] *= shrink
        summed[g, rows] *= shrink
        scores = scores - highest
      weights = jnp.exp(scores)
      total[at] += weights.sum(axis=-1, keepdims=True)
      summed[g, rows] += product(weights.astype(values.dtype), values, (1, 0))

  # The first step clears the scratch, and sees the rows' own keys chunk by chunk.
  @pl.when(step == 0)
  def _start():
    places[...] = index[0, 0].T
    # Above MASKED, which makes the weights of a row that sees nothing 0 instead of 1.
    peak[...] = jnp.full_like(peak, 0.0 if tiles.bounded else MASKED / 2)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      see(own.keys[0, 0, rows], own.values[0, 0, rows],
          _own_visible(places[rows], own.index[0, number], tiles), rows)

  # Each step sees one block of shared keys. Steps past the range do nothing.
  block = begin[text, row_block] + step

  @pl.when(block < end[text, row_block])
  def _see_shared():
    see(shared.keys[0, 0], shared.values[0, 0],
        _shared_visible(places[...], shared.index[0, 0], block, tiles))

  # The last step divides the sums by the total and writes them.
  @pl.when(step == pl.num_programs(3) - 1)
  def _finish():
    divisor = jnp.where(total[...] > 0, total[...], 1.0)
    for g in range(tiles.group):
      mixed[0, g] = (summed[g] / divisor[:, g:g + 1]).astype(mixed.dtype)
    lse[0, 0, 0] = (peak[...] + jnp.log(divisor)).T


def backward_kernel(begin, end, queries, index, shared, own, mixed, lse, cotangent,
                    query_gradient, own_gradient, places, column, delta, summed, *,
                    tiles: Tiles):
  """One step of the same grid.

  Scratch: `places` [R, 4], the index as columns; `column` [R, G], the log-sum-exp; `delta` [R, G],
  the product of the result and its gradient; `summed` [G, R, H], the gradient of queries so far.
  """
  text, row_block, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

  def pull(g, keys, values, visible, rows=slice(None)):
    """Returns weights and gradients of raw scores, [rows, keys]; adds to that of the queries."""
    at = rows, slice(g, g + 1)
    scores, slope = masked_scores(tiles, queries[0, g, rows], keys, visible)
    weights = jnp.exp(scores - column[at])
    pulled = product(cotangent[0, g, rows], values, (1, 1))
    gradient = (weights * (pulled - delta[at]) * slope).astype(keys.dtype)
    summed[g, rows] += product(gradient, keys, (1, 0))
    return weights, gradient

  # The first step prepares the scratch, and finishes the gradients of own keys.
  @pl.when(step == 0)
  def _start():
    summed[...] = jnp.zeros_like(summed)
    places[...] = index[0, 0].T
    column[...] = lse[0, 0, 0].T
    for g in range(tiles.group):
      # The gradient of softmax subtracts this product from that of every weight.
      both = cotangent[0, g].astype(jnp.float32) * mixed[0, g].astype(jnp.float32)
      delta[:, g:g + 1] = both.sum(axis=-1, keepdims=True)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      visible = _own_visible(places[rows], own.index[0, number], tiles)
      # All heads of the group add to the gradients of one chunk of keys.
      by_keys = by_values = jnp.zeros((tiles.chunk, tiles.width), jnp.float32)
      for g in range(tiles.group):
        weights, gradient = pull(g, own.keys[0, 0, rows], own.values[0, 0, rows], visible, rows)
        by_keys += product(gradient, queries[0, g, rows], (0, 0))
        by_values += product(weights.astype(cotangent.dtype), cotangent[0, g, rows], (0, 0))
      own_gradient[0][0, 0, rows] = by_keys.astype(own_gradient[0].dtype)
      own_gradient[1][0, 0, rows] = by_values.astype(own_gradient[1].dtype)

  # Shared keys are constants, so their blocks add to the gradients of queries alone.
  block = begin[text, row_block] + step

  @pl.when(block < end[text, row_block])
  def _see_shared():
    visible = _shared_visible(places[...], shared.index[0, 0], block, tiles)
    for g in range(tiles.group):
      pull(g, shared.keys[0, 0], shared.values[0, 0], visible)

  @pl.when(step == pl.num_programs(3) - 1)
  def _finish():
    for g in range(tiles.group):
      query_gradient[0, g] = summed[g].astype(query_gradient.dtype)


VMEM_BYTES = 32 * 2**20  # a TPU core has 64 MiB or more; the default for a kernel is 16


def _specs(tiles: Tiles, shared: Keys, own: Keys | tuple[()]):
  """Returns the block of each array that a step of the grid holds."""
  group, width, rows = tiles.group, tiles.width, tiles.rows

  def key_block(text, row, step, begin, end):
    # After the last visible block the index stays the same, and nothing is loaded.
    last = jnp.maximum(end[text, row] - 1, 0)
    return jnp.minimum(begin[text, row] + step, last)

  # Places by grid step: text b, row block i, kv head k, key block j.
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
  """Returns the cost if prefix lengths rise evenly from 0 to the number of shared keys.

  Args:
    products: numbers of matrix products with shared keys and with own keys.
    touched: arrays that are read or written once.
  """
  batch, row_blocks = rows.begin.shape
  key_blocks = shared.index.shape[1]
  # Row block i of I meets (i + 1) / I of the key blocks.
  pairs = batch * tiles.kv_heads * sum(
      math.ceil((number + 1) / row_blocks * key_blocks) for number in range(row_blocks))
  scores = pairs * tiles.keys * products[0]
  own_scores = batch * tiles.kv_heads * row_blocks * tiles.chunk * products[1] if own else 0
  # Keys and values are loaded for each pair of blocks, everything else once.
  heads = tiles.group * tiles.rows
  loaded = pairs * tiles.keys * tiles.width * 2 * shared.keys.dtype.itemsize
  exponentials = pairs * tiles.keys + own_scores // products[1]
  return pl.CostEstimate(
      flops=2 * heads * tiles.width * (scores + own_scores),
      transcendentals=heads * exponentials * (1 if tiles.cap is None else 2),
      bytes_accessed=loaded + sum(x.size * x.dtype.itemsize for x in touched))


def _call(kernel, name: str, tiles: Tiles, rows: Rows, shared: Keys, *, in_specs, out_specs,
          out_shape, cost: pl.CostEstimate):
  """Returns a kernel over the grid, with scratch for the index, two numbers a head, and sums."""
  batch, row_blocks = rows.begin.shape
  column = pltpu.VMEM((tiles.rows, tiles.group), jnp.float32)
  return pl.pallas_call(
      functools.partial(kernel, tiles=tiles),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(batch, row_blocks, tiles.kv_heads, shared.index.shape[1]),
          in_specs=in_specs, out_specs=out_specs,
          # Index as columns, two numbers for each head and row, and the sums.
          scratch_shapes=[pltpu.VMEM((tiles.rows, 4), jnp.int32), column, column,
                          pltpu.VMEM((tiles.group, tiles.rows, tiles.width), jnp.float32)]),
      out_shape=out_shape, cost_estimate=cost, interpret=tiles.interpret, name=name,
      # Key blocks run in order, because the scratch carries sums from one to the next.
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=VMEM_BYTES))


def forward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()]) -> tuple[Array, Array]:
  """Returns attention of all rows, [B, N, I * R, H], and log-sum-exp of scores, [B, I, K, G, R]."""
  heads, _, index, lse, of_shared, of_own = _specs(tiles, shared, own)
  batch, row_blocks = rows.begin.shape
  out_shape = (
      jax.ShapeDtypeStruct(rows.queries.shape, rows.queries.dtype),
      jax.ShapeDtypeStruct((batch, row_blocks, tiles.kv_heads, tiles.group, tiles.rows),
                           jnp.float32))
  # For the estimate of cost: shared keys and values are counted by `_cost` itself.
  touched = (rows.queries, rows.index, *own, *out_shape)
  return _call(
      forward_kernel, 'attention', tiles, rows, shared,
      in_specs=(heads, index, of_shared, of_own), out_specs=(heads, lse), out_shape=out_shape,
      cost=_cost(tiles, rows, shared, own, (2, 2), touched),
  )(rows.begin, rows.end, rows.queries, rows.index, shared, own)


def backward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys, mixed: Array, lse: Array,
             cotangent: Array) -> tuple[Array, tuple[Array, Array]]:
  """Returns gradients of queries and of (own keys, own values); shared keys are constants.

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
