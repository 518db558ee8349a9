"""Rotary position embedding (arXiv 2104.09864) on halves of heads, as Gemma and Llama pair them."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Float, RowTokens, typed

# Pi / 2 in four parts. The first three have 7 bits, so their products with up to 2**17 are exact.
QUARTER_TURN = (1.5625, 0.0081787109375, 0.00011730194091796875, 3.1391647326017846e-07)
# Polynomials of the square of an angle, highest power first: the rest of the series of sine and
# cosine after their first terms.
SINE = np.float32([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1])
COSINE = np.float32([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2])


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
  """Returns sine and cosine of the angle of each pair, float32 [B, M, Q, H / 2].

  They are the polynomials of the Cephes library, with an error below 1.2e-7 up to 2e5 radians, and
  no bound above 1e7. XLA computes sines again wherever they are used. On a CPU a sine of its own
  takes 13 ns, and this sine and cosine together take 0.6.
  """
  angles = positions[..., None].astype(jnp.float32) * frequencies
  # The angle is a number of quarter turns, and a rest of at most an eighth of a turn.
  quarters = jnp.round(angles * (2 / np.pi))
  rest = angles
  for part in QUARTER_TURN:
    rest = rest - quarters * part
  square = rest * rest
  sine = rest + rest * square * jnp.polyval(SINE, square)
  cosine = 1 - square / 2 + square * square * jnp.polyval(COSINE, square)
  # A quarter turn makes (sine, cosine) of (cosine, -sine); a half turn changes both signs.
  quarters = quarters.astype(jnp.int32)
  odd = (quarters & 1) == 1
  sine, cosine = jnp.where(odd, cosine, sine), jnp.where(odd, sine, cosine)
  return (jnp.where((quarters & 2) == 0, sine, -sine),
          jnp.where(((quarters + 1) & 2) == 0, cosine, -cosine))


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
