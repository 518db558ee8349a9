"""Choices are checked when they are written down, and against the trunk that must hold them."""

import dataclasses

import pytest

from latent_deliberation.deliberation import deliberation_config as options
from latent_deliberation.errors import UserError
from tests import tiny


@pytest.mark.parametrize('name, allowed', [
    ('latents', options.LATENTS), ('positions', options.POSITIONS),
    ('initialisation', options.INITIALISATIONS), ('trainable', options.TRAINABLES),
    ('gate', options.GATES), ('soft_tokens', options.SOFT_TOKENS)])
def test_an_unknown_choice_is_refused_with_those_that_exist(name, allowed):
  for choice in allowed:
    dataclasses.replace(tiny.CHOICES, **{name: choice})
  with pytest.raises(UserError) as error:
    dataclasses.replace(tiny.CHOICES, **{name: 'none'})
  assert str(error.value) == f"{name} = 'none': must be one of {allowed}"


@pytest.mark.parametrize('name', ['num_latents', 'num_ahead', 'num_traces', 'lora_rank'])
def test_a_number_below_one_is_refused(name):
  with pytest.raises(UserError, match=f'{name} = 0: at least 1'):
    dataclasses.replace(tiny.CHOICES, **{name: 0})


@pytest.mark.parametrize('alpha', [0.0, -1.0, float('nan'), float('inf')])
def test_an_alpha_that_adapters_cannot_learn_with_is_refused(alpha):
  with pytest.raises(UserError, match=f'lora_alpha = {alpha}: it must be above 0, or None'):
    dataclasses.replace(tiny.CHOICES, lora_alpha=alpha)


@pytest.mark.parametrize('latents, places', [('paper', 9), ('anchored', 9), ('refining', 7)])
def test_a_trunk_holds_as_many_traces_as_it_has_places_for_anchors(latents, places):
  # Ten tokens; the last has no next one, and the first two cannot hold three refining latents.
  dataclasses.replace(tiny.CHOICES, latents=latents, num_traces=places).check_trunk(10)
  with pytest.raises(UserError, match=f'num_traces = {places + 1}, but a trunk of 10 tokens has '
                     f'{places} places'):
    dataclasses.replace(tiny.CHOICES, latents=latents, num_traces=places + 1).check_trunk(10)


def test_a_trunk_is_longer_than_what_lies_ahead():
  dataclasses.replace(tiny.CHOICES, num_ahead=9).check_trunk(10)
  with pytest.raises(UserError, match='num_ahead = 10 tokens .* a trunk of 10 tokens'):
    dataclasses.replace(tiny.CHOICES, num_ahead=10).check_trunk(10)
