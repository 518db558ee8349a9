"""From logits to a token: greedy, or drawn from a tempered and filtered distribution."""

import dataclasses

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, Float, Int, typed


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen. Filters apply to the tempered distribution, in the order given here.

  Attributes:
    temperature: what logits are divided by; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens; None for all.
    top_p: keeps the likeliest tokens up to the one at which their mass reaches p.
    min_p: keeps tokens at least p times as likely as the likeliest.
  """
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature = {self.temperature}: it must be 0 (greedy) or above')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k = {self.top_k}: at least 1 token must be kept; None keeps all')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p = {self.top_p}: it must lie above 0, up to 1, which keeps all')
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p = {self.min_p}: it must lie between 0, which keeps all, and 1')


@typed
def filtered(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Tempered logits, -inf where a filter drops a token; the likeliest is always kept."""
  logits = logits / sampling.temperature
  drop = lambda least: jnp.where(logits < least, -jnp.inf, logits)  # noqa: E731
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    logits = drop(jax.lax.top_k(logits, sampling.top_k)[0][:, -1:])
  if sampling.top_p < 1:
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    logits = drop(jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf), axis=-1,
                          keepdims=True))
  if sampling.min_p > 0:
    logits = drop(jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p))
  return logits


@typed
def sample(keys: Array, logits: Float[Array, 'B V'],
           sampling: Sampling) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """A token for each text, and its log-probability under the model itself, before any filter.

  Args:
    keys: [B] PRNG keys, one a text, so that a text's tokens do not depend on the others.
  """
  if sampling.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    tokens = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
