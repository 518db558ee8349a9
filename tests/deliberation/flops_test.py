"""What deliberation costs follows from the passes that it takes."""

import dataclasses

import pytest

from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.flops import (
  adapters_flops,
  answer_flops,
  forward_flops,
  latents_flops,
  text_flops,
  traces_flops,
)
from latent_deliberation.model.transformer_config import PRESETS

MODEL = PRESETS['gemma2_2b']


@pytest.mark.parametrize('num_latents, teraflops', [(16, 74.3), (64, 204.5)])
def test_a_text_of_the_papers_batch_costs_what_was_counted_by_hand(num_latents, teraflops):
  config = DeliberationConfig(num_latents=num_latents, num_ahead=16, num_traces=128,
                              latents='paper', positions='shift', soft_tokens='free')
  assert traces_flops(MODEL, config, 2048) / 1e12 == pytest.approx(teraflops, rel=0.03)


def test_latents_cost_two_passes_and_constant_ones_a_single_one():
  full = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored')
  constant = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored',
                                trainable='constant')
  assert latents_flops(MODEL, full, 100) == 2 * forward_flops(MODEL, 4, 101)
  assert latents_flops(MODEL, constant, 100) == forward_flops(MODEL, 4, 101)
  assert answer_flops(MODEL, 100, 2) > forward_flops(MODEL, 101)


def test_refining_latents_shorten_what_the_decoder_reads_and_not_the_coprocessor():
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4)
  assert latents_flops(MODEL, config, 100) == (
      forward_flops(MODEL, 4, 97) + forward_flops(MODEL, 4, 101))


def test_adapters_have_gradients_and_the_weights_below_them_do_not():
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, trainable='lora',
                              lora_rank=8)
  full, constant = (dataclasses.replace(config, trainable=each) for each in ('full', 'constant'))
  per_token = adapters_flops(MODEL, 8)
  heads, kv_heads = (number * MODEL.head_dim for number in (MODEL.num_heads, MODEL.num_kv_heads))
  assert per_token == 2 * MODEL.num_layers * 8 * sum(
      into + out for into, out in [(2304, heads), (heads, 2304), *[(2304, kv_heads)] * 2,
                                   *[(2304, MODEL.hidden_dim)] * 3])
  thinking = {each.trainable: traces_flops(MODEL, each, 512) - traces_flops(MODEL, constant, 512)
              for each in (full, config)}
  assert thinking['lora'] == pytest.approx(2 / 3 * thinking['full'] + 4 * 4 * 3 * per_token)
  assert text_flops(MODEL, 512, rank=8) == pytest.approx(
      2 / 3 * text_flops(MODEL, 512) + 512 * 3 * per_token)


def test_half_of_the_layers_cost_half_of_a_pass_and_reading_states_a_projection_a_token():
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, latents='anchored')
  full, half, states = (latents_flops(MODEL, dataclasses.replace(config, **choices), 100)
                        for choices in ({}, {'num_layers': 13}, {'reads': 'states'}))
  assert half == 1.5 / 2 * full
  assert states - full == 100 * 2 * MODEL.num_layers * 2 * 2304 * 4 * 256


def test_training_the_decoder_as_well_costs_its_backward_passes():
  config = DeliberationConfig(num_latents=4, num_ahead=4, num_traces=4, trainable='constant')
  frozen, tuned = (traces_flops(MODEL, config, 512, tuned=each) for each in (False, True))
  assert frozen < tuned < 3 * frozen
  assert text_flops(MODEL, 512) > 3 * forward_flops(MODEL, 512)
