"""Hugging Face directories of Gemma 1, 2 and 3: tensor names, config.json in and out, and a writer.

safetensors_io.py reads and writes the files themselves.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import traverse_util

from latent_deliberation.array_types import Params
from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.layout import LAYERED, Entry, Layout, parameter_axes
from latent_deliberation.model.checkpoints.safetensors_io import FILE_BYTES, gather, write_tensors
from latent_deliberation.model.checkpoints.source import Source
from latent_deliberation.model.transformer_config import TransformerConfig

# Prefixes of the decoder in a multimodal checkpoint, from transformers 4 and 5.
_MULTIMODAL = ('language_model.model.', 'model.language_model.')
_OTHER_PARTS = ('vision_tower.', 'multi_modal_projector.', 'model.vision_tower.',
                'model.multi_modal_projector.')
_HEAD, _TABLE = 'lm_head.weight', 'model.embed_tokens.weight'

CONFIG = 'config.json'
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
_LLAMA3_KEYS = ('factor', 'low_freq_factor', 'high_freq_factor',
                'original_max_position_embeddings')
_KINDS = {'sliding_attention': 'local', 'full_attention': 'global'}
# The defaults of transformers for keys that a config.json leaves out, by model_type.
_SIZES = {'vocab_size': 256_000, 'num_attention_heads': 8, 'num_key_value_heads': 4,
          'head_dim': 256, 'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0}
_DEFAULTS = {
    'gemma': _SIZES | {
        'hidden_size': 3072, 'intermediate_size': 24_576, 'num_hidden_layers': 28,
        'num_attention_heads': 16, 'num_key_value_heads': 16},
    'gemma2': _SIZES | {
        'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
        'sliding_window': 4096, 'query_pre_attn_scalar': 256, 'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0},
    'gemma3_text': _SIZES | {
        'vocab_size': 262_208, 'hidden_size': 2304, 'intermediate_size': 9216,
        'num_hidden_layers': 26, 'sliding_window': 4096, 'query_pre_attn_scalar': 256,
        'attn_logit_softcapping': None, 'final_logit_softcapping': None,
        'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0},
}
_LLAMA_SIZES = {'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32,
                'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'hidden_act': 'silu',
                'tie_word_embeddings': False}
# Families without Gemma's 1 + scale, embedding scale and norms after attention and feed-forward.
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
FAMILIES = (*_DEFAULTS, 'gemma3', *_LLAMA_DEFAULTS)
# Keys that our decoder has no choice for, with the values that it computes; others are refused.
_FIXED = {
    'attention_bias': (False,), 'tie_word_embeddings': (True,),
    'use_bidirectional_attention': (False, None), 'quantization_config': (None,),
    'hidden_activation': ('gelu_pytorch_tanh', None)}
_FIXED_IN = {
    'gemma': {'hidden_act': ('gelu_pytorch_tanh', 'gelu', None)},  # all mean the tanh form
    'gemma2': {},
    # transformers reads these keys and computes without them.
    'gemma3_text': {'attn_logit_softcapping': (None,)},
    'gemma3': {'attn_logit_softcapping': (None,), 'final_logit_softcapping': (None,)}}


def plain_name(name: str) -> str:
  """Returns the name of a tensor as a checkpoint without vision has it."""
  for prefix in _MULTIMODAL:
    if name.startswith(prefix):
      return 'model.' + name.removeprefix(prefix)
  return _HEAD if name == f'language_model.{_HEAD}' else name


def is_foreign(name: str) -> bool:
  """Whether a tensor is not a parameter of the decoder: vision, the tied head, rotary buffers."""
  return (name.startswith(_OTHER_PARTS) or name == _HEAD
          or name.endswith('rotary_emb.inv_freq'))


def find_layout(config: TransformerConfig) -> Layout:
  """Returns the layout of a checkpoint of this architecture."""
  layer = 'model.layers.{}.'
  norms = {'attention_in': 'input_layernorm'}
  if config.post_norms:
    norms |= {'attention_out': 'post_attention_layernorm',
              'feed_forward_in': 'pre_feedforward_layernorm',
              'feed_forward_out': 'post_feedforward_layernorm'}
  else:  # Gemma 1 names the same norm by its place after attention
    norms |= {'feed_forward_in': 'post_attention_layernorm'}
  # Each layer: projections, then norms.
  block = {
      'attention/query/w': Entry(layer + 'self_attn.q_proj.weight', '(N H) D'),
      'attention/key/w': Entry(layer + 'self_attn.k_proj.weight', '(K H) D'),
      'attention/value/w': Entry(layer + 'self_attn.v_proj.weight', '(K H) D'),
      'attention/out/w': Entry(layer + 'self_attn.o_proj.weight', 'D (N H)'),
      'feed_forward/gate/w': Entry(layer + 'mlp.gate_proj.weight', 'F D'),
      'feed_forward/up/w': Entry(layer + 'mlp.up_proj.weight', 'F D'),
      'feed_forward/down/w': Entry(layer + 'mlp.down_proj.weight', 'D F')}
  block |= {f'{ours}/scale': Entry(f'{layer}{theirs}.weight', 'D')
            for ours, theirs in norms.items()}
  if config.qk_norm:
    block |= {'attention/query_norm/scale': Entry(layer + 'self_attn.q_norm.weight', 'H'),
              'attention/key_norm/scale': Entry(layer + 'self_attn.k_norm.weight', 'H')}
  if config.qkv_bias:
    block |= {f'attention/{ours}/b': Entry(f'{layer}self_attn.{ours[0]}_proj.bias', axes)
              for ours, axes in (('query', '(N H)'), ('key', '(K H)'), ('value', '(K H)'))}
  head = {} if config.tied_head else {'embedder/head': Entry(_HEAD, 'V D')}
  # The whole tree: the tables, the layers and the last norm.
  return {'embedder/table': Entry(_TABLE, 'V D'), **head,
          **{LAYERED + path: entry for path, entry in block.items()},
          'transformer/final_norm/scale': Entry('model.norm.weight', 'D')}


def check_head(source: Source) -> None:
  """Raises UserError if the checkpoint has an output head that differs from the embedding.

  Some writers store the tied head, too. A head with weights of its own is not Gemma.
  """
  if _HEAD not in source.tensors or _TABLE not in source.tensors:
    return
  head, table = source.tensors[_HEAD], source.tensors[_TABLE]
  # Shape and dtype are compared first. Values are read only if both agree.
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if head != table or not jnp.array_equal(*(
      source.read(name, table.shape, device) for name in (_HEAD, _TABLE)), equal_nan=True):
    raise UserError(f'{source.directory}: {_HEAD} {list(head.shape)} is not equal to {_TABLE} '
                    f'{list(table.shape)}; a Gemma has one table for both, so give another decoder')


def read_config(directory: Path) -> TransformerConfig:
  """Returns the architecture that config.json describes, or its text part if there are others.

  Raises:
    UserError: config.json is missing or damaged, or describes another model than Gemma 1, 2 or 3.
  """
  path = Path(directory) / CONFIG
  if not path.is_file():
    raise UserError(f'{directory} holds weights but no {CONFIG}, which describes them: download '
                    'it, too')
  try:
    stored = json.loads(path.read_text())
    family = stored['model_type']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or has no model_type ({error}): download it '
                    'again') from error
  if family not in FAMILIES:
    raise UserError(f'{path}: model_type {family!r} is not supported; give one of '
                    f'{", ".join(FAMILIES)}')
  if family in _LLAMA_DEFAULTS:
    return _read_llama(path, family, stored)
  fixed = _FIXED | _FIXED_IN[family]
  if family == 'gemma3':
    text = stored.get('text_config', {})
    if not isinstance(text, dict):
      raise UserError(f'{path}: text_config = {text!r} is not a dictionary: download it again')
    # Settings of the whole model hold for its text part, too.
    stored = text | {key: stored[key] for key in fixed if key in stored}
    family = 'gemma3_text'
  # Refuse settings that our decoder would silently ignore.
  for key, allowed in fixed.items():
    if stored.get(key, allowed[0]) not in allowed:
      raise UserError(f'{path}: {key} = {stored[key]!r} is not supported, only {allowed[0]!r}')
  try:
    return _config(family, _DEFAULTS[family] | stored)
  except KeyError as error:
    raise UserError(f'{path} lacks {error}, or has an unknown value for it') from error
  # A file of any content may have values of any type, for which arithmetic fails in many ways.
  except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
    raise UserError(f'{path} describes a decoder that is not supported: {error}') from error


# What a config.json of the llama family may say where our decoder has no choice.
_LLAMA_FIXED = {'attention_bias': (False,), 'mlp_bias': (False,), 'use_sliding_window': (False,),
                'quantization_config': (None,), 'hidden_act': tuple(_ACTIVATIONS)}


def _read_llama(path: Path, family: str, stored: Mapping[str, Any]) -> TransformerConfig:
  """The architecture of Llama, Mistral, Qwen 2 or Qwen 3."""
  stored = _LLAMA_DEFAULTS[family] | stored
  for key, allowed in _LLAMA_FIXED.items():
    if stored.get(key, allowed[0]) not in allowed:
      raise UserError(f'{path}: {key} = {stored[key]!r} is not supported, only {allowed} is')
  try:
    heads = stored['num_attention_heads']
    rope = {'rope_theta': stored['rope_theta'], **(stored.get('rope_scaling') or {}),
            **(stored.get('rope_parameters') or {})}
    is_llama3 = rope.get('rope_type', rope.get('type')) == 'llama3'
    window = stored.get('sliding_window') if family == 'mistral' else None
    return TransformerConfig(
        vocab_size=stored['vocab_size'], embed_dim=stored['hidden_size'],
        num_layers=stored['num_hidden_layers'], num_heads=heads,
        num_kv_heads=stored.get('num_key_value_heads') or heads,
        head_dim=stored.get('head_dim') or stored['hidden_size'] // heads,
        hidden_dim=stored['intermediate_size'], norm_epsilon=stored['rms_norm_eps'],
        layer_pattern=('local',) if window else ('global',), window=window or 4096,
        attention_softcap=None, final_softcap=None, post_norms=False, norm_offset=False,
        activation=_ACTIVATIONS[stored['hidden_act']], scale_embeddings=False,
        qk_norm=family == 'qwen3', qkv_bias=family == 'qwen2',
        tied_head=stored['tie_word_embeddings'], rope_base=rope['rope_theta'],
        rope_scaling=1.0 if is_llama3 else _linear_factor(rope),
        rope_llama3=tuple(rope[key] for key in _LLAMA3_KEYS) if is_llama3 else ())
  except KeyError as error:
    raise UserError(f'{path} lacks {error}: download it again') from error
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f'{path} describes no decoder of ours: {error}') from error


def _config(family: str, stored: Mapping[str, Any]) -> TransformerConfig:
  """Returns the config for the keys of a file, with defaults filled in."""
  common = dict(
      vocab_size=stored['vocab_size'], embed_dim=stored['hidden_size'],
      num_layers=stored['num_hidden_layers'], num_heads=stored['num_attention_heads'],
      num_kv_heads=stored['num_key_value_heads'], head_dim=stored['head_dim'],
      hidden_dim=stored['intermediate_size'], norm_epsilon=stored['rms_norm_eps'],
      **_rotary(family, stored))
  if family == 'gemma':
    return TransformerConfig(**common, layer_pattern=('global',), attention_softcap=None,
                             final_softcap=None, post_norms=False)
  # Gemma 2 and 3. A scale of 1 / sqrt(H) is our default, written as None.
  scalar = stored['query_pre_attn_scalar']
  return TransformerConfig(
      **common, layer_pattern=_layer_pattern(family, stored), window=stored['sliding_window'],
      attention_softcap=stored['attn_logit_softcapping'],
      final_softcap=stored['final_logit_softcapping'],
      query_scale=None if scalar == stored['head_dim'] else scalar ** -0.5,
      qk_norm=family == 'gemma3_text')


def _rotary(family: str, stored: Mapping[str, Any]) -> dict[str, Any]:
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
    raise UserError('its sliding layers have scaled rotary embeddings, which are supported only '
                    'for full attention')
  base, local_base = whole['rope_theta'], local['rope_theta']
  return {'rope_base': base, 'rope_local_base': None if local_base == base else local_base,
          'rope_scaling': scaling}


def _linear_factor(rope: Mapping[str, Any]) -> float:
  """Returns the factor that positions are divided by."""
  form = rope.get('rope_type', rope.get('type', 'default'))
  if form not in ('default', 'linear'):
    raise UserError(f'rope_type = {form!r}: only default and linear are supported')
  return float(rope['factor']) if form == 'linear' else 1.0


def _layer_pattern(family: str, stored: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the shortest pattern that gives the kinds of all layers."""
  layers = stored['num_hidden_layers']
  if stored.get('layer_types'):
    unknown = set(stored['layer_types']) - set(_KINDS)
    if unknown:
      raise UserError(f'layer_types has {sorted(unknown)}: only {", ".join(_KINDS)} are supported')
    kinds = [_KINDS[kind] for kind in stored['layer_types']]
  else:
    # Without a list of kinds, every period-th layer is global.
    period = stored.get('sliding_window_pattern', 2 if family == 'gemma2' else 6)
    kinds = ['global' if (layer + 1) % period == 0 else 'local' for layer in range(layers)]
  if len(kinds) != layers:
    raise UserError(f'layer_types has {len(kinds)} entries, num_hidden_layers is {layers}')
  return shortest_period(kinds)


def shortest_period(kinds: Sequence[str]) -> tuple[str, ...]:
  """Returns the shortest prefix that gives `kinds` when it is repeated and cut off."""
  for period in range(1, len(kinds) + 1):
    if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
      return tuple(kinds[:period])
  return tuple(kinds)


def write_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """Returns the content of a config.json for transformers 4 and 5.

  Raises:
    UserError: no Gemma in transformers has this combination of features.
  """
  if not config.norm_offset:
    return _write_llama(config, dtype)
  family = _family(config)
  # transformers stores the scale of queries as an integer, 1 / scale^2.
  scalar = config.head_dim if config.query_scale is None else config.query_scale ** -2
  if abs(scalar - round(scalar)) > 1e-9 * scalar:
    raise UserError(f'query_scale = {config.query_scale} is not 1 / sqrt of an integer, as '
                    "transformers' query_pre_attn_scalar must be: write format 'native'")
  local_base = config.rope_base if config.rope_local_base is None else config.rope_local_base
  linear = {'rope_type': 'linear', 'factor': config.rope_scaling}
  scaling = {'rope_type': 'default'} if config.rope_scaling == 1 else linear
  # Keys of every Gemma. Versions read one of dtype and torch_dtype, and of the two activations.
  content = {
      'architectures': [{'gemma': 'GemmaForCausalLM', 'gemma2': 'Gemma2ForCausalLM',
                         'gemma3_text': 'Gemma3ForCausalLM'}[family]],
      'model_type': family, 'dtype': dtype, 'torch_dtype': dtype, 'vocab_size': config.vocab_size,
      'hidden_size': config.embed_dim, 'intermediate_size': config.hidden_dim,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'rms_norm_eps': config.norm_epsilon, 'rope_theta': config.rope_base,
      'hidden_activation': 'gelu_pytorch_tanh', 'hidden_act': 'gelu_pytorch_tanh',
      'attention_bias': False, 'attention_dropout': 0.0, 'tie_word_embeddings': True,
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
  if family == 'gemma3_text':
    content |= {
        # transformers 4 reads the first two keys, transformers 5 the third.
        'rope_local_base_freq': local_base,
        'rope_scaling': None if config.rope_scaling == 1 else linear,
        'rope_parameters': {
            'full_attention': {'rope_theta': config.rope_base, **scaling},
            'sliding_attention': {'rope_theta': local_base, 'rope_type': 'default'}}}
  return content


def _write_llama(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """Content of a config.json of Llama, Mistral, Qwen 2 or Qwen 3."""
  windowed = set(config.layer_kinds) == {'local'}
  family = ('qwen3' if config.qk_norm else 'qwen2' if config.qkv_bias else
            'mistral' if windowed else 'llama')
  expected = TransformerConfig(**{
      **dataclasses.asdict(config), 'layer_pattern': ('local',) if windowed else ('global',),
      'attention_softcap': None, 'final_softcap': None, 'query_scale': None, 'post_norms': False,
      'rope_local_base': None, 'scale_embeddings': False, 'qk_norm': family == 'qwen3',
      'qkv_bias': family == 'qwen2'})
  if dataclasses.replace(config, layer_pattern=expected.layer_pattern) != expected or (
      windowed and family != 'mistral') or (
          not windowed and set(config.layer_kinds) != {'global'}):
    raise UserError(f'no Llama, Mistral or Qwen has the features of {config}: write it in our own '
                    'format')
  scaling = None
  if config.rope_llama3:
    scaling = {'rope_type': 'llama3', **dict(zip(_LLAMA3_KEYS, config.rope_llama3, strict=True))}
    scaling['original_max_position_embeddings'] = int(config.rope_llama3[3])
  elif config.rope_scaling != 1:
    scaling = {'rope_type': 'linear', 'factor': config.rope_scaling}
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  content = {
      'architectures': [{'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
                         'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}[family]],
      'model_type': family, 'dtype': dtype, 'torch_dtype': dtype, 'vocab_size': config.vocab_size,
      'hidden_size': config.embed_dim, 'intermediate_size': config.hidden_dim,
      'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads, 'head_dim': config.head_dim,
      'rms_norm_eps': config.norm_epsilon, 'rope_theta': config.rope_base,
      'rope_scaling': scaling,
      'rope_parameters': {'rope_theta': config.rope_base, **(scaling or {'rope_type': 'default'})},
      'hidden_act': names[config.activation], 'tie_word_embeddings': config.tied_head}
  if family == 'mistral':
    content['sliding_window'] = config.window
  return content


def _family(config: TransformerConfig) -> str:
  """Returns the model_type of the Gemma that has this config's features."""
  # Each Gemma allows only some features.
  plain_rotary = config.rope_local_base is None and config.rope_scaling == 1
  plain_scale = config.query_scale is None or config.query_scale == config.head_dim ** -0.5
  if config.post_norms and config.qk_norm and config.attention_softcap is None:
    return 'gemma3_text'
  if config.post_norms and not config.qk_norm and plain_rotary:
    return 'gemma2'
  if (not config.post_norms and not config.qk_norm and plain_rotary and plain_scale
      and set(config.layer_kinds) == {'global'}
      and config.attention_softcap is config.final_softcap is None):
    return 'gemma'
  raise UserError(f"no Gemma has the features of {config}: write format 'native'")


def write(directory: Path, config: TransformerConfig, params: Params,
          file_bytes: int = FILE_BYTES) -> None:
  """Writes config.json and safetensors into an empty directory, bit by bit.

  Process 0 writes. Every process must call this, because it gathers shards.

  Args:
    directory: empty directory.
    config: architecture.
    params: parameters.
    file_bytes: largest size of a file.
  """
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  content = write_config(config, dtypes.pop() if len(dtypes) == 1 else 'float32')
  layout = find_layout(config)
  write_tensors(directory, 'model', _sizes(layout, config, params),
                _tensors(layout, config, params), file_bytes)
  if jax.process_index() == 0:
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + '\n')


def _sizes(layout: Layout, config: TransformerConfig, params: Params) -> dict[str, int]:
  """Returns the bytes of every tensor, in the order of `_tensors`."""
  flat = traverse_util.flatten_dict(params, sep='/')
  sizes = {}
  for path, entry in layout.items():
    layers = config.num_layers if path.startswith(LAYERED) else 1
    for layer in range(layers):
      sizes[entry.name.format(layer)] = flat[path].nbytes // layers
  return sizes


def _tensors(layout: Layout, config: TransformerConfig,
             params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the name and value of every tensor, gathered on the host one at a time."""
  flat, axes = traverse_util.flatten_dict(params, sep='/'), parameter_axes(config)
  for path, entry in layout.items():
    layered = path.startswith(LAYERED)
    for layer in range(config.num_layers if layered else 1):
      piece = gather(flat[path][layer] if layered else flat[path])
      yield entry.name.format(layer), rearrange(piece, f'{axes[path]} -> {entry.axes}')
