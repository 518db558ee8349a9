"""Products of activations and weights: values, gradients and dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.model.products import contract, matmul, multiply, on_bits


@pytest.mark.parametrize('dtypes', [('float32', 'bfloat16'), ('bfloat16', 'bfloat16'),
                                    ('float32', 'float32')])
@pytest.mark.parametrize('lead, rows', [((), 5), ((3, 2), 5), ((3, 2), 1), ((), 1)])
@pytest.mark.parametrize('transposed', [False, True])
def test_matmul(dtypes, lead, rows, transposed):
  """Products have float32 results near the exact ones, and every factor a gradient in its dtype."""
  random = np.random.default_rng(0)
  x, y, weight = (jnp.asarray(random.normal(size=lead + shape), jnp.float32)
                  for shape in ((rows, 8), (7, 8) if transposed else (8, 7), (rows, 7)))
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


@pytest.mark.parametrize('flatten_batch', [True, False])
def test_multiply_in_the_dtype_of_the_weight(flatten_batch):
  """x is rounded to the weight's dtype, and the result has the dtype of x."""
  random = np.random.default_rng(3)
  x = jnp.asarray(random.normal(size=(2, 1, 5, 64)), jnp.float32)
  weight = jnp.asarray(random.normal(size=(64, 3)), jnp.bfloat16)
  y, pull = jax.vjp(lambda x: multiply(x, weight, flatten_batch=flatten_batch), x)
  assert y.dtype == jnp.float32 and pull(y)[0].dtype == jnp.float32
  exact, rounded = (np.asarray(each, np.float64) @ np.asarray(weight, np.float64)
                    for each in (x, x.astype(jnp.bfloat16)))
  np.testing.assert_allclose(y, rounded, atol=2e-4)
  assert np.abs(y - exact).max() > 1e-3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('rows', [(1,), (2, 3), (13, 7)])
@pytest.mark.parametrize('inputs, shape', [(1, (4, 3, 8)), (2, (6, 2, 8))])
def test_contract(dtype, rows, inputs, shape):
  random = np.random.default_rng(1)
  x = jnp.asarray(random.normal(size=rows + shape[-inputs:]), dtype)
  weight = jnp.asarray(random.normal(size=shape), dtype)
  y = contract(x, weight, inputs)
  axes = tuple(range(-inputs, 0))
  expected = np.tensordot(x.astype('float32'), weight.astype('float32'), (axes, axes))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_moves_keep_values_and_gradients(dtype):
  """Rows that are taken and a slice that is written: each entry has its gradient, in its dtype."""
  random = np.random.default_rng(2)
  table, new, weight = (jnp.asarray(random.normal(size=shape), dtype)
                        for shape in ((6, 3), (2, 3), (6, 3)))
  ids = jnp.array([5, 0, 5, 1, 4, 2])

  def moved(table, new):
    taken = on_bits(lambda table: table[ids], table)
    return on_bits(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, 1, 0), taken, new)

  expected = np.asarray(table, 'float32')[np.asarray(ids)]
  expected[1:3] = new
  value = jax.jit(moved)(table, new)
  assert value.dtype == dtype
  np.testing.assert_array_equal(value.astype('float32'), expected)

  of_table, of_new = jax.grad(lambda *arrays: jnp.sum(moved(*arrays) * weight), (0, 1))(table, new)
  written = np.asarray(weight, 'float32')
  np.testing.assert_array_equal(of_new.astype('float32'), written[1:3])
  sums = np.zeros((6, 3), np.float32)
  np.add.at(sums, np.asarray(ids)[[0, 3, 4, 5]], written[[0, 3, 4, 5]])
  np.testing.assert_array_equal(of_table.astype('float32'), sums)
  assert of_table.dtype == of_new.dtype == dtype


def test_bits_are_moved_without_float32():
  """XLA on a CPU would otherwise convert all of a table for a few of its rows."""
  table = jnp.ones((4096, 64), jnp.bfloat16)

  def rows(table, ids):
    return jax.lax.fori_loop(0, 3, lambda at, total: total + on_bits(
        lambda table: table[ids + at], table).astype('float32'), jnp.zeros((2, 64)))

  text = jax.jit(rows).lower(table, jnp.array([3, 5])).compile().as_text()
  assert 'f32[4096,64]' not in text
