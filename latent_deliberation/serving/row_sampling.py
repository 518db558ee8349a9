"""Draws of texts that are decoded together, each by options of its own, in one program."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Bool, Float, Int, typed
from latent_deliberation.inference.decode import (
  COLDEST,
  HOTTEST,
  drop_unlikely,
  falling,
  likeliest,
)


@struct.dataclass
class RowOptions:
  """Options of each text of a batch.

  Attributes:
    temperature, top_p, min_p: see Sampling.
    top_k: the same; 0 keeps all.
    leader: row whose token a text takes: its own, unless it follows another text. A text that
      follows is the same text with other latents, or none, which scores the leader's tokens.
  """
  temperature: Float[Array, 'B']
  top_k: Int[Array, 'B']
  top_p: Float[Array, 'B']
  min_p: Float[Array, 'B']
  leader: Int[Array, 'B']


@dataclasses.dataclass(frozen=True)
class RowSampling:
  """Takes the place of `Sampling` in `decode.decode`, whose `rows` are then RowOptions."""

  def draw(self, keys: Array, logits: Array, allowed: Array | None, rows: RowOptions) -> Array:
    """See `sample_rows`."""
    return sample_rows(keys, logits, rows, allowed)


@typed
def sample_rows(keys: Array, logits: Float[Array, 'B V'], rows: RowOptions,
                allowed: Bool[Array, ' V'] | None = None) -> Int[Array, 'B']:
  """Draws a token for each text as `decode.sample` does, each by options of its own."""
  if allowed is not None:
    logits = jnp.where(allowed, logits, -jnp.inf)
  first = likeliest(logits)
  drawn = rows.temperature >= COLDEST
  filters = drawn & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))

  def draw() -> Array:
    tempered = logits / jnp.clip(rows.temperature, COLDEST, HOTTEST)[:, None]
    # A whole vocabulary is sorted only where some text has a filter.
    kept = jax.lax.cond(filters.any(), lambda: _filtered_rows(tempered, rows), lambda: tempered)
    return jnp.where(drawn, jax.vmap(jax.random.categorical)(keys, kept), first)

  tokens = jax.lax.cond(drawn.any(), draw, lambda: first)
  return tokens.astype(jnp.int32)[rows.leader]


def _filtered_rows(logits: Array, rows: RowOptions) -> Array:
  """Returns tempered logits [B, V], with -inf for tokens that the text's filters drop."""
  kept = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1])
  candidates = jnp.where(jnp.arange(logits.shape[-1]) < kept[:, None], falling(logits), -jnp.inf)
  return drop_unlikely(logits, candidates, rows.top_p[:, None], rows.min_p[:, None])
