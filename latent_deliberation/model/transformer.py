"""The stack of blocks. One call serves every pass: prefill, coprocessor, second pass, decoding."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from latent_deliberation.array_types import Array, Int, Rows, RowTokens, typed
from latent_deliberation.model.attention import (
  Visibility,
  attend,
  cached_mask,
  fresh_mask,
)
from latent_deliberation.model.cache import KeysValues, KVCache
from latent_deliberation.model.config import TransformerConfig
from latent_deliberation.model.layers import FeedForward, LowRank, Projection, RMSNorm, rotate

REMAT_POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, over a cache and over the fresh tokens."""
  config: TransformerConfig
  lora: LowRank | None = None

  @nn.compact
  def __call__(self, x: Array, positions: Array, visibility: Visibility, window: Array,
               cache: KVCache | None) -> tuple[Array, KeysValues]:
    c = self.config
    axes = ('batch', 'trace', 'length', 'heads', 'head_dim')

    def project(name: str, heads: int, axis: str) -> Array:
      return Projection((c.embed_dim, heads, c.head_dim), ('embed', axis, 'head_dim'),
                        lora=self.lora, name=name)(x)

    scale = c.head_dim ** -0.5 if c.query_scale is None else c.query_scale
    queries = rotate(project('query', c.num_heads, 'heads'), positions, c.rope_base) * scale
    queries = nn.with_logical_constraint(queries.astype(x.dtype), axes)
    keys = rotate(project('key', c.num_kv_heads, 'kv_heads'), positions, c.rope_base)
    values = project('value', c.num_kv_heads, 'kv_heads')

    visible = fresh_mask(positions, visibility, window)
    if cache is None:
      mixed = attend(queries, keys, values, visible, cap=c.attention_softcap)
    else:
      # A cache may be kept in another dtype than the one this pass computes in.
      mixed = attend(
          queries, keys, values, visible, cache.keys.astype(x.dtype),
          cache.values.astype(x.dtype),
          cached_mask(positions, visibility, cache.positions, cache.segments, window),
          cap=c.attention_softcap)
    out = Projection((c.num_heads, c.head_dim, c.embed_dim), ('heads', 'head_dim', 'embed'),
                     inputs=2, lora=self.lora, name='out')(mixed)
    return out, KeysValues(keys, values)


class Block(nn.Module):
  """x + norm(attention(norm(x))), then x + norm(feed-forward(norm(x)))."""
  config: TransformerConfig
  lora: LowRank | None = None

  @nn.compact
  def __call__(self, x: Array, layer: tuple[Array, KVCache | None], positions: Array,
               visibility: Visibility) -> tuple[Array, KeysValues]:
    window, cache = layer
    norm = lambda name: RMSNorm(self.config.norm_epsilon, name=name)  # noqa: E731
    mixed, fresh = Attention(self.config, self.lora, name='attention')(
        norm('attention_in')(x), positions, visibility, window, cache)
    x = x + norm('attention_out')(mixed)
    fed = FeedForward(self.config.hidden_dim, self.lora, name='feed_forward')(
        norm('feed_forward_in')(x))
    x = x + norm('feed_forward_out')(fed)
    return nn.with_logical_constraint(x, ('batch', 'trace', 'length', 'activation')), fresh


class Transformer(nn.Module):
  """L blocks, scanned over stacked weights, and the final norm.

  Attributes:
    config: sizes.
    lora: low-rank adapters on every projection, in the collection 'lora'.
    remat: what the backward pass keeps of a block, a key of REMAT_POLICIES.
    scan: False unrolls the loop over layers (same weights, same result; longer to compile).
  """
  config: TransformerConfig
  lora: LowRank | None = None
  remat: str = 'none'
  scan: bool = True

  @nn.compact
  @typed
  def __call__(self, x: Rows, positions: RowTokens, visibility: Visibility,
               cache: KVCache | None = None) -> tuple[Rows, KeysValues]:
    """Hidden states of fresh tokens after the final norm, and their keys and values.

    Args:
      x: [B, M, Q, D] embeddings.
      positions: [B, M, Q] rotary positions.
      visibility: what the rows may see.
      cache: of the same B texts; shared by all M rows of a text, and never changed.
    """
    block = Block
    if REMAT_POLICIES[self.remat] is not None:
      block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
    blocks = nn.scan(
        block, length=self.config.num_layers, unroll=1 if self.scan else self.config.num_layers,
        variable_axes={'params': 0, 'lora': 0}, split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast), metadata_params={nn.PARTITION_NAME: 'layers'},
    )(self.config, self.lora, name='blocks')
    x = nn.with_logical_constraint(x, ('batch', 'trace', 'length', 'activation'))
    x, fresh = blocks(x, (self._windows(), self._per_layer(cache)), positions, visibility)
    return RMSNorm(self.config.norm_epsilon, name='final_norm')(x), fresh

  def _windows(self) -> Int[Array, 'L']:
    """Reach of each layer; a global layer's is past any position."""
    everything = jnp.iinfo(jnp.int32).max
    return jnp.array([self.config.window if kind == 'local' else everything
                      for kind in self.config.layer_kinds], jnp.int32)

  def _per_layer(self, cache: KVCache | None) -> KVCache | None:
    """The cache with a layer axis on every leaf, since scan slices all of them."""
    if cache is None:
      return None
    tile = lambda leaf: jnp.broadcast_to(leaf, (self.config.num_layers, *leaf.shape))  # noqa: E731
    return cache.replace(positions=tile(cache.positions), segments=tile(cache.segments))
