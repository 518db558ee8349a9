"""Norms, projections, adapters and embeddings compute what their formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.attention import AttentionMaskSpec
from latent_deliberation.model.layers import (
  Embedder,
  FeedForward,
  LowRank,
  Projection,
  RMSNorm,
  adapt,
)
from latent_deliberation.model.transformer import Transformer
from tests import tiny


def test_norm_formula():
  """The norm is computed in float32, and its scale is stored as an offset from 1."""
  x = 100 * jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)
  scale = jnp.linspace(-1, 1, 64)
  y = RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
  wide = np.asarray(x, np.float32)
  expected = wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(scale))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


def test_norm_of_zeros():
  """The norm of zeros is zero and has a finite gradient."""
  def total(x):
    return RMSNorm(1e-6).apply({'params': {'scale': jnp.ones(4)}}, x).sum()

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize('shape, inputs', [((5, 2, 3), 1), ((2, 3, 5), 2)])
def test_adapter_adds_scaled_product(shape, inputs):
  """An adapter adds its scaled product to the weight."""
  plain = Projection(shape, ('embed',) * 3, inputs)
  adapted = Projection(shape, ('embed',) * 3, inputs, lora=LowRank(rank=2, alpha=3.0))
  x = jax.random.normal(jax.random.key(0), (7, *shape[:inputs]))
  variables = tiny.randomised(adapted.init(jax.random.key(1), x), seed=0)
  weight, (a, b) = variables['params']['w'], map(variables['lora'].get, 'ab')
  merged = weight + 3.0 / 2 * np.tensordot(a, b, axes=1)
  np.testing.assert_allclose(adapted.apply(variables, x), plain.apply({'params': {'w': merged}}, x),
                             rtol=1e-5, atol=1e-5)


def test_new_adapter_changes_nothing():
  """A new adapter changes nothing, and can learn."""
  adapted = Projection((5, 3), ('embed', 'mlp'), lora=LowRank(rank=2, alpha=3.0))
  lora = adapted.init(jax.random.key(1), jnp.ones((1, 5)))['lora']
  assert np.all(lora['b'].value == 0) and np.all(lora['a'].value != 0)


def test_lora_rank_below_one():
  """A rank below 1 is refused."""
  with pytest.raises(UserError, match='rank = 0'):
    LowRank(rank=0)


def test_lora_scale():
  """Without an alpha, the factor of an adapter is 1."""
  assert LowRank(rank=8).scale == 1
  assert LowRank(rank=8, alpha=128.0).scale == 16


def test_feed_forward_formula():
  """The feed-forward gates with the tanh form of gelu."""
  block = FeedForward(hidden_dim=6)
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
  params = tiny.randomised(block.init(jax.random.key(1), x)['params'], seed=0)
  gate, up = x @ params['gate']['w'], x @ params['up']['w']
  gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate ** 3)))
  np.testing.assert_allclose(block.apply({'params': params}, x), (gelu * up) @ params['down']['w'],
                             rtol=1e-5, atol=1e-5)


def test_embeddings_are_scaled():
  """Embeddings are scaled by the root of the width."""
  embedder = Embedder(vocab_size=3, embed_dim=4)
  table = jnp.arange(12.0).reshape(3, 4)
  rows = embedder.apply({'params': {'table': table}}, jnp.array([[[2, 0]]]), 'float32',
                        method='encode')
  np.testing.assert_array_equal(rows, 2 * table[jnp.array([[[2, 0]]])])


@pytest.mark.parametrize('config', [tiny.CONFIG, tiny.LLAMA], ids=['gemma', 'llama'])
def test_adapted_weights_equal_adapters(config):
  """Adapted weights compute the same as a transformer with adapters; biases stay."""
  low_rank, decoder_params = LowRank(rank=2, alpha=3.0), tiny.decoder_params(config)
  deliberator = tiny.deliberator(config, trainable='lora')
  adapters = tiny.coprocessor_params(deliberator, decoder_params)['lora']
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 7, tiny.CONFIG.embed_dim)),
                  jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 1, 7))
  mask_spec = AttentionMaskSpec(jnp.ones_like(positions), jnp.zeros((2, 1), jnp.int32))
  weights = decoder_params['transformer']
  adapted, _ = Transformer(config, lora=low_rank).apply(
      {'params': weights, 'lora': adapters}, x, positions, mask_spec)
  plain = Transformer(config)
  in_tree, _ = plain.apply({'params': adapt(weights, adapters, low_rank)}, x, positions, mask_spec)
  without, _ = plain.apply({'params': weights}, x, positions, mask_spec)
  np.testing.assert_array_equal(in_tree, adapted)
  assert np.abs(without - adapted).max() > 0.1


def test_small_adapters_count_in_bfloat16():
  """An adapter changes the product by x A B, also where bfloat16 holds no sum of W and A B."""
  rng = np.random.default_rng(0)
  x, weight, down, up = (jnp.asarray(rng.normal(size=size) * scale, jnp.float32) for size, scale in
                         (((1, 1, 5, 32), 1), ((32, 16), 1), ((32, 2), 1), ((2, 16), 1e-4)))
  weight = weight.astype(jnp.bfloat16)
  tree = adapt({'w': weight}, {'a': down, 'b': up}, LowRank(rank=2))
  projection = Projection((32, 16), ('embed', 'mlp'), dtype='bfloat16')
  change = projection.apply({'params': tree}, x) - projection.apply({'params': {'w': weight}}, x)
  np.testing.assert_allclose(change, x @ down @ up, atol=2e-5)
  assert np.abs(change).max() > 1e-3
