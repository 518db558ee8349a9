"""Cross-entropy over a large vocabulary, without all logits at once; entropy.

The losses of training, which call these functions, are in training/objectives.py. Scores of answers
are in evaluation/answers.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from latent_deliberation.array_types import Array, Float, Int, PyTree, typed
from latent_deliberation.model.attention import MASKED, SUMMABLE, softcap
from latent_deliberation.model.products import Quantised, from_bits, matmul, to_bits

OutputHead = Float[Array, 'V D'] | Quantised


@typed
def token_nll(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
              unembedding: OutputHead, cap: float | None,
              chunk: int) -> Float[Array, 'B N']:
  """Returns -log p(target) in nats, float32, from hidden states and the output head.

  Only [B, chunk, V] logits exist at a time. All of them at once would take 16.8 GB in float32 for
  V = 256,000, B = 8 and 2048 targets per text. A CPU keeps only the logits of a block of tokens.

  Where the output head is a constant, the gradient of the hidden states is computed together with
  the loss, so logits are computed once. Otherwise the backward pass computes them again.

  Args:
    hidden: hidden states after the final norm.
    targets: token ids.
    unembedding: the output head.
    cap: soft-cap of the logits; None for none.
    chunk: number of targets of a text per slice; the last slice may be shorter.
  """
  return by_slices(functools.partial(_nll, cap), hidden, targets, unembedding, chunk)


def by_slices(measure: Callable[..., PyTree], hidden: Array, targets: Array,
              unembedding: OutputHead, chunk: int) -> PyTree:
  """Applies measure(hidden [n, D], targets [n], head [V, D]) -> [n] to slices of the N targets."""
  # A quantised head stays int8 here, and every slice converts it.
  if not isinstance(unembedding, Quantised):
    unembedding = unembedding.astype(hidden.dtype)
  # Shard the head by whole tokens. With a part of each, devices would gather it for every slice.
  unembedding = jax.tree.map(
      lambda leaf: nn.with_logical_constraint(leaf, ('vocab', None)[:leaf.ndim]), unembedding)
  batch, length, width = hidden.shape

  def of_slice(hidden: Array, targets: Array) -> PyTree:
    # Flatten to the rows of one matrix, since XLA then fuses more of what follows.
    measured = measure(hidden.reshape(-1, width), targets.reshape(-1), unembedding)
    return jax.tree.map(lambda leaf: leaf.reshape(targets.shape), measured)

  if length <= chunk:
    return of_slice(hidden, targets)
  # A loop over slices of equal size, and one call for the rest.
  whole = length // chunk * chunk
  slices = (
      jnp.moveaxis(hidden[:, :whole].reshape(batch, -1, chunk, width), 1, 0),
      jnp.moveaxis(targets[:, :whole].reshape(batch, -1, chunk), 1, 0))
  measured = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(batch, whole),
                          jax.lax.map(lambda pair: of_slice(*pair), slices))
  if whole == length:
    return measured
  return jax.tree.map(lambda first, rest: jnp.concatenate([first, rest], axis=1), measured,
                      of_slice(hidden[:, whole:], targets[:, whole:]))


# --- The loss of a slice, and its gradient ---


def _compute_nll(cap: float | None, hidden: Array, targets: Array, head: OutputHead) -> Array:
  return by_platform(_nll_by_blocks, nll_at_once, cap, hidden, targets, head)


_nll = jax.custom_vjp(_compute_nll, nondiff_argnums=(0,))


def _nll_forward(cap: float | None, hidden: CustomVJPPrimal, targets: CustomVJPPrimal,
                 head: PyTree) -> tuple[Array, Array | tuple[Array, Array, OutputHead]]:
  is_constant = not any(leaf.perturbed for leaf in jax.tree.leaves(head))
  values = (hidden.value, targets.value, jax.tree.map(lambda leaf: leaf.value, head))
  if is_constant:
    return by_platform(_gradient_by_blocks, _gradient_at_once, cap, *values)
  return _compute_nll(cap, *values), values


def _nll_backward(cap: float | None, residuals: Array | tuple[Array, Array, OutputHead],
                  cotangent: Array | SymbolicZero) -> tuple[Array, None, OutputHead | None]:
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  # With a constant head, the forward pass has made the gradient for a cotangent of 1.
  if not isinstance(residuals, tuple):
    return (residuals * cotangent[..., None]).astype(residuals.dtype), None, None

  # With a trained head, compute the logits again for both gradients.
  def pull(nll: Callable[..., Array], cap: float | None, hidden: Array, targets: Array,
           head: OutputHead, cotangent: Array) -> tuple[Array, OutputHead]:
    return jax.vjp(lambda hidden, head: nll(cap, hidden, targets, head), hidden, head)[1](cotangent)

  by_blocks = functools.partial(_nll_by_blocks, is_constant=False)
  of_hidden, of_head = by_platform(
      functools.partial(pull, by_blocks), functools.partial(pull, nll_at_once),
      cap, *residuals, cotangent)
  return of_hidden, None, of_head


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


def by_platform(by_blocks: Callable[..., PyTree], at_once: Callable[..., PyTree],
                cap: float | None, hidden: Array, targets: Array, head: OutputHead,
                *more: Array) -> PyTree:
  """Calls `by_blocks` where the program is for one CPU and a large head, otherwise `at_once`.

  Several devices may hold a part of the head each, and then take the logits of their part at once.
  """
  if _block_size(_vocab_size(head)) is None or jax.sharding.get_abstract_mesh().size > 1:
    return at_once(cap, hidden, targets, head, *more)
  return jax.lax.platform_dependent(
      hidden, targets, head, *more, cpu=functools.partial(by_blocks, cap),
      default=functools.partial(at_once, cap))


def _vocab_size(head: OutputHead) -> int:
  return len(head.values if isinstance(head, Quantised) else head)


def head_logits(cap: float | None, hidden: Array, head: OutputHead) -> Array:
  """Logits [n, V] in float32."""
  # Axes are named, since a CPU would write a transposed table.
  return softcap(jax.lax.dot_general(hidden, head.astype(hidden.dtype), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32), cap)


def chosen_logits(logits: Array, targets: Array) -> Array:
  """The targets' logits, as a masked sum: XLA would write all logits for a gather's gradient.

  A target that is none of the tokens gets 0.
  """
  is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[..., None]
  return jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


# The logits of all tokens at once.


def nll_at_once(cap: float | None, hidden: Array, targets: Array, head: OutputHead) -> Array:
  logits = head_logits(cap, hidden, head)
  if cap is None or cap > SUMMABLE:
    return jax.nn.logsumexp(logits, axis=-1) - chosen_logits(logits, targets)
  # Bounded logits need no first pass that finds the largest.
  return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - chosen_logits(logits, targets)


def _gradient_at_once(cap: float | None, hidden: Array, targets: Array,
                      head: OutputHead) -> tuple[Array, Array]:
  """Returns the loss [n] and its gradient by the hidden states [n, D]."""
  # Each loss depends on its own hidden state alone, so a cotangent of ones gives each gradient.
  nll, pull = jax.vjp(lambda hidden: nll_at_once(cap, hidden, targets, head), hidden)
  return nll, pull(jnp.ones_like(nll))[0]


# The logits of one block of tokens at a time. They stay in a CPU's cache, and no [V, D] table is
# transposed, which took as long as a product with it.

LARGEST_BLOCK, SMALLEST_BLOCK = 4096, 512  # tokens


def _block_size(vocab_size: int) -> int | None:
  """Returns the largest divisor of V that is a block; None if one block has all tokens."""
  sizes = range(LARGEST_BLOCK, SMALLEST_BLOCK - 1, -1)
  block = next((size for size in sizes if vocab_size % size == 0), vocab_size)
  return None if block == vocab_size else block


@struct.dataclass
class Sums:
  """Sums over the tokens that were read so far, for n targets.

  A larger peak in a later block rescales the sums, as in attention without stored scores. Indeed
  the gradient is an attention: from hidden states as queries, to the head as keys and values.

  Attributes:
    peak: largest logit [n].
    total: sum of exp(logit - peak) [n].
    chosen: logit of the target, 0 if it was not read yet [n].
    mixed: sum of exp(logit - peak) d(logit)/d(hidden) [n, D]; None if it is not wanted.
  """
  peak: Array
  total: Array
  chosen: Array
  mixed: Array | None = None

  @property
  def nll(self) -> Array:
    """Negative log-likelihood of the targets in nats [n]."""
    return self.peak + jnp.log(self.total) - self.chosen


def sum_blocks(cap: float | None, hidden: Array, targets: Array, head: OutputHead,
               mixed: Array | None = None, is_constant: bool = True) -> Sums:
  """Returns the sums over all tokens.

  Args:
    mixed: zeros [n, D] if that sum is wanted.
    is_constant: whether the head is a constant. Otherwise it has a gradient.
  """
  block = _block_size(_vocab_size(head))
  if is_constant:
    # Otherwise XLA on a CPU keeps a float32 copy of the whole table; see `on_bits`.
    head = jax.tree.map(to_bits, head)
  blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, block, *leaf.shape[1:]), head)
  firsts = jnp.arange(0, _vocab_size(head), block)

  @jax.checkpoint  # a backward pass computes the logits of a block again
  def add(sums: Sums, item: tuple[Array, OutputHead]) -> tuple[Sums, None]:
    first, part = item
    part = jax.tree.map(from_bits, part).astype(hidden.dtype)
    logits = softcap(matmul(hidden, part, transposed=True), cap)
    # The peak cancels out of the loss, so it needs no gradient.
    peak = jnp.maximum(sums.peak, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    shrink, weights = jnp.exp(sums.peak - peak), jnp.exp(logits - peak[:, None])
    added = Sums(peak, sums.total * shrink + jnp.sum(weights, axis=-1),
                  sums.chosen + chosen_logits(logits, targets - first))
    if sums.mixed is not None:
      update = matmul((weights * _slope(cap, logits)).astype(hidden.dtype), part)
      added = added.replace(mixed=sums.mixed * shrink[:, None] + update)
    return added, None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  return jax.lax.scan(add, Sums(zeros + MASKED, zeros, zeros, mixed), (firsts, blocks))[0]


def _slope(cap: float | None, logits: Array) -> Array | float:
  """The derivative of a soft-capped logit by the one before the cap."""
  return 1.0 if cap is None else 1 - (logits / cap) ** 2


def _nll_by_blocks(cap: float | None, hidden: Array, targets: Array, head: OutputHead,
                   is_constant: bool = True) -> Array:
  return sum_blocks(cap, hidden, targets, head, is_constant=is_constant).nll


def _gradient_by_blocks(cap: float | None, hidden: Array, targets: Array,
                        head: OutputHead) -> tuple[Array, Array]:
  """Returns the loss [n] and its gradient by the hidden states [n, D], from one pass."""
  sums = sum_blocks(cap, hidden, targets, head, jnp.zeros(hidden.shape, jnp.float32))
  rows = jax.tree.map(lambda leaf: leaf[targets], head).astype(jnp.float32)
  gradient = sums.mixed / sums.total[:, None] - rows * jnp.broadcast_to(
      _slope(cap, sums.chosen), targets.shape)[:, None]
  return sums.nll, gradient.astype(hidden.dtype)


@typed
def entropy(logits: Float[Array, 'B V']) -> Float[Array, 'B']:
  """Returns the entropy of the next token in nats."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
