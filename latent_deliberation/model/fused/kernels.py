"""The bodies of two Pallas kernels: forward, and backward by queries and own keys.

A block of queries is some whole traces, with the G query heads of one kv head. It meets the shared
keys block by block, from the first block that any of its queries sees to the last, and its own keys
in chunks of a few traces; scores never leave the chip. Heads come first, a layout that XLA can give
to the result of a projection, so that nothing need be transposed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import MASKED

# exp of a score that a soft-cap bounds by this, summed over any number of keys, fits a float32.
BOUNDED_CAP = 60.0


class Rows(NamedTuple):
  """I blocks of R queries.

  Attributes:
    queries: [B, N, I * R, H].
    index: int32 [B, I, 4, R]: segment (0 sees nothing); position that a key must be beyond to be
      inside the window; horizon; place in its chunk of the first own key that may be seen.
    begin, end: int32 [B, I] range of blocks of shared keys that a block of queries sees.
  """
  queries: Array
  index: Array
  begin: Array
  end: Array


class Keys(NamedTuple):
  """Shared keys, in J blocks, or the rows' own, in chunks.

  Attributes:
    keys, values: [B, K, S or I * R, H].
    index: int32 [B, J, 2, keys] or [B, I, chunks, 2, keys]: segment (-1 is not seen), position.
  """
  keys: Array
  values: Array
  index: Array


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes that are compiled in.

  Attributes:
    kv_heads, group, width: K, G, H.
    rows: R, queries of a block.
    keys: shared keys of a block.
    chunk: queries, and as many own keys, of a chunk; divides R.
    cap: of the scores; None for no cap.
    interpret: run as ordinary operations, on any platform.
  """
  kv_heads: int
  group: int
  width: int
  rows: int
  keys: int
  chunk: int
  cap: float | None
  interpret: bool = False

  @property
  def bounded(self) -> bool:
    """Scores are small enough for exp without a running maximum."""
    return self.cap is not None and self.cap <= BOUNDED_CAP

  def chunks(self) -> list[slice]:
    """Rows of each chunk of a block."""
    return [slice(start, start + self.chunk) for start in range(0, self.rows, self.chunk)]


def _product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
  """Matrix product over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())),
                             preferred_element_type=jnp.float32)


def _scores(tiles: Tiles, queries: Array, keys: Array, visible: Array) -> tuple[Array, Array]:
  """Masked scores [rows, keys], and the derivative of the soft-cap at each."""
  raw = _product(queries, keys, (1, 1))
  if tiles.cap is None:
    return jnp.where(visible, raw, MASKED), jnp.ones((), jnp.float32)
  share = jnp.tanh(raw * (1 / tiles.cap))
  return jnp.where(visible, tiles.cap * share, MASKED), 1 - share * share


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
  """One step of the grid (text, row block, kv head, key block), over blocks of what `grid` says.

  Scratch: [R, 4] the index as columns; [R, G] the maximum and the total of the weights so far;
  [G, R, H] the weighted sum.
  """
  text, row_block, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

  def see(keys, values, visible, rows=slice(None)):
    for g in range(tiles.group):
      scores, _ = _scores(tiles, queries[0, g, rows], keys, visible)
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
      summed[g, rows] += _product(weights.astype(values.dtype), values, (1, 0))

  @pl.when(step == 0)
  def _start():
    places[...] = index[0, 0].T
    # Above MASKED, so that the weights of a row that sees nothing vanish instead of being 1.
    peak[...] = jnp.full_like(peak, 0.0 if tiles.bounded else MASKED / 2)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      see(own.keys[0, 0, rows], own.values[0, 0, rows],
          _own_visible(places[rows], own.index[0, 0, number], tiles), rows)

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
    scores, slope = _scores(tiles, queries[0, g, rows], keys, visible)
    weights = jnp.exp(scores - column[at])
    pulled = _product(cotangent[0, g, rows], values, (1, 1))
    gradient = (weights * (pulled - delta[at]) * slope).astype(keys.dtype)
    summed[g, rows] += _product(gradient, keys, (1, 0))
    return weights, gradient

  @pl.when(step == 0)
  def _start():
    summed[...] = jnp.zeros_like(summed)
    places[...] = index[0, 0].T
    column[...] = lse[0, 0, 0].T
    for g in range(tiles.group):
      product = cotangent[0, g].astype(jnp.float32) * mixed[0, g].astype(jnp.float32)
      delta[:, g:g + 1] = product.sum(axis=-1, keepdims=True)
    for number, rows in enumerate(tiles.chunks() if own else ()):
      visible = _own_visible(places[rows], own.index[0, 0, number], tiles)
      by_keys = by_values = jnp.zeros((tiles.chunk, tiles.width), jnp.float32)
      for g in range(tiles.group):
        weights, gradient = pull(g, own.keys[0, 0, rows], own.values[0, 0, rows], visible, rows)
        by_keys += _product(gradient, queries[0, g, rows], (0, 0))
        by_values += _product(weights.astype(cotangent.dtype), cotangent[0, g, rows], (0, 0))
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
