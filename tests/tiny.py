"""A decoder of a few thousand weights in which every feature of the architecture matters.

Caps are small, windows are shorter than documents, norms are not zero, and all sizes differ. So a
mistake in any of them changes the outputs by far more than rounding. decoder_test.py checks that.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import Traces
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig

LENGTH = 19  # T
CONFIG = TransformerConfig(
    vocab_size=38, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
    hidden_dim=20, window=4, attention_softcap=2.0, final_softcap=3.0, query_scale=0.7,
    rope_base=50.0)
# Every switch that tells Llama and Qwen from Gemma, at once.
LLAMA = dataclasses.replace(
    CONFIG, attention_softcap=None, final_softcap=None, query_scale=None, post_norms=False,
    rope_llama3=(4.0, 1.0, 4.0, 16.0), norm_offset=False, activation='silu',
    scale_embeddings=False, qkv_bias=True, tied_head=False)
CHOICES = DeliberationConfig(num_latents=3, num_ahead=4, num_traces=4, lora_rank=2, lora_alpha=3.0)


def randomised(params: Params, seed: int, spread: float = 0.3) -> Params:
  """Returns the same tree, unboxed, with every leaf drawn at random, also those that are zero."""
  leaves, structure = jax.tree.flatten(nn.unbox(params))
  random = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [
      jnp.asarray(spread * random.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])


def decoder_params(config: TransformerConfig = CONFIG, seed: int = 0) -> Params:
  """Returns random weights of a decoder."""
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return randomised(shapes['params'], seed)


def packed_batch(documents: Sequence[Sequence[int]], seed: int = 0, length: int = LENGTH) -> Batch:
  """Returns texts of documents of the given lengths, padded to `length`."""
  random = np.random.default_rng(seed)
  tokens, segments, positions = np.zeros((3, len(documents), length), np.int32)
  for text, lengths in enumerate(documents):
    start = 0
    for number, size in enumerate(lengths, start=1):
      inside = slice(start, start + size)
      tokens[text, inside] = random.integers(1, CONFIG.vocab_size, size)
      segments[text, inside] = number
      positions[text, inside] = np.arange(size)
      start += size
  return Batch(*map(jnp.asarray, (tokens, segments, positions)))


def deliberator(model: TransformerConfig = CONFIG, attention: str = 'plain', remat: str = 'none',
                **choices) -> Deliberator:
  """Returns a deliberator with CHOICES, some of them replaced."""
  config, options = dataclasses.replace(CHOICES, **choices), dict(attention=attention, remat=remat)
  return Deliberator(Decoder(model, **options), Coprocessor(model, config, **options))


def coprocessor_params(deliberator: Deliberator, decoder_params: Params, seed: int = 1) -> Params:
  """Returns parameters of its coprocessor as if trained: no gate and no adapter is zero."""
  shapes = jax.eval_shape(deliberator.coprocessor.init, jax.random.key(0), decoder_params)
  return randomised(shapes, seed)


@functools.partial(jax.jit, static_argnums=0)
def start(deliberator: Deliberator, key: Array, decoder_params: Params) -> Params:
  """Returns the initial parameters of a coprocessor, boxed."""
  return deliberator.coprocessor.init(key, decoder_params)


@functools.partial(jax.jit, static_argnums=0)
def forward(deliberator: Deliberator, params: Params, decoder_params: Params, batch: Batch,
            traces: Traces) -> Array:
  """Returns the hidden states [B, M, A, D] of Deliberator.forward."""
  return deliberator.forward(params, decoder_params, batch, traces)


@functools.partial(jax.jit, static_argnums=0)
def forward_and_gradient(deliberator: Deliberator, params: Params, decoder_params: Params,
                         batch: Batch, traces: Traces, weight: Array) -> tuple[Array, Params]:
  """Returns the hidden states and the gradient of their sum weighted by [B, M, A, D]."""
  hidden, pull = jax.vjp(
      lambda params: deliberator.forward(params, decoder_params, batch, traces), params)
  return hidden, pull(weight)[0]


@functools.partial(jax.jit, static_argnames='config')
def read(decoder_params: Params, tokens: Array, positions: Array | None = None,
         segments: Array | None = None, config: TransformerConfig = CONFIG,
         ) -> tuple[Array, Array, KVCache]:
  """Returns hidden states, logits and cache of whole texts [B, T]."""
  variables = {'params': decoder_params}
  hidden, cache = Decoder(config).apply(variables, tokens, positions, segments, method='prefill')
  return hidden, Decoder(config).apply(variables, hidden, method='logits'), cache


@functools.partial(jax.jit, static_argnames='config')
def read_on(decoder_params: Params, x: Array, positions: Array, cache: KVCache,
            config: TransformerConfig = CONFIG) -> tuple[Array, Array, KVCache]:
  """Returns hidden states, logits and the longer cache for embeddings x [B, Q, D] after a cache.

  Args:
    positions: [Q] position ids. The cache and x of a text are one document.
  """
  variables, decoder = {'params': decoder_params}, Decoder(config)
  positions = jnp.broadcast_to(positions, (len(x), 1, x.shape[1]))
  mask_spec = AttentionMaskSpec(jnp.ones_like(positions), jnp.full((len(x), 1), cache.length))
  hidden, fresh = decoder.apply(variables, x[:, None], positions, mask_spec, cache,
                                method='transform')
  hidden = hidden[:, 0]
  logits = decoder.apply(variables, hidden, method='logits')
  return hidden, logits, cache.append(fresh, positions, mask_spec.segments)


def truncate(cache: KVCache, length: int) -> KVCache:
  """Returns the first `length` tokens of a cache. This also detaches latents that were appended."""
  return KVCache(
      keys=cache.keys[:, :, :length], values=cache.values[:, :, :length],
      positions=cache.positions[:, :length], segments=cache.segments[:, :length])


def embed(decoder_params: Params, tokens: Array, config: TransformerConfig = CONFIG) -> Array:
  """Returns the input embeddings [B, Q, D] of tokens [B, Q]."""
  return Decoder(config).apply({'params': decoder_params}, tokens[:, None], method='embed')[:, 0]
