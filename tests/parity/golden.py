"""Reads the goldens of make_goldens.py, and runs our decoder in the same way. Needs no torch."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Params
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig

DIRECTORY = Path(__file__).parent / 'goldens'
NAMES = ('gemma1', 'gemma1_multihead', 'gemma2', 'gemma2_bfloat16', 'gemma3', 'gemma3_multimodal',
         'llama3', 'mistral', 'qwen2', 'qwen3')
PROMPT, CONTINUATION = 10, 50  # tokens
LENGTH = PROMPT + CONTINUATION  # of every text
TOLERANCE = 2e-5  # of logits of order 4, in float32


@dataclasses.dataclass(frozen=True)
class Golden:
  """A checkpoint, and the results of transformers with it.

  Attributes:
    directory: directory of the checkpoint.
    tokens: [B, LENGTH] random tokens.
    logits: [B, LENGTH, V] logits in float32.
    logits_bfloat16: [B, LENGTH, V] logits computed in bfloat16.
    continuation: [B, CONTINUATION] greedy text after tokens[:, :PROMPT].
  """
  directory: Path
  tokens: np.ndarray
  logits: np.ndarray
  logits_bfloat16: np.ndarray
  continuation: np.ndarray


def read_golden(name: str) -> Golden:
  """Reads the golden of one of NAMES."""
  directory = DIRECTORY / name
  return Golden(directory, **np.load(directory / 'golden.npz'))


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def logits_of(config: TransformerConfig, params: Params, tokens: Array,
              dtype: str = 'float32') -> Array:
  """Logits [B, T, V] of whole texts [B, T]."""
  return Decoder(config, dtype=dtype).apply({'params': params}, tokens)[0]


@functools.partial(jax.jit, static_argnames='config')
def prefill(config: TransformerConfig, params: Params, tokens: Array) -> tuple[Array, KVCache]:
  """Logits [B, V] after the last token, and a cache of LENGTH places, the first of them empty."""
  logits, cache = Decoder(config).apply({'params': params}, tokens)
  empty = (LENGTH - cache.length, 0)
  layered, flat = ((0, 0), (0, 0), empty, (0, 0), (0, 0)), ((0, 0), empty)
  return logits[:, -1], KVCache(
      keys=jnp.pad(cache.keys, layered), values=jnp.pad(cache.values, layered),
      positions=jnp.pad(cache.positions, flat), segments=jnp.pad(cache.segments, flat))


@functools.partial(jax.jit, static_argnames='config')
def step(config: TransformerConfig, params: Params, tokens: Array, position: int,
         cache: KVCache) -> tuple[Array, KVCache]:
  """Logits [B, V] after one more token [B], and the cache with that token.

  The cache keeps its length, so that all steps are one compilation. It drops its first place, which
  is empty if texts have at most LENGTH tokens.
  """
  decoder, variables = Decoder(config), {'params': params}
  tokens = tokens[:, None, None]
  positions = jnp.full_like(tokens, position)
  mask_spec = AttentionMaskSpec(jnp.ones_like(tokens), jnp.full((len(tokens), 1), cache.length))
  x = decoder.apply(variables, tokens, method='embed')
  hidden, fresh = decoder.apply(variables, x, positions, mask_spec, cache, method='transform')
  grown = cache.append(fresh, positions, mask_spec.segments)
  kept = KVCache(keys=grown.keys[:, :, 1:], values=grown.values[:, :, 1:],
                 positions=grown.positions[:, 1:], segments=grown.segments[:, 1:])
  return decoder.apply(variables, hidden[:, 0, 0], method='logits'), kept


def read_on(config: TransformerConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
  """Logits [B, CONTINUATION + 1, V] of texts [B, LENGTH], from the last token of the prompt on.

  The prompt is prefilled, and the rest is read token by token.
  """
  last, cache = prefill(config, params, tokens[:, :PROMPT])
  logits = [last]
  for position in range(PROMPT, LENGTH):
    last, cache = step(config, params, jnp.asarray(tokens[:, position]), position, cache)
    logits.append(last)
  return np.stack(logits, axis=1)


def continue_greedily(config: TransformerConfig, params: Params, prompts: np.ndarray) -> np.ndarray:
  """The most likely next tokens [B, CONTINUATION] after prompts [B, PROMPT]."""
  last, cache = prefill(config, params, prompts)
  chosen = [last.argmax(axis=-1)]
  for position in range(PROMPT, LENGTH - 1):
    last, cache = step(config, params, chosen[-1], position, cache)
    chosen.append(last.argmax(axis=-1))
  return np.stack(chosen, axis=1)
