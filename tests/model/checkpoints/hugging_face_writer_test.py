"""A decoder that was read from a Hugging Face directory is written back to the bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import hugging_face, safetensors_io
from latent_deliberation.model.checkpoints.hugging_face import read_config
from latent_deliberation.model.decoder import boxed_shapes
from tests.model.checkpoints import foreign
from tests.parity import golden


def load_all(directory):
  """Every tensor of a directory; no name may be in two files."""
  tensors = {}
  for path in directory.glob('*.safetensors'):
    held = load_file(path)
    assert not set(held) & set(tensors)
    tensors |= held
  return tensors


@pytest.mark.parametrize('name, limit', [
    ('gemma1_multihead', None), ('gemma2_bfloat16', 20_000), ('gemma3_multimodal', None)])
def test_what_transformers_wrote_comes_back_to_the_bit(tmp_path, name, limit, monkeypatch):
  if limit is not None:
    write = hugging_face.write
    monkeypatch.setattr(hugging_face, 'write',
                        lambda *args: write(*args, file_bytes=limit))
  config, params = weights.load(golden.DIRECTORY / name)
  weights.save(tmp_path / 'target', config, params, format='huggingface')
  prefix = 'language_model.' if name == 'gemma3_multimodal' else ''
  originals = {name.removeprefix(prefix): tensor
               for name, tensor in load_all(golden.DIRECTORY / name).items()
               if name.startswith(prefix + 'model.') and 'vision' not in name
               and 'multi_modal' not in name}
  foreign.assert_same(load_all(tmp_path / 'target'), originals)
  assert read_config(tmp_path / 'target') == config
  if limit is not None:
    index = json.loads((tmp_path / 'target' / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == sum(leaf.nbytes for leaf in originals.values())
  assert [path.name for path in tmp_path.iterdir()] == ['target']


def write(directory, params, family='gemma2'):
  hugging_face.write(directory, foreign.FAMILIES[family], params)


@pytest.mark.parametrize('family', foreign.FAMILIES)
def test_tensors_have_the_names_and_axes_that_transformers_gives_them(tmp_path, family):
  params = foreign.params_of(family, 'float16')
  write(tmp_path, params, family)
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
  assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == 'float16'


def test_every_bit_of_every_dtype_is_kept(tmp_path):
  params = jax.tree.map(np.array, foreign.params_of('gemma2'))
  params['embedder']['table'] = params['embedder']['table'].astype('bfloat16')
  params['embedder']['table'].view(np.uint16)[0, :3] = 0xFFC1, 0x8000, 0x7F80  # NaN, -0, infinity
  params['transformer']['final_norm']['scale'].view(np.uint32)[:2] = 0x7FA00001, 1  # NaN, subnormal
  write(tmp_path, jax.tree.map(jax.numpy.asarray, params))
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))


def test_weights_of_a_mesh_are_written_as_those_of_one_device(tmp_path):
  params = foreign.params_of('gemma3')
  spread = jax.device_put(
      params, foreign.mesh_shardings(boxed_shapes(foreign.FAMILIES['gemma3'])))
  write(tmp_path, spread, 'gemma3')
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))


def test_our_format_and_theirs_turn_into_each_other_to_the_bit(tmp_path):
  params, config = foreign.params_of('gemma3', 'bfloat16'), foreign.FAMILIES['gemma3']
  weights.save(tmp_path / 'native', config, params)
  weights.save(tmp_path / 'theirs', *weights.load(tmp_path / 'native'), format='huggingface')
  weights.save(tmp_path / 'back', *weights.load(tmp_path / 'theirs'))
  returned_config, returned = weights.load(tmp_path / 'back')
  assert returned_config == config
  foreign.assert_same(returned, params)
  assert (weights.open_checkpoint(tmp_path / 'back').fingerprint
          == weights.open_checkpoint(tmp_path / 'native').fingerprint)


def test_nothing_is_left_of_what_cannot_be_written(tmp_path, monkeypatch):
  params, config = foreign.params_of('gemma2'), foreign.FAMILIES['gemma2']
  other = dataclasses.replace(config, rope_scaling=2.0)
  with pytest.raises(UserError, match='no Gemma has the features'):
    weights.save(tmp_path / 'target', other, params, format='huggingface')
  with pytest.raises(UserError, match="format 'gguf': .*'native', 'huggingface'"):
    weights.save(tmp_path / 'target', config, params, format='gguf')

  def full(tensors, path, metadata):
    path.write_bytes(b'part')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(safetensors_io, 'save_file', full)
  with pytest.raises(UserError, match='No space left'):
    weights.save(tmp_path / 'target', config, params, format='huggingface')
  assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
  (tmp_path / 'target').mkdir()
  with pytest.raises(UserError, match=f'{tmp_path}/target exists already'):
    weights.save(tmp_path / 'target', foreign.FAMILIES['gemma2'], foreign.params_of('gemma2'),
                 format='huggingface')


@pytest.mark.parametrize('change', [{'num_layers': 2}, {'vocab_size': 40}])
@pytest.mark.parametrize('format', weights.FORMATS)
def test_parameters_that_are_not_of_the_config_are_refused(tmp_path, change, format):
  config = dataclasses.replace(foreign.FAMILIES['gemma2'], **change)
  with pytest.raises(UserError):
    weights.save(tmp_path / 'target', config, foreign.params_of('gemma2'), format=format)
  assert not list(tmp_path.iterdir())
