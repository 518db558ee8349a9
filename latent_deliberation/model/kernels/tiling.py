"""From traces over a cache to rows and keys of the kernels, padded to whole blocks, and back."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, PyTree
from latent_deliberation.model.attention import MASKED, AttentionMaskSpec, KVCache

# exp of a score that a soft-cap bounds by this, summed over any number of keys, fits a float32.
BOUNDED_CAP = 60.0


class Rows(NamedTuple):
  """I blocks of R queries.

  Attributes:
    queries: [B, N, I * R, H].
    index: int32 [B, I, 4, R]: segment (0 sees nothing); position that a key must be beyond to be
      inside the window; prefix_length; place in its chunk of the first own key that may be seen.
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
    index: int32 [B, J or chunks, 2, keys]: segment (-1 is not seen), position.
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
    chunk: queries, and as many own keys, of a chunk: whole traces. It divides R on TPUs.
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


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
  """Matrix product over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())),
                             preferred_element_type=jnp.float32)


def masked_scores(tiles: Tiles, queries: Array, keys: Array, visible: Array) -> tuple[Array, Array]:
  """Masked scores [rows, keys], and the derivative of the soft-cap at each."""
  raw = product(queries, keys, (1, 1))
  if tiles.cap is None:
    return jnp.where(visible, raw, MASKED), jnp.ones((), jnp.float32)
  share = jnp.tanh(raw * (1 / tiles.cap))
  return jnp.where(visible, tiles.cap * share, MASKED), 1 - share * share


SUBLANES = 16  # of a tile of bfloat16; fresh tokens of a trace are padded to a multiple
FAR = 2**30  # past any position, and past no int32 when a position is added


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How much a kernel holds at a time; more only where a single trace is longer, on TPUs.

  Attributes:
    rows: queries; on TPUs, of all heads of a kv head together.
    keys: shared keys; on GPUs, own keys too.
    own: fresh tokens of whole traces whose scores are one product, masked between the traces; on
      GPUs without effect, since traces lie across blocks there.
  """
  rows: int
  keys: int
  own: int = 128


class Inputs(NamedTuple):
  """Arguments of `attend_visible` that are arrays."""
  queries: Array
  keys: Array
  values: Array
  positions: Array
  mask_spec: AttentionMaskSpec
  window: Array
  cache: KVCache | None


class Operands(NamedTuple):
  """Arguments of the kernels; a row over itself has no own keys."""
  rows: Rows
  shared: Keys
  own: Keys | tuple[()]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How M rows of Q fresh tokens lie in the blocks of the kernels.

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
    """For queries of `shape` over `cached` tokens, or over themselves where that is None.

    A block of queries has whole traces, or a part of the only row.
    """
    _, traces, length, heads, width = shape
    group = heads // kv_heads
    most = max(blocks.rows // group // SUBLANES, 1) * SUBLANES
    length = _round_up(length, SUBLANES)
    if cached is None:
      rows = chunk = min(length, most)
      shared, length = length, _round_up(length, rows)
    else:
      per_chunk = max(1, min(traces, blocks.own // length))
      whole = _round_up(traces, per_chunk)
      limit = min(max(per_chunk, most // length // per_chunk * per_chunk), whole)
      # Blocks may be down to half as large as they could, for fewer traces of padding.
      sizes = [size for size in range(per_chunk, limit + 1, per_chunk) if 2 * size >= limit]
      per_block = min(sizes, key=lambda size: (_round_up(traces, size), -size))
      rows, chunk = per_block * length, per_chunk * length
      shared, traces = cached, _round_up(traces, per_block)
    keys = min(blocks.keys, _round_up(max(shared, 1), SUBLANES))
    return cls(traces, length, Tiles(kv_heads, group, width, rows, keys, chunk, cap))

  @classmethod
  def across(cls, blocks: Blocks, cap: float | None, shape: tuple[int, ...], kv_heads: int,
             cached: int | None) -> 'Layout':
    """The same in blocks of a power of two, as Triton needs them, that traces lie across."""
    _, traces, length, heads, width = shape
    length = _round_up(length, SUBLANES)
    rows, fresh = blocks.keys, traces * length
    while rows < min(blocks.rows, fresh):
      rows *= 2
    if cached is None:
      length = _round_up(length, rows)
    else:
      traces = _round_up(traces, rows // math.gcd(rows, length))
    return cls(traces, length, Tiles(
        kv_heads, heads // kv_heads, width, rows, blocks.keys, length, cap))

  def flatten(self, x: Array) -> Array:
    """[B, M, Q] as rows [B, I * R]; [B, M, Q, N or K, H] as [B, N or K, I * R, H]."""
    batch, traces, length, *rest = x.shape
    padding = [(0, 0), (0, self.traces - traces), (0, self.length - length)] + [(0, 0)] * len(rest)
    rows = jnp.pad(x, padding)
    if rest:
      rows = jnp.moveaxis(rows, 3, 1)
    return rows.reshape(batch, *rest[:-1], self.traces * self.length, *rest[1:])

  def unflatten(self, rows: Array, shape: tuple[int, ...]) -> Array:
    """[B, M, Q, N or K, H], which is `shape`, from [B, N or K, I * R, H]."""
    batch, traces, length, heads, width = shape
    rows = rows.reshape(batch, heads, self.traces, self.length, width)
    return jnp.moveaxis(rows, 1, 3)[:, :traces, :length]


def lay_out(layout: Layout, inputs: Inputs) -> Operands:
  """What the kernels are given. A row over itself is a row over a cache that is this row."""
  tiles, cache = layout.tiles, inputs.cache
  segments, first = inputs.mask_spec.segments, inputs.mask_spec.first
  batch, traces, length = segments.shape
  if cache is None:
    shown = jnp.arange(1, length + 1)
    cache = KVCache(inputs.keys[:, 0], inputs.values[:, 0], inputs.positions[:, 0], segments[:, 0])
  else:
    shown = inputs.mask_spec.prefix_length
    shown = shown if shown.ndim == 3 else shown[..., None]
  first = jnp.zeros_like(segments) if first is None else first
  # Own keys are numbered through a chunk; a query sees those of its own trace, up to itself.
  first += jnp.arange(traces)[:, None] % (tiles.chunk // layout.length or 1) * layout.length
  reach = inputs.positions - jnp.minimum(inputs.window, FAR)
  index = jnp.stack([
      layout.flatten(jnp.broadcast_to(x, segments.shape)).reshape(batch, -1, tiles.rows)
      for x in (segments, reach, shown, first)], axis=2)

  def numbered(segments: Array, positions: Array, size: int) -> Array:
    index = jnp.stack([jnp.where(segments > 0, segments, -1), positions])
    return jnp.moveaxis(index.reshape(2, batch, -1, size), 0, -2)

  cached = cache.keys.shape[1]
  excess = _round_up(max(cached, 1), tiles.keys) - cached
  cache = jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0), (0, excess)] + [(0, 0)] * (x.ndim - 2)), cache)
  shared = Keys(jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2),
                numbered(cache.segments, cache.positions, tiles.keys))
  own = () if inputs.cache is None else Keys(
      layout.flatten(inputs.keys), layout.flatten(inputs.values), numbered(
          layout.flatten(segments), layout.flatten(inputs.positions), tiles.chunk))
  begin, end = _blocks_seen(index, shared.index)
  return Operands(Rows(layout.flatten(inputs.queries), index, begin, end), shared, own)


def _blocks_seen(rows: Array, keys: Array) -> tuple[Array, Array]:
  """Range [B, I] of the blocks of keys outside of which no query of a block sees anything.

  Args:
    rows: [B, I, 4, R] index of the queries.
    keys: [B, J, 2, keys] index of the shared keys.
  """
  segment, reach, prefix_length, _ = jnp.moveaxis(rows, 2, 0)
  real = segment > 0
  lowest = jnp.min(segment, axis=-1, where=real, initial=FAR)[..., None]
  highest = jnp.max(segment, axis=-1)[..., None]
  reach = jnp.min(reach, axis=-1, where=real, initial=FAR)[..., None]
  prefix_length = jnp.max(prefix_length, axis=-1, where=real, initial=0)[..., None]

  segment, position = keys[:, None, :, 0], keys[:, None, :, 1]
  blocks, size = segment.shape[-2:]
  seen = ((jnp.max(segment, axis=-1) >= lowest)
          & (jnp.min(segment, axis=-1, where=segment > 0, initial=FAR) <= highest)
          & (jnp.max(position, axis=-1, where=segment > 0, initial=-FAR) > reach)
          & (jnp.arange(blocks) * size < prefix_length))
  begin = jnp.argmax(seen, axis=-1).astype(jnp.int32)
  end = blocks - jnp.argmax(seen[..., ::-1], axis=-1).astype(jnp.int32)
  return begin, jnp.where(seen.any(axis=-1), end, begin)


def pad(rows: PyTree) -> PyTree:
  """Rows of fresh tokens, [B, M, Q, ...], with the length that the kernels work on.

  The additional tokens are of segment 0, which sees nothing. [B, M] leaves are left as they are.
  """

  def of_leaf(leaf: Array) -> Array:
    if leaf.ndim < 3:
      return leaf
    widths = [(0, 0)] * leaf.ndim
    widths[2] = (0, -leaf.shape[2] % SUBLANES)
    return jnp.pad(leaf, widths)

  return jax.tree.map(of_leaf, rows)


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
