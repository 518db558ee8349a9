"""Products of activations and weights: values, gradients and dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.model.products import matmul


@pytest.mark.parametrize('dtypes', [('float32', 'bfloat16'), ('bfloat16', 'bfloat16'),
                                    ('float32', 'float32')])
@pytest.mark.parametrize('lead', [(), (3, 2)])
@pytest.mark.parametrize('transposed', [False, True])
def test_matmul(dtypes, lead, transposed):
  """Products have float32 results near the exact ones, and every factor a gradient in its dtype."""
  random = np.random.default_rng(0)
  x, y, weight = (jnp.asarray(random.normal(size=lead + shape), jnp.float32)
                  for shape in ((5, 8), (7, 8) if transposed else (8, 7), (5, 7)))
  factors = x.astype(dtypes[0]), y.astype(dtypes[1])
  turned = jnp.swapaxes(y, -1, -2)
  value, gradients = jax.value_and_grad(
      lambda x, y: jnp.sum(matmul(x, y, transposed) * weight), argnums=(0, 1))(*factors)
  assert matmul(*factors, transposed).dtype == value.dtype == jnp.float32
  np.testing.assert_allclose(matmul(*factors, transposed), x @ (turned if transposed else y),
                             atol=0.1)
  exact = ((weight @ y, jnp.swapaxes(weight, -1, -2) @ x) if transposed else
           (weight @ turned, jnp.swapaxes(x, -1, -2) @ weight))
  for dtype, gradient, expected in zip(dtypes, gradients, exact, strict=True):
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=0.1)
  # Backward as well, both factors of a product have one dtype: a CPU is slow otherwise.
  text = jax.jit(jax.grad(lambda x, y: jnp.sum(matmul(x, y, transposed) ** 2), (0, 1))).lower(
      *factors).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) == 3
  used = 'bf16' if 'bfloat16' in dtypes else 'f32'
  assert all(line.count(f'x{used}>') >= 2 for line in products), products


@pytest.mark.parametrize('transposed', [False, True])
def test_compiled_products_keep_their_dtype(transposed):
  """If a CPU multiplies bfloat16 in the forward pass, it does so for the gradient of x, too.

  XLA decides by the form of a product, and otherwise converts both factors to float32 first.
  """
  x, y = jnp.ones((64, 32)), jnp.ones((48, 32) if transposed else (32, 48), jnp.bfloat16)

  def used(function):
    text = jax.jit(function).lower(x, y).compile().as_text()
    kinds = dict(re.findall(r'%([\w.-]+) = (\w+)\[', text))
    return [tuple(kinds[name] for name in names)
            for names in re.findall(r' dot\(%([\w.-]+), %([\w.-]+)\)', text)]

  forward = used(lambda x, y: matmul(x, y, transposed))
  backward = used(jax.grad(lambda x, y: jnp.sum(jnp.tanh(matmul(x, y, transposed)))))
  assert len(forward) == 1 and len(backward) == 2
  assert set(backward) == set(forward)
