"""Hugging Face directories of the Gemma and Llama families: names of tensors, and a writer.

hugging_face_config.py reads and writes config.json, safetensors_io.py the files of tensors.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import traverse_util

from latent_deliberation.array_types import Params
from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.hugging_face_config import CONFIG, write_config
from latent_deliberation.model.checkpoints.layout import LAYERED, Entry, Layout, parameter_axes
from latent_deliberation.model.checkpoints.safetensors_io import FILE_BYTES, gather, write_tensors
from latent_deliberation.model.checkpoints.source import Source
from latent_deliberation.model.transformer_config import TransformerConfig

# Prefixes of the decoder in a checkpoint that transformers wrote. The longer ones are multimodal,
# and a model without its head has none.
_OWN_PREFIXES = ('language_model.model.', 'model.language_model.', 'language_model.', 'model.', '')
_OTHER_PARTS = ('vision_tower.', 'multi_modal_projector.', 'model.vision_tower.',
                'model.multi_modal_projector.')
HEAD, TABLE = 'lm_head.weight', 'model.embed_tokens.weight'
# Every decoder here has this tensor, and no vision tower does: it tells the prefix of the decoder.
_LANDMARK = 'layers.0.input_layernorm.weight'
# What torch.compile, FSDP and checkpointing put into the names of the modules that they wrap.
_WRAPPERS = ('_orig_mod.', '_fsdp_wrapped_module.', '_checkpoint_wrapped_module.')
_ADAPTERS = ('.lora_A.', '.base_layer.')  # in the names of PEFT, before adapters are merged


def plain_names(names: Collection[str], directory: Path, tied_head: bool) -> dict[str, str]:
  """Returns the name that each tensor has in a plain checkpoint of a decoder alone.

  Writers put prefixes before the names: PEFT, DistributedDataParallel, Lightning, or a multimodal
  model. Any prefix is read if it is that of all layers.

  Args:
    names: names of the stored tensors.
    directory: directory of the checkpoint, for messages.
    tied_head: whether the head is the table of embeddings. If only one of them is stored, it is
      named as the table.

  Raises:
    UserError: there is no decoder, or two, or adapters that are not merged.
  """
  adapter = next((name for name in names if any(part in name for part in _ADAPTERS)), None)
  if adapter:
    raise UserError(f'{directory} has adapters next to its weights, such as {adapter}: merge them '
                    'with PEFT (merge_and_unload), and save the model again')
  plain = {name: name for name in names}
  for wrapper in _WRAPPERS:
    plain = {name: there.replace(wrapper, '') for name, there in plain.items()}
  prefix = _find_prefix(plain.values(), directory)
  # What is before all parts of a multimodal model, too.
  outer = next(prefix.removesuffix(own) for own in _OWN_PREFIXES
               if re.fullmatch(fr'(.*\.)?{re.escape(own)}', prefix))
  plain = {name: _plain_name(there, prefix, outer) for name, there in plain.items()}
  if tied_head and TABLE not in plain.values():
    plain = {name: TABLE if there == HEAD else there for name, there in plain.items()}
  return plain


def _find_prefix(names: Collection[str], directory: Path) -> str:
  """Returns the prefix of the decoder's layers."""
  matches = (re.fullmatch(fr'((?:.*\.)?){re.escape(_LANDMARK)}', name) for name in names)
  found = sorted(match[1] for match in matches if match)
  if not found:
    raise UserError(f'{directory} has no tensor {_LANDMARK}, after any prefix: its names, such as '
                    f'{next(iter(names), "none")}, are not those of a Gemma or Llama decoder. '
                    'Save it with transformers')
  known = [prefix for prefix in found if prefix in _OWN_PREFIXES]
  if len(found) > 1 and len(known) != 1:
    raise UserError(f'{directory} has layers under the prefixes {found}: keep one decoder, and '
                    'save it again')
  return (known or found)[0]


def _plain_name(name: str, prefix: str, outer: str) -> str:
  """Returns a name without the prefix of the decoder, or without what is before all parts."""
  if name.removeprefix(outer) in (HEAD, f'language_model.{HEAD}'):
    return HEAD
  if name.startswith(prefix):
    return 'model.' + name.removeprefix(prefix)
  return name.removeprefix(outer)


def is_foreign(name: str) -> bool:
  """Whether a tensor is not a parameter of the decoder: vision, the tied head, rotary buffers."""
  return (name.startswith(_OTHER_PARTS) or name == HEAD
          or name.endswith('rotary_emb.inv_freq'))


def find_layout(config: TransformerConfig) -> Layout:
  """Returns the layout of a checkpoint of this architecture."""
  layer = 'model.layers.{}.'
  norms = {'attention_in': 'input_layernorm'}
  if config.post_norms:
    norms |= {'attention_out': 'post_attention_layernorm',
              'feed_forward_in': 'pre_feedforward_layernorm',
              'feed_forward_out': 'post_feedforward_layernorm'}
  else:  # without post-norms, the same norm is named by its place after attention
    norms |= {'feed_forward_in': 'post_attention_layernorm'}
  # Each layer: projections, norms and, in some families, norms of heads and biases.
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
  head = {} if config.tied_head else {'embedder/head': Entry(HEAD, 'V D')}
  # The whole tree: the tables, the layers and the last norm.
  return {'embedder/table': Entry(TABLE, 'V D'), **head,
          **{LAYERED + path: entry for path, entry in block.items()},
          'transformer/final_norm/scale': Entry('model.norm.weight', 'D')}


def check_own_head(source: Source) -> None:
  """Raises UserError if the checkpoint lacks the output head that its config.json names."""
  if HEAD not in source.tensors:
    raise UserError(f'{source.directory}: {CONFIG} has tie_word_embeddings = false, so {HEAD} '
                    'is needed, which is missing: download the whole directory again')


def check_tied_head(source: Source) -> None:
  """Raises UserError if a stored output head differs from the embedding, although it is tied.

  Some writers store the tied head, too.
  """
  if HEAD not in source.tensors or TABLE not in source.tensors:
    return
  head, table = source.tensors[HEAD], source.tensors[TABLE]
  # Shape and dtype are compared first. Values are read only if both agree.
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if head != table or not jnp.array_equal(*(
      source.read(name, table.shape, device) for name in (HEAD, TABLE)), equal_nan=True):
    raise UserError(f'{source.directory}: {HEAD} {list(head.shape)} is not equal to {TABLE} '
                    f'{list(table.shape)}, but {CONFIG} describes one table for both '
                    '(tie_word_embeddings): give a decoder whose weights and config agree')


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
                stored_tensors(layout, config, params), file_bytes)
  if jax.process_index() == 0:
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + '\n')


def _sizes(layout: Layout, config: TransformerConfig, params: Params) -> dict[str, int]:
  """Returns the bytes of every tensor, in the order of `stored_tensors`."""
  flat = traverse_util.flatten_dict(params, sep='/')
  sizes = {}
  for path, entry in layout.items():
    layers = config.num_layers if path.startswith(LAYERED) else 1
    for layer in range(layers):
      sizes[entry.name.format(layer)] = flat[path].nbytes // layers
  return sizes


def stored_tensors(layout: Layout, config: TransformerConfig,
                   params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the name and value of every tensor, gathered on the host one at a time."""
  flat, axes = traverse_util.flatten_dict(params, sep='/'), parameter_axes(config)
  for path, entry in layout.items():
    layered = path.startswith(LAYERED)
    for layer in range(config.num_layers if layered else 1):
      piece = gather(flat[path][layer] if layered else flat[path])
      yield entry.name.format(layer), rearrange(piece, f'{axes[path]} -> {entry.axes}')
