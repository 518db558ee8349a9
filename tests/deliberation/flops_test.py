"""What deliberation costs follows from the passes that it takes."""

import dataclasses

import pytest

from latent_deliberation.deliberation.config import DeliberationConfig
from latent_deliberation.deliberation.flops import (
  answer_flops,
  latents_flops,
  text_flops,
  traces_flops,
)
from latent_deliberation.model.config import PRESETS
from latent_deliberation.model.flops import forward_flops

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
