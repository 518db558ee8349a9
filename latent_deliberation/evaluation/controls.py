"""What stands in for a coprocessor's own thoughts, so that their content can be told from the rest.

Each control maps the coprocessor's outputs [B, M, Z, D] to others of the same shape; embeddings
that latents rest on, gate, positions and number of latents are the same in every arm. A text may
have fewer places than M traces: what stands at the others (`valid`, bool [B, M]) is nobody's
content.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from latent_deliberation.array_types import Array

BASELINE = 'frozen'  # the arm that all others are compared with: the decoder alone
OWN = 'own'
Control = Callable[[Array, Array], Array]


def own(thoughts: Array, valid: Array) -> Array:
  """The coprocessor's own outputs."""
  del valid
  return thoughts


def shuffled(thoughts: Array, valid: Array) -> Array:
  """Those of the previous text in the batch: same distribution, wrong content."""
  thoughts, valid = jnp.roll(thoughts, 1, axis=0), jnp.roll(valid, 1, axis=0)
  # Valid traces stand first; where the other text has fewer, they come again.
  count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
  trace = jnp.arange(valid.shape[1]) % count
  return jnp.take_along_axis(thoughts, trace[..., None, None], axis=1)


def zero(thoughts: Array, valid: Array) -> Array:
  """None at all."""
  del valid
  return jnp.zeros_like(thoughts)


def mean(thoughts: Array, valid: Array) -> Array:
  """The mean over all texts and traces of the batch, at each latent: form without content."""
  average = jnp.mean(thoughts, axis=(0, 1), keepdims=True, where=valid[..., None, None])
  return jnp.broadcast_to(average, thoughts.shape)


ARMS: Mapping[str, Control] = {OWN: own, 'shuffled': shuffled, 'zero': zero, 'mean': mean}
# What stands in the place of an arm's own latents.
CONTROLS = tuple(name for name in ARMS if name != OWN)
