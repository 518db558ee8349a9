"""The coprocessor: soft tokens read the decoder's kv-cache and become outputs, then latents."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from latent_deliberation.array_types import Array, Float, Latents, Params, PyTree, typed
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.traces import Placement
from latent_deliberation.model.attention import AttentionMaskSpec, KeysValues, KVCache
from latent_deliberation.model.layers import LowRank
from latent_deliberation.model.transformer import Block, LayerTraits, Transformer, layer_traits
from latent_deliberation.model.transformer_config import TransformerConfig

# All top-level keys that a coprocessor's parameters may have. Its config decides which it has.
PARTS = ('soft_tokens', 'gate', 'transformer', 'lora')
ADDITIVE_SPREAD = 0.1  # spread of additive soft tokens, relative to that of embeddings


@dataclasses.dataclass(frozen=True)
class Coprocessor:
  """Maps a kv-cache to Z outputs, and those to latents, in one forward pass (paper, section 2.1).

  The parameters are 'soft_tokens' [Z, D] and, unless latents are those of the 'paper', a 'gate'
  [D] or [D, D]. A coprocessor that is not constant also has a full 'transformer', or 'lora'
  adapters on the decoder's own transformer.

  Attributes:
    decoder_config: architecture of the decoder.
    config: how latents are made.
    dtype: dtype of the computation.
    remat, scan, attention, activations: see Transformer.
  """
  decoder_config: TransformerConfig
  config: DeliberationConfig
  dtype: str = 'float32'
  remat: str = 'none'
  scan: bool = True
  attention: str = 'plain'
  activations: str | None = None

  def __post_init__(self):
    if self.config.num_layers:
      self.decoder_config.last(self.config.num_layers)  # raises where the decoder has fewer

  @property
  def transformer_config(self) -> TransformerConfig:
    """Architecture of the coprocessor itself. Raises UserError where it is too deep."""
    config = self.decoder_config
    return config.last(self.config.num_layers) if self.config.num_layers else config

  @property
  def transformer(self) -> Transformer:
    """The coprocessor's transformer, without weights."""
    lora = None
    if self.config.trainable == 'lora':
      lora = LowRank(self.config.lora_rank, self.config.lora_alpha)
    return Transformer(self.transformer_config, lora=lora, remat=self.remat, scan=self.scan,
                       attention=self.attention, activations=self.activations)

  def init(self, key: Array, decoder_params: Params) -> Params:
    """Returns new trainable parameters, boxed with their logical axes.

    Soft tokens start with the spread of the decoder's input embeddings, or with a tenth of it
    where they are additive. The gate starts at zero.
    """
    soft_key, transformer_key = jax.random.split(key)
    width = self.decoder_config.embed_dim
    # Gemma scales embeddings by sqrt(D) when it reads them, so their spread is larger.
    factor = width if self.decoder_config.scale_embeddings else 1
    table = decoder_params['embedder']['table'].astype(jnp.float32)
    spread = jnp.sqrt(jnp.mean(table ** 2) * factor)
    if self.config.is_additive:
      spread = spread * ADDITIVE_SPREAD
    soft = spread * jax.random.normal(soft_key, (self.config.num_latents, width))
    params = {'soft_tokens': nn.LogicallyPartitioned(soft, ('latent', 'embed'))}
    if self.config.latents != 'paper':
      # With a gate of zero, latents start as the embeddings of their base tokens.
      axes = {'channel': ('norm',), 'matrix': ('embed', 'gated')}[self.config.gate]
      params['gate'] = nn.LogicallyPartitioned(jnp.zeros((width,) * len(axes)), axes)
    if self.config.trainable != 'constant':
      params |= self._init_transformer(transformer_key, decoder_params)
    return params

  def _init_transformer(self, key: Array, decoder_params: Params) -> Params:
    # Parameters do not depend on the number of tokens, so one is enough.
    rows = jnp.zeros((1, 1, 1, self.decoder_config.embed_dim))
    index = jnp.zeros((1, 1, 1), jnp.int32)
    # With plain attention, which takes any dtype; kernels have no parameters.
    plain = self.transformer.clone(attention='plain')
    variables = plain.init(key, rows, index, AttentionMaskSpec(index, index[0]))
    if self.config.trainable == 'lora':
      return {'lora': variables['lora']}
    boxed = variables['params']
    if self.config.initialisation == 'decoder':
      # A copy of the decoder's last layers, in float32. Training starts from it.
      boxed = jax.tree.map(lambda box, weight: box.replace_boxed(weight.astype(jnp.float32)),
                           boxed, self._last_layers(decoder_params),
                           is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {'transformer': boxed}

  @typed
  def read_cache(self, params: Params, decoder_params: Params, base: Latents, placement: Placement,
                 trunk: Float[Array, 'B T D'], cache: KVCache) -> Latents:
    """Returns the final layer's outputs o [B, M, Z, D] at the soft tokens.

    Args:
      params: parameters of the coprocessor.
      decoder_params: the frozen weights that 'lora' adapts.
      base: [B, M, Z, D] embeddings of the base tokens of the latents.
      placement: positions of the soft tokens, and how much of the cache they read.
      trunk: the decoder's final hidden states of the trunks.
      cache: the decoder's kv-cache of the trunks.
    """
    soft = self.feed(params, base)
    if self.config.trainable == 'constant':
      return soft
    segments = jnp.broadcast_to(placement.segments[..., None], placement.latent_positions.shape)
    # The weights: the coprocessor's own, or the decoder's with adapters.
    if self.config.trainable == 'lora':
      weights = self._last_layers(decoder_params)
      variables = {'params': weights, 'lora': params['lora']}
    else:
      variables = {'params': params['transformer']}
    # The cache: keys and values of the final states, or the last layers of the decoder's cache.
    if self.config.reads == 'states':
      cache = self._read_states(variables, trunk, cache)
    elif self.config.num_layers:
      first = -self.config.num_layers
      cache = cache.replace(keys=cache.keys[first:], values=cache.values[first:])
    hidden, _ = self.transformer.apply(
        variables, soft, placement.latent_positions,
        AttentionMaskSpec(segments, placement.coprocessor_prefix_length), cache)
    return hidden

  def _last_layers(self, decoder_params: Params) -> Params:
    """The decoder's transformer, with as many of its last layers as the coprocessor has."""
    transformer = decoder_params['transformer']
    num_layers = self.transformer_config.num_layers
    last = jax.tree.map(lambda leaf: leaf[-num_layers:], transformer['blocks'])
    return {**transformer, 'blocks': last}

  def _read_states(self, variables: PyTree, trunk: Array, cache: KVCache) -> KVCache:
    """A cache of the keys and values that each layer projects from the final hidden states."""
    block = Block(self.transformer_config, self.transformer.lora)
    # The trunk is one row of each text. Its keys and values are used, its attention is not.
    positions, segments = cache.positions[:, None], cache.segments[:, None]
    mask_spec = AttentionMaskSpec(segments, jnp.zeros_like(positions[:, :, 0]))

    def read(layer: PyTree, traits: LayerTraits) -> KeysValues:
      _, fresh = block.apply(layer, trunk[:, None], (traits, None), positions, mask_spec)
      return fresh  # jit drops the rest of the block, which nothing uses

    # Every layer reads the same final states, so no layer waits for another.
    blocks = {name: tree['blocks'] for name, tree in variables.items()}
    fresh = jax.vmap(read)(blocks, layer_traits(self.transformer_config))
    return KVCache.empty(fresh).append(fresh, positions, segments)

  @typed
  def feed(self, params: Params, base: Latents) -> Latents:
    """Returns the transformer's input [B, M, Z, D]; 'constant' soft tokens are also the outputs."""
    soft = jnp.broadcast_to(params['soft_tokens'].astype(self.dtype), base.shape)
    return soft + base if self.config.is_additive else soft

  @typed
  def compose(self, params: Params, outputs: Latents, base: Latents) -> Latents:
    """Returns latents z for outputs o: o itself, or base + gate * o."""
    if self.config.latents == 'paper':
      return outputs
    gate = params['gate'].astype(outputs.dtype)
    return base + (outputs * gate if self.config.gate == 'channel' else outputs @ gate)
