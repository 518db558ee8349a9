"""The bodies of three Pallas-Triton kernels for NVIDIA GPUs: forward, and two for the gradients.

The rows of all traces lie one behind the other, and a program has a block of them, of one head,
wherever a trace begins or ends. It walks over blocks of own keys, from the beginning of its first
row's trace to its last row, and over blocks of shared keys, from the first that any of its rows
sees to the last; what it sums stays in registers. The gradients of own keys have programs of their
own, which walk over the queries behind a block of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import MASKED
from latent_deliberation.model.kernels.tiles import Keys, Tiles, masked_scores, product


class Sight(NamedTuple):
  """[R] What each of R rows sees of some keys: its segment, beyond `reach`, in [first, end)."""
  segment: Array
  reach: Array
  first: Array
  end: Array

  def visible(self, index, start: Array, size: int) -> Array:
    """[R, size] of keys from number `start` on, whose index is a reference to [2, S]."""
    segment, position = (index[part, pl.ds(start, size)] for part in range(2))
    order = start + jnp.arange(size)
    return ((segment[None] == self.segment[:, None]) & (position[None] > self.reach[:, None])
            & (order[None] >= self.first[:, None]) & (order[None] < self.end[:, None]))


def _shared_sight(index, at) -> Sight:
  """Of rows `at` of a reference to [4, R]; the counterpart of `cached_mask`."""
  segment, reach, horizon, _ = (index[part, at] for part in range(4))
  return Sight(segment, reach, jnp.zeros_like(horizon), horizon)


def _own_sight(index, at, start: Array, size: int, tiles: Tiles) -> Sight:
  """Of rows `at`, which are `size` from number `start` on; the counterpart of `fresh_mask`."""
  segment, reach, _, first = (index[part, at] for part in range(4))
  row = start + jnp.arange(size)
  return Sight(segment, reach, row // tiles.chunk * tiles.chunk + first, row + 1)


def _walk(meet, begin, end, index, shared: Keys, own: Keys | tuple[()], sums, tiles: Tiles):
  """Sums of meet(sums, keys, values, visible) over all blocks of keys that a block of rows sees."""
  # The index maps of the grid turn the order of the blocks: the longest walks begin first.
  start = (pl.num_programs(0) - 1 - pl.program_id(0)) * tiles.rows

  def over(source: Keys, sight: Sight, first: Array, last: Array, sums):
    def step(block, sums):
      at = block * tiles.keys
      return meet(sums, source.keys[pl.ds(at, tiles.keys)], source.values[pl.ds(at, tiles.keys)],
                  sight.visible(source.index, at, tiles.keys))
    return jax.lax.fori_loop(first, last, step, sums)

  everything = slice(None)
  if own:
    sums = over(own, _own_sight(index, everything, start, tiles.rows, tiles),
                start // tiles.chunk * tiles.chunk // tiles.keys,
                (start + tiles.rows) // tiles.keys, sums)
  return over(shared, _shared_sight(index, everything), begin[...], end[...], sums)


def forward_kernel(begin, end, queries, index, shared, own, mixed, lse, *, tiles: Tiles):
  """Program (row block, head, text): the result [R, H] and the log-sum-exp [R] of the scores."""
  read = queries[...]

  def meet(sums, keys, values, visible):
    peak, total, summed = sums
    scores, _ = masked_scores(tiles, read, keys, visible)
    if not tiles.bounded:
      highest = jnp.maximum(peak, scores.max(axis=-1))
      shrink = jnp.exp(peak - highest)
      peak, total, summed = highest, total * shrink, summed * shrink[:, None]
      scores = scores - highest[:, None]
    weights = jnp.exp(scores)
    return (peak, total + weights.sum(axis=-1),
            summed + product(weights.astype(values.dtype), values, (1, 0)))

  # Above MASKED, so that the weights of a row that sees nothing vanish instead of being 1.
  peak = jnp.full((tiles.rows,), 0.0 if tiles.bounded else MASKED / 2, jnp.float32)
  peak, total, summed = _walk(
      meet, begin, end, index, shared, own,
      (peak, jnp.zeros_like(peak), jnp.zeros((tiles.rows, tiles.width), jnp.float32)), tiles)
  divisor = jnp.where(total > 0, total, 1.0)
  mixed[...] = (summed / divisor[:, None]).astype(mixed.dtype)
  lse[...] = peak + jnp.log(divisor)


def _pull(tiles: Tiles, queries: Array, cotangent: Array, lse: Array, delta: Array, keys: Array,
          values: Array, visible: Array) -> tuple[Array, Array]:
  """Weights [R, keys] of one block of scores, and the gradient of the raw ones."""
  scores, slope = masked_scores(tiles, queries, keys, visible)
  weights = jnp.exp(scores - lse[:, None])
  pulled = product(cotangent, values, (1, 1))
  gradient = weights * (pulled - delta[:, None]) * slope
  return weights.astype(cotangent.dtype), gradient.astype(keys.dtype)


def query_kernel(begin, end, queries, index, shared, own, lse, delta, cotangent, gradient, *,
                 tiles: Tiles):
  """Program (row block, head, text): the gradient [R, H] of the queries.

  Args:
    delta: [R] product of the result and its gradient.
  """
  of_rows = queries[...], cotangent[...], lse[...], delta[...]

  def meet(summed, keys, values, visible):
    _, pulled = _pull(tiles, *of_rows, keys, values, visible)
    return summed + product(pulled, keys, (1, 0))

  gradient[...] = _walk(meet, begin, end, index, shared, own,
                        jnp.zeros((tiles.rows, tiles.width), jnp.float32), tiles,
                        ).astype(gradient.dtype)


def own_kernel(queries, index, own, lse, delta, cotangent, by_keys, by_values, *, tiles: Tiles):
  """Program (key block, kv head, text): the gradients [keys, H] of own keys and values.

  Queries, lse, delta and cotangent are those of all rows, [G, I * R, ...].
  """
  size, first = tiles.keys, pl.program_id(0)
  start = first * size
  keys, values = (ref[pl.ds(start, size)] for ref in (own.keys, own.values))
  # The last of these keys is seen up to the end of its trace.
  end = pl.cdiv(((start + size - 1) // tiles.chunk + 1) * tiles.chunk, size)
  blocks = jnp.minimum(end, pl.num_programs(0)) - first

  def meet(step, sums):
    head, block = step // blocks, first + step % blocks
    rows = pl.ds(block * size, size)
    visible = _own_sight(index, rows, block * size, size, tiles).visible(own.index, start, size)
    read, pulled = queries[head, rows], cotangent[head, rows]
    weights, gradient = _pull(
        tiles, read, pulled, lse[head, rows], delta[head, rows], keys, values, visible)
    return sums[0] + product(gradient, read, (0, 0)), sums[1] + product(weights, pulled, (0, 0))

  zeros = jnp.zeros((size, tiles.width), jnp.float32)
  sums = jax.lax.fori_loop(0, tiles.group * blocks, meet, (zeros, zeros))
  by_keys[...], by_values[...] = (x.astype(by_keys.dtype) for x in sums)
