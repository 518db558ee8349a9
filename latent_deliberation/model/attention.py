"""Shared-prefix attention: rows of fresh tokens attend jointly to a common cache and to themselves.

M traces of a text share the trunk's cached keys. Their scores are computed as
    (fresh queries) x (cached keys)            [M * Q, S] per head and text, one matrix product,
    (fresh queries) x (own fresh keys)         [Q, Q] per trace,
and normalised by ONE softmax over both. The dense mask of the paper's figure would have
(S + M * Q)^2 scores, nearly all of them masked out.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Bool, Float, Int, RowTokens, typed
from latent_deliberation.errors import UserError


@struct.dataclass
class KeysValues:
  """Keys (already rotated to their positions) and values of fresh tokens, [L, B, M, Q, K, H]."""
  keys: Array
  values: Array


@struct.dataclass
class KVCache:
  """What a decoder remembers of B texts of S tokens, packed or not.

  Attributes:
    keys: [L, B, S, K, H], already rotated to their positions.
    values: [L, B, S, K, H].
    positions: [B, S] position of each token in its own document.
    segments: [B, S] document of each token; 0 is a hole that nobody sees.
  """
  keys: Array
  values: Array
  positions: Array
  segments: Array

  @classmethod
  def empty(cls, fresh: KeysValues) -> 'KVCache':
    """A cache of no tokens, shaped to have `fresh` appended."""
    layers, batch, _, _, heads, width = fresh.keys.shape
    keys = jnp.zeros((layers, batch, 0, heads, width), fresh.keys.dtype)
    index = jnp.zeros((batch, 0), jnp.int32)
    return cls(keys=keys, values=keys, positions=index, segments=index)

  @property
  def length(self) -> int:
    """S, the number of cached tokens of each text."""
    return self.keys.shape[2]

  def append(self, fresh: KeysValues, positions: Array, segments: Array) -> 'KVCache':
    """The cache with one row of fresh tokens behind it.

    Args:
      fresh: [L, B, 1, Q, K, H]; a text's cache grows by one row at a time.
      positions: [B, 1, Q].
      segments: [B, 1, Q].
    """
    if fresh.keys.shape[2] != 1:
      raise UserError(
          f'{fresh.keys.shape[2]} rows of fresh tokens, expected 1: traces of one text are '
          'alternatives, so each continues a cache of its own')
    return KVCache(
        keys=jnp.concatenate([self.keys, fresh.keys[:, :, 0]], axis=2),
        values=jnp.concatenate([self.values, fresh.values[:, :, 0]], axis=2),
        positions=jnp.concatenate([self.positions, positions[:, 0]], axis=1),
        segments=jnp.concatenate([self.segments, segments[:, 0]], axis=1))

  def truncate(self, length: int) -> 'KVCache':
    """The first `length` tokens: detaching latents is truncating the cache they were added to."""
    if not 0 <= length <= self.length:
      raise UserError(f'cannot truncate a cache of {self.length} tokens to {length}')
    return KVCache(
        keys=self.keys[:, :, :length], values=self.values[:, :, :length],
        positions=self.positions[:, :length], segments=self.segments[:, :length])


# Names of the fused kernel's results, which a remat policy may keep, so that the backward pass
# need not run the kernel again.
FUSED_RESULTS = ('attention_mixed', 'attention_lse')

MASKED = -1e30  # finite, so that a query with nothing to see gives zeros and no NaN

# Long rows go by blocks of queries, none of which is compared with the tokens after it: down to
# half of the scores, and few enough at a time for a CPU's cache.
MIN_BLOCK, MAX_BLOCKS = 128, 8


@struct.dataclass
class AttentionMaskSpec:
  """What rows of fresh tokens may see, beyond causality and the sliding window.

  Attributes:
    segments: [B, M, Q] document of each fresh token; a token sees its own document only.
    prefix_length: [B, M], or [B, M, Q] where tokens of a row differ, number of leading cached tokens that
      are seen (by a trace: up to its anchor).
    first: [B, M, Q] index in its row of the first fresh token that each token sees; None for 0.
  """
  segments: Array
  prefix_length: Array
  first: Array | None = None


@typed
def fresh_mask(positions: RowTokens, mask_spec: AttentionMaskSpec,
               window: Int[Array, '']) -> Bool[Array, 'B M Q P']:
  """Who sees whom within a row: causal by order in the row, own segment, inside the window."""
  order = jnp.arange(positions.shape[-1])
  causal = order[:, None] >= order
  same = mask_spec.segments[..., :, None] == mask_spec.segments[..., None, :]
  near = positions[..., :, None] - positions[..., None, :] < window
  real = mask_spec.segments[..., None, :] > 0
  visible = causal & same & near & real
  if mask_spec.first is not None:
    visible &= order >= mask_spec.first[..., None]
  return visible


@typed
def cached_mask(positions: RowTokens, mask_spec: AttentionMaskSpec, cached_positions: Int[Array, 'B S'],
                cached_segments: Int[Array, 'B S'],
                window: Int[Array, '']) -> Bool[Array, 'B M Q S']:
  """Which cached tokens a fresh token sees: up to the prefix_length, own segment, inside the window."""
  order = jnp.arange(cached_positions.shape[-1])
  prefix_length = mask_spec.prefix_length
  before = order < (prefix_length if prefix_length.ndim == 3 else prefix_length[..., None])[..., None]
  segments = cached_segments[:, None, None, :]
  same = mask_spec.segments[..., None] == segments
  near = positions[..., None] - cached_positions[:, None, None, :] < window
  return before & same & near & (segments > 0)


def softcap(x: Array, cap: float | None) -> Array:
  """cap * tanh(x / cap), or x where cap is None (Gemma 2, arXiv 2408.00118, section 2)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


@typed
def attend_visible(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    values: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    mask_spec: AttentionMaskSpec,
    window: Int[Array, ''],
    cache: KVCache | None = None,
    cap: float | None = None,
) -> Float[Array, 'B M Q N H']:
  """Attention of fresh tokens to what they may see of a cache and of their own row; see `attend`.

  Args:
    keys, values: of the fresh tokens.
    window: [] keys that a query sees, its own included.
    cache: of one layer, [B, S, K, H]; None where rows see nothing but themselves.
  """
  visible = fresh_mask(positions, mask_spec, window)
  if cache is not None:
    cached_visible = cached_mask(
        positions, mask_spec, cache.positions, cache.segments, window)
  length = queries.shape[2]
  block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))

  def of_block(start: int) -> Array:
    ours, seen = slice(start, start + block), slice(start + block)
    cached = () if cache is None else (cache.keys, cache.values, cached_visible[:, :, ours])
    return attend(queries[:, :, ours], keys[:, :, seen], values[:, :, seen],
                  visible[:, :, ours, seen], *cached, cap=cap)

  return jnp.concatenate([of_block(start) for start in range(0, length, block)], axis=2)


@typed
def attend(
    queries: Float[Array, 'B M Q N H'],
    fresh_keys: Float[Array, 'B M P K H'],
    fresh_values: Float[Array, 'B M P K H'],
    fresh_visible: Bool[Array, 'B M Q P'],
    cached_keys: Float[Array, 'B S K H'] | None = None,
    cached_values: Float[Array, 'B S K H'] | None = None,
    cached_visible: Bool[Array, 'B M Q S'] | None = None,
    cap: float | None = None,
) -> Float[Array, 'B M Q N H']:
  """Attention of fresh tokens to (cached tokens, fresh tokens of their own row), one softmax.

  Scores, softmax and accumulation are float32; the result has the queries' dtype. Queries come
  scaled. A query that sees nothing gets zeros.
  """
  batch, traces, length, heads, width = queries.shape
  kv_heads = fresh_keys.shape[-2]
  # Rows of a matrix of its own for each (text, head): of all traces for what is cached, of each
  # trace for what is its own. XLA turns whole scores on a CPU where a product is not such a matrix.
  grouped = jnp.transpose(
      queries.reshape(batch, traces, length, kv_heads, heads // kv_heads, width),
      (0, 3, 1, 4, 2, 5))
  per_query = grouped.shape[:-1]  # B K M G Q

  def product(x: Array, matrices: Array) -> Array:
    lead = matrices.shape[:-2]
    rows = x.reshape(*lead, math.prod(per_query) // math.prod(lead), x.shape[-1])
    y = jnp.matmul(rows, matrices, preferred_element_type=jnp.float32)
    return y.reshape(*per_query, matrices.shape[-1])

  def scores(keys: Array, visible: Array) -> Array:
    raw = product(grouped, jnp.swapaxes(keys, -1, -2))
    return jnp.where(visible[:, None, :, None], softcap(raw, cap), MASKED)

  fresh_keys, fresh_values = (jnp.moveaxis(leaf, 3, 1) for leaf in (fresh_keys, fresh_values))
  parts = [(scores(fresh_keys, fresh_visible), fresh_values)]
  if cached_keys is not None:
    cached_keys, cached_values = (
        jnp.moveaxis(leaf, 2, 1) for leaf in (cached_keys, cached_values))
    parts.append((scores(cached_keys, cached_visible), cached_values))

  peak = jax.lax.stop_gradient(
      jnp.max(jnp.stack([part.max(axis=-1, initial=MASKED) for part, _ in parts]), axis=0))
  # A row of nothing but MASKED has that as its peak; raised, its weights vanish instead of being 1.
  peak = jnp.maximum(peak, MASKED / 2)[..., None]
  weights = [jnp.exp(part - peak) for part, _ in parts]
  total = sum(weight.sum(axis=-1) for weight in weights)
  mixed = sum(product(weight.astype(values.dtype), values)
              for weight, (_, values) in zip(weights, parts, strict=True))
  # Nothing seen: 0 / 1, not 0 / tiny, whose gradient overflows. Anything seen: the total is >= 1.
  total = jnp.where(total > 0, total, 1.0)
  mixed = jnp.transpose(mixed / total[..., None], (0, 2, 4, 1, 3, 5))
  return mixed.reshape(queries.shape).astype(queries.dtype)
