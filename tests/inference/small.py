"""Engines around the tiny decoder, and what the forward pass of training says of their tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.policy import ONCE, Policy
from latent_deliberation.inference.session import Completion, DecodingOptions
from tests import tiny

LENGTH = 48
AHEAD = 16  # most tokens whose log-probabilities `trained_logprobs` compares
# Shorter than a window and the latents, longer than both, and the shortest that can hold latents.
PROMPTS = [np.random.default_rng(size).integers(1, tiny.CONFIG.vocab_size, size).tolist()
           for size in (5, 19, 3)]


def augmented(decoder_params: Params, length: int = LENGTH, mesh: Any = None,
              **choices: Any) -> tuple[Engine, Deliberator, Params]:
  """Returns an engine with a coprocessor, and the same as training knows it."""
  deliberator = tiny.deliberator(**choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  engine = Engine(tiny.CONFIG, decoder_params, length=length, mesh=mesh,
                  coprocessor=(deliberator.config, params))
  return engine, deliberator, params


def decoding(policy: Policy = ONCE, max_tokens: int = 12, **timing: Any) -> DecodingOptions:
  """Returns options for sampled tokens; `timing` says when latents join."""
  return DecodingOptions(max_tokens, Sampling(temperature=1.0), policy=policy,
                         timing=LatentTiming(**timing))


def read_without_cache(decoder_params: Params, prompt: Sequence[int], tokens: Sequence[int],
                       ) -> tuple[np.ndarray, np.ndarray]:
  """Returns the hidden states [A, D] and logits [A, V] that predict A tokens after a prompt."""
  hidden, logits, _ = tiny.read(decoder_params, _padded(prompt, tokens))
  predicting = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
  return np.asarray(hidden[0, predicting]), np.asarray(logits[0, predicting])


def plain_logprobs(decoder_params: Params, prompt: Sequence[int],
                   tokens: Sequence[int]) -> np.ndarray:
  """Scores tokens after a prompt, read all at once without a cache."""
  return chosen(read_without_cache(decoder_params, prompt, tokens)[1], tokens)


def trained_logprobs(deliberator: Deliberator, params: Params, decoder_params: Params,
                     prompt: Sequence[int], tokens: Sequence[int],
                     delay: int | None = None) -> np.ndarray:
  """Scores tokens after a prompt with latents at its end, by the forward pass of training.

  Args:
    delay: number of tokens that have been read when the latents join.
  """
  logits = _trained_logits(deliberator, params, decoder_params, _padded(prompt, tokens),
                           len(prompt), len(prompt) + len(tokens), delay)
  return chosen(logits, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _trained_logits(deliberator: Deliberator, params: Params, decoder_params: Params,
                    text: Array, anchor: int, end: int, delay: int | None) -> Array:
  """Returns logits [AHEAD, V] after the first `anchor` tokens of a text of `end` tokens."""
  places = jnp.arange(LENGTH)[None]
  batch = Batch(text, (places < end).astype(jnp.int32), places)
  traces = gather_traces(batch, jnp.full((1, 1), anchor - 1), jnp.ones((1, 1), bool), AHEAD)
  if delay is not None:
    traces = traces.replace(delay=jnp.full((1, 1), delay))
  hidden = deliberator.forward(params, decoder_params, batch, traces)[0, 0]
  return deliberator.decoder.apply({'params': decoder_params}, hidden, method='logits')


def _padded(prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
  """Returns a text as int32 [1, LENGTH], so that texts of all lengths share one program."""
  text = [*prompt, *tokens]
  return np.array([text + [0] * (LENGTH - len(text))], np.int32)


def chosen(logits: np.ndarray | Array, tokens: Sequence[int]) -> np.ndarray:
  return np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(tokens)), list(tokens)]


def assert_same(first: list[Completion], second: list[Completion]) -> None:
  """Asserts the same tokens, and the same log-probabilities to the bit."""
  for one, other in zip(first, second, strict=True):
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs
