"""Choices are checked when they are made, and against the trunk that must hold the traces."""

import dataclasses
import re

import pytest

from latent_deliberation.deliberation import deliberation_config as options
from latent_deliberation.errors import UserError
from tests import tiny


@pytest.mark.parametrize('name, allowed', [
    ('latents', options.LATENTS), ('positions', options.POSITIONS),
    ('initialisation', options.INITIALISATIONS), ('trainable', options.TRAINABLES),
    ('gate', options.GATES), ('soft_tokens', options.SOFT_TOKENS)])
def test_unknown_choice(name, allowed):
  """An unknown choice is refused with those that exist."""
  for choice in allowed:
    dataclasses.replace(tiny.CHOICES, **{name: choice})
  with pytest.raises(UserError, match=f"{name}.*'none'.*{re.escape(str(allowed))}"):
    dataclasses.replace(tiny.CHOICES, **{name: 'none'})


@pytest.mark.parametrize('name', ['num_latents', 'num_ahead', 'num_traces', 'lora_rank'])
def test_number_below_one(name):
  """A count below 1 is refused."""
  with pytest.raises(UserError, match=f'{name}.*0'):
    dataclasses.replace(tiny.CHOICES, **{name: 0})


@pytest.mark.parametrize('alpha', [0.0, -1.0, float('nan'), float('inf')])
def test_impossible_alpha(alpha):
  """A scale with which adapters cannot be trained is refused."""
  with pytest.raises(UserError, match=f'lora_alpha.*{alpha}'):
    dataclasses.replace(tiny.CHOICES, lora_alpha=alpha)


@pytest.mark.parametrize('latents, places', [('paper', 9), ('anchored', 9), ('refining', 7)])
def test_trunk_holds_traces(latents, places):
  """A trunk holds as many traces as it has places for anchors."""
  # Ten tokens; the last has no next one, and the first two cannot hold three refining latents.
  dataclasses.replace(tiny.CHOICES, latents=latents, num_traces=places).check_trunk(10)
  with pytest.raises(UserError, match=f'num_traces.*{places + 1}.*10.*{places}'):
    dataclasses.replace(tiny.CHOICES, latents=latents, num_traces=places + 1).check_trunk(10)


def test_trunk_holds_ahead_tokens():
  """A trunk must be longer than the ahead tokens."""
  dataclasses.replace(tiny.CHOICES, num_ahead=9).check_trunk(10)
  with pytest.raises(UserError, match='num_ahead.*10'):
    dataclasses.replace(tiny.CHOICES, num_ahead=10).check_trunk(10)
