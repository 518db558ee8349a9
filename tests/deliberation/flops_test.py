"""Operations counted by formula are those of the program, and those counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.flops import (
  adapters_flops,
  answer_flops,
  attention_flops,
  forward_flops,
  head_flops,
  latents_flops,
  text_flops,
  traces_flops,
  training_flops,
)
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import PRESETS
from tests import tiny

MODEL = PRESETS['gemma2_2b']


def test_gemma2_2b():
  """A token of Gemma 2 2B costs twice its parameters, without its table and norms."""
  projections = 2_614_341_888 - 256_000 * 2304 - 26 * 4 * 2304 - 2304  # without table and norms
  assert forward_flops(MODEL, 1, 1) - attention_flops(MODEL, 1, 1) == 2 * projections
  assert head_flops(MODEL) == 2 * 256_000 * 2304


@pytest.mark.parametrize('queries, first', [(7, 1), (1, 9), (6, 3), (5, 30)])
def test_attention_key_by_key(queries, first):
  """Attention counts every visible key of every query."""
  config = tiny.CONFIG
  reach = {'global': 10**9, 'local': config.window}
  keys = sum(min(first + query, reach[kind]) for kind in config.layer_kinds
             for query in range(queries))
  assert attention_flops(config, queries, first) == 4 * config.num_heads * config.head_dim * keys


def test_compiled_program(decoder_params):
  """Projections and head are those that XLA counts in the compiled program."""
  def whole(params, tokens):
    return Decoder(tiny.CONFIG, scan=False).apply({'params': params}, tokens)[0]

  tokens = jnp.ones((1, 64), jnp.int32)
  counted = jax.jit(whole).lower(decoder_params, tokens).compile().cost_analysis()['flops']
  # The program computes all 64 keys of every query; norms and activations come on top.
  config = dataclasses.replace(tiny.CONFIG, window=10**9)
  dense = (forward_flops(config, 64) - attention_flops(config, 64, 1)
           + 64 * (attention_flops(config, 1, 64) + head_flops(config)))
  assert dense < counted < 1.5 * dense


@pytest.mark.parametrize('num_latents, teraflops', [(16, 74.3), (64, 204.5)])
def test_paper_batch(num_latents, teraflops):
  """A text of the paper's batch costs what was counted by hand."""
  config = DeliberationConfig(num_latents=num_latents, num_ahead=16, num_traces=128,
                              latents='paper', positions='shift', soft_tokens='free')
  assert traces_flops(MODEL, config, 2048) / 1e12 == pytest.approx(teraflops, rel=0.03)


def test_latents_cost_two_passes():
  """Latents cost two passes, constant ones a single one."""
  full = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored')
  constant = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored',
                                trainable='constant')
  assert latents_flops(MODEL, full, 100) == 2 * forward_flops(MODEL, 4, 101)
  assert latents_flops(MODEL, constant, 100) == forward_flops(MODEL, 4, 101)
  assert answer_flops(MODEL, 100, 2) > forward_flops(MODEL, 101)


def test_refining_latents():
  """Refining latents shorten the prefix of the decoder and not that of the coprocessor."""
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4)
  assert latents_flops(MODEL, config, 100) == (
      forward_flops(MODEL, 4, 97) + forward_flops(MODEL, 4, 101))


def test_adapters():
  """Adapters have gradients, and the weights below them have none."""
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, trainable='lora',
                              lora_rank=8)
  full, constant = (dataclasses.replace(config, trainable=each) for each in ('full', 'constant'))
  per_token = adapters_flops(MODEL, 8)
  heads, kv_heads = (number * MODEL.head_dim for number in (MODEL.num_heads, MODEL.num_kv_heads))
  assert per_token == 2 * MODEL.num_layers * 8 * sum(
      into + out for into, out in [(2304, heads), (heads, 2304), *[(2304, kv_heads)] * 2,
                                   *[(2304, MODEL.hidden_dim)] * 3])
  coprocessing = {each.trainable:
                  traces_flops(MODEL, each, 512) - traces_flops(MODEL, constant, 512)
                  for each in (full, config)}
  assert coprocessing['lora'] == pytest.approx(
      2 / 3 * coprocessing['full'] + 4 * 4 * 3 * per_token)
  assert text_flops(MODEL, 512, rank=8) == pytest.approx(
      2 / 3 * text_flops(MODEL, 512) + 512 * 3 * per_token)


def test_layers_and_states():
  """Half the layers cost half a pass. Reading states costs a projection for each token."""
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored')
  full, half, states = (latents_flops(MODEL, dataclasses.replace(config, **choices), 100)
                        for choices in ({}, {'num_layers': 13}, {'reads': 'states'}))
  assert half == 1.5 / 2 * full
  assert states - full == 100 * 2 * MODEL.num_layers * 2 * 2304 * 4 * 256


def test_tuned_decoder():
  """Training the decoder as well costs its backward passes."""
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, trainable='constant')
  frozen, tuned = (traces_flops(MODEL, config, 512, tuned=each) for each in (False, True))
  assert frozen < tuned < 3 * frozen
  assert text_flops(MODEL, 512) > 3 * forward_flops(MODEL, 512)


def test_jobs():
  """Every job counts what it trains, and a misspelt one counts as none."""
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, trainable='lora')
  for job, expected in (
      ('pretrain', text_flops(MODEL, 512)), ('finetuned', text_flops(MODEL, 512)),
      ('lora', text_flops(MODEL, 512, config.lora_rank)),
      ('joint', traces_flops(MODEL, config, 512, tuned=True)),
      *((job, traces_flops(MODEL, config, 512)) for job in ('train', 'latents'))):
    assert training_flops(job, MODEL, config, 512) == expected
  with pytest.raises(KeyError, match='pretrian'):
    training_flops('pretrian', MODEL, config, 512)
