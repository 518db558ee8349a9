"""What stands in for a coprocessor's own thoughts, so that their content can be told from the rest.

Each control maps the coprocessor's outputs [B, M, Z, D] to others of the same shape; embeddings
that latents rest on, gate, positions and number of latents are the same in every arm.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from latent_deliberation.array_types import Array

Control = Callable[[Array], Array]


def own(thoughts: Array) -> Array:
  """The coprocessor's own outputs."""
  return thoughts


def shuffled(thoughts: Array) -> Array:
  """Those of the previous text in the batch: same distribution, wrong content."""
  return jnp.roll(thoughts, 1, axis=0)


def zero(thoughts: Array) -> Array:
  """None at all."""
  return jnp.zeros_like(thoughts)


def mean(thoughts: Array) -> Array:
  """The mean over all texts and traces of the batch, at each latent: form without content."""
  return jnp.broadcast_to(jnp.mean(thoughts, axis=(0, 1), keepdims=True), thoughts.shape)


CONTROLS: Mapping[str, Control] = {'own': own, 'shuffled': shuffled, 'zero': zero, 'mean': mean}
