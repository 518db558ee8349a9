"""Fused attention for TPUs: the same function as the plain one, without scores in memory.

Plain attention writes [M * Q, S] scores of every head. Here a kernel makes them block by block and
leaves out the blocks of keys that no query of a block sees: beyond its furthest horizon, before its
sliding window, in other documents. Traces in the order of their anchors so cost half of the keys.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array, Float, Int, PyTree, RowTokens, typed
from latent_deliberation.model import attention, attention_kernels
from latent_deliberation.model.attention import Visibility
from latent_deliberation.model.attention_kernels import Keys, Rows, Tiles
from latent_deliberation.model.cache import KVCache

# What a remat policy may keep of a layer so that its backward pass need not run the kernel again.
SAVED = ('attention_mixed', 'attention_lse')
SUBLANES = 16  # of a tile of bfloat16; fresh tokens of a trace are padded to a multiple
FAR = 2**30  # past any position, and past no int32 when a position is added


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How much the kernel holds at a time; more only where a single trace is longer.

  Attributes:
    rows: queries, all heads of a kv head together.
    keys: shared keys.
    own: fresh tokens of whole traces whose scores are one product, masked between the traces.
  """
  rows: int = 1024
  keys: int = 512
  own: int = 128


class _Inputs(NamedTuple):
  """Arguments of `attend_visible` that are arrays."""
  queries: Array
  keys: Array
  values: Array
  positions: Array
  visibility: Visibility
  window: Array
  cache: KVCache | None


class _Operands(NamedTuple):
  """Arguments of the kernels; a row over itself has no own keys."""
  rows: Rows
  shared: Keys
  own: Keys | tuple[()]


@dataclasses.dataclass(frozen=True)
class _Options:
  """Arguments of `attend_visible` that are compiled in."""
  cap: float | None
  blocks: Blocks


@typed
def attend_visible(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    values: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    visibility: Visibility,
    window: Int[Array, ''],
    cache: KVCache | None = None,
    cap: float | None = None,
    blocks: Blocks = Blocks(),
) -> Float[Array, 'B M Q N H']:
  """The function of attention.attend_visible; compiled for a TPU, interpreted (slowly) on a CPU.

  The backward pass is fused where the cache is a constant, as the frozen decoder's is. Where there
  is none, or gradients flow into it, the backward pass is the plain one. Under a mesh, each device
  works on its own texts, traces and heads, by the logical-axis rules.

  Args:
    blocks: sizes, for tests and tuning.

  Raises:
    ValueError: another platform; several rows without a cache; heads split otherwise than kv heads.
  """
  platform = jax.default_backend()
  if platform not in ('cpu', 'tpu'):
    raise ValueError(f"attention = 'fused' on platform {platform!r}: its kernel is for TPUs (and "
                     "interpreted on CPUs, for tests); set attention = 'plain'")
  if cache is None and (queries.shape[1] > 1 or visibility.first is not None):
    raise ValueError(f"attention = 'fused' on {queries.shape[1]} rows without a cache: it takes "
                     "rows over a cache, or one causal row; set attention = 'plain'")
  inputs = _Inputs(queries, keys, values, positions, visibility, window, cache)
  return _over_mesh(functools.partial(_attend, _Options(cap, blocks)), inputs)(inputs)


def _over_mesh(function, inputs: _Inputs):
  """The function on each device's own texts, traces and heads, where there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  queries = nn.logical_to_mesh_axes(('batch', 'trace', None, 'heads'))
  fresh = nn.logical_to_mesh_axes(('batch', 'trace', None, 'kv_heads'))
  batch, trace, _, kv_heads = fresh
  if queries != fresh and inputs.keys.shape[3] > 1:
    raise ValueError(
        f"attention = 'fused': the rules split 'heads' over {queries[3]} and 'kv_heads' over "
        f'{kv_heads}, so that a device lacks the keys of its queries; give both the same rule')
  rows, text = PartitionSpec(batch, trace), PartitionSpec(batch)
  shared = PartitionSpec(batch, None, kv_heads)
  cache = inputs.cache and KVCache(shared, shared, text, text)
  specs = _Inputs(queries, fresh, fresh, rows, rows, PartitionSpec(), cache)
  return jax.shard_map(function, in_specs=(specs,), out_specs=queries, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, inputs: _Inputs) -> Array:
  return _run(options, inputs)[0]


def _run(options: _Options, inputs: _Inputs) -> tuple[Array, tuple[_Operands, Array, Array]]:
  """The result, and all that its fused gradient needs."""
  shape, kv_heads = inputs.queries.shape, inputs.keys.shape[3]
  layout = _Layout.of(options, shape, kv_heads, inputs.cache and inputs.cache.keys.shape[1])
  operands = _operands(layout, inputs)
  mixed, lse = map(checkpoint_name, _on_platform(
      attention_kernels.forward, layout.tiles, *operands), SAVED)
  return layout.unflatten(mixed, shape), (operands, mixed, lse)


def _attend_forward(options: _Options, inputs: _Inputs):
  cache = inputs.cache
  constant = cache is not None and not (cache.keys.perturbed or cache.values.perturbed)
  inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
  result, residuals = _run(options, inputs)
  return result, residuals if constant else inputs


def _attend_backward(options: _Options, residuals, cotangent: Array | SymbolicZero):
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  if isinstance(residuals, _Inputs):
    return (_plain_backward(options, residuals, cotangent),)
  operands, mixed, lse = residuals
  shape, kv_heads = cotangent.shape, lse.shape[2]
  layout = _Layout.of(options, shape, kv_heads, operands.shared.keys.shape[2])
  queries, own = _on_platform(
      attention_kernels.backward, layout.tiles, *operands, mixed, lse, layout.flatten(cotangent))
  keys, values = (layout.unflatten(x, (*shape[:3], kv_heads, shape[4])) for x in own)
  return (_Inputs(layout.unflatten(queries, shape), keys, values, None, None, None, None),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _plain_backward(options: _Options, inputs: _Inputs, cotangent: Array) -> _Inputs:
  """Gradients by everything that has some, the cache included."""

  def plain(inputs: _Inputs) -> Array:
    return attention.attend_visible(*inputs, cap=options.cap)

  _, pull = jax.vjp(plain, inputs)
  return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf,
                      pull(cotangent)[0])


def _on_platform(kernel, tiles: Tiles, *operands):
  """A kernel, compiled or interpreted as the platform needs that a program is lowered for.

  That is not always the one at hand: a CPU can compile for a TPU.
  """
  interpreted = dataclasses.replace(tiles, interpret=True)
  return jax.lax.platform_dependent(
      *operands, tpu=functools.partial(kernel, tiles), cpu=functools.partial(kernel, interpreted))


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How M rows of Q fresh tokens lie in the blocks of the kernels.

  Attributes:
    traces, length: M and Q, padded.
    tiles: sizes of blocks. A block of queries has whole traces, or a part of the only row.
  """
  traces: int
  length: int
  tiles: Tiles

  @classmethod
  def of(cls, options: _Options, shape: tuple[int, ...], kv_heads: int,
         cached: int | None) -> '_Layout':
    """For queries of `shape` over `cached` tokens, or over themselves where that is None."""
    _, traces, length, heads, width = shape
    group, blocks = heads // kv_heads, options.blocks
    most = max(blocks.rows // group // SUBLANES, 1) * SUBLANES
    length = _round_up(length, SUBLANES)
    if cached is None:
      rows = chunk = min(length, most)
      shared, length = length, _round_up(length, rows)
    else:
      per_chunk = max(1, min(traces, blocks.own // length))
      # Blocks of equal size, so that padding is small.
      row_blocks = -(-traces // max(per_chunk, most // length))
      per_block = _round_up(-(-traces // row_blocks), per_chunk)
      rows, chunk = per_block * length, per_chunk * length
      shared, traces = cached, _round_up(traces, per_block)
    keys = min(blocks.keys, _round_up(shared, SUBLANES))
    return cls(traces, length, Tiles(kv_heads, group, width, rows, keys, chunk, options.cap))

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


def _operands(layout: _Layout, inputs: _Inputs) -> _Operands:
  """What the kernels are given. A row over itself is a row over a cache that is this row."""
  tiles, cache = layout.tiles, inputs.cache
  segments, first = inputs.visibility.segments, inputs.visibility.first
  batch, traces, length = segments.shape
  if cache is None:
    shown = jnp.arange(1, length + 1)
    cache = KVCache(inputs.keys[:, 0], inputs.values[:, 0], inputs.positions[:, 0], segments[:, 0])
  else:
    shown = inputs.visibility.horizon
    shown = shown if shown.ndim == 3 else shown[..., None]
  first = jnp.zeros_like(segments) if first is None else first
  # Own keys are numbered through a chunk; a query sees those of its own trace, up to itself.
  first += jnp.arange(traces)[:, None] % (tiles.chunk // layout.length or 1) * layout.length
  reach = inputs.positions - jnp.minimum(inputs.window, FAR)
  index = jnp.stack([layout.flatten(jnp.broadcast_to(x, segments.shape))
                     for x in (segments, reach, shown, first)], axis=-1)

  def numbered(segments: Array, positions: Array, *blocks: int) -> Array:
    index = jnp.stack([jnp.where(segments > 0, segments, -1), positions])
    return jnp.moveaxis(index.reshape(2, batch, *blocks), 0, -2)

  excess = -cache.keys.shape[1] % tiles.keys
  cache = jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0), (0, excess)] + [(0, 0)] * (x.ndim - 2)), cache)
  shared = Keys(jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2),
                numbered(cache.segments, cache.positions, -1, tiles.keys))
  own = () if inputs.cache is None else Keys(
      layout.flatten(inputs.keys), layout.flatten(inputs.values), numbered(
          layout.flatten(segments), layout.flatten(inputs.positions),
          -1, tiles.rows // tiles.chunk, tiles.chunk))
  begin, end = _blocks_seen(index.reshape(batch, -1, tiles.rows, 4), shared.index)
  return _Operands(Rows(layout.flatten(inputs.queries), index, begin, end), shared, own)


def _blocks_seen(rows: Array, keys: Array) -> tuple[Array, Array]:
  """Range [B, I] of the blocks of keys outside of which no query of a block sees anything.

  Args:
    rows: [B, I, R, 4] index of the queries.
    keys: [B, J, 2, keys] index of the shared keys.
  """
  segment, reach, horizon, _ = jnp.moveaxis(rows, -1, 0)
  real = segment > 0
  lowest = jnp.min(segment, axis=-1, where=real, initial=FAR)[..., None]
  highest = jnp.max(segment, axis=-1)[..., None]
  reach = jnp.min(reach, axis=-1, where=real, initial=FAR)[..., None]
  horizon = jnp.max(horizon, axis=-1, where=real, initial=0)[..., None]

  segment, position = keys[:, None, :, 0], keys[:, None, :, 1]
  blocks, size = segment.shape[-2:]
  seen = ((jnp.max(segment, axis=-1) >= lowest)
          & (jnp.min(segment, axis=-1, where=segment > 0, initial=FAR) <= highest)
          & (jnp.max(position, axis=-1, where=segment > 0, initial=-FAR) > reach)
          & (jnp.arange(blocks) * size < horizon))
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
