"""The transformer: L blocks of attention and feed-forward, scanned over stacked weights.

One call serves every pass: prefill, coprocessor, second pass and decoding. attention = 'plain' runs
model/attention.py and model/rotary.py, 'fused' the kernels in model/kernels.
"""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from latent_deliberation.array_types import Array, Float, Int, Rows, RowTokens, typed
from latent_deliberation.errors import UserError
from latent_deliberation.model import attention, rotary
from latent_deliberation.model.attention import (
  FUSED_RESULTS,
  AttentionMaskSpec,
  KeysValues,
  KVCache,
)
from latent_deliberation.model.layers import FeedForward, LowRank, Projection, RMSNorm
from latent_deliberation.model.products import INT8_PRODUCT, LARGEST_INPUTS
from latent_deliberation.model.transformer_config import TransformerConfig

# Names of results inside a block, by which a policy may keep them.
_NAMED = ('queries', 'keys', 'values', 'feed_forward_out')
_policies = jax.checkpoint_policies


def _keeps_product(primitive: Primitive, *values: Any, **options: Any) -> bool:
  """The policy of 'dots'. It keeps products of int8 when they are scaled, not their int32 sums."""
  if options.get('preferred_element_type') == jnp.int32:
    return False
  return _policies.dots_with_no_batch_dims_saveable(primitive, *values, **options)


# What the backward pass keeps of a block, besides its input.
REMAT_POLICIES = {
    'none': None,  # no recomputation: everything is kept
    'full': _policies.nothing_saveable,
    # What costs most to compute for each byte; for Gemma-2 2B, a third of the bytes of 'dots'.
    'mid': _policies.save_only_these_names(*_NAMED, *FUSED_RESULTS),
    # Every matrix product.
    'dots': _policies.save_from_both_policies(
        _keeps_product, _policies.save_only_these_names(*FUSED_RESULTS, INT8_PRODUCT)),
}

ATTENTIONS = ('plain', 'fused')  # two computations of the same functions


def _fused_kernels() -> ModuleType:
  """Returns the fused functions, imported lazily, because plain attention needs no Pallas."""
  return importlib.import_module('latent_deliberation.model.kernels.fused_attention')


@struct.dataclass
class LayerTraits:
  """The differences of local and global layers, as arrays: one scanned body serves both kinds.

  Attributes:
    window: number of keys that a query sees, with its own; one number, or one for each layer.
    frequencies: [H / 2] or [L, H / 2], of the rotary embedding.
  """
  window: Int[Array | np.ndarray, '...']
  frequencies: Float[Array | np.ndarray, '... half']

  def layer(self, number: int) -> 'LayerTraits':
    """Returns the traits of one layer, as constants of the program."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[number]), self)


def layer_traits(config: TransformerConfig) -> LayerTraits:
  """Returns the traits of the L layers, stacked, as NumPy arrays.

  A global layer's window exceeds any position.
  """
  c = config
  local_base = c.rope_base if c.rope_local_base is None else c.rope_local_base
  # Kinds differ in window and frequencies. Only global layers have scaled positions.
  traits = {
      'local': (c.window, rotary.rotary_frequencies(c.head_dim, local_base)),
      'global': (np.iinfo(np.int32).max,
                 rotary.rotary_frequencies(c.head_dim, c.rope_base, c.rope_scaling, c.rope_llama3))}
  windows, frequencies = zip(*(traits[kind] for kind in c.layer_kinds), strict=True)
  return LayerTraits(np.array(windows, np.int32), np.stack(frequencies))


class Attention(nn.Module):
  """Grouped-query attention with rotary positions, over a cache and over the fresh tokens.

  Attributes:
    config: architecture.
    lora: low-rank adapters of the projections; None for none.
    fused: whether kernels compute attention and rotary embedding. Projections then keep the axes
      of x; see `products.multiply`.
    dtype: dtype of the products, if it is not that of x; see Transformer.
  """
  config: TransformerConfig
  lora: LowRank | None = None
  fused: bool = False
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Array, positions: Array, mask_spec: AttentionMaskSpec, traits: LayerTraits,
               cache: KVCache | None) -> tuple[Array, KeysValues]:
    c = self.config
    axes = ('batch', 'trace', 'length', 'heads', 'head_dim')
    if self.fused:
      attend, rotate = _fused_kernels().attend_visible, _fused_kernels().rotate
    else:
      attend, rotate = attention.attend_visible, rotary.rotate

    def project(name: str, heads: int, axis: str) -> Array:
      y = Projection((c.embed_dim, heads, c.head_dim), ('embed', axis, 'head_dim'),
                     lora=self.lora, flatten_batch=not self.fused, bias=c.qkv_bias,
                     dtype=self.dtype, name=name)(x)
      # Under fused attention x holds all traces in one row, but heads keep [B, M, Q].
      return y.reshape(*positions.shape, heads, c.head_dim)

    # Queries, keys and values: projected, normed and rotated to their positions.
    queries = project('query', c.num_heads, 'heads')
    keys = project('key', c.num_kv_heads, 'kv_heads')
    values = project('value', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      queries = RMSNorm(c.norm_epsilon, c.norm_offset, name='query_norm')(queries)
      keys = RMSNorm(c.norm_epsilon, c.norm_offset, name='key_norm')(keys)
    # The queries carry the scale of the scores. The rotation applies it in float32.
    scale = c.head_dim ** -0.5 if c.query_scale is None else c.query_scale
    queries, keys = rotate(queries, keys, positions, traits.frequencies, scale)
    queries = nn.with_logical_constraint(queries, axes)
    # Attention is made of products, so it takes their dtype. The cache may have another one.
    dtype = self.dtype or x.dtype
    queries, keys, values = (leaf.astype(dtype) for leaf in (queries, keys, values))
    queries, keys, values = map(checkpoint_name, (queries, keys, values), _NAMED[:3])
    cache = cache and cache.replace(
        keys=cache.keys.astype(dtype), values=cache.values.astype(dtype))
    mixed = attend(queries, keys, values, positions, mask_spec, traits.window, cache,
                   c.attention_softcap)
    mixed = mixed.reshape(*x.shape[:3], c.num_heads, c.head_dim).astype(x.dtype)
    out = Projection((c.num_heads, c.head_dim, c.embed_dim), ('heads', 'head_dim', 'embed'),
                     inputs=2, lora=self.lora, flatten_batch=not self.fused, dtype=self.dtype,
                     name='out')(mixed)
    return out, KeysValues(keys, values)


class Block(nn.Module):
  """x + norm(attention(norm(x))), then x + norm(feed-forward(norm(x))).

  The outer norms are absent if the config has no post_norms.

  Attributes:
    config, lora, dtype: as in Attention.
    fused: as in Attention; x is then row-major in memory, too.
  """
  config: TransformerConfig
  lora: LowRank | None = None
  fused: bool = False
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Array, layer: tuple[LayerTraits, KVCache | None], positions: Array,
               mask_spec: AttentionMaskSpec) -> tuple[Array, KeysValues]:
    traits, cache = layer
    c = self.config
    norm = lambda name: RMSNorm(c.norm_epsilon, c.norm_offset, name=name)  # noqa: E731
    mixed, fresh = Attention(self.config, self.lora, self.fused, self.dtype, name='attention')(
        norm('attention_in')(x), positions, mask_spec, traits, cache)
    if self.config.post_norms:
      mixed = norm('attention_out')(mixed)
    x = x + mixed
    fed = FeedForward(c.hidden_dim, self.lora, not self.fused, c.activation, self.dtype,
                      name='feed_forward')(norm('feed_forward_in')(x))
    fed = checkpoint_name(fed, _NAMED[3])
    if self.config.post_norms:
      fed = norm('feed_forward_out')(fed)
    x = nn.with_logical_constraint(x + fed, ('batch', 'trace', 'length', 'activation'))
    if self.fused:
      # The kernels of the next block take no other order in memory.
      x = _fused_kernels().row_major(x)
    return x, fresh


class Transformer(nn.Module):
  """L blocks, scanned over stacked weights, and the final norm.

  Attributes:
    config: architecture.
    lora: low-rank adapters on every projection, in the collection 'lora'; None for none.
    remat: key of REMAT_POLICIES, which says what the backward pass keeps of a block.
    scan: whether layers are scanned; False unrolls them (same weights and result, slower to
      compile).
    attention: computation of attention, one of ATTENTIONS.
    activations: dtype of x between products, of norms and of the feed-forward's activation.
      Products, attention and results have the dtype of the input. None: all have that one.
  """
  config: TransformerConfig
  lora: LowRank | None = None
  remat: str = 'none'
  scan: bool = True
  attention: str = 'plain'
  activations: str | None = None

  @nn.compact
  @typed
  def __call__(self, x: Rows, positions: RowTokens, mask_spec: AttentionMaskSpec,
               cache: KVCache | None = None) -> tuple[Rows, KeysValues]:
    """Returns the hidden states of fresh tokens after the final norm, and their keys and values.

    Args:
      x: embeddings.
      positions: rotary positions.
      mask_spec: limits on what the rows see.
      cache: cache of the same B texts, which all M rows of a text share; it stays as it is.

    Raises:
      UserError: unknown attention; see also kernels.fused_attention.attend_visible.
    """
    if self.attention not in ATTENTIONS:
      raise UserError(f'attention = {self.attention!r}: must be one of {ATTENTIONS}')
    block = Block
    if REMAT_POLICIES[self.remat] is not None:
      # Inside of a scan, XLA cannot merge the recomputation with the first computation.
      block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
    # One block serves all layers. Weights, traits and the cache are sliced by layer.
    blocks = nn.scan(
        block, length=self.config.num_layers, unroll=1 if self.scan else self.config.num_layers,
        variable_axes={'params': 0, 'lora': 0, LARGEST_INPUTS: 0}, split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast), metadata_params={nn.PARTITION_NAME: 'layers'},
    )(self.config, self.lora, self.attention == 'fused', x.dtype.name, name='blocks')
    length, dtype = x.shape[2], x.dtype
    if self.attention == 'fused':
      # Padding x once saves padding queries, keys and values in every layer. All traces become one
      # row, because XLA would put the axis of tokens outside that of traces, and transpose both
      # for each kernel.
      x, positions, mask_spec = _fused_kernels().pad((x, positions, mask_spec))
      x = x.reshape(x.shape[0], 1, -1, x.shape[3])
    x = nn.with_logical_constraint(
        x.astype(self.activations or dtype), ('batch', 'trace', 'length', 'activation'))
    x, fresh = blocks(x, (layer_traits(self.config), self._per_layer(cache)), positions, mask_spec)
    x = RMSNorm(self.config.norm_epsilon, self.config.norm_offset, name='final_norm')(x)
    # Split the traces again, and cut off the padding.
    x = x.reshape(*positions.shape, x.shape[3]).astype(dtype)
    return x[:, :, :length], jax.tree.map(lambda leaf: leaf[:, :, :, :length], fresh)

  def _per_layer(self, cache: KVCache | None) -> KVCache | None:
    """Returns the cache with a layer axis on every leaf, because scan slices all of them."""
    if cache is None:
      return None
    tile = lambda leaf: jnp.broadcast_to(leaf, (self.config.num_layers, *leaf.shape))  # noqa: E731
    return cache.replace(positions=tile(cache.positions), segments=tile(cache.segments))
