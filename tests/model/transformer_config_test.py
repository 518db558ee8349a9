"""A config checks its sizes, and the error has the name and the value."""

import dataclasses
import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig
from tests import tiny


@pytest.mark.parametrize('change, message', [
    ({'vocab_size': 0}, 'vocab_size = 0:'),
    ({'num_layers': -1}, 'num_layers = -1:'),
    ({'window': 0}, 'window = 0:'),
    ({'num_kv_heads': 3}, 'num_heads = 4 .*num_kv_heads = 3'),
    ({'head_dim': 5}, 'head_dim = 5 '),
    ({'layer_pattern': ('local', 'sparse')}, r"'sparse'.*\('local', 'global'\)"),
    ({'layer_pattern': ()}, r'layer_pattern = \(\)'),
    ({'activation': 'relu'}, "activation = 'relu'.*'gelu', 'silu'"),
    ({'tied_head': 'no'}, "tied_head = 'no'"),
    ({'rope_llama3': (8.0, 1.0, 4.0)}, r'rope_llama3 = \(8.0, 1.0, 4.0\)'),
    ({'rope_llama3': (8.0, 4.0, 4.0, 16)}, r'rope_llama3 = .*4.0, 4.0'),
    ({'rope_llama3': (8.0, 1.0, '4', 16)}, "rope_llama3 = .*'4'"),
])
def test_impossible_sizes(change, message):
  """Impossible sizes are refused, by name and value."""
  with pytest.raises(UserError, match=message):
    dataclasses.replace(tiny.CONFIG, **change)


def test_layer_pattern_repeats():
  """The pattern of layers repeats from the first layer on."""
  config = dataclasses.replace(
      tiny.CONFIG, num_layers=5, layer_pattern=['local', 'local', 'global'])
  assert config.layer_kinds == ('local', 'local', 'global', 'local', 'local')


def test_config_survives_json():
  """A config survives JSON, which has no tuples."""
  for config in (PRESETS['gemma2_27b'], tiny.LLAMA):
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TransformerConfig(**as_json) == config


def test_presets_scale_queries():
  """The sizes of Gemma 2 scale their queries as published."""
  scales = {name: config.query_scale or config.head_dim ** -0.5
            for name, config in PRESETS.items() if name.startswith('gemma2')}
  assert scales == {'gemma2_2b': 1 / 16, 'gemma2_9b': 1 / 16, 'gemma2_27b': 1 / 12}
