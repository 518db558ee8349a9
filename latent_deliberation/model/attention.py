"""The kv-cache, attention masks, and attention of fresh tokens to a shared cache and to themselves.

M traces of a text share the trunk's cached keys. Two products give their scores:
    (fresh queries) x (cached keys)            [M * Q, S] per head and text, one matrix product
    (fresh queries) x (own fresh keys)         [Q, Q] per trace
ONE softmax over both normalises them. The dense mask of the paper's figure would have
(S + M * Q)^2 scores, nearly all of them masked out.

`AttentionMaskSpec` says what each token may see; `fresh_mask` and `cached_mask` are the rules.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Bool, Float, Int, RowTokens, typed
from latent_deliberation.model.products import matmul


@struct.dataclass
class KeysValues:
  """Rotated keys and values of fresh tokens, of L layers or of one."""
  keys: Float[Array, '... B M Q K H']
  values: Float[Array, '... B M Q K H']


@struct.dataclass
class KVCache:
  """The kv-cache of B texts of S tokens, packed or not. It has L layers, or is that of one.

  Attributes:
    keys: rotated to their positions.
    values: values of the same tokens.
    positions: position of each token in its own document.
    segments: document of each token; 0 is padding, which no token sees.
  """
  keys: Float[Array, '... B S K H']
  values: Float[Array, '... B S K H']
  positions: Int[Array, 'B S']
  segments: Int[Array, 'B S']

  @classmethod
  def empty(cls, fresh: KeysValues) -> 'KVCache':
    """Returns a cache of no tokens that `fresh` can be appended to."""
    layers, batch, _, _, heads, width = fresh.keys.shape
    keys = jnp.zeros((layers, batch, 0, heads, width), fresh.keys.dtype)
    index = jnp.zeros((batch, 0), jnp.int32)
    return cls(keys=keys, values=keys, positions=index, segments=index)

  @property
  def length(self) -> int:
    """Number of cached tokens of each text, S."""
    return self.keys.shape[2]

  def append(self, fresh: KeysValues, positions: Array, segments: Array) -> 'KVCache':
    """Returns the cache with one row of fresh tokens after its last token.

    Args:
      fresh: [L, B, 1, Q, K, H] keys and values.
      positions: [B, 1, Q] positions.
      segments: [B, 1, Q] documents.

    Raises:
      ValueError: there are several rows.
    """
    if fresh.keys.shape[2] != 1:
      raise ValueError(
          f'{fresh.keys.shape[2]} rows of fresh tokens, expected 1: traces of one text are '
          'alternatives, so append each to a cache of its own')
    return KVCache(
        keys=jnp.concatenate([self.keys, fresh.keys[:, :, 0]], axis=2),
        values=jnp.concatenate([self.values, fresh.values[:, :, 0]], axis=2),
        positions=jnp.concatenate([self.positions, positions[:, 0]], axis=1),
        segments=jnp.concatenate([self.segments, segments[:, 0]], axis=1))


# Names of the fused kernel's results. A remat policy may keep them, which saves the backward pass
# a second run of the kernel.
FUSED_RESULTS = ('attention_mixed', 'attention_lse')

# Up to this soft-cap, the sum of exp(x) over any vocabulary or row of keys fits float32: exp(60) is
# 1e26, and the limit is 3e38.
SUMMABLE = 60.0

MASKED = -1e30  # finite: a query that sees nothing gives zeros and no NaN

# A long row is cut into blocks of queries. No block is compared with the tokens after it, which
# saves up to half of the scores. The scores of a block fit a CPU's cache.
MIN_BLOCK, MAX_BLOCKS = 128, 8


@struct.dataclass
class AttentionMaskSpec:
  """The limits on what fresh tokens see, besides causality and the sliding window.

  Attributes:
    segments: document of each fresh token; a token sees only its own document.
    prefix_length: number of leading cached tokens that are seen (by a trace: up to its anchor);
      one number for each row, or one for each token.
    first: index, in the row, of the first fresh token that each token sees; None for 0.
  """
  segments: Int[Array, 'B M Q']
  prefix_length: Int[Array, 'B M'] | Int[Array, 'B M Q']
  first: Int[Array, 'B M Q'] | None = None


@typed
def fresh_mask(positions: RowTokens, mask_spec: AttentionMaskSpec,
               window: Int[Array, '']) -> Bool[Array, 'B M Q P']:
  """Returns which tokens of its row each token sees: earlier, same segment, inside the window."""
  # Causality follows the order in the row, because latents may share one position.
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
def cached_mask(positions: RowTokens, mask_spec: AttentionMaskSpec,
                cached_positions: Int[Array, 'B S'], cached_segments: Int[Array, 'B S'],
                window: Int[Array, '']) -> Bool[Array, 'B M Q S']:
  """Returns which cached tokens each token sees: in the prefix, same segment, inside the window."""
  order = jnp.arange(cached_positions.shape[-1])
  # Prefix lengths are [B, M], one for each row, or [B, M, Q], one for each token.
  length = mask_spec.prefix_length
  before = order < (length if length.ndim == 3 else length[..., None])[..., None]
  segments = cached_segments[:, None, None, :]
  same = mask_spec.segments[..., None] == segments
  near = positions[..., None] - cached_positions[:, None, None, :] < window
  return before & same & near & (segments > 0)


def softcap(x: Array, cap: float | None) -> Array:
  """Returns cap * tanh(x / cap), or x if cap is None (Gemma 2, arXiv 2408.00118, section 2)."""
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
  """Attention of fresh tokens to the visible part of a cache and of their own row; see `attend`.

  Args:
    keys, values: those of the fresh tokens.
    mask_spec: limits on what the tokens see.
    window: number of keys that a query sees, with its own.
    cache: cache of one layer, [B, S, K, H]; None if rows see only themselves.
    cap: soft-cap of the scores; None for no cap.
  """
  visible = fresh_mask(positions, mask_spec, window)
  if cache is not None:
    cached_visible = cached_mask(
        positions, mask_spec, cache.positions, cache.segments, window)
  # Queries are cut into blocks. The last one may be shorter.
  length = queries.shape[2]
  block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))

  def of_block(start: int) -> Array:
    # A block of queries meets the row's tokens up to its own end, and the whole cache.
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
  """Attention of fresh tokens to cached tokens and to those of their own row, by one softmax.

  Scores, softmax and sums are float32; the result has the dtype of the queries, which are scaled
  already. A query that sees nothing gets zeros.
  """
  batch, traces, length, heads, width = queries.shape
  kv_heads = fresh_keys.shape[-2]
  # Each (text, head) has a matrix of queries: those of all traces for cached keys, those of one
  # trace for its own keys. For any other form of product, XLA on a CPU transposes all scores.
  grouped = jnp.transpose(
      queries.reshape(batch, traces, length, kv_heads, heads // kv_heads, width),
      (0, 3, 1, 4, 2, 5))
  per_query = grouped.shape[:-1]  # B K M G Q

  # The leading axes of `matrices` are [B, K] if cached and [B, K, M] if fresh.
  def product(x: Array, matrices: Array, transposed: bool = False) -> Array:
    lead = matrices.shape[:-2]
    rows = x.reshape(*lead, math.prod(per_query) // math.prod(lead), x.shape[-1])
    return matmul(rows, matrices, transposed).reshape(*per_query, -1)

  def scores(keys: Array, visible: Array) -> Array:
    raw = product(grouped, keys, transposed=True)
    return jnp.where(visible[:, None, :, None], softcap(raw, cap), MASKED)

  # Scores of both kinds of keys, each with its values. The axis of kv heads comes second.
  fresh_keys, fresh_values = (jnp.moveaxis(leaf, 3, 1) for leaf in (fresh_keys, fresh_values))
  parts = [(scores(fresh_keys, fresh_visible), fresh_values)]
  if cached_keys is not None:
    cached_keys, cached_values = (
        jnp.moveaxis(leaf, 2, 1) for leaf in (cached_keys, cached_values))
    parts.append((scores(cached_keys, cached_visible), cached_values))

  # One softmax over both parts. The common peak cancels out, so it needs no gradient.
  peak = jax.lax.stop_gradient(
      jnp.max(jnp.stack([part.max(axis=-1, initial=MASKED) for part, _ in parts]), axis=0))
  # The peak of a row that sees nothing is MASKED. Raised, it makes the weights 0 instead of 1.
  peak = jnp.maximum(peak, MASKED / 2)[..., None]
  weights = [jnp.exp(part - peak) for part, _ in parts]
  total = sum(weight.sum(axis=-1) for weight in weights)
  mixed = sum(product(weight.astype(values.dtype), values)
              for weight, (_, values) in zip(weights, parts, strict=True))
  # A query that sees nothing gets 0 / 1, since the gradient of 0 / tiny overflows. The total of
  # any other query is at least 1.
  total = jnp.where(total > 0, total, 1.0)
  mixed = jnp.transpose(mixed / total[..., None], (0, 2, 4, 1, 3, 5))
  return mixed.reshape(queries.shape).astype(queries.dtype)
