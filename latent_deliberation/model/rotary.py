"""Rotary position embedding (arXiv 2104.09864) on halves of heads, as Gemma pairs them."""

import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Float, RowTokens, typed


def rotary_frequencies(head_dim: int, base: float, scaling: float = 1.0) -> np.ndarray:
  """Radians that each of the H / 2 pairs turns by from one position to the next, float32 [H / 2].

  Args:
    scaling: by which positions are divided (arXiv 2306.15595).
  """
  return (base ** (-np.arange(0, head_dim, 2) / head_dim) / scaling).astype(np.float32)


def sines(positions: Array, frequencies: Array) -> tuple[Array, Array]:
  """Sine and cosine of what each pair is turned by, float32 [B, M, Q, H / 2]."""
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.sin(angles), jnp.cos(angles)


@typed
def rotate(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    frequencies: Float[Array, 'half'],
    scale: float = 1.0,
) -> tuple[Float[Array, 'B M Q N H'], Float[Array, 'B M Q K H']]:
  """Queries and keys, each pair turned by position * frequency, computed in float32.

  Args:
    scale: factor of the queries, before they are rounded to their dtype.
  """
  sin, cos = (angle[..., None, :] for angle in sines(positions, frequencies))
  return turn(queries, sin, cos, scale), turn(keys, sin, cos)


def turn(x: Array, sin: Array, cos: Array, scale: float = 1.0) -> Array:
  """x [..., H] with its pairs turned, times scale; sin and cos are broadcast to [..., H / 2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return (turned * scale).astype(x.dtype)
