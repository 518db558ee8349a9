"""Engines around the tiny decoder, and what the forward pass of training says of their tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.policy import ONCE, Policy
from latent_deliberation.inference.session import Completion, DecodingOptions
from tests import tiny

LENGTH = 48
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


def plain_logprobs(decoder_params: Params, prompt: Sequence[int],
                            tokens: Sequence[int]) -> np.ndarray:
  """Scores tokens after a prompt, read all at once without a cache."""
  _, logits, _ = tiny.read(decoder_params, jnp.asarray([[*prompt, *tokens]]))
  return chosen(logits[0, len(prompt) - 1:-1], tokens)


def trained_logprobs(deliberator: Deliberator, params: Params, decoder_params: Params,
                              prompt: Sequence[int], tokens: Sequence[int],
                              delay: int | None = None) -> np.ndarray:
  """Scores tokens after a prompt with latents at its end, by the forward pass of training.

  Args:
    delay: number of tokens that have been read when the latents join.
  """
  text = jnp.asarray([[*prompt, *tokens]])
  batch = Batch(text, jnp.ones_like(text), jnp.arange(text.shape[1])[None])
  traces = gather_traces(batch, jnp.array([[len(prompt) - 1]]), jnp.array([[True]]), len(tokens))
  if delay is not None:
    traces = traces.replace(delay=jnp.array([[delay]]))
  hidden = tiny.forward(deliberator, params, decoder_params, batch, traces)[0, 0]
  logits = deliberator.decoder.apply({'params': decoder_params}, hidden, method='logits')
  return chosen(logits, tokens)


def chosen(logits: jax.Array, tokens: Sequence[int]) -> np.ndarray:
  return np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(tokens)), list(tokens)]


def assert_same(first: list[Completion], second: list[Completion]) -> None:
  """Asserts the same tokens, and the same log-probabilities to the bit."""
  for one, other in zip(first, second, strict=True):
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs
