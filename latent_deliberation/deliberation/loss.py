"""Cross-entropy over a large vocabulary, a slice of the targets at a time; entropy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from latent_deliberation.array_types import Array, Bool, Float, Int, PyTree, typed
from latent_deliberation.model.attention import softcap
from latent_deliberation.model.layers import Quantised

# Up to this cap float32 holds the sum of exp over any vocabulary: exp(60) is 1e26 of its 3e38.
SUMMABLE = 60.0

OutputHead = Float[Array, 'V D'] | Quantised


@typed
def token_nll(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: OutputHead, cap: float | None,
              chunk: int) -> Float[Array, 'B N']:
  """-log p(target) in nats, float32, from hidden states and the (tied) output head.

  Only [B, chunk, V] logits exist at a time: with V = 256,000, B = 8 and 2048 targets a text all of
  them at once would be 16.8 GB in float32. Where the output head is a constant they exist once, and
  the gradient of the hidden states is computed with the loss; otherwise again in the backward pass.

  Args:
    hidden: states after the final norm.
    targets: token ids.
    unembedding: the output head.
    cap: soft-cap of the logits.
    chunk: targets of a text per slice; the last slice may be shorter.
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
  # A target depends on its own hidden state alone, so that ones give the gradient of each.
  nll, pull = jax.vjp(of_hidden, hidden.value)
  gradient, = pull(jnp.ones_like(nll))
  return nll, gradient


def _nll_backward(cap: float | None, residuals: Array | tuple[Array, Array, Array],
                  cotangent: Array | SymbolicZero) -> tuple[Array, None, Array | None]:
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  if not isinstance(residuals, tuple):
    return (residuals * cotangent[..., None]).astype(residuals.dtype), None, None
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
  """Whether no token has a higher logit than the target; arguments as for `token_nll`."""

  def is_top(hidden: Array, targets: Array, unembedding: Array | Quantised) -> Array:
    logits = _logits(cap, hidden, unembedding)
    return _chosen(logits, targets) >= jnp.max(logits, axis=-1)

  return _by_slices(is_top, hidden, targets, unembedding, chunk)


def _logits(cap: float | None, hidden: Array, unembedding: Array | Quantised) -> Array:
  """[n, V] in float32, of a head as `_by_slices` gives it."""
  if isinstance(unembedding, Quantised):
    unembedding = unembedding.astype(hidden.dtype).T
  return softcap(jnp.matmul(hidden, unembedding, preferred_element_type='float32'), cap)


def _log_sum_exp(logits: Array, cap: float | None) -> Array:
  """Without looking for the largest first, one more pass over them all, where a cap bounds them."""
  if cap is None or cap > SUMMABLE:
    return jax.nn.logsumexp(logits, axis=-1)
  return jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def _chosen(logits: Array, targets: Array) -> Array:
  """As a sum: the gradient of a gather is a scatter, for which XLA writes that of all logits."""
  is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[..., None]
  return jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


def _by_slices(measure: Callable[..., Array], hidden: Array, targets: Array,
               unembedding: Array | Quantised, chunk: int) -> Array:
  """measure(hidden [n, D], targets [n], head) -> [n], of all texts over slices of their N targets.

  The head is [D, V], turned once for all slices, or quantised and as it is, [V, D], which every
  slice converts as it reads it.
  """
  # Whole tokens: a device that has a part of each would gather the others for every slice.
  if isinstance(unembedding, Quantised):
    unembedding = jax.tree.map(
        lambda leaf: nn.with_logical_constraint(leaf, ('vocab', None)[:leaf.ndim]), unembedding)
  else:
    unembedding = nn.with_logical_constraint(
        unembedding.astype(hidden.dtype).T, (None, 'vocab'))
  batch, length, width = hidden.shape

  def of_slice(hidden: Array, targets: Array) -> Array:
    # Rows of one matrix, for the product and all that follows, or XLA would fuse less of it.
    measured = measure(hidden.reshape(-1, width), targets.reshape(-1), unembedding)
    return measured.reshape(targets.shape)

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
