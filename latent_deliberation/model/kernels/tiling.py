"""The layout of the kernels: traces over a cache as padded blocks of rows and of keys, and back.

`Layout` chooses the sizes of blocks (`Tiles`). `lay_out` makes the arguments of a kernel
(`Operands`) from those of attention (`Inputs`), with the range of key blocks that each block of
rows visits.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, Float, Int, PyTree
from latent_deliberation.model.attention import MASKED, SUMMABLE, AttentionMaskSpec, KVCache

SUBLANES = 16  # of a tile of bfloat16; the fresh tokens of a trace are padded to a multiple
FAR = 2**30  # past any position; a position plus FAR still fits an int32


class Rows(NamedTuple):
  """I blocks of R queries.

  Attributes:
    queries: queries of all blocks.
    index: four numbers for each query: its segment (0 sees nothing); the position that a key must
      exceed to be inside the window; its prefix length; the place, in its chunk, of the first own
      key that it may see.
    begin, end: range of blocks of shared keys that a block of queries visits.
  """
  queries: Float[Array, 'B N I*R H']
  index: Int[Array, 'B I 4 R']
  begin: Int[Array, 'B I']
  end: Int[Array, 'B I']


class Keys(NamedTuple):
  """Shared keys, in J blocks of C, or the rows' own keys, in J chunks of C.

  Attributes:
    keys, values: keys and values of all blocks.
    index: two numbers for each key: its segment (-1 is never seen) and its position.
  """
  keys: Float[Array, 'B K J*C H']
  values: Float[Array, 'B K J*C H']
  index: Int[Array, 'B J 2 C']


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The sizes that are compiled into a kernel.

  Attributes:
    kv_heads, group, width: K, G and H.
    rows: R, number of queries of a block.
    keys: number of shared keys of a block.
    chunk: number of queries of a chunk, and of its own keys: whole traces. It divides R on TPUs.
    cap: soft-cap of the scores; None for no cap.
    interpret: whether to run as ordinary operations, on any platform.
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
    """Whether scores are small enough for exp without a running maximum."""
    return self.cap is not None and self.cap <= SUMMABLE

  def chunks(self) -> list[slice]:
    """Returns the rows of each chunk of a block."""
    return [slice(start, start + self.chunk) for start in range(0, self.rows, self.chunk)]


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
  """Returns the matrix product over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())),
                             preferred_element_type=jnp.float32)


def masked_scores(tiles: Tiles, queries: Array, keys: Array, visible: Array) -> tuple[Array, Array]:
  """Returns masked scores [rows, keys], and the derivative of the soft-cap at each."""
  raw = product(queries, keys, (1, 1))
  if tiles.cap is None:
    return jnp.where(visible, raw, MASKED), jnp.ones((), jnp.float32)
  # The derivative of cap * tanh(x / cap) is 1 - tanh^2.
  share = jnp.tanh(raw * (1 / tiles.cap))
  return jnp.where(visible, tiles.cap * share, MASKED), 1 - share * share


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The largest sizes that a kernel holds at a time. On TPUs, a single long trace may exceed them.

  Attributes:
    rows: number of queries; on TPUs, of all heads of a kv head together.
    keys: number of shared keys; on GPUs, also of own keys.
    own: number of fresh tokens of whole traces whose scores are one product, masked between the
      traces. It has no effect on GPUs, where traces cross the borders of blocks.
  """
  rows: int
  keys: int
  own: int = 128


class Inputs(NamedTuple):
  """The arguments of `attend_visible` that are arrays."""
  queries: Float[Array, 'B M Q N H']
  keys: Float[Array, 'B M Q K H']
  values: Float[Array, 'B M Q K H']
  positions: Int[Array, 'B M Q']
  mask_spec: AttentionMaskSpec
  window: Int[Array, '']
  cache: KVCache | None


class Operands(NamedTuple):
  """The arguments of the kernels; a row over itself has only shared keys."""
  rows: Rows
  shared: Keys
  own: Keys | tuple[()]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The places of M rows of Q fresh tokens in the blocks of the kernels.

  Attributes:
    traces, length: M and Q, padded.
    tiles: sizes of blocks.
  """
  traces: int
  length: int
  tiles: Tiles

  @classmethod
  def aligned(cls, blocks: Blocks, cap: float | None, shape: tuple[int, ...], kv_heads: int,
              cached: int | None) -> 'Layout':
    """Returns the layout on TPUs: a block has whole traces, or a part of the only row.

    Args:
      blocks: largest sizes.
      cap: soft-cap of the scores.
      shape: shape of the queries, [B, M, Q, N, H].
      kv_heads: K.
      cached: S; None for a row over itself.
    """
    _, traces, length, heads, width = shape
    group = heads // kv_heads
    # The rows of a block count for every head of a kv head.
    most = max(blocks.rows // group // SUBLANES, 1) * SUBLANES
    length = _round_up(length, SUBLANES)
    if cached is None:
      # A row over itself is cut into blocks, and is its own shared keys.
      rows = chunk = min(length, most)
      shared, length = length, _round_up(length, rows)
    else:
      # Whole traces make a chunk, and whole chunks make a block.
      per_chunk = max(1, min(traces, blocks.own // length))
      whole = _round_up(traces, per_chunk)
      limit = min(max(per_chunk, most // length // per_chunk * per_chunk), whole)
      # A block may be as small as half of the limit, for fewer traces of padding.
      sizes = [size for size in range(per_chunk, limit + 1, per_chunk) if 2 * size >= limit]
      per_block = min(sizes, key=lambda size: (_round_up(traces, size), -size))
      rows, chunk = per_block * length, per_chunk * length
      shared, traces = cached, _round_up(traces, per_block)
    keys = min(blocks.keys, _round_up(max(shared, 1), SUBLANES))
    return cls(traces, length, Tiles(kv_heads, group, width, rows, keys, chunk, cap))

  @classmethod
  def across(cls, blocks: Blocks, cap: float | None, shape: tuple[int, ...], kv_heads: int,
             cached: int | None) -> 'Layout':
    """Returns the layout on GPUs: blocks of a power of two, for Triton, which traces may cross."""
    _, traces, length, heads, width = shape
    length = _round_up(length, SUBLANES)
    # Double the block until it holds all fresh tokens or reaches the limit.
    rows, fresh = blocks.keys, traces * length
    while rows < min(blocks.rows, fresh):
      rows *= 2
    if cached is None:
      length = _round_up(length, rows)
    else:
      # Add traces of padding until all rows fill whole blocks.
      traces = _round_up(traces, rows // math.gcd(rows, length))
    return cls(traces, length, Tiles(
        kv_heads, heads // kv_heads, width, rows, blocks.keys, length, cap))

  def flatten(self, x: Array) -> Array:
    """Pads [B, M, Q] to rows [B, I * R], and [B, M, Q, N or K, H] to [B, N or K, I * R, H]."""
    batch, traces, length, *rest = x.shape
    padding = [(0, 0), (0, self.traces - traces), (0, self.length - length)] + [(0, 0)] * len(rest)
    rows = jnp.pad(x, padding)
    if rest:
      rows = jnp.moveaxis(rows, 3, 1)
    return rows.reshape(batch, *rest[:-1], self.traces * self.length, *rest[1:])

  def unflatten(self, rows: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `flatten`: from [B, N or K, I * R, H] to `shape`, [B, M, Q, N or K, H]."""
    batch, traces, length, heads, width = shape
    rows = rows.reshape(batch, heads, self.traces, self.length, width)
    return jnp.moveaxis(rows, 1, 3)[:, :traces, :length]


def lay_out(layout: Layout, inputs: Inputs) -> Operands:
  """Returns the arguments of the kernels. A row over itself becomes a row over a cache."""
  tiles, cache = layout.tiles, inputs.cache
  segments, first = inputs.mask_spec.segments, inputs.mask_spec.first
  batch, traces, length = segments.shape
  if cache is None:
    shown = jnp.arange(1, length + 1)  # causal: each token sees the row up to itself
    cache = KVCache(inputs.keys[:, 0], inputs.values[:, 0], inputs.positions[:, 0], segments[:, 0])
  else:
    shown = inputs.mask_spec.prefix_length
    shown = shown if shown.ndim == 3 else shown[..., None]
  first = jnp.zeros_like(segments) if first is None else first
  # `first` becomes a place in the chunk, by adding the start of the query's own trace in it.
  first += jnp.arange(traces)[:, None] % (tiles.chunk // layout.length or 1) * layout.length
  # A key is inside the window if its position is above `reach`. FAR avoids an overflow.
  reach = inputs.positions - jnp.minimum(inputs.window, FAR)
  index = jnp.stack([
      layout.flatten(jnp.broadcast_to(x, segments.shape)).reshape(batch, -1, tiles.rows)
      for x in (segments, reach, shown, first)], axis=2)

  def key_index(segments: Array, positions: Array, size: int) -> Array:
    index = jnp.stack([jnp.where(segments > 0, segments, -1), positions])
    return jnp.moveaxis(index.reshape(2, batch, -1, size), 0, -2)

  # Shared keys are padded to whole blocks; padding has segment 0, which becomes -1.
  cached = cache.keys.shape[1]
  excess = _round_up(max(cached, 1), tiles.keys) - cached
  cache = jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0), (0, excess)] + [(0, 0)] * (x.ndim - 2)), cache)
  shared = Keys(jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2),
                key_index(cache.segments, cache.positions, tiles.keys))
  # A row over itself has its keys in `shared` already.
  own = () if inputs.cache is None else Keys(
      layout.flatten(inputs.keys), layout.flatten(inputs.values), key_index(
          layout.flatten(segments), layout.flatten(inputs.positions), tiles.chunk))
  begin, end = _visible_range(index, shared.index)
  return Operands(Rows(layout.flatten(inputs.queries), index, begin, end), shared, own)


def _visible_range(rows: Int[Array, 'B I 4 R'],
                   keys: Int[Array, 'B J 2 C']) -> tuple[Int[Array, 'B I'], Int[Array, 'B I']]:
  """Returns begin and end of the range of key blocks that holds all keys a row block sees.

  Args:
    rows: index of the queries, see Rows.
    keys: index of the shared keys, see Keys.
  """
  # Extremes over the queries of each block of rows.
  segment, reach, prefix_length, _ = jnp.moveaxis(rows, 2, 0)
  real = segment > 0
  lowest = jnp.min(segment, axis=-1, where=real, initial=FAR)[..., None]
  highest = jnp.max(segment, axis=-1)[..., None]
  reach = jnp.min(reach, axis=-1, where=real, initial=FAR)[..., None]
  prefix_length = jnp.max(prefix_length, axis=-1, where=real, initial=0)[..., None]

  # A block of keys counts as seen if these extremes do not exclude it.
  segment, position = keys[:, None, :, 0], keys[:, None, :, 1]
  blocks, size = segment.shape[-2:]
  seen = ((jnp.max(segment, axis=-1) >= lowest)
          & (jnp.min(segment, axis=-1, where=segment > 0, initial=FAR) <= highest)
          & (jnp.max(position, axis=-1, where=segment > 0, initial=-FAR) > reach)
          & (jnp.arange(blocks) * size < prefix_length))
  # From the first seen block to the last one. The range is empty if none is seen.
  begin = jnp.argmax(seen, axis=-1).astype(jnp.int32)
  end = blocks - jnp.argmax(seen[..., ::-1], axis=-1).astype(jnp.int32)
  return begin, jnp.where(seen.any(axis=-1), end, begin)


def pad(rows: PyTree) -> PyTree:
  """Pads rows of fresh tokens, [B, M, Q, ...], to the length that the kernels work on.

  The padding has segment 0, which sees nothing. [B, M] leaves stay as they are.
  """

  def pad_leaf(leaf: Array) -> Array:
    if leaf.ndim < 3:
      return leaf
    widths = [(0, 0)] * leaf.ndim
    widths[2] = (0, -leaf.shape[2] % SUBLANES)
    return jnp.pad(leaf, widths)

  return jax.tree.map(pad_leaf, rows)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
