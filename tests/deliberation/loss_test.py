"""The chunked cross-entropy equals the plain one, and never holds all logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_deliberation.deliberation import loss
from latent_deliberation.deliberation.loss import token_nll
from latent_deliberation.evaluation.answers import nll_and_likeliest
from latent_deliberation.model.attention import SUMMABLE
from latent_deliberation.model.products import quantise

B, N, D, V = 2, 10, 4, 501


@pytest.fixture(scope='module')
def inputs():
  random = np.random.default_rng(0)
  hidden, table = random.normal(size=(B, N, D)), random.normal(size=(V, D))
  return (jnp.asarray(hidden, jnp.float32), jnp.asarray(random.integers(0, V, (B, N))),
          jnp.asarray(table, jnp.float32))


@pytest.fixture(params=['at once', 'by blocks'])
def way(request, monkeypatch):
  """How a CPU reads the head: all tokens at once, or in three blocks of 167."""
  if request.param == 'by blocks':
    monkeypatch.setattr(loss, 'LARGEST_BLOCK', 200)
    monkeypatch.setattr(loss, 'SMALLEST_BLOCK', 2)
  return request.param


def optax_nll(hidden, targets, table, cap):
  logits = hidden @ table.T
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def with_gradients(nll, hidden, targets, table, cap):
  """Loss of each target, and gradients of a weighted sum for hidden states and the table."""
  weight = jnp.arange(1.0, 1 + targets.size).reshape(targets.shape)

  def total(hidden, table):
    values = nll(hidden, targets, table, cap)
    return jnp.sum(values * weight), values

  return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, table)


@pytest.mark.parametrize('cap', [None, 2.0])
@pytest.mark.parametrize('chunk', [1, 3, 5, 9, 10, 64])
def test_equals_optax(inputs, cap, chunk, way):
  """Values and gradients equal those of optax for any chunk."""
  chunked = with_gradients(functools.partial(token_nll, chunk=chunk), *inputs, cap)
  plain = with_gradients(optax_nll, *inputs, cap)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), chunked, plain)


@pytest.mark.parametrize('cap', [SUMMABLE, 1000.0])
def test_no_overflow_at_cap(inputs, cap, way):
  """Logits as large as their cap overflow neither the loss nor its gradient."""
  hidden, targets, table = inputs
  ours = with_gradients(functools.partial(token_nll, chunk=N), 1000 * hidden, targets, table, cap)
  plain = with_gradients(optax_nll, 1000 * hidden, targets, table, cap)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3), ours, plain)


@pytest.mark.parametrize('chunk', [3, 10])
def test_int8_head(inputs, chunk, way):
  """An int8 output head gives the loss and gradient of its float32 values."""
  hidden, targets, table = inputs
  head = quantise({'table': table})['table']
  weight = jnp.arange(1.0, 1 + targets.size).reshape(targets.shape)

  def measured(head):
    total = lambda hidden: jnp.sum(  # noqa: E731
        token_nll(hidden, targets, head, 2.0, chunk) * weight)
    return jax.value_and_grad(total)(hidden), nll_and_likeliest(hidden, targets, head, 2.0, chunk)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
               measured(head), measured(head.astype(jnp.float32)))


@pytest.mark.parametrize('cap', [None, 2.0])
def test_constant_head_by_blocks(inputs, cap, way):
  """A constant head's gradient equals optax's, and blocks keep no logits of all tokens."""
  hidden, targets, table = inputs
  weight = jnp.arange(1.0, 1 + targets.size).reshape(targets.shape)

  def program(nll):
    total = lambda hidden: jnp.sum(nll(hidden, targets, table, cap) * weight)  # noqa: E731
    return jax.jit(jax.value_and_grad(total))

  ours = program(functools.partial(token_nll, chunk=N))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
               ours(hidden), program(optax_nll)(hidden))
  text = ours.lower(hidden).compile().as_text()
  assert (f'f32[{B * N},{V}]' in text) == (way == 'at once')
  assert (f'f32[{B * N},{V // 3}]' in text) == (way == 'by blocks')


@pytest.mark.parametrize('vocab_size, block', [
    (501, None), (4096, None), (32_000, 4000), (49_152, 4096), (50_257, 1733), (50_021, None),
    (128_256, 4008), (151_936, 2374), (256_000, 4000), (262_144, 4096), (262_208, 3856)])
def test_block_size(vocab_size, block):
  """Every large vocabulary of a published model divides into blocks; a prime one does not."""
  assert loss._block_size(vocab_size) == block


@pytest.mark.parametrize('chunk', [3, 10])
def test_constant_head_computed_once(inputs, chunk):
  """Logits of a constant output head are computed once for loss and gradient."""
  hidden, targets, table = inputs
  weight = jnp.arange(1.0, 1 + targets.size).reshape(targets.shape)

  def gradient(nll):
    return jax.grad(lambda hidden: jnp.sum(nll(hidden, targets, table, 2.0) * weight))

  ours = gradient(functools.partial(token_nll, chunk=chunk))
  np.testing.assert_allclose(jax.jit(ours)(hidden), gradient(optax_nll)(hidden), atol=1e-4)
  products = str(jax.make_jaxpr(ours)(hidden)).count('dot_general[')
  assert products == 2 * (1 if chunk == N else 2)  # a last, shorter slice is a call of its own


def test_bfloat16_states(inputs, way):
  """The loss of bfloat16 states is computed in float32."""
  hidden, targets, table = inputs
  rounded = hidden.astype(jnp.bfloat16), targets, table.astype(jnp.bfloat16)
  nll = token_nll(*rounded, cap=2.0, chunk=4)
  assert nll.dtype == jnp.float32
  exact = optax_nll(rounded[0].astype(jnp.float32), targets, rounded[2].astype(jnp.float32), 2.0)
  np.testing.assert_allclose(nll, exact, atol=1e-4)


def test_bfloat16_gradients(inputs, way):
  """States and a head in bfloat16 have float32's gradients, but for rounding."""
  hidden, targets, table = inputs
  rounded = hidden.astype(jnp.bfloat16), targets, table.astype(jnp.bfloat16)
  exact = hidden.astype(jnp.bfloat16).astype(jnp.float32), targets, rounded[2].astype(jnp.float32)
  ours, _ = with_gradients(functools.partial(token_nll, chunk=4), *rounded, 2.0)
  expected, _ = with_gradients(optax_nll, *exact, 2.0)
  for gradient, wanted in zip(ours, expected, strict=True):
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=0.05,
                               atol=0.02 * float(jnp.max(jnp.abs(wanted))))


def largest(jaxpr):
  """Elements of the largest array that a jaxpr makes, in the loops and calls inside it too."""
  sizes = [math.prod(variable.aval.shape) for equation in jaxpr.eqns
           for variable in equation.outvars]
  parameters = [parameter for equation in jaxpr.eqns for parameter in equation.params.values()]
  inner = [getattr(parameter, 'jaxpr', parameter) for parameter in parameters]
  return max(sizes + [largest(each) for each in inner if hasattr(each, 'eqns')], default=0)


@pytest.mark.parametrize('chunk, largest_logits', [(3, B * 3 * V), (64, B * N * V)])
def test_largest_array(inputs, chunk, largest_logits):
  """No array is larger than a chunk's logits, forward or backward."""
  jaxpr = jax.make_jaxpr(functools.partial(
      with_gradients, functools.partial(token_nll, chunk=chunk), cap=2.0))(*inputs)
  assert largest(jaxpr.jaxpr) == largest_logits


@pytest.mark.parametrize('chunk', [3, 10])
def test_likeliest(inputs, chunk):
  """The likeliest target is that of argmax."""
  hidden, targets, table = inputs
  top = jnp.argmax(hidden @ table.T, axis=-1)
  targets = targets.at[:, ::2].set(top[:, ::2])
  _, found = nll_and_likeliest(hidden, targets, table, 3.0, chunk)
  np.testing.assert_array_equal(found, targets == top)
  assert 0 < found.sum() < found.size
