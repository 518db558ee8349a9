"""Adapters folded into weights are adapters beside weights."""

import jax.numpy as jnp
import numpy as np

from latent_deliberation.model.attention import AttentionMaskSpec
from latent_deliberation.model.layers import LowRank, merge
from latent_deliberation.model.transformer import Transformer
from tests import tiny


def test_merged_weights_compute_what_weights_with_adapters_beside_them_do(decoder_params):
  low_rank = LowRank(rank=2, alpha=3.0)
  deliberator = tiny.deliberator(trainable='lora')
  adapters = tiny.coprocessor_params(deliberator, decoder_params)['lora']
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 7, tiny.CONFIG.embed_dim)),
                  jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 1, 7))
  mask_spec = AttentionMaskSpec(jnp.ones_like(positions), jnp.zeros((2, 1), jnp.int32))
  weights = decoder_params['transformer']
  beside, _ = Transformer(tiny.CONFIG, lora=low_rank).apply(
      {'params': weights, 'lora': adapters}, x, positions, mask_spec)
  plain = Transformer(tiny.CONFIG)
  folded, _ = plain.apply({'params': merge(weights, adapters, low_rank)}, x, positions, mask_spec)
  without, _ = plain.apply({'params': weights}, x, positions, mask_spec)
  np.testing.assert_allclose(folded, beside, rtol=1e-4, atol=1e-5)
  assert np.abs(without - beside).max() > 0.1
