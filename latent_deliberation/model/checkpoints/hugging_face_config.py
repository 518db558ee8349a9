"""config.json of the Gemma and Llama families, to and from a TransformerConfig.

`read_config` accepts the keys of transformers 4 and 5, and `write_config` writes those of both.
Settings that our decoder would ignore are refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.model.transformer_config import (
  GEMMA1,
  LLAMA,
  MOST_LAYERS,
  TransformerConfig,
  unlike_gemma,
)
from latent_deliberation.paths import TOKENIZER_CONFIG, TOKENIZER_JSON

CONFIG = 'config.json'
# Files beside the weights that say how texts begin and end, and how a conversation is written.
GENERATION, ADDED = 'generation_config.json', 'added_tokens.json'
TEMPLATE, PROCESSOR = 'chat_template.jinja', 'chat_template.json'
CONVENTIONS = (TOKENIZER_CONFIG, ADDED, TEMPLATE, PROCESSOR, GENERATION)
COMPANIONS = (TOKENIZER_JSON, 'special_tokens_map.json', *CONVENTIONS)

# The values of transformers in our words.
_KINDS = {'sliding_attention': 'local', 'full_attention': 'global'}
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
_LLAMA3_KEYS = ('factor', 'low_freq_factor', 'high_freq_factor',
                'original_max_position_embeddings')

# The defaults of transformers for keys that a config.json leaves out, by model_type.
_GEMMA_SIZES = {'vocab_size': 256_000, 'num_attention_heads': 8, 'num_key_value_heads': 4,
                'head_dim': 256, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0}
_GEMMA_DEFAULTS = {
    'gemma': _GEMMA_SIZES | {
        'hidden_size': 3072, 'intermediate_size': 24_576, 'num_hidden_layers': 28,
        'num_attention_heads': 16, 'num_key_value_heads': 16},
    'gemma2': _GEMMA_SIZES | {
        'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
        'sliding_window': 4096, 'query_pre_attn_scalar': 256, 'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0},
    'gemma3_text': _GEMMA_SIZES | {
        'vocab_size': 262_208, 'hidden_size': 2304, 'intermediate_size': 9216,
        'num_hidden_layers': 26, 'sliding_window': 4096, 'query_pre_attn_scalar': 256,
        'attn_logit_softcapping': None, 'final_logit_softcapping': None,
        'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0},
}
_LLAMA_SIZES = {'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32,
                'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'hidden_act': 'silu',
                'tie_word_embeddings': False}
_LLAMA_DEFAULTS = {
    'llama': _LLAMA_SIZES | {'vocab_size': 32_000, 'intermediate_size': 11_008},
    'mistral': _LLAMA_SIZES | {
        'vocab_size': 32_000, 'intermediate_size': 14_336, 'num_key_value_heads': 8,
        'sliding_window': 4096},
    'qwen2': _LLAMA_SIZES | {
        'vocab_size': 151_936, 'intermediate_size': 22_016, 'num_key_value_heads': 32},
    'qwen3': _LLAMA_SIZES | {
        'vocab_size': 151_936, 'intermediate_size': 22_016, 'num_key_value_heads': 32,
        'head_dim': 128},
}
FAMILIES = (*_GEMMA_DEFAULTS, 'gemma3', *_LLAMA_DEFAULTS)

# Keys that our decoder has no choice for, with the values that it computes; others are refused.
_GEMMA_FIXED = {
    'attention_bias': (False,), 'tie_word_embeddings': (True,),
    'use_bidirectional_attention': (False, None), 'quantization_config': (None,),
    'hidden_activation': ('gelu_pytorch_tanh', None)}
_GEMMA_FIXED_IN = {
    'gemma': {'hidden_act': ('gelu_pytorch_tanh', 'gelu', None)},  # all mean the tanh form
    'gemma2': {},
    # transformers reads these keys and computes without them.
    'gemma3_text': {'attn_logit_softcapping': (None,)},
    'gemma3': {'attn_logit_softcapping': (None,), 'final_logit_softcapping': (None,)}}
_LLAMA_FIXED = {
    'attention_bias': (False,), 'mlp_bias': (False,), 'use_sliding_window': (False, None),
    'quantization_config': (None,), 'hidden_act': tuple(_ACTIVATIONS)}
_ANOTHER = 'give another decoder'  # the remedy where no edit of the file helps


def read_config(directory: Path) -> TransformerConfig:
  """Returns the architecture that config.json describes, or its text part if there are others.

  Raises:
    UserError: config.json is missing or damaged, or describes a model of none of FAMILIES.
  """
  path = Path(directory) / CONFIG
  if not path.is_file():
    raise UserError(f'{directory} holds weights but no {CONFIG}, which describes them: download '
                    'it, too')
  try:
    stored = json.loads(path.read_bytes())
    family = stored['model_type']
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{path} is damaged or has no model_type ({error}): download it '
                    'again') from error
  if family not in FAMILIES:
    raise UserError(f'{path}: model_type {family!r} is not supported; give one of '
                    f'{", ".join(FAMILIES)}')
  try:
    if family in _LLAMA_DEFAULTS:
      return _read_llama(family, stored)
    return _read_gemma(family, stored)
  except KeyError as error:
    raise UserError(f'{path} lacks {error}, or has an unknown value for it: download it '
                    'again') from error
  except UserError as error:
    raise UserError(f'{path} describes a decoder that is not supported: {error}') from error
  # A file of any content may have values of any type, for which arithmetic fails in many ways.
  except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
    raise UserError(f'{path} has a value of a wrong type ({error}): download it '
                    'again') from error


def _check_fixed(stored: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]]) -> None:
  """Refuses settings that our decoder would silently ignore."""
  for key, allowed in fixed.items():
    if stored.get(key, allowed[0]) not in allowed:
      raise UserError(f'{key} = {stored[key]!r}, only {" or ".join(map(repr, allowed))} is '
                      f'supported: {_ANOTHER}')


def _read_gemma(family: str, stored: Mapping[str, Any]) -> TransformerConfig:
  """Returns the architecture of Gemma 1, 2 or 3 for the keys of a file."""
  fixed = _GEMMA_FIXED | _GEMMA_FIXED_IN[family]
  if family == 'gemma3':
    text = stored.get('text_config', {})
    if not isinstance(text, dict):
      raise UserError(f'text_config = {text!r} is not a dictionary: download it again')
    # Settings of the whole model hold for its text part, too.
    stored = text | {key: stored[key] for key in fixed if key in stored}
    family = 'gemma3_text'
  _check_fixed(stored, fixed)
  stored = _GEMMA_DEFAULTS[family] | stored
  common = dict(
      vocab_size=stored['vocab_size'], embed_dim=stored['hidden_size'],
      num_layers=stored['num_hidden_layers'], num_heads=stored['num_attention_heads'],
      num_kv_heads=stored['num_key_value_heads'], head_dim=stored['head_dim'],
      hidden_dim=stored['intermediate_size'], norm_epsilon=stored['rms_norm_eps'],
      **_gemma_rotary(family, stored))
  if family == 'gemma':
    return TransformerConfig(**common, **GEMMA1)
  # Gemma 2 and 3. A scale of 1 / sqrt(H) is our default, written as None.
  scalar = stored['query_pre_attn_scalar']
  return TransformerConfig(
      **common, layer_pattern=_layer_pattern(family, stored), window=stored['sliding_window'],
      attention_softcap=stored['attn_logit_softcapping'],
      final_softcap=stored['final_logit_softcapping'],
      query_scale=None if scalar == stored['head_dim'] else scalar ** -0.5,
      qk_norm=family == 'gemma3_text')


def _gemma_rotary(family: str, stored: Mapping[str, Any]) -> dict[str, Any]:
  """Returns rotary settings. transformers 5 keeps them in dictionaries, 4 in single keys."""
  # Settings of full attention, from whichever keys the file has.
  parameters = stored.get('rope_parameters') or {}
  whole = {'rope_theta': stored['rope_theta'], **parameters.get('full_attention', parameters),
           **(stored.get('rope_scaling') or {})}
  # Only Gemma 3 has other settings for sliding layers.
  local = whole
  if family == 'gemma3_text':
    local = {'rope_theta': stored['rope_local_base_freq'],
             **parameters.get('sliding_attention', {})}
  scaling = _linear_factor(whole)
  if family != 'gemma' and _linear_factor(local) != 1:
    raise UserError(f'its sliding layers have scaled rotary embeddings ({local}), which only full '
                    f'attention may have: {_ANOTHER}')
  base, local_base = whole['rope_theta'], local['rope_theta']
  return {'rope_base': base, 'rope_local_base': None if local_base == base else local_base,
          'rope_scaling': scaling}


def _linear_factor(rope: Mapping[str, Any]) -> float:
  """Returns the factor that positions are divided by."""
  form = _rope_type(rope)
  if form not in ('default', 'linear'):
    raise UserError(f'rope_type = {form!r}, only default and linear are supported, and llama3 in '
                    f'the family of Llama: {_ANOTHER}')
  return float(rope['factor']) if form == 'linear' else 1.0


def _rope_type(rope: Mapping[str, Any]) -> str:
  """Returns the kind of scaling; old files keep it under another key."""
  return rope.get('rope_type', rope.get('type', 'default'))


def _layer_pattern(family: str, stored: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the shortest pattern that gives the kinds of all layers."""
  layers = stored['num_hidden_layers']
  check_integer('num_hidden_layers', layers, 1, MOST_LAYERS)  # before a list of so many is made
  if stored.get('layer_types'):
    unknown = set(stored['layer_types']) - set(_KINDS)
    if unknown:
      raise UserError(f'layer_types has {sorted(unknown)}, only {", ".join(_KINDS)} are '
                      f'supported: {_ANOTHER}')
    kinds = [_KINDS[kind] for kind in stored['layer_types']]
  else:
    # Without a list of kinds, every period-th layer is global.
    period = stored.get('sliding_window_pattern', 2 if family == 'gemma2' else 6)
    kinds = ['global' if (layer + 1) % period == 0 else 'local' for layer in range(layers)]
  if len(kinds) != layers:
    raise UserError(f'layer_types has {len(kinds)} entries, num_hidden_layers is {layers}: '
                    'download it again')
  return shortest_period(kinds)


def shortest_period(kinds: Sequence[str]) -> tuple[str, ...]:
  """Returns the shortest prefix that gives `kinds` when it is repeated and cut off."""
  for period in range(1, len(kinds) + 1):
    if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
      return tuple(kinds[:period])
  return tuple(kinds)


def _read_llama(family: str, stored: Mapping[str, Any]) -> TransformerConfig:
  """Returns the architecture of Llama, Mistral, Qwen 2 or Qwen 3 for the keys of a file."""
  _check_fixed(stored, _LLAMA_FIXED)
  stored = _LLAMA_DEFAULTS[family] | stored
  # Only Mistral has a sliding window, and all of its layers have it.
  if 'sliding_attention' in (stored.get('layer_types') or ()):
    raise UserError(f'layer_types has sliding_attention, which no {family} here has: {_ANOTHER}')
  window = stored['sliding_window'] if family == 'mistral' else None
  # Rotary settings. transformers 5 keeps all of them in rope_parameters.
  rope = {'rope_theta': stored['rope_theta'], **(stored.get('rope_scaling') or {}),
          **(stored.get('rope_parameters') or {})}
  is_llama3 = _rope_type(rope) == 'llama3'
  scaling = 1.0 if is_llama3 else _linear_factor(rope)
  if window and (is_llama3 or scaling != 1):
    raise UserError(f'its sliding layers have scaled rotary embeddings ({rope}), which only full '
                    f'attention may have: {_ANOTHER}')
  # Two keys may be null in a file: transformers then computes them from the others.
  heads = stored['num_attention_heads']
  return TransformerConfig(
      vocab_size=stored['vocab_size'], embed_dim=stored['hidden_size'],
      num_layers=stored['num_hidden_layers'], num_heads=heads,
      num_kv_heads=stored.get('num_key_value_heads') or heads,
      head_dim=stored.get('head_dim') or stored['hidden_size'] // heads,
      hidden_dim=stored['intermediate_size'], norm_epsilon=stored['rms_norm_eps'],
      **LLAMA | {'layer_pattern': ('local',) if window else ('global',)}, window=window or 4096,
      activation=_ACTIVATIONS[stored['hidden_act']], qk_norm=family == 'qwen3',
      qkv_bias=family == 'qwen2', tied_head=stored['tie_word_embeddings'],
      rope_base=rope['rope_theta'], rope_scaling=scaling,
      rope_llama3=tuple(rope[key] for key in _LLAMA3_KEYS) if is_llama3 else ())


def write_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of a config.json for transformers 4 and 5.

  Args:
    config: architecture.
    dtype: name of the dtype of the stored weights.

  Raises:
    UserError: no model of FAMILIES has this combination of features.
  """
  content = _write_gemma(config) if config.norm_offset else _write_llama(config)
  # Versions of transformers read one of the two keys of the dtype.
  return content | {
      'dtype': dtype, 'torch_dtype': dtype, 'vocab_size': config.vocab_size,
      'hidden_size': config.embed_dim, 'intermediate_size': config.hidden_dim,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'rms_norm_eps': config.norm_epsilon, 'rope_theta': config.rope_base,
      'tie_word_embeddings': config.tied_head}


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of Gemma 1, 2 or 3 besides those that every family has."""
  family = _gemma_family(config)
  # transformers stores the scale of queries as an integer, 1 / scale^2.
  scalar = config.head_dim if config.query_scale is None else config.query_scale ** -2
  if abs(scalar - round(scalar)) > 1e-9 * scalar:
    raise UserError(f'query_scale = {config.query_scale} is not 1 / sqrt of an integer, as '
                    "transformers' query_pre_attn_scalar must be: write format 'native'")
  # Versions read one of the two keys of the activation.
  content = {
      'architectures': [{'gemma': 'GemmaForCausalLM', 'gemma2': 'Gemma2ForCausalLM',
                         'gemma3_text': 'Gemma3ForCausalLM'}[family]],
      'model_type': family, 'hidden_activation': 'gelu_pytorch_tanh',
      'hidden_act': 'gelu_pytorch_tanh', 'attention_bias': False, 'attention_dropout': 0.0,
      'pad_token_id': 0, 'eos_token_id': 1, 'bos_token_id': 2}
  if family == 'gemma':
    return content
  # Gemma 2 and 3 also have windows, caps and two kinds of layers.
  names = {kind: name for name, kind in _KINDS.items()}
  content |= {
      'query_pre_attn_scalar': round(scalar), 'sliding_window': config.window,
      'attn_logit_softcapping': config.attention_softcap,
      'final_logit_softcapping': config.final_softcap,
      'layer_types': [names[kind] for kind in config.layer_kinds]}
  if family == 'gemma2':
    return content
  # Gemma 3. transformers 4 reads the first two keys, transformers 5 the third.
  local_base = config.rope_base if config.rope_local_base is None else config.rope_local_base
  scaling = _linear_scaling(config)
  return content | {
      'rope_local_base_freq': local_base, 'rope_scaling': scaling,
      'rope_parameters': {
          'full_attention': {'rope_theta': config.rope_base,
                             **(scaling or {'rope_type': 'default'})},
          'sliding_attention': {'rope_theta': local_base, 'rope_type': 'default'}}}


def _linear_scaling(config: TransformerConfig) -> dict[str, Any] | None:
  """Returns the dictionary of a linear scaling of positions; None for none."""
  if config.rope_scaling == 1:
    return None
  return {'rope_type': 'linear', 'factor': config.rope_scaling}


def _has_plain_scale(config: TransformerConfig) -> bool:
  """Whether queries are scaled by 1 / sqrt(H)."""
  return config.query_scale is None or config.query_scale == config.head_dim ** -0.5


def _gemma_family(config: TransformerConfig) -> str:
  """Returns the model_type of the Gemma that has this config's features."""
  # Each Gemma allows only some features.
  plain_rotary = config.rope_local_base is None and config.rope_scaling == 1
  if unlike_gemma(config):
    pass
  elif config.post_norms and config.qk_norm and config.attention_softcap is None:
    return 'gemma3_text'
  elif config.post_norms and not config.qk_norm and plain_rotary:
    return 'gemma2'
  elif (not config.post_norms and not config.qk_norm and plain_rotary
        and _has_plain_scale(config) and set(config.layer_kinds) == {'global'}
        and config.attention_softcap is config.final_softcap is None):
    return 'gemma'
  raise UserError(f"no Gemma has the features of {config}: write format 'native'")


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
  """Returns the keys of Llama, Mistral, Qwen 2 or Qwen 3 besides those that every family has."""
  family = _llama_family(config)
  # transformers 4 reads rope_scaling, transformers 5 rope_parameters.
  scaling = _linear_scaling(config)
  if config.rope_llama3:
    scaling = {'rope_type': 'llama3', **dict(zip(_LLAMA3_KEYS, config.rope_llama3, strict=True))}
    scaling['original_max_position_embeddings'] = int(config.rope_llama3[3])
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  content = {
      'architectures': [{'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
                         'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}[family]],
      # Not known here; transformers would take 1 and 2. Those that end a text are beside it.
      'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None,
      'model_type': family, 'hidden_act': names[config.activation], 'rope_scaling': scaling,
      'rope_parameters': {'rope_theta': config.rope_base, **(scaling or {'rope_type': 'default'})}}
  if family == 'mistral':
    content['sliding_window'] = config.window
  return content


def _llama_family(config: TransformerConfig) -> str:
  """Returns the model_type of the Llama, Mistral or Qwen that has this config's features."""
  kinds = set(config.layer_kinds)
  plain_rotary = config.rope_scaling == 1 and not config.rope_llama3
  # Norms, caps and scales that only Gemma has.
  if (config.attention_softcap is config.final_softcap is config.rope_local_base is None
      and _has_plain_scale(config) and not config.post_norms and not config.scale_embeddings
      and not (config.rope_llama3 and config.rope_scaling != 1)):
    # Each family allows only some features.
    if kinds == {'local'} and plain_rotary and not config.qk_norm and not config.qkv_bias:
      return 'mistral'
    if kinds == {'global'} and not (config.qk_norm and config.qkv_bias):
      return 'qwen3' if config.qk_norm else 'qwen2' if config.qkv_bias else 'llama'
  raise UserError(f"no Llama, Mistral or Qwen has the features of {config}: write format 'native'")
