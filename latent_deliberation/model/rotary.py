"""Rotary position embedding (arXiv 2104.09864) on halves of heads, as Gemma and Llama pair them."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Float, RowTokens, typed


def rotary_frequencies(head_dim: int, base: float, scaling: float = 1.0,
                       llama3: Sequence[float] = ()) -> np.ndarray:
  """Returns the rotation of each pair from one position to the next, in radians, float32 [H / 2].

  Args:
    head_dim: H, width of a head.
    base: wavelength base.
    scaling: factor that positions are divided by (arXiv 2306.15595).
    llama3: factor, low and high frequency factors, and original length of Llama 3's scaling; ()
      for none.
  """
  frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim) / scaling
  if llama3:
    # Long wavelengths are divided by the factor, short ones are kept, with a ramp between them.
    factor, low, high, length = llama3
    ramp = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    frequencies = frequencies * (ramp + (1 - ramp) / factor)
  return frequencies.astype(np.float32)


def sines(positions: Array, frequencies: Array) -> tuple[Array, Array]:
  """Returns sine and cosine of the angle of each pair, float32 [B, M, Q, H / 2]."""
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
  """Rotates each pair of queries and keys by position * frequency, in float32.

  Args:
    scale: factor on the queries, before they are rounded to their dtype.
  """
  sin, cos = (angle[..., None, :] for angle in sines(positions, frequencies))
  return rotate_pairs(queries, sin, cos, scale), rotate_pairs(keys, sin, cos)


def rotate_pairs(x: Array, sin: Array, cos: Array, scale: float = 1.0) -> Array:
  """Rotates the pairs of x [..., H], times scale; sin and cos are broadcast to [..., H / 2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return (rotated * scale).astype(x.dtype)
