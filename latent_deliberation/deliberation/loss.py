"""Cross-entropy over a large vocabulary, a slice of the targets at a time; entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from latent_deliberation.array_types import Array, Bool, Float, Int, typed
from latent_deliberation.model.attention import softcap


@typed
def token_nll(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: Float[Array, 'V D'], cap: float | None,
              chunk: int) -> Float[Array, 'B N']:
  """-log p(target) in nats, float32, from hidden states and the (tied) output head.

  Only [B, chunk, V] logits exist at a time, in the forward and in the backward pass, where each
  slice is computed again: with V = 256,000, B = 8 and 2048 targets a text all of them at once
  would be 16.8 GB in float32.

  Args:
    hidden: states after the final norm.
    targets: token ids.
    unembedding: the output head.
    cap: soft-cap of the logits.
    chunk: targets of a text per slice; the last slice may be shorter.
  """

  def nll(logits: Array, targets: Array) -> Array:
    return jax.nn.logsumexp(logits, axis=-1) - _chosen(logits, targets)

  return _by_slices(nll, hidden, targets, unembedding, cap, chunk)


@typed
def likeliest(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: Float[Array, 'V D'], cap: float | None,
              chunk: int) -> Bool[Array, 'B N']:
  """Whether no token has a higher logit than the target; arguments as for `token_nll`."""

  def is_top(logits: Array, targets: Array) -> Array:
    return _chosen(logits, targets) >= jnp.max(logits, axis=-1)

  return _by_slices(is_top, hidden, targets, unembedding, cap, chunk)


def _chosen(logits: Array, targets: Array) -> Array:
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _by_slices(measure: Callable[[Array, Array], Array], hidden: Array, targets: Array,
               unembedding: Array, cap: float | None, chunk: int) -> Array:
  """measure(logits [B, n, V], targets [B, n]) -> [B, n], over slices of the N targets."""

  # Whole rows: a device that has a part of each would gather the others for every slice.
  unembedding = nn.with_logical_constraint(unembedding.astype(hidden.dtype), ('vocab', None))

  @jax.checkpoint
  def of_slice(hidden: Array, targets: Array) -> Array:
    logits = jnp.einsum('BND,VD->BNV', hidden, unembedding,
                        preferred_element_type=jnp.float32)
    return measure(softcap(logits, cap), targets)

  batch, length, width = hidden.shape
  if length <= chunk:
    return of_slice(hidden, targets)
  whole = length // chunk * chunk
  slices = (
      jnp.moveaxis(hidden[:, :whole].reshape(batch, -1, chunk, width), 1, 0),
      jnp.moveaxis(targets[:, :whole].reshape(batch, -1, chunk), 1, 0))
  measured = jax.lax.map(lambda pair: of_slice(*pair), slices)
  measured = jnp.moveaxis(measured, 0, 1).reshape(batch, whole)
  if whole == length:
    return measured
  return jnp.concatenate([measured, of_slice(hidden[:, whole:], targets[:, whole:])], axis=1)


@typed
def entropy(logits: Float[Array, 'B V']) -> Float[Array, 'B']:
  """Of the next token, nats."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
