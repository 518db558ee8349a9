"""The config.json of a golden as transformers 4 wrote it, which is how the hub has Gemma."""

from typing import Any

_NEW = ('dtype', 'layer_types', 'rope_parameters', 'tie_word_embeddings',
        'use_bidirectional_attention', '_sliding_window_pattern')
# What the published configs of the Gemma 3 with a vision tower leave to transformers 4.
_TAKEN_FOR_GRANTED = {
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'rope_theta': 1e6, 'rms_norm_eps': 1e-6,
    'rope_local_base_freq': 1e4, 'sliding_window_pattern': 6, 'attn_logit_softcapping': None,
    'final_logit_softcapping': None, 'hidden_activation': 'gelu_pytorch_tanh', 'use_cache': True,
    'attention_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02,
    'bos_token_id': 2, 'eos_token_id': 1, 'pad_token_id': 0}


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
  """What transformers 4 would have written for a model, from what transformers 5 has written.

  Raises:
    ValueError: transformers 4 had no words for its layer types.
  """
  kind = config['model_type']
  if kind == 'gemma3':
    text = legacy_config(config['text_config'])
    sparse = {key: value for key, value in text.items()
              if key not in _TAKEN_FOR_GRANTED or value != _TAKEN_FOR_GRANTED[key]}
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
  if rope['rope_type'] == 'linear':
    legacy['rope_scaling'] = {'factor': rope['factor'], 'rope_type': 'linear'}
  if kind == 'gemma':  # GELU's exact form by name, its tanh form by deed
    legacy['hidden_act'] = 'gelu'
  period = {'gemma': 0, 'gemma2': 2, 'gemma3_text': 6}[kind]
  expected = ['full_attention' if i % period == period - 1 else 'sliding_attention'
              for i in range(config['num_hidden_layers'])] if period else None
  if config.get('layer_types') != expected:
    raise ValueError(f'layer_types = {config["layer_types"]}: before transformers 5 a {kind} had '
                     f'{expected}')
  return dict(sorted(legacy.items()))


def _header(config: dict[str, Any]) -> dict[str, Any]:
  """The keys that stayed as they were, and the two that every config has."""
  kept = {key: value for key, value in config.items() if key not in _NEW}
  return kept | {'torch_dtype': 'float32', 'transformers_version': '4.50.0.dev0'}
