"""Hugging Face directories are read to the bit; what is not exactly a Gemma is refused."""

import logging
import re

import jax
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import hugging_face
from latent_deliberation.model.decoder import boxed_shapes
from tests.model.checkpoints import foreign


@pytest.fixture
def tensors():
  """Of a Gemma 2, to be damaged."""
  return foreign.hf_tensors(foreign.params_of('gemma2'))


def write(directory, tensors, family='gemma2', files=1):
  return foreign.write_hf(directory, foreign.HF_CONFIGS[family], tensors, files)


@pytest.mark.parametrize('family, dtype, files', [
    ('gemma1', 'float32', 1), ('gemma2', 'float16', 3), ('gemma3', 'bfloat16', 2)])
def test_weights_come_as_they_are_stored(tmp_path, caplog, family, dtype, files):
  params = foreign.params_of(family, dtype)
  write(tmp_path, foreign.hf_tensors(params), family, files)
  assert len(list(tmp_path.glob('*.safetensors'))) == files
  with caplog.at_level(logging.WARNING, logger='absl'):
    config, loaded = weights.load(tmp_path)
  assert config == foreign.FAMILIES[family]
  foreign.assert_same(loaded, params)
  assert not caplog.messages


def test_weights_are_read_straight_onto_a_mesh(tmp_path):
  params = foreign.params_of('gemma3')
  checkpoint = weights.open_checkpoint(
      write(tmp_path, foreign.hf_tensors(params), 'gemma3', files=2))
  loaded = checkpoint.load(foreign.mesh_shardings)
  expected = foreign.mesh_shardings(boxed_shapes(checkpoint.config))
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == expected
  foreign.assert_same(loaded, params)


@pytest.mark.parametrize('prefix, vision', [
    ('language_model.model.', ''),  # transformers 4
    ('model.language_model.', 'model.')])  # transformers 5
def test_the_decoder_of_a_multimodal_checkpoint_is_found_and_the_rest_left(tmp_path, prefix,
                                                                           vision):
  plain = foreign.hf_tensors(foreign.params_of('gemma3'))
  tensors = {prefix + name.removeprefix('model.'): tensor for name, tensor in plain.items()}
  tensors |= {vision + name: tensor for name, tensor in foreign.VISION.items()}
  config = {'model_type': 'gemma3', 'text_config': foreign.HF_CONFIGS['gemma3']}
  checkpoint = weights.open_checkpoint(foreign.write_hf(tmp_path, config, tensors))
  checkpoint.check()
  assert checkpoint.config == foreign.FAMILIES['gemma3']
  foreign.assert_same(foreign.read_all(checkpoint.source, plain), plain)


@pytest.mark.parametrize('name', ['lm_head.weight', 'language_model.lm_head.weight'])
def test_a_stored_head_is_accepted_where_it_is_the_embedding(tmp_path, tensors, name):
  tensors['model.embed_tokens.weight'][2, 3] = np.nan  # is to be warned of, no more
  tensors[name] = tensors['model.embed_tokens.weight']
  checkpoint = weights.open_checkpoint(write(tmp_path, tensors))
  checkpoint.check()
  assert 'lm_head.weight' in checkpoint.source.tensors
  hugging_face.check_head(checkpoint.source)


def test_a_head_of_its_own_is_refused(tmp_path, tensors):
  head = tensors['model.embed_tokens.weight'].copy()
  head[-1, -1] += 1
  write(tmp_path, {**tensors, 'lm_head.weight': head})
  with pytest.raises(UserError, match='lm_head.weight .* is not equal to model.embed_tokens'):
    weights.load(tmp_path)
  write(tmp_path, {**tensors, 'lm_head.weight': head[:30]})
  with pytest.raises(UserError, match=re.escape('lm_head.weight [30, 16] is not equal to '
                                                 'model.embed_tokens.weight [38, 16]')):
    weights.load(tmp_path)


def test_rotary_buffers_of_early_writers_are_left(tmp_path, tensors):
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  weights.open_checkpoint(write(tmp_path, tensors)).check()


def test_all_tensors_that_do_not_fit_are_named_in_one_error_before_any_is_read(tmp_path, tensors,
                                                                               monkeypatch):
  del tensors['model.norm.weight'], tensors['model.layers.2.mlp.up_proj.weight']
  tensors['model.layers.1.self_attn.q_proj.weight'] = np.ones((16, 24), np.float32)
  tensors['model.layers.3.mlp.up_proj.weight'] = np.ones((20, 16), np.float32)
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(24, np.float32)
  checkpoint = weights.open_checkpoint(write(tmp_path, tensors))
  monkeypatch.setattr(checkpoint.source, 'read', None)
  with pytest.raises(UserError, match=f'{tmp_path} does not hold the decoder') as error:
    checkpoint.load()
  lines = [line.strip() for line in str(error.value).split('\n')[1:-1]]
  assert sorted(lines) == [
      'model.layers.0.self_attn.q_proj.bias: not expected, has shape [24]',
      'model.layers.1.self_attn.q_proj.weight: has shape [16, 24], expected [24, 16]',
      'model.layers.2.mlp.up_proj.weight: missing, expected [20, 16]',
      'model.layers.3.mlp.up_proj.weight: not expected, has shape [20, 16]',
      'model.norm.weight: missing, expected [16]']


def test_weights_of_another_family_are_refused(tmp_path, tensors):
  with pytest.raises(UserError, match='layers.1.post_feedforward_layernorm.weight: not expected'):
    weights.load(write(tmp_path / '1', tensors, 'gemma1'))
  with pytest.raises(UserError, match='layers.2.self_attn.k_norm.weight: missing, expected .6.'):
    weights.load(write(tmp_path / '3', tensors, 'gemma3'))


def test_values_that_are_not_finite_are_warned_of_by_path(tmp_path, tensors, caplog):
  tensors['model.layers.1.self_attn.o_proj.weight'][3, 5] = np.nan
  tensors['model.norm.weight'][0] = -np.inf
  with caplog.at_level(logging.WARNING, logger='absl'):
    _, params = weights.load(write(tmp_path, tensors))
  assert sorted(caplog.messages) == [
      f'{tmp_path}: {path} has values that are not finite (NaN or infinity) in float32'
      for path in ('transformer/blocks/attention/out/w', 'transformer/final_norm/scale')]
  assert np.isnan(params['transformer']['blocks']['attention']['out']['w']).sum() == 1
