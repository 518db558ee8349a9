"""Google's orbax checkpoints are read in all their layouts, and recognised by their sizes."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import google, hugging_face
from latent_deliberation.model.checkpoints.layout import stored_shapes
from latent_deliberation.model.checkpoints.source import Stored, check_tensors
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import PRESETS
from tests import tiny
from tests.model.checkpoints import foreign

FAMILY = {'gemma1': False, 'gemma2': False, 'gemma3': True}  # whether gates are transposed


@pytest.fixture(scope='module')
def arrays():
  """The arrays of a Gemma 2, to be changed."""
  return foreign.google_arrays(foreign.params_of('gemma2'))


def open_memory(arrays, config):
  """The tensors of a checkpoint by plain name, checked against a config, and their layout."""
  source = foreign.MemorySource({google.plain_name(name): array for name, array in arrays.items()})
  layout = google.find_layout(config, source.tensors)
  check_tensors(source, stored_shapes(layout, config), [google.TABLE], google.is_foreign)
  return source, layout


@pytest.mark.parametrize('family, as_tree, options', [
    ('gemma1', foreign.as_flat, {'merged': True}),
    ('gemma3', foreign.as_nested, {'transposed': True})])
def test_google_parameters(tmp_path, family, as_tree, options):
  """Parameters equal those of the Hugging Face layout."""
  params, config = foreign.params_of(family, 'bfloat16'), foreign.FAMILIES[family]
  tree = as_tree(foreign.google_arrays(params, **options))
  foreign.write_orbax(tmp_path / 'checkpoint', tree)
  loaded_config, loaded = weights.load(tmp_path / 'checkpoint', config=config)
  assert loaded_config == config
  foreign.assert_same(loaded, params)


def test_google_onto_mesh(tmp_path):
  """Weights are read straight onto a mesh, without padded rows."""
  params, config = foreign.params_of('gemma2'), foreign.FAMILIES['gemma2']
  arrays = foreign.google_arrays(params, transposed=True, padding=90)
  foreign.write_orbax(tmp_path / 'checkpoint', foreign.as_flat(arrays))
  loaded = weights.open_checkpoint(tmp_path / 'checkpoint', config).load(foreign.mesh_shardings)
  expected = foreign.mesh_shardings(boxed_shapes(config))
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == expected
  foreign.assert_same(loaded, params)


@pytest.mark.parametrize('family, options', [
    ('gemma1', {}), ('gemma1', {'merged': True}), ('gemma2', {}), ('gemma2', {'transposed': True}),
    ('gemma3', {'transposed': True}), ('gemma3', {'transposed': False})])
def test_google_layouts(family, options):
  """Every layout is recognised, in flat and nested trees."""
  arrays = foreign.google_arrays(foreign.params_of(family), **options)
  config, plain = foreign.FAMILIES[family], None
  for tree in (foreign.as_flat(arrays), foreign.as_nested(arrays),
               foreign.as_nested(arrays, with_w=False), foreign.as_nested(arrays, prefix=''),
               foreign.as_nested(arrays, prefix='params/', with_w=False),
               foreign.as_nested(arrays, prefix='params/transformer/')):
    named = {'/'.join(str(key.key) for key in path): leaf
             for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    source, _ = open_memory(named, config)
    plain = plain or set(source.tensors)
    assert set(source.tensors) == plain
    for name, array in named.items():
      np.testing.assert_array_equal(source.arrays[google.plain_name(name)], array)


def test_google_square_gate():
  """The axes of a square gate are those of its family."""
  for family, transposed in FAMILY.items():
    config = dataclasses.replace(foreign.FAMILIES[family], hidden_dim=16)
    tensors = {'layer_0/mlp/gating_einsum': Stored((2, 16, 16), 'float32')}
    layout = google.find_layout(config, tensors)
    axes = layout['transformer/blocks/feed_forward/gate/w'].axes
    assert axes == ('F D' if transposed else 'D F'), family


def test_google_vision_is_left_out(arrays):
  """Vision parts are left out; other tensors are refused."""
  vision = {'vision_encoder/siglip_encoder/embedding/kernel': np.ones(3, np.float32),
            'SigLiPFromPatches_0/siglip_encoder/pos_embedding': np.ones(3, np.float32),
            'transformer/embedder/mm_input_projection/w': np.ones((2, 3), np.float32),
            'transformer/embedder/mm_soft_embedding_norm/scale': np.ones(2, np.float32)}
  open_memory({**arrays, **vision}, foreign.FAMILIES['gemma2'])
  with pytest.raises(UserError, match='layer_0/audio: not expected'):
    open_memory({**arrays, 'transformer/layer_0/audio': np.ones(2)}, foreign.FAMILIES['gemma2'])


@pytest.mark.parametrize('family', FAMILY)
def test_google_layout_is_complete(family):
  """Both layouts have the parameters and bytes of one model."""
  config = foreign.FAMILIES[family]
  source, layout = open_memory(foreign.google_arrays(foreign.params_of(family)), config)
  assert set(layout) == set(hugging_face.find_layout(config))
  assert sum(stored.nbytes for stored in source.tensors.values()) == sum(
      array.nbytes for array in foreign.hf_tensors(foreign.params_of(family)).values())


def published(name):
  """Names and shapes of a published checkpoint; embeddings have Google's numbers of rows."""
  config = PRESETS[name]
  width, heads, head = config.embed_dim, config.num_heads, config.head_dim
  shapes = {'embedder/input_embedding': (262144 if config.qk_norm else 256128, width),
            'final_norm/scale': (width,)}
  for layer in range(config.num_layers):
    gate = ((2, config.hidden_dim, width)
            if config.qk_norm or name in ('gemma2_9b', 'gemma2_27b')
            else (2, width, config.hidden_dim))
    one = {'attn/attn_vec_einsum/w': (heads, head, width), 'mlp/gating_einsum/w': gate,
           'mlp/linear/w': (config.hidden_dim, width)}
    if heads == config.num_kv_heads:
      one['attn/qkv_einsum/w'] = (3, heads, width, head)
    else:
      one |= {'attn/q_einsum/w': (heads, width, head),
              'attn/kv_einsum/w': (2, config.num_kv_heads, width, head)}
    norms = ['pre_attention_norm', 'pre_ffw_norm']
    norms += ['post_attention_norm', 'post_ffw_norm'] if config.post_norms else []
    one |= {f'{norm}/scale': (width,) for norm in norms}
    if config.qk_norm:
      one |= {'attn/_query_norm/scale': (head,), 'attn/_key_norm/scale': (head,)}
    shapes |= {f'layer_{layer}/{key}': shape for key, shape in one.items()}
  return {google.plain_name(f'transformer/{key}'): Stored(shape, 'bfloat16')
          for key, shape in shapes.items()}


@dataclasses.dataclass
class Described:
  """A Source that cannot be read."""
  tensors: dict
  directory: str = 'published'


@pytest.mark.parametrize('name', [name for name in PRESETS if name != 'tiny'])
def test_google_published_sizes(name):
  """A published checkpoint is recognised by its sizes."""
  tensors = published(name)
  config = google.find_config(tensors, 'origin')
  # The published embeddings of Gemma 3 have no rows for the tokens of images. transformers adds
  # them after the others.
  vocab_size = min(PRESETS[name].vocab_size, tensors[google.TABLE].shape[0])
  assert dataclasses.replace(config, vocab_size=1) == dataclasses.replace(
      PRESETS[name], vocab_size=1)
  layout = google.find_layout(config, tensors)
  check_tensors(Described(tensors), stored_shapes(layout, config), [google.TABLE],
                google.is_foreign)
  assert config.vocab_size == vocab_size


def test_google_unknown_sizes(tmp_path, arrays):
  """Unknown sizes are refused; the error lists the presets and a remedy."""
  foreign.write_orbax(tmp_path / 'checkpoint', foreign.as_flat(arrays))
  with pytest.raises(UserError, match=re.escape('weights.load(..., config=...)')) as error:
    weights.load(tmp_path / 'checkpoint')
  message = str(error.value)
  assert message.startswith(f'{tmp_path}/checkpoint ')
  assert ('embed_dim 16, num_layers 3, num_heads 4, num_kv_heads 2, head_dim 6, hidden_dim 20'
          in message)
  assert all(f'  {name}: embed_dim {config.embed_dim}, num_layers {config.num_layers}' in message
             for name, config in PRESETS.items())


def test_google_head_norms(monkeypatch, arrays):
  """Decoders with and without norms of heads are told apart."""
  gemma3 = {google.plain_name(name): Stored(array.shape, 'float32') for name, array in
            foreign.google_arrays(foreign.params_of('gemma3')).items()}
  monkeypatch.setattr(google, 'PRESETS', foreign.FAMILIES)
  assert google.find_config(gemma3, '') == foreign.FAMILIES['gemma3']
  gemma2 = {google.plain_name(name): Stored(array.shape, 'float32')
            for name, array in arrays.items()}
  assert google.find_config(gemma2, '') == foreign.FAMILIES['gemma2']


def test_google_next_to_tokenizer(tmp_path, arrays):
  """A checkpoint next to its tokenizer is found, if there is only one."""
  foreign.write_orbax(tmp_path / 'gemma' / 'checkpoint', foreign.as_flat(arrays))
  (tmp_path / 'gemma' / 'tokenizer.model').write_bytes(b'')
  checkpoint = weights.open_checkpoint(tmp_path / 'gemma', foreign.FAMILIES['gemma2'])
  checkpoint.check()
  assert checkpoint.format == 'google'
  shutil.copytree(tmp_path / 'gemma' / 'checkpoint', tmp_path / 'gemma' / 'second')
  with pytest.raises(UserError, match=f'{tmp_path}/gemma .*no decoder'):
    weights.open_checkpoint(tmp_path / 'gemma', foreign.FAMILIES['gemma2'])


def test_google_other_orbax(tmp_path):
  """Another orbax checkpoint is refused; the error lists its content."""
  foreign.write_orbax(tmp_path / 'checkpoint', {'step': np.ones(2), 'opt': {'mu': np.ones(3)}})
  with pytest.raises(UserError, match=r"layer_0/attn.*\['opt/mu', 'step'"):
    weights.open_checkpoint(tmp_path / 'checkpoint')


def test_google_mismatches(arrays):
  """All arrays that do not match are listed, with both shapes."""
  changed = {**arrays, 'layer_1/attn/kv_einsum/w': np.ones((2, 2, 6, 16), np.float32),
             'embedder/input_embedding': np.ones((37, 16), np.float32),
             'layer_3/mlp/linear/w': np.ones((20, 16), np.float32)}
  del changed['layer_2/post_ffw_norm/scale']
  with pytest.raises(UserError) as error:
    open_memory(changed, foreign.FAMILIES['gemma2'])
  assert sorted(line.strip() for line in str(error.value).split('\n')[1:-1]) == [
      'embedder/input_embedding: has shape [37, 16], expected [38, 16]',
      'layer_1/attn/kv_einsum: has shape [2, 2, 6, 16], expected [2, 2, 16, 6]',
      'layer_2/post_ffw_norm/scale: missing, expected [16]',
      'layer_3/mlp/linear: not expected, has shape [20, 16]']


@pytest.mark.parametrize('name, shape', [
    ('attn/kv_einsum', (2,)), ('attn/attn_vec_einsum', (24, 16)), ('mlp/linear', ()),
    ('mlp/linear', None)])
def test_google_unreadable_sizes(arrays, name, shape):
  """An array that does not show its sizes is refused, by name."""
  tensors = {google.plain_name(key): Stored(array.shape, 'float32')
             for key, array in arrays.items()}
  tensors[f'layer_0/{name}'] = Stored(shape, 'float32')
  if shape is None:
    del tensors[f'layer_0/{name}']
  with pytest.raises(UserError, match=f'origin .*layer_0/{name}'):
    google.find_config(tensors, 'origin')


def test_config_of_no_gemma():
  """A config with a feature that no Gemma has is refused."""
  with pytest.raises(UserError, match="'tied_head': False.*Gemma"):
    google.find_layout(tiny.LLAMA, {})
