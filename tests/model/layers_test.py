"""Norm, projection, adapter and embedding do what their formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.layers import (
  Embedder,
  FeedForward,
  LowRank,
  Projection,
  RMSNorm,
)
from tests import tiny


def test_the_norm_is_computed_in_float32_and_its_scale_is_stored_off_one():
  x = 100 * jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)
  scale = jnp.linspace(-1, 1, 64)
  y = RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
  wide = np.asarray(x, np.float32)
  expected = wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(scale))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


def test_the_norm_of_nothing_is_nothing_and_has_a_finite_gradient():
  def total(x):
    return RMSNorm(1e-6).apply({'params': {'scale': jnp.ones(4)}}, x).sum()

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize('shape, inputs', [((5, 2, 3), 1), ((2, 3, 5), 2)])
def test_an_adapter_adds_its_scaled_product_to_the_weight(shape, inputs):
  plain = Projection(shape, ('embed',) * 3, inputs)
  adapted = Projection(shape, ('embed',) * 3, inputs, lora=LowRank(rank=2, alpha=3.0))
  x = jax.random.normal(jax.random.key(0), (7, *shape[:inputs]))
  variables = tiny.randomised(adapted.init(jax.random.key(1), x), seed=0)
  weight, (a, b) = variables['params']['w'], map(variables['lora'].get, 'ab')
  merged = weight + 3.0 / 2 * np.tensordot(a, b, axes=1)
  np.testing.assert_allclose(adapted.apply(variables, x), plain.apply({'params': {'w': merged}}, x),
                             rtol=1e-5, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_can_learn():
  adapted = Projection((5, 3), ('embed', 'mlp'), lora=LowRank(rank=2, alpha=3.0))
  lora = adapted.init(jax.random.key(1), jnp.ones((1, 5)))['lora']
  assert np.all(lora['b'].value == 0) and np.all(lora['a'].value != 0)


def test_a_rank_below_one_is_refused():
  with pytest.raises(UserError, match='lora rank = 0: at least 1'):
    LowRank(rank=0)


def test_adapters_without_an_alpha_are_added_as_they_are():
  assert LowRank(rank=8).scale == 1
  assert LowRank(rank=8, alpha=128.0).scale == 16


def test_the_feed_forward_gates_with_the_tanh_form_of_gelu():
  block = FeedForward(hidden_dim=6)
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
  params = tiny.randomised(block.init(jax.random.key(1), x)['params'], seed=0)
  gate, up = x @ params['gate']['w'], x @ params['up']['w']
  gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate ** 3)))
  np.testing.assert_allclose(block.apply({'params': params}, x), (gelu * up) @ params['down']['w'],
                             rtol=1e-5, atol=1e-5)


def test_embeddings_are_scaled_by_the_root_of_the_width():
  embedder = Embedder(vocab_size=3, embed_dim=4)
  table = jnp.arange(12.0).reshape(3, 4)
  rows = embedder.apply({'params': {'table': table}}, jnp.array([[[2, 0]]]), 'float32',
                        method='encode')
  np.testing.assert_array_equal(rows, 2 * table[jnp.array([[[2, 0]]])])
