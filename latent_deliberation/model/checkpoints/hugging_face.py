"""The tensors of Hugging Face directories: their names and where they belong."""

import jax
import jax.numpy as jnp

from latent_deliberation.model.checkpoints.layout import LAYERED, Entry, Layout
from latent_deliberation.model.checkpoints.source import Source
from latent_deliberation.model.transformer_config import TransformerConfig

# The decoder's prefix in a multimodal checkpoint: transformers 4 and 5.
_MULTIMODAL = ('language_model.model.', 'model.language_model.')
_OTHER_PARTS = ('vision_tower.', 'multi_modal_projector.', 'model.vision_tower.',
                'model.multi_modal_projector.')
_HEAD, _TABLE = 'lm_head.weight', 'model.embed_tokens.weight'


def plain_name(name: str) -> str:
  """The name that a tensor has in a checkpoint of text alone."""
  for prefix in _MULTIMODAL:
    if name.startswith(prefix):
      return 'model.' + name.removeprefix(prefix)
  return _HEAD if name == f'language_model.{_HEAD}' else name


def is_foreign(name: str) -> bool:
  """Whether a tensor is no part of the decoder: vision, the tied head, rotary buffers."""
  return (name.startswith(_OTHER_PARTS) or name == _HEAD
          or name.endswith('rotary_emb.inv_freq'))


def find_layout(config: TransformerConfig) -> Layout:
  """Where each parameter is; Gemma 1 calls its second norm 'post_attention_layernorm'."""
  layer = 'model.layers.{}.'
  norms = {'attention_in': 'input_layernorm'}
  if config.post_norms:
    norms |= {'attention_out': 'post_attention_layernorm',
              'feed_forward_in': 'pre_feedforward_layernorm',
              'feed_forward_out': 'post_feedforward_layernorm'}
  else:
    norms |= {'feed_forward_in': 'post_attention_layernorm'}
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
  return {'embedder/table': Entry(_TABLE, 'V D'),
          **{LAYERED + path: entry for path, entry in block.items()},
          'transformer/final_norm/scale': Entry('model.norm.weight', 'D')}


def check_head(source: Source) -> None:
  """Raises ValueError where an output head is stored that is not the embedding.

  Some writers store a tied head; one of its own is not Gemma.
  """
  if _HEAD not in source.tensors or _TABLE not in source.tensors:
    return
  head, table = source.tensors[_HEAD], source.tensors[_TABLE]
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if head != table or not jnp.array_equal(*(
      source.read(name, table.shape, device) for name in (_HEAD, _TABLE)), equal_nan=True):
    raise ValueError(f'{source.directory}: {_HEAD} {list(head.shape)} is not equal to {_TABLE} '
                     f'{list(table.shape)}; a Gemma has one table for both')
