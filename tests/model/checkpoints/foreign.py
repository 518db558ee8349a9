"""Tiny decoders of each family in the formats of others, made from our parameters with numpy."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors.numpy import save_file

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.model.checkpoints.source import Source, Stored
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny

FAMILIES: Mapping[str, TransformerConfig] = {
    'gemma1': dataclasses.replace(
        tiny.CONFIG, num_kv_heads=4, layer_pattern=('global',), window=4096, attention_softcap=None,
        final_softcap=None, post_norms=False, query_scale=None),
    'gemma2': dataclasses.replace(tiny.CONFIG, query_scale=0.5),
    'gemma3': dataclasses.replace(
        tiny.CONFIG, attention_softcap=None, final_softcap=None, qk_norm=True, query_scale=0.25,
        rope_local_base=20.0, rope_scaling=8.0),
}

# One of each family, with the switches of tiny.LLAMA that it has.
_LLAMA = dataclasses.replace(tiny.LLAMA, layer_pattern=('global',), window=4096, qkv_bias=False,
                             rope_llama3=())
LLAMAS: Mapping[str, TransformerConfig] = {
    'llama': dataclasses.replace(_LLAMA, rope_llama3=tiny.LLAMA.rope_llama3),
    'mistral': dataclasses.replace(_LLAMA, layer_pattern=('local',), window=4),
    'qwen2': dataclasses.replace(_LLAMA, qkv_bias=True, tied_head=True),
    'qwen3': dataclasses.replace(_LLAMA, qk_norm=True, rope_scaling=2.0),
}
ALL = {**FAMILIES, **LLAMAS}

_COMMON = {
    'vocab_size': 38, 'hidden_size': 16, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'head_dim': 6, 'intermediate_size': 20, 'rope_theta': 50.0}
HF_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    'gemma1': {**_COMMON, 'model_type': 'gemma', 'num_key_value_heads': 4},
    'gemma2': {
        **_COMMON, 'model_type': 'gemma2', 'sliding_window': 4, 'attn_logit_softcapping': 2.0,
        'final_logit_softcapping': 3.0, 'query_pre_attn_scalar': 4},
    'gemma3': {
        **_COMMON, 'model_type': 'gemma3_text', 'sliding_window': 4, 'sliding_window_pattern': 2,
        'query_pre_attn_scalar': 16, 'rope_local_base_freq': 20.0,
        'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}},
}
VISION = {'vision_tower.vision_model.embeddings.patch_embedding.bias': np.ones(3, np.float32),
          'multi_modal_projector.mm_input_projection_weight': np.ones((3, 2), np.float32)}


def params_of(family: str, dtype: str = 'float32') -> Params:
  """Parameters of one of ALL."""
  params = tiny.decoder_params(ALL[family])
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def hf_tensors(params: Params) -> dict[str, np.ndarray]:
  """The tensors that transformers stores, by name."""
  params = jax.tree.map(np.asarray, params)
  blocks = params['transformer']['blocks']
  attention, feed_forward = blocks['attention'], blocks['feed_forward']
  norms = {'attention_in': 'input_layernorm', 'feed_forward_in': 'post_attention_layernorm'}
  if 'attention_out' in blocks:
    norms = {'attention_in': 'input_layernorm', 'attention_out': 'post_attention_layernorm',
             'feed_forward_in': 'pre_feedforward_layernorm',
             'feed_forward_out': 'post_feedforward_layernorm'}
  tensors = {'model.embed_tokens.weight': params['embedder']['table'],
             'model.norm.weight': params['transformer']['final_norm']['scale']}
  if 'head' in params['embedder']:
    tensors['lm_head.weight'] = params['embedder']['head']
  for layer in range(len(blocks['attention_in']['scale'])):
    one = {f'{theirs}.weight': blocks[ours]['scale'][layer] for ours, theirs in norms.items()}
    for ours, theirs in {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj'}.items():
      weight = attention[ours]['w'][layer]
      one[f'self_attn.{theirs}.weight'] = weight.reshape(len(weight), -1).T
      if 'b' in attention[ours]:
        one[f'self_attn.{theirs}.bias'] = attention[ours]['b'][layer].ravel()
    out = attention['out']['w'][layer]
    one['self_attn.o_proj.weight'] = out.reshape(-1, out.shape[-1]).T
    for part in ('gate', 'up', 'down'):
      one[f'mlp.{part}_proj.weight'] = feed_forward[part]['w'][layer].T
    if 'query_norm' in attention:
      one['self_attn.q_norm.weight'] = attention['query_norm']['scale'][layer]
      one['self_attn.k_norm.weight'] = attention['key_norm']['scale'][layer]
    tensors |= {f'model.layers.{layer}.{name}': tensor for name, tensor in one.items()}
  return {name: np.array(tensor, order='C') for name, tensor in tensors.items()}


def write_hf(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
             files: int = 1) -> Path:
  """Writes a Hugging Face directory, with tensors spread over `files` files; returns it."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(config))
  if files == 1:
    save_file(dict(tensors), directory / 'model.safetensors')
    return directory
  names = [f'model-{i + 1:05d}-of-{files:05d}.safetensors' for i in range(files)]
  for i, name in enumerate(names):
    save_file(dict(list(tensors.items())[i::files]), directory / name)
  weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
  index = {'metadata': {}, 'weight_map': weight_map}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
  return directory


def google_arrays(params: Params, transposed: bool = False, merged: bool = False,
                  padding: int = 0) -> dict[str, np.ndarray]:
  """The arrays that Google's gemma library stores, keys joined by '/'.

  Args:
    params: parameters of a decoder.
    transposed: whether the gate is [2, F, D] instead of [2, D, F].
    merged: whether query, key and value are one array.
    padding: number of rows of NaN after the embeddings, which must never be read.
  """
  params = jax.tree.map(np.asarray, params)
  blocks, table = params['transformer']['blocks'], params['embedder']['table']
  attention, feed_forward = blocks['attention'], blocks['feed_forward']
  table = np.concatenate([table, np.full((padding, table.shape[1]), np.nan, table.dtype)])
  arrays = {'embedder/input_embedding': table,
            'final_norm/scale': params['transformer']['final_norm']['scale']}
  norms = {'attention_in': 'pre_attention_norm', 'attention_out': 'post_attention_norm',
           'feed_forward_in': 'pre_ffw_norm', 'feed_forward_out': 'post_ffw_norm'}
  for layer in range(len(blocks['attention_in']['scale'])):
    query, key, value = (
        attention[part]['w'][layer].swapaxes(0, 1) for part in ('query', 'key', 'value'))
    gates = np.stack([feed_forward[part]['w'][layer] for part in ('gate', 'up')])
    one = {'attn/attn_vec_einsum/w': attention['out']['w'][layer],
           'mlp/gating_einsum/w': gates.swapaxes(1, 2) if transposed else gates,
           'mlp/linear/w': feed_forward['down']['w'][layer]}
    if merged:
      one['attn/qkv_einsum/w'] = np.stack([query, key, value])
    else:
      one |= {'attn/q_einsum/w': query, 'attn/kv_einsum/w': np.stack([key, value])}
    if 'query_norm' in attention:
      one |= {f'attn/_{part}_norm/scale': attention[f'{part}_norm']['scale'][layer]
              for part in ('query', 'key')}
    one |= {f'{theirs}/scale': blocks[ours]['scale'][layer]
            for ours, theirs in norms.items() if ours in blocks}
    arrays |= {f'layer_{layer}/{name}': array for name, array in one.items()}
  return arrays


def as_flat(arrays: Mapping[str, np.ndarray]) -> PyTree:
  """A tree with module paths as keys: {'transformer/layer_0/attn/q_einsum': {'w': ...}}."""
  return traverse_util.unflatten_dict({
      tuple(f'transformer/{name}'.rsplit('/', 1)): array for name, array in arrays.items()})


def as_nested(arrays: Mapping[str, np.ndarray], prefix: str = 'transformer/',
              with_w: bool = True) -> PyTree:
  """A tree with a dictionary per module, and matrices under 'w' or in its place."""
  return traverse_util.unflatten_dict({
      prefix + (name if with_w else name.removesuffix('/w')): array
      for name, array in arrays.items()}, sep='/')


def write_orbax(directory: Path, tree: PyTree, **options: Any) -> Path:
  """Writes an orbax checkpoint; returns its directory."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
    checkpointer.save(directory, tree)
  return directory


class MemorySource:
  """A Source of arrays in memory."""

  def __init__(self, arrays: Mapping[str, np.ndarray], directory: Path = Path('/memory')):
    self.directory, self.arrays = directory, arrays
    self.tensors = {name: Stored(array.shape, str(array.dtype)) for name, array in arrays.items()}

  def read(self, name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    """See Source. It returns a copy, because the caller may donate it."""
    leading = self.arrays[name][tuple(map(slice, shape))]
    return jax.make_array_from_callback(shape, sharding, lambda index: leading[index].copy())


def read_all(source: Source, names: Iterable[str]) -> dict[str, np.ndarray]:
  """Reads tensors of a source as they are stored."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {name: np.asarray(source.read(name, source.tensors[name].shape, device))
          for name in names}


def mesh_shardings(boxed: PyTree) -> PyTree:
  """Shardings on eight devices that split as much as DEFAULT_RULES can."""
  return shardings_of(boxed, make_mesh(MeshConfig(2, 2, 2)), DEFAULT_RULES)


def assert_same(actual: PyTree, expected: PyTree) -> None:
  """Asserts that trees of arrays are equal in every path, dtype, shape and bit."""
  actual, expected = (
      {jax.tree_util.keystr(path): np.asarray(leaf)
       for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (actual, expected))
  assert sorted(actual) == sorted(expected)
  for path, array in expected.items():
    assert (actual[path].dtype, actual[path].shape) == (array.dtype, array.shape), path
    assert actual[path].tobytes() == array.tobytes(), path
