"""Operations counted by formula are those of the program, and those counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from latent_deliberation.deliberation.flops import attention_flops, forward_flops, head_flops
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import PRESETS
from tests import tiny


def test_gemma2_2b_costs_what_is_published():
  """Forward and backward of a text of 2,048 tokens: 6 x parameters in matrix products, and more."""
  config = dataclasses.replace(PRESETS['gemma2_2b'])
  projections = 2_614_341_888 - 256_000 * 2304 - 26 * 4 * 2304 - 2304  # without table and norms
  assert forward_flops(config, 1, 1) - attention_flops(config, 1, 1) == 2 * projections
  assert head_flops(config) == 2 * 256_000 * 2304


@pytest.mark.parametrize('queries, first', [(7, 1), (1, 9), (6, 3), (5, 30)])
def test_attention_is_counted_key_by_key(queries, first):
  config = tiny.CONFIG
  reach = {'global': 10**9, 'local': config.window}
  keys = sum(min(first + query, reach[kind]) for kind in config.layer_kinds
             for query in range(queries))
  assert attention_flops(config, queries, first) == 4 * config.num_heads * config.head_dim * keys


def test_projections_and_head_are_those_of_the_compiled_program(decoder_params):
  def whole(params, tokens):
    return Decoder(tiny.CONFIG, scan=False).apply({'params': params}, tokens)[0]

  tokens = jnp.ones((1, 64), jnp.int32)
  counted = jax.jit(whole).lower(decoder_params, tokens).compile().cost_analysis()['flops']
  # The program computes all 64 keys of every query; norms and activations come on top.
  config = dataclasses.replace(tiny.CONFIG, window=10**9)
  dense = (forward_flops(config, 64) - attention_flops(config, 64, 1)
           + 64 * (attention_flops(config, 1, 64) + head_flops(config)))
  assert dense < counted < 1.5 * dense
