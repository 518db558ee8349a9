"""Sizes are checked when they are written down, and the message names them."""

import dataclasses

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig
from tests import tiny


@pytest.mark.parametrize('change, message', [
    ({'vocab_size': 0}, 'vocab_size = 0: .* at least 1'),
    ({'num_layers': -1}, 'num_layers = -1: .* at least 1'),
    ({'window': 0}, 'window = 0: .* at least 1'),
    ({'num_kv_heads': 3}, 'num_heads = 4 is not a multiple of num_kv_heads = 3'),
    ({'head_dim': 5}, 'head_dim = 5 is odd'),
    ({'layer_pattern': ('local', 'sparse')}, r"'sparse'.*must be among \('local', 'global'\)"),
    ({'layer_pattern': ()}, r'layer_pattern = \(\)'),
])
def test_impossible_sizes_are_refused_by_name_and_value(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(tiny.CONFIG, **change)


def test_the_layer_pattern_repeats_from_the_first_layer():
  config = dataclasses.replace(
      tiny.CONFIG, num_layers=5, layer_pattern=['local', 'local', 'global'])
  assert config.layer_kinds == ('local', 'local', 'global', 'local', 'local')


def test_a_config_survives_json_which_has_no_tuples():
  config = PRESETS['gemma2_27b']
  as_json = {**dataclasses.asdict(config), 'layer_pattern': list(config.layer_pattern)}
  assert TransformerConfig(**as_json) == config


def test_gemma_sizes_scale_their_queries_as_published():
  scales = {name: config.query_scale or config.head_dim ** -0.5
            for name, config in PRESETS.items() if name.startswith('gemma2')}
  assert scales == {'gemma2_2b': 1 / 16, 'gemma2_9b': 1 / 16, 'gemma2_27b': 1 / 12}
