"""config.json gives the architecture of a decoder; unsupported settings are refused."""

import dataclasses
import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.hugging_face_config import (
  read_config,
  shortest_period,
  write_config,
)
from latent_deliberation.model.transformer_config import PRESETS
from tests.model.checkpoints import foreign

# From the hub: keys that decide the architecture, and keys that look as if they did.
_GEMMA1 = {'model_type': 'gemma', 'head_dim': 256, 'hidden_act': 'gelu', 'vocab_size': 256000,
           'hidden_activation': None, 'rms_norm_eps': 1e-6, 'rope_scaling': None,
           'rope_theta': 10000.0, 'attention_bias': False, 'torch_dtype': 'bfloat16'}
_GEMMA2 = {'model_type': 'gemma2', 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
           'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh',
           'query_pre_attn_scalar': 256, 'head_dim': 256, 'sliding_window': 4096,
           'rope_theta': 10000.0, 'vocab_size': 256000, 'cache_implementation': 'hybrid'}
_GEMMA3 = {'model_type': 'gemma3_text', 'attn_logit_softcapping': None, 'head_dim': 256,
           'final_logit_softcapping': None, 'query_pre_attn_scalar': 256, 'rope_theta': 1000000,
           'rope_local_base_freq': 10000, 'rope_scaling': None, 'sliding_window': 512,
           'vocab_size': 262144, 'num_attention_heads': 4, 'num_key_value_heads': 1}
_GEMMA3_TEXT = {'model_type': 'gemma3_text', 'sliding_window': 1024,
                'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}}


def _sizes(width, hidden, layers, heads=None, kv_heads=None):
  heads = {} if heads is None else {'num_attention_heads': heads, 'num_key_value_heads': kv_heads}
  return {'hidden_size': width, 'intermediate_size': hidden, 'num_hidden_layers': layers, **heads}


def _multimodal(text):
  return {'model_type': 'gemma3', 'architectures': ['Gemma3ForConditionalGeneration'],
          'text_config': {**_GEMMA3_TEXT, **text}, 'torch_dtype': 'bfloat16',
          'vision_config': {'hidden_size': 1152, 'model_type': 'siglip_vision_model'}}


PUBLISHED = {
    'gemma1_2b': {**_GEMMA1, **_sizes(2048, 16384, 18, 8, 1)},
    'gemma1_7b': {**_GEMMA1, **_sizes(3072, 24576, 28, 16, 16)},
    'gemma2_2b': {**_GEMMA2, **_sizes(2304, 9216, 26, 8, 4)},
    'gemma2_9b': {**_GEMMA2, **_sizes(3584, 14336, 42, 16, 8), 'sliding_window_size': 4096},
    'gemma2_27b': {**_GEMMA2, **_sizes(4608, 36864, 46, 32, 16), 'head_dim': 128,
                   'query_pre_attn_scalar': 144},
    'gemma3_270m': {
        **_GEMMA3, **_sizes(640, 2048, 18), '_sliding_window_pattern': 6,
        'use_bidirectional_attention': False,
        'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3},
    'gemma3_1b': {**_GEMMA3, **_sizes(1152, 6912, 26), 'sliding_window_pattern': 6},
    'gemma3_4b': _multimodal(_sizes(2560, 10240, 34)),
    'gemma3_12b': _multimodal(_sizes(3840, 15360, 48, 16, 8)),
    'gemma3_27b': _multimodal(
        {**_sizes(5376, 21504, 62, 32, 16), 'head_dim': 128, 'query_pre_attn_scalar': 168}),
}


def read(directory, content):
  text = content if isinstance(content, str) else json.dumps(content)
  (directory / 'config.json').write_text(text)
  return read_config(directory)


def test_all_presets_are_tested():
  """Every preset has a published config here."""
  assert {*PUBLISHED, 'tiny'} == {*PRESETS}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_configs(tmp_path, name):
  """The config.json of a published checkpoint gives its preset."""
  assert read(tmp_path, PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize('config', [*PRESETS.values(), *foreign.ALL.values()])
def test_config_round_trip(tmp_path, config):
  """A config that was written reads back equal."""
  assert read(tmp_path, write_config(config, 'bfloat16')) == config


@pytest.mark.parametrize('family', foreign.FAMILIES)
def test_written_config_keys(family):
  """A written config has the keys that transformers reads."""
  written, expected = (write_config(foreign.FAMILIES[family], 'float16'),
                       dict(foreign.HF_CONFIGS[family]))
  if expected.pop('sliding_window_pattern', None):
    expected['layer_types'] = ['sliding_attention', 'full_attention', 'sliding_attention']
  assert {key: written[key] for key in expected} == expected
  assert written['dtype'] == written['torch_dtype'] == 'float16'


def test_rope_parameters(tmp_path):
  """The rotary bases of transformers 5 are read."""
  content = {key: value for key, value in foreign.HF_CONFIGS['gemma3'].items()
             if not key.startswith('rope')}
  content['rope_parameters'] = {
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 50.0},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 20.0}}
  assert read(tmp_path, content) == foreign.FAMILIES['gemma3']
  content = {key: value for key, value in foreign.HF_CONFIGS['gemma2'].items()
             if not key.startswith('rope')}
  content['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 50.0}
  assert read(tmp_path, content) == foreign.FAMILIES['gemma2']


def test_unknown_architecture(tmp_path):
  """An unknown architecture is refused; the error lists the known ones."""
  with pytest.raises(UserError, match="'phi3'.*gemma, gemma2, gemma3_text, gemma3, llama"):
    read(tmp_path, {'model_type': 'phi3'})


@pytest.mark.parametrize('family', foreign.FAMILIES)
@pytest.mark.parametrize('key, value', [
    ('attention_bias', True), ('use_bidirectional_attention', True),
    ('tie_word_embeddings', False), ('quantization_config', {'quant_method': 'bitsandbytes'}),
    ('hidden_activation', 'relu'), ('rope_scaling', {'type': 'dynamic', 'factor': 2.0})])
def test_unsupported_settings(tmp_path, family, key, value):
  """Settings that our decoder does not have are refused."""
  with pytest.raises(UserError, match=f'{tmp_path}/config.json.*{key[:4]}'):
    read(tmp_path, {**foreign.HF_CONFIGS[family], key: value})


@pytest.mark.parametrize('family, key, value', [
    ('gemma1', 'hidden_act', 'relu'), ('gemma3', 'attn_logit_softcapping', 50.0),
    ('gemma1', 'rope_parameters', {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}),
    ('gemma2', 'rope_parameters', {'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 2.0})])
def test_unsupported_settings_of_family(tmp_path, family, key, value):
  """Settings that a family does not have are refused."""
  with pytest.raises(UserError, match=f'{tmp_path}/config.json.*{key[:4]}'):
    read(tmp_path, {**foreign.HF_CONFIGS[family], key: value})


def test_llama_defaults(tmp_path):
  """Keys that a file leaves out or sets to null follow from the others."""
  content = {'model_type': 'mistral', 'hidden_size': 64, 'num_attention_heads': 4,
             'num_key_value_heads': None, 'head_dim': None, 'sliding_window': None}
  config = read(tmp_path, content)
  assert (config.num_kv_heads, config.head_dim, config.layer_pattern, config.tied_head) == (
      4, 16, ('global',), False)


@pytest.mark.parametrize('family, key, value', [
    ('llama', 'attention_bias', True), ('llama', 'hidden_act', 'relu'), ('llama', 'mlp_bias', True),
    ('qwen2', 'use_sliding_window', True), ('qwen3', 'layer_types', ['sliding_attention'] * 3),
    ('qwen2', 'rope_parameters', {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}),
    ('mistral', 'rope_parameters', {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}),
    ('qwen2', 'rope_parameters', {'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 2.0}),
    ('llama', 'tie_word_embeddings', 'no'), ('llama', 'num_attention_heads', 0)])
def test_unsupported_settings_of_llama(tmp_path, family, key, value):
  """Settings that the family of Llama does not have here are refused, with one remedy."""
  content = {**write_config(foreign.ALL[family], 'float32'), key: value}
  with pytest.raises(UserError, match=f'{tmp_path}/config.json.*({key[:3]}|low_freq_factor)'):
    read(tmp_path, content)


@pytest.mark.parametrize('key, value', [
    ('quantization_config', {'quant_method': 'bitsandbytes'}), ('tie_word_embeddings', False)])
def test_unsupported_multimodal_settings(tmp_path, key, value):
  """Unsupported settings of a whole multimodal model are refused, too."""
  with pytest.raises(UserError, match=key):
    read(tmp_path, {**PUBLISHED['gemma3_4b'], key: value})


def test_scaled_local_positions(tmp_path):
  """Scaled positions on local layers are refused."""
  # One rotary embedding serves all layers of a Gemma 2; ours scales global layers alone.
  with pytest.raises(UserError, match='config.json .*sliding'):
    read(tmp_path, {**foreign.HF_CONFIGS['gemma2'],
                    'rope_scaling': {'type': 'linear', 'factor': 2.0}})
  with pytest.raises(UserError, match='config.json .*sliding'):
    read(tmp_path, {**foreign.HF_CONFIGS['gemma3'], 'rope_parameters': {
        'full_attention': {'rope_type': 'default', 'rope_theta': 50.0},
        'sliding_attention': {'rope_type': 'linear', 'rope_theta': 20.0, 'factor': 2.0}}})


def test_scaled_global_positions(tmp_path):
  """Scaled positions on global layers are read."""
  content = {**foreign.HF_CONFIGS['gemma1'], 'rope_scaling': {'type': 'linear', 'factor': 2.0}}
  assert read(tmp_path, content) == dataclasses.replace(
      foreign.FAMILIES['gemma1'], rope_scaling=2.0)


@pytest.mark.parametrize('content', [
    '{"model_type": "gemma2", ', '[]', 'null', '{}', '{"model_type": ["gemma2"]}',
    '{"model_type": "gemma3", "text_config": [1]}', '[' * 100_000,
    json.dumps({**_GEMMA3, 'num_hidden_layers': 5 * 10**9})])
def test_damaged_config(tmp_path, content):
  """A damaged config.json is refused."""
  with pytest.raises(UserError, match=f'{tmp_path}/config.json'):
    read(tmp_path, content)


@pytest.mark.parametrize('change, message', [
    ({'num_key_value_heads': 3}, 'num_heads = 4 .*num_kv_heads = 3'),
    ({'sliding_window': None}, 'sliding_window|window|None'),
    ({'hidden_size': '16'}, 'embed_dim|str'),
    ({'layer_types': ['full_attention'] * 2}, 'layer_types has 2 .*num_hidden_layers is 3'),
    ({'layer_types': ['full_attention', 'chunked_attention', 'full_attention']}, 'chunked')])
def test_impossible_values(tmp_path, change, message):
  """Impossible values are refused."""
  with pytest.raises(UserError, match=f'{tmp_path}/config.json .*({message})'):
    read(tmp_path, {**foreign.HF_CONFIGS['gemma2'], **change})


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_config_with_a_byte_order_mark(tmp_path, encoding):
  content = json.dumps(foreign.HF_CONFIGS['gemma2'])
  (tmp_path / 'config.json').write_text(content, encoding=encoding)
  assert read_config(tmp_path) == foreign.FAMILIES['gemma2']


def test_weights_without_config(tmp_path):
  """Weights without a config.json are refused."""
  with pytest.raises(UserError, match=f'{tmp_path} .*no config.json'):
    read_config(tmp_path)


@pytest.mark.parametrize('change', [
    {'qk_norm': True, 'post_norms': False}, {'rope_scaling': 2.0}, {'rope_local_base': 7.0},
    {'post_norms': False}])
def test_config_of_no_gemma(change):
  """A combination of features that no Gemma has is not written."""
  config = dataclasses.replace(foreign.FAMILIES['gemma2'], **change)
  with pytest.raises(UserError, match='no Gemma .*TransformerConfig'):
    write_config(config, 'float32')


@pytest.mark.parametrize('family, change', [
    ('gemma2', {'tied_head': False}), ('gemma2', {'activation': 'silu'}),
    ('gemma1', {'qkv_bias': True}), ('llama', {'scale_embeddings': True}),
    ('llama', {'final_softcap': 30.0}), ('mistral', {'rope_scaling': 2.0}),
    ('qwen2', {'qk_norm': True}), ('qwen3', {'layer_pattern': ('local',)}),
    ('llama', {'layer_pattern': ('local', 'global')})])
def test_config_of_no_family(family, change):
  """Switches of two families together are not written as one of them."""
  with pytest.raises(UserError, match="no .*TransformerConfig.*'native'"):
    write_config(dataclasses.replace(foreign.ALL[family], **change), 'float32')


def test_unwritable_query_scale():
  """A query scale that transformers cannot hold is not written."""
  config = dataclasses.replace(foreign.FAMILIES['gemma2'], query_scale=0.7)
  with pytest.raises(UserError, match='query_scale = 0.7 '):
    write_config(config, 'float32')


@pytest.mark.parametrize('kinds, period', [
    ('aaaa', 'a'), ('abab', 'ab'), ('aba', 'ab'), ('aab', 'aab'), ('aaaaabaa', 'aaaaab'),
    ('abba', 'abb')])
def test_shortest_period(kinds, period):
  """A pattern is as short as possible."""
  assert shortest_period(kinds) == tuple(period)
