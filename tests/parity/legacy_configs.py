"""The config.json of a golden in the form of transformers 4, which Gemma has on the hub."""

from typing import Any

_NEW = ('dtype', 'layer_types', 'rope_parameters', 'tie_word_embeddings',
        'use_bidirectional_attention', '_sliding_window_pattern')
# Defaults of transformers 4 that published configs of Gemma 3 with a vision tower leave out.
_DEFAULTS = {
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'rope_theta': 1e6, 'rms_norm_eps': 1e-6,
    'rope_local_base_freq': 1e4, 'sliding_window_pattern': 6, 'attn_logit_softcapping': None,
    'final_logit_softcapping': None, 'hidden_activation': 'gelu_pytorch_tanh', 'use_cache': True,
    'attention_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02,
    'bos_token_id': 2, 'eos_token_id': 1, 'pad_token_id': 0}


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of transformers 4 for a model, from the config of transformers 5.

  Raises:
    ValueError: transformers 4 cannot express its layer types.
  """
  kind = config['model_type']
  if kind == 'gemma3':
    text = legacy_config(config['text_config'])
    sparse = {key: value for key, value in text.items()
              if key not in _DEFAULTS or value != _DEFAULTS[key]}
    del sparse['torch_dtype'], sparse['transformers_version']
    return _header(config) | {'text_config': sparse}
  legacy = _header(config)
  rope = config['rope_parameters']
  if kind == 'gemma3_text':
    legacy['sliding_window_pattern'] = 6
    legacy['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope = rope['full_attention']
  legacy['rope_theta'] = rope['rope_theta']
  legacy['rope_scaling'] = None
  if rope['rope_type'] != 'default':
    legacy['rope_scaling'] = {key: value for key, value in rope.items() if key != 'rope_theta'}
  if kind in ('llama', 'mistral', 'qwen2', 'qwen3'):
    return dict(sorted((legacy | {'tie_word_embeddings': config['tie_word_embeddings']}).items()))
  if kind == 'gemma':  # the name of the exact GELU, with which it computed the tanh form
    legacy['hidden_act'] = 'gelu'
  period = {'gemma': 0, 'gemma2': 2, 'gemma3_text': 6}[kind]
  expected = ['full_attention' if i % period == period - 1 else 'sliding_attention'
              for i in range(config['num_hidden_layers'])] if period else None
  if config.get('layer_types') != expected:
    raise ValueError(f'layer_types = {config["layer_types"]}: a {kind} of transformers 4 has '
                     f'{expected}')
  return dict(sorted(legacy.items()))


def _header(config: dict[str, Any]) -> dict[str, Any]:
  """The keys that both versions share, and the two that every config has."""
  kept = {key: value for key, value in config.items() if key not in _NEW}
  return kept | {'torch_dtype': 'float32', 'transformers_version': '4.50.0.dev0'}
