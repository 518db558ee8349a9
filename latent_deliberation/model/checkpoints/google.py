"""Orbax checkpoints of Google's gemma library: names, layouts, and their architecture."""

import dataclasses
from collections.abc import Mapping

from latent_deliberation.errors import UnknownSizesError, UserError
from latent_deliberation.model.checkpoints.layout import LAYERED, Entry, Layout, stored_shape
from latent_deliberation.model.checkpoints.source import Stored
from latent_deliberation.model.transformer_config import (
  PRESETS,
  TransformerConfig,
  unlike_gemma,
)

TABLE = 'embedder/input_embedding'  # padded with rows that no token uses
# Prefixes of the other parts of a multimodal checkpoint.
_OTHER_PARTS = ('vision_encoder/', 'SigLiPFromPatches_0/', 'embedder/mm_')


def plain_name(name: str) -> str:
  """Returns the name of an array in the form that all versions of the library share.

  Flat trees hold 'transformer/layer_0/attn/q_einsum' as one key. Nested trees may lack the first
  part. Some versions keep a matrix under a further key 'w'.
  """
  for prefix in ('params/', 'transformer/'):
    name = name.removeprefix(prefix)
  return name.removesuffix('/w').replace('/_query_norm', '/query_norm').replace('/_key_norm',
                                                                              '/key_norm')


def is_foreign(name: str) -> bool:
  """Whether a tensor belongs to another part than the decoder."""
  return name.startswith(_OTHER_PARTS)


def find_config(tensors: Mapping[str, Stored], origin: str) -> TransformerConfig:
  """Returns the preset of the checkpoint's sizes. It also gives what shapes do not show.

  Args:
    tensors: tensors of the checkpoint, by plain name.
    origin: directory of the checkpoint, for messages.

  Raises:
    UnknownSizesError: no preset has these sizes; the message lists the presets.
  """
  found = _sizes(tensors, origin)
  for config in PRESETS.values():
    same = all(getattr(config, name) == size for name, size in found.items())
    if same and config.qk_norm == ('layer_0/attn/query_norm/scale' in tensors):
      # A table may be padded with unused rows, or have fewer rows than the preset.
      rows = tensors[TABLE].shape[0] if TABLE in tensors else config.vocab_size
      return dataclasses.replace(config, vocab_size=min(config.vocab_size, rows))
  known = '\n'.join(
      f'  {name}: ' + ', '.join(f'{key} {getattr(config, key)}' for key in found)
      for name, config in PRESETS.items())
  raise UnknownSizesError(
      f'{origin} holds a decoder of ' + ', '.join(f'{key} {size}' for key, size in found.items())
      + f'. No preset has these sizes, and the format does not store the rest:\n{known}\n'
      'Pass your TransformerConfig to weights.load(..., config=...)')


def _sizes(tensors: Mapping[str, Stored], origin: str) -> dict[str, int]:
  """Returns the sizes that shapes show."""
  out, down = 'layer_0/attn/attn_vec_einsum', 'layer_0/mlp/linear'
  shared = 'layer_0/attn/kv_einsum'
  ranks = {out: 3, down: 2} | ({shared: 4} if shared in tensors else {})
  for name, rank in ranks.items():
    if name not in tensors or len(tensors[name].shape) != rank:
      raise UserError(f"{origin} is an orbax checkpoint, but not of Google's gemma library: it "
                      f'has no {name} of {rank} axes. It holds {sorted(tensors)[:8]} ... Give '
                      'another directory')
  # One layer shows all sizes. Without a shared tensor, each head has its own keys.
  layers = {name.split('/')[0] for name in tensors if name.startswith('layer_')}
  heads, head_dim, width = tensors[out].shape
  hidden = tensors[down].shape[0]
  kv_heads = tensors[shared].shape[1] if shared in tensors else heads
  return {'embed_dim': width, 'num_layers': len(layers), 'num_heads': heads,
          'num_kv_heads': kv_heads, 'head_dim': head_dim, 'hidden_dim': hidden}


def find_layout(config: TransformerConfig, tensors: Mapping[str, Stored]) -> Layout:
  """Returns the layout of this checkpoint.

  Versions of the library differ in the order of two axes of the gate. They store query, key and
  value as one tensor if the numbers of heads are equal.

  Raises:
    UserError: the config has a feature that no Gemma has, so this format cannot store it.
  """
  if unlike_gemma(config):
    raise UserError(f'a checkpoint of Google holds a Gemma, but the config has '
                    f'{unlike_gemma(config)}: give the config of a Gemma')
  # Attention: one tensor for query, key and value, or one for the query and one for the others.
  if 'layer_0/attn/qkv_einsum' in tensors:
    attention = {'query': Entry('layer_{}/attn/qkv_einsum', 'N D H', 0, 3),
                 'key': Entry('layer_{}/attn/qkv_einsum', 'K D H', 1, 3),
                 'value': Entry('layer_{}/attn/qkv_einsum', 'K D H', 2, 3)}
  else:
    attention = {'query': Entry('layer_{}/attn/q_einsum', 'N D H'),
                 'key': Entry('layer_{}/attn/kv_einsum', 'K D H', 0, 2),
                 'value': Entry('layer_{}/attn/kv_einsum', 'K D H', 1, 2)}
  attention['out'] = Entry('layer_{}/attn/attn_vec_einsum', 'N H D')
  # Feed-forward and norms. One tensor holds gate and up.
  gate = 'F D' if _gate_is_transposed(config, tensors) else 'D F'
  block = {f'attention/{name}/w': entry for name, entry in attention.items()} | {
      'feed_forward/gate/w': Entry('layer_{}/mlp/gating_einsum', gate, 0, 2),
      'feed_forward/up/w': Entry('layer_{}/mlp/gating_einsum', gate, 1, 2),
      'feed_forward/down/w': Entry('layer_{}/mlp/linear', 'F D'),
      'attention_in/scale': Entry('layer_{}/pre_attention_norm/scale', 'D'),
      'feed_forward_in/scale': Entry('layer_{}/pre_ffw_norm/scale', 'D')}
  if config.post_norms:
    block |= {'attention_out/scale': Entry('layer_{}/post_attention_norm/scale', 'D'),
              'feed_forward_out/scale': Entry('layer_{}/post_ffw_norm/scale', 'D')}
  if config.qk_norm:
    block |= {f'attention/{name}_norm/scale': Entry(f'layer_{{}}/attn/{name}_norm/scale', 'H')
              for name in ('query', 'key')}
  # The whole tree: the table, the layers and the last norm.
  return {'embedder/table': Entry(TABLE, 'V D'),
          **{LAYERED + path: entry for path, entry in block.items()},
          'transformer/final_norm/scale': Entry('final_norm/scale', 'D')}


def _gate_is_transposed(config: TransformerConfig, tensors: Mapping[str, Stored]) -> bool:
  """Whether gates are [2, F, D]. If F = D, shapes do not tell, and only Gemma 3 has them so."""
  gate = tensors.get('layer_0/mlp/gating_einsum')
  if gate is None or config.hidden_dim == config.embed_dim:
    return config.qk_norm
  return gate.shape == stored_shape(Entry('', 'F D', 0, 2), config)
