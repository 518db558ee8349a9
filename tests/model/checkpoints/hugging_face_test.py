"""Hugging Face directories are read and written to the bit; other decoders are refused."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import hugging_face, safetensors_io
from latent_deliberation.model.checkpoints.hugging_face_config import read_config, write_config
from latent_deliberation.model.decoder import boxed_shapes
from tests.model.checkpoints import foreign
from tests.parity import golden


@pytest.fixture
def tensors():
  """The tensors of a Gemma 2, to be damaged."""
  return foreign.hf_tensors(foreign.params_of('gemma2'))


def write(directory, tensors, family='gemma2', files=1):
  return foreign.write_hf(directory, foreign.HF_CONFIGS[family], tensors, files)


@pytest.mark.parametrize('family, dtype, files', [
    ('gemma1', 'float32', 1), ('gemma2', 'float16', 3), ('gemma3', 'bfloat16', 2)])
def test_load_keeps_stored_values(tmp_path, caplog, family, dtype, files):
  """Weights come back as stored, from one file or several."""
  params = foreign.params_of(family, dtype)
  write(tmp_path, foreign.hf_tensors(params), family, files)
  assert len(list(tmp_path.glob('*.safetensors'))) == files
  with caplog.at_level(logging.WARNING, logger='absl'):
    config, loaded = weights.load(tmp_path)
  assert config == foreign.FAMILIES[family]
  foreign.assert_same(loaded, params)
  assert not caplog.messages


def test_hugging_face_onto_mesh(tmp_path):
  """Weights are read straight onto a mesh."""
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
def test_multimodal_checkpoint(tmp_path, prefix, vision):
  """The decoder of a multimodal checkpoint is found; the rest is left out."""
  plain = foreign.hf_tensors(foreign.params_of('gemma3'))
  tensors = {prefix + name.removeprefix('model.'): tensor for name, tensor in plain.items()}
  tensors |= {vision + name: tensor for name, tensor in foreign.VISION.items()}
  config = {'model_type': 'gemma3', 'text_config': foreign.HF_CONFIGS['gemma3']}
  checkpoint = weights.open_checkpoint(foreign.write_hf(tmp_path, config, tensors))
  checkpoint.check()
  assert checkpoint.config == foreign.FAMILIES['gemma3']
  foreign.assert_same(foreign.read_all(checkpoint.source, plain), plain)


@pytest.mark.parametrize('name', ['lm_head.weight', 'language_model.lm_head.weight'])
def test_tied_head(tmp_path, tensors, name):
  """A stored head that equals the embedding is accepted."""
  tensors['model.embed_tokens.weight'][2, 3] = np.nan  # gives a warning, not an error
  tensors[name] = tensors['model.embed_tokens.weight']
  checkpoint = weights.open_checkpoint(write(tmp_path, tensors))
  checkpoint.check()
  assert 'lm_head.weight' in checkpoint.source.tensors
  hugging_face.check_tied_head(checkpoint.source)


def test_untied_head(tmp_path, tensors):
  """A head that differs from the embedding is refused."""
  head = tensors['model.embed_tokens.weight'].copy()
  head[-1, -1] += 1
  write(tmp_path, {**tensors, 'lm_head.weight': head})
  with pytest.raises(UserError, match='lm_head.weight .*model.embed_tokens'):
    weights.load(tmp_path)
  write(tmp_path, {**tensors, 'lm_head.weight': head[:30]})
  with pytest.raises(UserError, match=r'lm_head.weight \[30, 16\].*embed_tokens.weight \[38, 16\]'):
    weights.load(tmp_path)


@pytest.mark.parametrize('family', foreign.LLAMAS)
def test_llama_round_trip(tmp_path, family):
  """An exported Llama, Mistral or Qwen comes back with its config and every bit."""
  params = foreign.params_of(family, 'bfloat16')
  weights.save(tmp_path / 'theirs', foreign.ALL[family], params, format='huggingface')
  config, loaded = weights.load(tmp_path / 'theirs')
  assert config == foreign.ALL[family]
  foreign.assert_same(loaded, params)


def test_head_and_config_disagree(tmp_path):
  """A head that config.json does not name, or that is missing, is refused."""
  config, tensors = foreign.ALL['mistral'], foreign.hf_tensors(foreign.params_of('mistral'))
  content = write_config(config, 'float32')
  foreign.write_hf(tmp_path, {**content, 'tie_word_embeddings': True}, tensors)
  with pytest.raises(UserError, match='lm_head.weight .*embed_tokens.*tie_word_embeddings'):
    weights.load(tmp_path)
  del tensors['lm_head.weight']
  foreign.write_hf(tmp_path, content, tensors)
  with pytest.raises(UserError, match='tie_word_embeddings = false.*lm_head.weight'):
    weights.open_checkpoint(tmp_path)


def test_rotary_buffers_are_left_out(tmp_path, tensors):
  """Rotary buffers of old writers are left out."""
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  weights.open_checkpoint(write(tmp_path, tensors)).check()


def test_mismatches_before_reading(tmp_path, tensors, monkeypatch):
  """One error lists all tensors that do not match, before any is read."""
  del tensors['model.norm.weight'], tensors['model.layers.2.mlp.up_proj.weight']
  tensors['model.layers.1.self_attn.q_proj.weight'] = np.ones((16, 24), np.float32)
  tensors['model.layers.3.mlp.up_proj.weight'] = np.ones((20, 16), np.float32)
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(24, np.float32)
  checkpoint = weights.open_checkpoint(write(tmp_path, tensors))
  monkeypatch.setattr(checkpoint.source, 'read', None)
  with pytest.raises(UserError, match=str(tmp_path)) as error:
    checkpoint.load()
  lines = [line.strip() for line in str(error.value).split('\n')[1:-1]]
  assert sorted(lines) == [
      'model.layers.0.self_attn.q_proj.bias: not expected, has shape [24]',
      'model.layers.1.self_attn.q_proj.weight: has shape [16, 24], expected [24, 16]',
      'model.layers.2.mlp.up_proj.weight: missing, expected [20, 16]',
      'model.layers.3.mlp.up_proj.weight: not expected, has shape [20, 16]',
      'model.norm.weight: missing, expected [16]']


def test_weights_of_another_family(tmp_path, tensors):
  """Weights of another family are refused."""
  with pytest.raises(UserError, match='layers.1.post_feedforward_layernorm.weight: not'):
    weights.load(write(tmp_path / '1', tensors, 'gemma1'))
  with pytest.raises(UserError, match='layers.2.self_attn.k_norm.weight: missing.*6'):
    weights.load(write(tmp_path / '3', tensors, 'gemma3'))


def test_values_not_finite(tmp_path, tensors, caplog):
  """A warning names each parameter with values that are not finite."""
  tensors['model.layers.1.self_attn.o_proj.weight'][3, 5] = np.nan
  tensors['model.norm.weight'][0] = -np.inf
  with caplog.at_level(logging.WARNING, logger='absl'):
    _, params = weights.load(write(tmp_path, tensors))
  assert sorted(caplog.messages) == [
      f'{tmp_path}: {path} has values that are not finite (NaN or infinity) in float32'
      for path in ('transformer/blocks/attention/out/w', 'transformer/final_norm/scale')]
  assert np.isnan(params['transformer']['blocks']['attention']['out']['w']).sum() == 1


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
def test_export_of_goldens(tmp_path, name, limit, monkeypatch):
  """Tensors that transformers wrote come back, bit by bit."""
  if limit is not None:
    unlimited = hugging_face.write
    monkeypatch.setattr(hugging_face, 'write',
                        lambda *args: unlimited(*args, file_bytes=limit))
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


def export(directory, params, family='gemma2'):
  hugging_face.write(directory, foreign.ALL[family], params)


@pytest.mark.parametrize('family', foreign.ALL)
def test_export_names_and_axes(tmp_path, family):
  """Tensors have the names and axes of transformers."""
  params = foreign.params_of(family, 'float16')
  export(tmp_path, params, family)
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
  assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == 'float16'


def test_export_keeps_every_bit(tmp_path):
  """Every bit of every dtype is kept."""
  params = jax.tree.map(np.array, foreign.params_of('gemma2'))
  params['embedder']['table'] = params['embedder']['table'].astype('bfloat16')
  params['embedder']['table'].view(np.uint16)[0, :3] = 0xFFC1, 0x8000, 0x7F80  # NaN, -0, infinity
  params['transformer']['final_norm']['scale'].view(np.uint32)[:2] = 0x7FA00001, 1  # NaN, subnormal
  export(tmp_path, jax.tree.map(jax.numpy.asarray, params))
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))


def test_export_from_mesh(tmp_path):
  """Weights on a mesh are written like those on one device."""
  params = foreign.params_of('gemma3')
  spread = jax.device_put(
      params, foreign.mesh_shardings(boxed_shapes(foreign.FAMILIES['gemma3'])))
  export(tmp_path, spread, 'gemma3')
  foreign.assert_same(load_all(tmp_path), foreign.hf_tensors(params))


def test_formats_convert_both_ways(tmp_path):
  """The native format and that of Hugging Face convert into each other, bit by bit."""
  params, config = foreign.params_of('gemma3', 'bfloat16'), foreign.FAMILIES['gemma3']
  weights.save(tmp_path / 'native', config, params)
  weights.save(tmp_path / 'theirs', *weights.load(tmp_path / 'native'), format='huggingface')
  weights.save(tmp_path / 'back', *weights.load(tmp_path / 'theirs'))
  returned_config, returned = weights.load(tmp_path / 'back')
  assert returned_config == config
  foreign.assert_same(returned, params)
  assert (weights.open_checkpoint(tmp_path / 'back').fingerprint
          == weights.open_checkpoint(tmp_path / 'native').fingerprint)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
  """A failed save leaves nothing."""
  params, config = foreign.params_of('gemma2'), foreign.FAMILIES['gemma2']
  other = dataclasses.replace(config, rope_scaling=2.0)
  with pytest.raises(UserError, match='rope_scaling=2.0'):
    weights.save(tmp_path / 'target', other, params, format='huggingface')
  with pytest.raises(UserError, match="'gguf'.*'native', 'huggingface'"):
    weights.save(tmp_path / 'target', config, params, format='gguf')

  def full(tensors, path, metadata):
    path.write_bytes(b'part')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(safetensors_io, 'save_file', full)
  with pytest.raises(UserError, match=f'{tmp_path}/target.*No space left'):
    weights.save(tmp_path / 'target', config, params, format='huggingface')
  assert not list(tmp_path.iterdir())


def test_export_never_overwrites(tmp_path):
  """An existing directory is refused."""
  (tmp_path / 'target').mkdir()
  with pytest.raises(UserError, match=f'{tmp_path}/target'):
    weights.save(tmp_path / 'target', foreign.FAMILIES['gemma2'], foreign.params_of('gemma2'),
                 format='huggingface')


@pytest.mark.parametrize('change', [{'num_layers': 2}, {'vocab_size': 40}])
@pytest.mark.parametrize('format', weights.FORMATS)
def test_save_checks_shapes(tmp_path, change, format):
  """Parameters of another config are refused."""
  config = dataclasses.replace(foreign.FAMILIES['gemma2'], **change)
  with pytest.raises(UserError, match='shape'):
    weights.save(tmp_path / 'target', config, foreign.params_of('gemma2'), format=format)
  assert not list(tmp_path.iterdir())


def renamed(tensors, change):
  return {change(name): tensor for name, tensor in tensors.items()}


def bare(name):
  return name.removeprefix('model.')


@pytest.mark.parametrize('change', [
    bare,  # the model without its head
    lambda name: f'_orig_mod.{name}',  # torch.compile
    lambda name: name.replace('self_attn', '_orig_mod.self_attn'),  # of each layer
    lambda name: f'module.{name}',  # DistributedDataParallel
    lambda name: f'base_model.model.{name}',  # PEFT
    lambda name: f'base_model.{bare(name)}',
    lambda name: f'language_model.{bare(name)}',
    lambda name: f'module._orig_mod.model.language_model.{bare(name)}',
    lambda name: f'student.{name}'])
def test_prefixes(tmp_path, tensors, change):
  """Any prefix is read if it is that of the whole decoder."""
  checkpoint = weights.open_checkpoint(write(tmp_path, renamed(tensors, change)))
  checkpoint.check()
  foreign.assert_same(foreign.read_all(checkpoint.source, tensors), tensors)


def test_prefix_before_all_parts(tmp_path):
  """A prefix before the vision tower and the head is left out, too."""
  plain = foreign.hf_tensors(foreign.params_of('gemma3'))
  tensors = renamed(plain, lambda name: f'module.language_model.{name}')
  tensors |= {f'module.{name}': tensor for name, tensor in foreign.VISION.items()}
  tensors['module.language_model.lm_head.weight'] = plain['model.embed_tokens.weight']
  config = {'model_type': 'gemma3', 'text_config': foreign.HF_CONFIGS['gemma3']}
  checkpoint = weights.open_checkpoint(foreign.write_hf(tmp_path, config, tensors))
  checkpoint.check()
  hugging_face.check_tied_head(checkpoint.source)


def test_tied_head_alone(tmp_path, tensors):
  """A tied head that is stored in the place of its table is the table."""
  table = tensors.pop('model.embed_tokens.weight')
  checkpoint = weights.open_checkpoint(write(tmp_path, {**tensors, 'lm_head.weight': table}))
  checkpoint.check()
  foreign.assert_same(foreign.read_all(checkpoint.source, ['model.embed_tokens.weight']),
                      {'model.embed_tokens.weight': table})


@pytest.mark.parametrize('change, message', [
    (lambda tensors: renamed(tensors, lambda name: f'a.{name}') | renamed(
        tensors, lambda name: f'b.{name}'), r"\['a.model.', 'b.model.'\]"),
    (lambda tensors: renamed(tensors, lambda name: name.replace('layers', 'blocks')),
     'layers.0.input_layernorm.weight.*blocks'),
    (lambda tensors: tensors | {
        'base_model.model.layers.0.mlp.up_proj.lora_A.default.weight': np.ones((2, 16))},
     'lora_A.*merge_and_unload')])
def test_ambiguous_names(tmp_path, tensors, change, message):
  """Names that could mean several things are told in one line."""
  with pytest.raises(UserError, match=message) as error:
    weights.open_checkpoint(write(tmp_path, change(tensors)))
  assert len(str(error.value).splitlines()) == 1
