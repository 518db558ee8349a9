"""Cross-entropy over a large vocabulary, a slice of the targets at a time; entropy."""

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, Float, Int, typed
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

  @jax.checkpoint
  def slice_nll(hidden: Array, targets: Array) -> Array:
    logits = jnp.einsum('BND,VD->BNV', hidden, unembedding.astype(hidden.dtype),
                        preferred_element_type=jnp.float32)
    logits = softcap(logits, cap)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

  batch, length, width = hidden.shape
  if length <= chunk:
    return slice_nll(hidden, targets)
  whole = length // chunk * chunk
  slices = (
      jnp.moveaxis(hidden[:, :whole].reshape(batch, -1, chunk, width), 1, 0),
      jnp.moveaxis(targets[:, :whole].reshape(batch, -1, chunk), 1, 0))
  nll = jax.lax.map(lambda pair: slice_nll(*pair), slices)
  nll = jnp.moveaxis(nll, 0, 1).reshape(batch, whole)
  if whole == length:
    return nll
  return jnp.concatenate([nll, slice_nll(hidden[:, whole:], targets[:, whole:])], axis=1)


@typed
def entropy(logits: Float[Array, 'B V']) -> Float[Array, 'B']:
  """Of the next token, nats."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
