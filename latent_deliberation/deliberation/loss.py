"""Cross-entropy over a large vocabulary, one slice of the targets at a time, and entropy.

The losses of training, which call these functions, are in training/objectives.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from latent_deliberation.array_types import Array, Bool, Float, Int, PyTree, typed
from latent_deliberation.model.attention import SUMMABLE, softcap
from latent_deliberation.model.layers import Quantised

OutputHead = Float[Array, 'V D'] | Quantised


@typed
def token_nll(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: OutputHead, cap: float | None,
              chunk: int) -> Float[Array, 'B N']:
  """Returns -log p(target) in nats, float32, from hidden states and the (tied) output head.

  Only [B, chunk, V] logits exist at a time. All of them at once would take 16.8 GB in float32 for
  V = 256,000, B = 8 and 2048 targets per text. Where the output head is a constant, the gradient
  of the hidden states is computed together with the loss, so logits are computed once. Otherwise
  the backward pass computes them again.

  Args:
    hidden: hidden states after the final norm.
    targets: token ids.
    unembedding: the output head.
    cap: soft-cap of the logits; None for none.
    chunk: number of targets of a text per slice; the last slice may be shorter.
  """
  return _by_slices(functools.partial(_nll, cap), hidden, targets, unembedding, chunk)


def _compute_nll(cap: float | None, hidden: Array, targets: Array,
                 unembedding: Array | Quantised) -> Array:
  logits = _logits(cap, hidden, unembedding)
  return _log_sum_exp(logits, cap) - _chosen(logits, targets)


_nll = jax.custom_vjp(_compute_nll, nondiff_argnums=(0,))


def _nll_forward(cap: float | None, hidden: CustomVJPPrimal, targets: CustomVJPPrimal,
                 unembedding: PyTree) -> tuple[Array, Array | tuple[Array, Array, Array]]:
  is_constant = not any(leaf.perturbed for leaf in jax.tree.leaves(unembedding))
  unembedding = jax.tree.map(lambda leaf: leaf.value, unembedding)

  def of_hidden(hidden: Array) -> Array:
    return _compute_nll(cap, hidden, targets.value, unembedding)

  if not is_constant:
    return of_hidden(hidden.value), (hidden.value, targets.value, unembedding)
  # Each loss depends on its own hidden state alone, so a cotangent of ones gives each gradient.
  nll, pull = jax.vjp(of_hidden, hidden.value)
  gradient, = pull(jnp.ones_like(nll))
  return nll, gradient


def _nll_backward(cap: float | None, residuals: Array | tuple[Array, Array, Array],
                  cotangent: Array | SymbolicZero) -> tuple[Array, None, Array | None]:
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  # With a constant head, the forward pass has made the gradient for a cotangent of 1.
  if not isinstance(residuals, tuple):
    return (residuals * cotangent[..., None]).astype(residuals.dtype), None, None
  # With a trained head, compute the logits again for both gradients.
  hidden, targets, unembedding = residuals
  _, pull = jax.vjp(lambda hidden, table: _compute_nll(cap, hidden, targets, table),
                    hidden, unembedding)
  of_hidden, of_table = pull(cotangent)
  return of_hidden, None, of_table


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


@typed
def likeliest(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: OutputHead, cap: float | None,
              chunk: int) -> Bool[Array, 'B N']:
  """Returns whether no token has a higher logit than the target; arguments as in `token_nll`."""

  def is_top(hidden: Array, targets: Array, unembedding: Array | Quantised) -> Array:
    logits = _logits(cap, hidden, unembedding)
    return _chosen(logits, targets) >= jnp.max(logits, axis=-1)

  return _by_slices(is_top, hidden, targets, unembedding, chunk)


def _logits(cap: float | None, hidden: Array, unembedding: Array | Quantised) -> Array:
  """Logits [n, V] in float32, for a head as `_by_slices` passes it."""
  if isinstance(unembedding, Quantised):
    unembedding = unembedding.astype(hidden.dtype).T
  return softcap(jnp.matmul(hidden, unembedding, preferred_element_type='float32'), cap)


def _log_sum_exp(logits: Array, cap: float | None) -> Array:
  """log(sum(exp(logits))). Bounded logits need no first pass that finds the largest."""
  if cap is None or cap > SUMMABLE:
    return jax.nn.logsumexp(logits, axis=-1)
  return jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def _chosen(logits: Array, targets: Array) -> Array:
  """The targets' logits, as a masked sum: XLA would write all logits for a gather's gradient."""
  is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[..., None]
  return jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


def _by_slices(measure: Callable[..., Array], hidden: Array, targets: Array,
               unembedding: Array | Quantised, chunk: int) -> Array:
  """Applies measure(hidden [n, D], targets [n], head) -> [n] to slices of the N targets.

  `measure` gets the head as [D, V], transposed once for all slices. A quantised head stays
  [V, D], and every slice converts it.
  """
  # Shard the head by whole tokens. With a part of each, devices would gather it for every slice.
  if isinstance(unembedding, Quantised):
    unembedding = jax.tree.map(
        lambda leaf: nn.with_logical_constraint(leaf, ('vocab', None)[:leaf.ndim]), unembedding)
  else:
    unembedding = nn.with_logical_constraint(
        unembedding.astype(hidden.dtype).T, (None, 'vocab'))
  batch, length, width = hidden.shape

  def of_slice(hidden: Array, targets: Array) -> Array:
    # Flatten to the rows of one matrix, since XLA then fuses more of what follows.
    measured = measure(hidden.reshape(-1, width), targets.reshape(-1), unembedding)
    return measured.reshape(targets.shape)

  if length <= chunk:
    return of_slice(hidden, targets)
  # A loop over slices of equal size, and one call for the rest.
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
  """Returns the entropy of the next token in nats."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
