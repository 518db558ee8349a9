"""Fused attention on NVIDIA GPUs: the bodies of the forward and backward kernels, and their grids.

Eight warps, and blocks of 128 rows and 64 keys, suit Hopper and heads of 256 in bfloat16. A program
may have 227 KB of shared memory. The forward kernel uses 192 KB: 64 KB of queries, and two pairs of
keys and values of 32 KB each, because the next pair is loaded early. The gradient of the queries
uses 192 KB, too: queries and incoming gradients of 64 KB each, and one pair of keys and values. The
float32 sums, 128 KB in both, take half of the registers. The gradients of own keys and values are
sums of the same size, in blocks of 64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from latent_deliberation.array_types import Array, Int
from latent_deliberation.model.attention import MASKED
from latent_deliberation.model.kernels.tiling import Keys, Rows, Tiles, masked_scores, product


class Sight(NamedTuple):
  """The keys that each of R rows sees: those of its segment, after `reach`, in [first, end)."""
  segment: Int[Array, 'R']
  reach: Int[Array, 'R']
  first: Int[Array, 'R']
  end: Int[Array, 'R']

  def visible(self, index, start: Array, size: int) -> Array:
    """Returns which of `size` keys from `start` on are seen, [R, size]; index refers to [2, S]."""
    segment, position = (index[part, pl.ds(start, size)] for part in range(2))
    order = start + jnp.arange(size)
    return ((segment[None] == self.segment[:, None]) & (position[None] > self.reach[:, None])
            & (order[None] >= self.first[:, None]) & (order[None] < self.end[:, None]))


def _shared_sight(index, at) -> Sight:
  """Returns which shared keys the rows `at` of an index [4, R] see; see attention.cached_mask."""
  segment, reach, prefix_length, _ = (index[part, at] for part in range(4))
  return Sight(segment, reach, jnp.zeros_like(prefix_length), prefix_length)


def _own_sight(index, at, start: Array, size: int, tiles: Tiles) -> Sight:
  """Returns which own keys the rows `at`, `size` from `start` on, see; see attention.fresh_mask."""
  segment, reach, _, first = (index[part, at] for part in range(4))
  row = start + jnp.arange(size)
  return Sight(segment, reach, row // tiles.chunk * tiles.chunk + first, row + 1)


def _walk(meet, begin, end, index, shared: Keys, own: Keys | tuple[()], sums, tiles: Tiles):
  """Folds meet(sums, keys, values, visible) over all blocks of keys that a block of rows sees."""
  # The index maps of the grid reverse the order of the blocks: the longest walks begin first.
  start = (pl.num_programs(0) - 1 - pl.program_id(0)) * tiles.rows

  def over(source: Keys, sight: Sight, first: Array, last: Array, sums):
    def step(block, sums):
      at = block * tiles.keys
      return meet(sums, source.keys[pl.ds(at, tiles.keys)], source.values[pl.ds(at, tiles.keys)],
                  sight.visible(source.index, at, tiles.keys))
    return jax.lax.fori_loop(first, last, step, sums)

  everything = slice(None)
  # Own keys: from the trace of the first row to the last row.
  if own:
    sums = over(own, _own_sight(index, everything, start, tiles.rows, tiles),
                start // tiles.chunk * tiles.chunk // tiles.keys,
                (start + tiles.rows) // tiles.keys, sums)
  return over(shared, _shared_sight(index, everything), begin[...], end[...], sums)


def forward_kernel(begin, end, queries, index, shared, own, mixed, lse, *, tiles: Tiles):
  """Program (row block, head, text): writes the result [R, H] and the log-sum-exp [R]."""
  read = queries[...]

  def meet(sums, keys, values, visible):
    peak, total, summed = sums
    scores, _ = masked_scores(tiles, read, keys, visible)
    # A running softmax: a larger score shrinks the sums so far. Capped scores need none.
    if not tiles.bounded:
      highest = jnp.maximum(peak, scores.max(axis=-1))
      shrink = jnp.exp(peak - highest)
      peak, total, summed = highest, total * shrink, summed * shrink[:, None]
      scores = scores - highest[:, None]
    weights = jnp.exp(scores)
    return (peak, total + weights.sum(axis=-1),
            summed + product(weights.astype(values.dtype), values, (1, 0)))

  # Above MASKED, which makes the weights of a row that sees nothing 0 instead of 1.
  peak = jnp.full((tiles.rows,), 0.0 if tiles.bounded else MASKED / 2, jnp.float32)
  peak, total, summed = _walk(
      meet, begin, end, index, shared, own,
      (peak, jnp.zeros_like(peak), jnp.zeros((tiles.rows, tiles.width), jnp.float32)), tiles)
  divisor = jnp.where(total > 0, total, 1.0)
  mixed[...] = (summed / divisor[:, None]).astype(mixed.dtype)
  lse[...] = peak + jnp.log(divisor)


def _pull(tiles: Tiles, queries: Array, cotangent: Array, lse: Array, delta: Array, keys: Array,
          values: Array, visible: Array) -> tuple[Array, Array]:
  """Returns weights and gradients of the raw scores of one block, [R, keys]."""
  # The gradient of softmax, times the slope of the soft-cap.
  scores, slope = masked_scores(tiles, queries, keys, visible)
  weights = jnp.exp(scores - lse[:, None])
  pulled = product(cotangent, values, (1, 1))
  gradient = weights * (pulled - delta[:, None]) * slope
  return weights.astype(cotangent.dtype), gradient.astype(keys.dtype)


def query_kernel(begin, end, queries, index, shared, own, lse, delta, cotangent, gradient, *,
                 tiles: Tiles):
  """Program (row block, head, text): writes the gradient [R, H] of the queries.

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
  """Program (key block, kv head, text): writes the gradients [keys, H] of own keys and values.

  Queries, lse, delta and cotangent are those of all rows, [G, I * R, ...].
  """
  size, first = tiles.keys, pl.program_id(0)
  start = first * size
  keys, values = (ref[pl.ds(start, size)] for ref in (own.keys, own.values))
  # Blocks of rows end with the trace of the last of these keys.
  end = pl.cdiv(((start + size - 1) // tiles.chunk + 1) * tiles.chunk, size)
  blocks = jnp.minimum(end, pl.num_programs(0)) - first

  # A step is one head of the group and one block of rows that may see these keys.
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


def _flat(index: Array) -> Array:
  """Joins the blocks of an index, [B, blocks, 2 or 4, S / blocks], to [B, 2 or 4, S]."""
  batch, _, parts, _ = index.shape
  return jnp.moveaxis(index, 2, 1).reshape(batch, parts, -1)


def _flat_keys(keys: Keys | tuple[()]) -> Keys | tuple[()]:
  return keys and keys._replace(index=_flat(keys.index))


def _over_rows(kernel, name: str, tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()],
               more: tuple[Array, ...], out_shape, num_stages: int):
  """Runs a kernel over the grid (row block, head, text).

  Args:
    more: further arrays [B, N, I * R, ...], cut into blocks of rows, like the results.
    out_shape: shapes of the results.
    num_stages: number of pairs of keys and values in shared memory.
  """
  batch, blocks = rows.begin.shape
  heads = rows.queries.shape[1]

  # A program holds one block of rows of one head. Blocks go in reverse, as `_walk` expects.
  def of_rows(leaf) -> pl.BlockSpec:
    rest = leaf.shape[3:]
    return pl.BlockSpec((None, None, tiles.rows, *rest),
                        lambda i, n, b: (b, n, blocks - 1 - i, *(0 for _ in rest)))

  # Keys are passed whole, and the kernel slices them. A group of heads shares them.
  def of_keys(keys: Keys) -> Keys:
    whole = pl.BlockSpec((None, None, *keys.keys.shape[2:]),
                         lambda i, n, b: (b, n // tiles.group, 0, 0))
    of_text = pl.BlockSpec((None, *keys.index.shape[1:]), lambda i, n, b: (b, 0, 0))
    return Keys(whole, whole, of_text)

  shared, own = _flat_keys(shared), _flat_keys(own)
  # The range of key blocks and the index follow the rows, in the same order.
  bound = pl.BlockSpec((None, None), lambda i, n, b: (b, blocks - 1 - i))
  index = pl.BlockSpec((None, 4, tiles.rows), lambda i, n, b: (b, 0, blocks - 1 - i))
  return pl.pallas_call(
      functools.partial(kernel, tiles=tiles), name=name, interpret=tiles.interpret,
      grid=(blocks, heads, batch),
      in_specs=(bound, bound, of_rows(rows.queries), index, of_keys(shared), own and of_keys(own),
                *map(of_rows, more)),
      out_specs=jax.tree.map(of_rows, out_shape), out_shape=out_shape,
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=num_stages),
  )(rows.begin, rows.end, rows.queries, _flat(rows.index), shared, own, *more)


def forward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()]) -> tuple[Array, Array]:
  """Returns attention of all rows, [B, N, I * R, H], and log-sum-exp of scores, [B, N, I * R]."""
  queries = rows.queries
  out_shape = (jax.ShapeDtypeStruct(queries.shape, queries.dtype),
               jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32))
  return _over_rows(forward_kernel, 'attention', tiles, rows, shared, own, (), out_shape, 2)


def backward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys, mixed: Array, lse: Array,
             cotangent: Array) -> tuple[Array, tuple[Array, Array]]:
  """Returns gradients of queries and of (own keys, own values); shared keys are constants.

  Args:
    mixed, lse: results of `forward`.
    cotangent: gradient of `mixed`.
  """
  delta = jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  of_rows = lse, delta, cotangent
  by_queries = _over_rows(
      query_kernel, 'attention_gradient', tiles, rows, shared, own, of_rows,
      jax.ShapeDtypeStruct(rows.queries.shape, rows.queries.dtype), 1)
  return by_queries, _own_gradients(tiles, rows, own, *of_rows)


def _own_gradients(tiles: Tiles, rows: Rows, own: Keys, *of_rows: Array) -> tuple[Array, Array]:
  """Runs `own_kernel` over the grid (key block, kv head, text)."""
  batch, kv_heads, length, width = own.keys.shape

  # A program reads all rows of a group of heads, and writes one block of keys.
  def whole(leaf) -> pl.BlockSpec:
    rest = leaf.shape[2:]
    return pl.BlockSpec((None, leaf.shape[1] // kv_heads, *rest),
                        lambda j, k, b: (b, k, *(0 for _ in rest)))

  def of_text(index: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, *index.shape[1:]), lambda j, k, b: (b, 0, 0))

  index, own = _flat(rows.index), _flat_keys(own)
  all_keys = pl.BlockSpec((None, None, length, width), lambda j, k, b: (b, k, 0, 0))
  block = pl.BlockSpec((None, None, tiles.keys, width), lambda j, k, b: (b, k, j, 0))
  return pl.pallas_call(
      functools.partial(own_kernel, tiles=tiles), name='attention_own_gradient',
      interpret=tiles.interpret, grid=(length // tiles.keys, kv_heads, batch),
      in_specs=(whole(rows.queries), of_text(index), Keys(all_keys, all_keys, of_text(own.index)),
                *map(whole, of_rows)),
      out_specs=(block, block),
      out_shape=(jax.ShapeDtypeStruct(own.keys.shape, own.keys.dtype),) * 2,
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
  )(rows.queries, index, own, *of_rows)
