"""The bodies of the two kernels for TPUs: forward, and backward by queries and own keys.

A block of queries is some whole traces, with the G query heads of one kv head. It meets the shared
keys block by block, from the first block that any of its queries sees to the last, and its own keys
in chunks of a few traces; scores never leave the chip. Heads come first, a layout that XLA can give
to the result of a projection, so that nothing need be transposed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import MASKED
from latent_deliberation.model.kernels.tiles import Tiles, masked_scores, product


def _shared_visible(index: Array, keys: Array, block: Array, tiles: Tiles) -> Array:
  """[R, keys] which keys of a shared block the rows see; the counterpart of `cached_mask`."""
  order = jax.lax.broadcasted_iota(jnp.int32, (tiles.rows, tiles.keys), 1)
  return ((keys[0:1] == index[:, 0:1]) & (keys[1:2] > index[:, 1:2])
          & (order < index[:, 2:3] - block * tiles.keys))


def _own_visible(index: Array, keys: Array, tiles: Tiles) -> Array:
  """[chunk, chunk] which own keys the rows of a chunk see; the counterpart of `fresh_mask`."""
  row = jax.lax.broadcasted_iota(jnp.int32, (tiles.chunk, tiles.chunk), 0)
  order = jax.lax.broadcasted_iota(jnp.int32, (tiles.chunk, tiles.chunk), 1)
  return ((keys[0:1] == index[:, 0:1]) & (keys[1:2] > index[:, 1:2])
          & (order >= index[:, 3:4]) & (order <= row))


def forward_kernel(begin, end, queries, index, shared, own, mixed, lse, places, peak, total,
                   summed, *, tiles: Tiles):
  """One step of the grid (text, row block, kv head, key block), over blocks as tpu_grid cuts them.

  Scratch: [R, 4] the index as columns; [R, G] the maximum and the total of the weights so far;
  [G, R, H] the weighted sum.
  """
  text, row_block, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

  def see(keys, values, visible, rows=slice(None)):
    for g in range(tiles.group):
      scores, _ = masked_scores(tiles, queries[0, g, rows], keys, visible)
      at = rows, slice(g, g + 1)
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

  @pl.when(step == 0)
  def _start():
    places[...] = index[0, 0].T
    # Above MASKED, so that the weights of a row that sees nothing vanish instead of being 1.
    peak[...] = jnp.full_like(peak, 0.0 if tiles.bounded else MASKED / 2)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      see(own.keys[0, 0, rows], own.values[0, 0, rows],
          _own_visible(places[rows], own.index[0, number], tiles), rows)

  block = begin[text, row_block] + step

  @pl.when(block < end[text, row_block])
  def _see_shared():
    see(shared.keys[0, 0], shared.values[0, 0],
        _shared_visible(places[...], shared.index[0, 0], block, tiles))

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

  Scratch: [R, 4] the index as columns; [R, G] log-sum-exp, and the product of the result and its
  gradient; [G, R, H] the gradient of the queries so far.
  """
  text, row_block, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

  def pull(g, keys, values, visible, rows=slice(None)):
    """Weights [rows, keys] and the gradient of the raw scores; adds to that of the queries."""
    at = rows, slice(g, g + 1)
    scores, slope = masked_scores(tiles, queries[0, g, rows], keys, visible)
    weights = jnp.exp(scores - column[at])
    pulled = product(cotangent[0, g, rows], values, (1, 1))
    gradient = (weights * (pulled - delta[at]) * slope).astype(keys.dtype)
    summed[g, rows] += product(gradient, keys, (1, 0))
    return weights, gradient

  @pl.when(step == 0)
  def _start():
    summed[...] = jnp.zeros_like(summed)
    places[...] = index[0, 0].T
    column[...] = lse[0, 0, 0].T
    for g in range(tiles.group):
      both = cotangent[0, g].astype(jnp.float32) * mixed[0, g].astype(jnp.float32)
      delta[:, g:g + 1] = both.sum(axis=-1, keepdims=True)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      visible = _own_visible(places[rows], own.index[0, number], tiles)
      by_keys = by_values = jnp.zeros((tiles.chunk, tiles.width), jnp.float32)
      for g in range(tiles.group):
        weights, gradient = pull(g, own.keys[0, 0, rows], own.values[0, 0, rows], visible, rows)
        by_keys += product(gradient, queries[0, g, rows], (0, 0))
        by_values += product(weights.astype(cotangent.dtype), cotangent[0, g, rows], (0, 0))
      own_gradient[0][0, 0, rows] = by_keys.astype(own_gradient[0].dtype)
      own_gradient[1][0, 0, rows] = by_values.astype(own_gradient[1].dtype)

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
