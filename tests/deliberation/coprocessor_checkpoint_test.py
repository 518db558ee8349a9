"""A coprocessor survives the disk to the bit, and works only with its own decoder and config."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  DESCRIPTION,
  CoprocessorCheckpoint,
  Description,
  check_decoder,
  compare_frozen_dtype,
  describe,
  find_coprocessor,
  load_coprocessor,
  locate_coprocessor,
  read_description,
  write_description,
)
from latent_deliberation.errors import UserError
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import finished, tiny

INDEX = 'model.safetensors.index.json'
WRITTEN = Description(tiny.CONFIG, tiny.CHOICES, decoder_fingerprint='d0', vocabulary_hash='v0',
                      steps=7,
                      frozen_dtype='int8')


@pytest.fixture
def directory(tmp_path):
  write_description(tmp_path, WRITTEN, 'f0')
  return tmp_path


def test_description_round_trip(directory):
  """A description is read as it was written."""
  assert read_description(directory) == (WRITTEN, 'f0')
  assert describe(directory) == WRITTEN


def test_description_without_frozen_dtype(directory):
  """A description without its decoder's dtype is read."""
  path = directory / DESCRIPTION
  content = json.loads(path.read_text())
  assert content.pop('frozen_dtype') == 'int8'
  del content['checksum']  # which came later
  path.write_text(json.dumps(content))
  assert describe(directory).frozen_dtype == ''


@pytest.mark.parametrize('trained, now, warned', [
    ('int8', 'float32', True), ('bfloat16', 'int8', True), ('float32', 'bfloat16', False),
    ('int8', 'int8', False), ('', 'int8', False), ('int8', 'w8a8', True),
    ('w8a8', 'float32', True), ('w8a8', 'w8a8', False)])
def test_frozen_dtype_warning(caplog, trained, now, warned):
  """A warning names a decoder that is int8 in training or now alone."""
  compare_frozen_dtype(dataclasses.replace(WRITTEN, frozen_dtype=trained), now)
  assert [bool(re.search(f'{trained}.*{now}', text)) for text in caplog.messages] == [True] * warned


def test_other_decoder():
  """Another decoder is refused with both fingerprints."""
  check_decoder(WRITTEN, 'd0')
  with pytest.raises(UserError, match='fingerprint.*d0.*d1'):
    check_decoder(WRITTEN, 'd1')


def test_no_coprocessor(tmp_path):
  """A directory without a coprocessor is refused."""
  for directory in (tmp_path, tmp_path / 'absent'):
    for read in (describe, coprocessor_checkpoint.load):
      with pytest.raises(UserError, match=f'{directory}.*{DESCRIPTION}'):
        read(directory)


def test_coprocessor_one_level_off(directory, tmp_path):
  """The only one inside a directory is taken; several are named."""
  for name in ('one', 'two'):
    place = tmp_path / 'runs' / name / 'coprocessor'
    place.mkdir(parents=True)
    shutil.copy(directory / DESCRIPTION, place)
    if name == 'one':
      assert locate_coprocessor(tmp_path / 'runs') == place
  with pytest.raises(UserError, match=r'runs holds no .* 2 .*one/coprocessor, .*two/coprocessor'):
    locate_coprocessor(tmp_path / 'runs')


@pytest.mark.parametrize('damage', [
    lambda text: text[:-30],
    lambda text: '[]',
    lambda text: text.replace('"format": 1', '"format": 2'),
    lambda text: text.replace('"num_latents"', '"latents_num"'),
    lambda text: text.replace('"refining"', '"refined"'),
    lambda text: text.replace('"num_kv_heads": 2', '"num_kv_heads": 3'),
    lambda text: text.replace('"decoder"', '"encoder"')])
def test_damaged_description(directory, damage):
  """A damaged description is refused."""
  path = directory / DESCRIPTION
  changed = damage(path.read_text())
  assert changed != path.read_text()
  path.write_text(changed)
  for read in (describe, coprocessor_checkpoint.load):
    with pytest.raises(UserError, match=f'{path}.*damaged'):
      read(directory)


def trained(decoder_params, **choices) -> CoprocessorCheckpoint:
  """A coprocessor with every parameter far from zero."""
  deliberator = tiny.deliberator(**choices)
  description = dataclasses.replace(WRITTEN, config=deliberator.config)
  return CoprocessorCheckpoint(
      **vars(description), params=tiny.coprocessor_params(deliberator, decoder_params))


def on_mesh(boxed):
  return shardings_of(boxed, make_mesh(MeshConfig(2, 2, 2)), DEFAULT_RULES)


def assert_same(actual: CoprocessorCheckpoint, expected: CoprocessorCheckpoint) -> None:
  """Equal to the bit, dtypes included."""
  assert fingerprint(actual.params) == fingerprint(expected.params)
  assert dataclasses.replace(actual, params=0) == dataclasses.replace(expected, params=0)


@pytest.fixture(scope='module')
def full(decoder_params) -> CoprocessorCheckpoint:
  return trained(decoder_params)


@pytest.fixture(scope='module')
def saved(full, tmp_path_factory):
  directory = tmp_path_factory.mktemp('saved') / 'coprocessor'
  coprocessor_checkpoint.save(directory, full)
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of a saved coprocessor, to be damaged."""
  return shutil.copytree(saved, tmp_path / 'copied')


@pytest.mark.parametrize('choices', [
    {}, {'trainable': 'lora'}, {'trainable': 'constant'}, {'latents': 'paper'},
    {'gate': 'channel'}])
def test_params_round_trip(decoder_params, tmp_path, choices):
  """Parameters are loaded as they were saved."""
  expected = trained(decoder_params, **choices)
  coprocessor_checkpoint.save(tmp_path / 'new', expected)
  assert_same(coprocessor_checkpoint.load(tmp_path / 'new'), expected)


def test_dtypes_round_trip(full, tmp_path):
  """bfloat16 and mixed dtypes survive the disk."""
  short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full.params)
  mixed = dataclasses.replace(full, params=short | {'gate': full.params['gate']})
  coprocessor_checkpoint.save(tmp_path / 'new', mixed)
  loaded = coprocessor_checkpoint.load(tmp_path / 'new')
  assert loaded.params['soft_tokens'].dtype == jnp.bfloat16
  assert_same(loaded, mixed)


def test_load_rounded(saved, full):
  """Parameters may be kept in another dtype."""
  loaded = coprocessor_checkpoint.load(saved, dtype='bfloat16')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
               loaded.params, full.params)


@pytest.mark.parametrize('file_bytes', [1 << 30, 5000])
def test_sharded_params(saved, full, tmp_path, file_bytes):
  """Sharded parameters are saved whole and read straight onto a mesh."""
  sharded = coprocessor_checkpoint.load(saved, on_mesh)
  query = sharded.params['transformer']['blocks']['attention']['query']['w']
  assert query.shape == (3, 16, 4, 6)
  assert query.addressable_shards[0].data.shape == (3, 8, 2, 6)
  assert_same(sharded, full)
  coprocessor_checkpoint.save(tmp_path / 'again', sharded, file_bytes)
  assert_same(coprocessor_checkpoint.load(tmp_path / 'again'), full)


def test_split_files(full, saved, tmp_path):
  """A large coprocessor is split over files with an index."""
  coprocessor_checkpoint.save(tmp_path / 'split', full, file_bytes=5000)
  files = sorted((tmp_path / 'split').glob('*.safetensors'))
  assert [path.name for path in files] == [
      f'coprocessor-{n:05d}-of-{len(files):05d}.safetensors' for n in range(1, len(files) + 1)]
  parts = [load_file(path) for path in files]
  assert len(parts) > 1 and all(
      len(part) == 1 or sum(leaf.nbytes for leaf in part.values()) <= 5000 for part in parts)
  index = json.loads((tmp_path / 'split' / INDEX).read_text())
  assert index['metadata']['total_size'] == sum(
      leaf.nbytes for leaf in jax.tree.leaves(full.params))
  assert index['weight_map'] == {
      name: path.name for path, part in zip(files, parts, strict=True) for name in part}
  assert set(index['weight_map']) == set(load_file(saved / 'coprocessor.safetensors'))


def test_two_files(saved, full):
  """A small coprocessor is two files, and the json describes it."""
  assert sorted(path.name for path in saved.iterdir()) == [
      'coprocessor.json', 'coprocessor.safetensors']
  assert [path.name for path in saved.parent.iterdir()] == ['coprocessor']
  said = json.loads((saved / 'coprocessor.json').read_text())
  assert said['format'] == 1
  assert said['fingerprint'] == fingerprint(full.params)
  assert (said['decoder'], said['vocabulary'], said['steps']) == ('d0', 'v0', 7)
  assert said['config']['num_latents'] == 3 and said['model']['embed_dim'] == 16


def test_describe_reads_no_params(copied, full):
  """A description is read without the parameters."""
  (copied / 'coprocessor.safetensors').unlink()
  described = describe(copied)
  assert dataclasses.replace(full, params=0) == CoprocessorCheckpoint(**vars(described), params=0)


def test_no_overwriting(saved, full):
  """An existing checkpoint is not overwritten."""
  before = (saved / 'coprocessor.json').read_bytes()
  with pytest.raises(UserError, match=f'{saved}.*exists'):
    coprocessor_checkpoint.save(saved, dataclasses.replace(full, steps=8))
  assert (saved / 'coprocessor.json').read_bytes() == before


def test_full_disk_leaves_nothing(full, tmp_path, monkeypatch):
  """A failed write is named and leaves no file."""
  def full_disk(*unused, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(
      'latent_deliberation.model.checkpoints.safetensors_io.save_file', full_disk)
  with pytest.raises(UserError, match=f"{tmp_path / 'new'}.*No space left"):
    coprocessor_checkpoint.save(tmp_path / 'new', full)
  assert list(tmp_path.iterdir()) == []


def test_save_other_config(full, tmp_path):
  """Parameters of another config are not written."""
  wrong = dataclasses.replace(
      full, config=dataclasses.replace(full.config, num_latents=5, latents='paper'))
  with pytest.raises(ValueError, match=(
      r'(?s)gate: .*\[16, 16\].*soft_tokens: .*\[3, 16\].*\[5, 16\]')):
    coprocessor_checkpoint.save(tmp_path / 'new', wrong)
  assert not (tmp_path / 'new').exists()


def edit(directory, **changes):
  path = directory / 'coprocessor.json'
  content = {**json.loads(path.read_text()), **changes}
  del content['checksum']  # as somebody who changes it on purpose does
  path.write_text(json.dumps(content))


def test_wrong_tensors(copied):
  """Tensors that are missing, misshapen or unknown are all named."""
  path = copied / 'coprocessor.safetensors'
  tensors = load_file(path)
  del tensors['gate']
  tensors['soft_tokens'] = tensors['soft_tokens'][:2]
  tensors['head'] = np.zeros(4, np.float32)
  save_file(tensors, path)
  with pytest.raises(UserError, match=(
      rf'(?s){copied}.*gate: missing.*\[16, 16\].*head: .*\[4\].*'
      r'soft_tokens: .*\[2, 16\].*\[3, 16\]')):
    coprocessor_checkpoint.load(copied)


def test_truncated_file(copied):
  """A truncated file is refused."""
  path = copied / 'coprocessor.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match='coprocessor.safetensors.*truncated'):
    coprocessor_checkpoint.load(copied)


@pytest.mark.parametrize('name', ['coprocessor.safetensors', 'coprocessor-00002-of'])
def test_missing_file(full, tmp_path, name):
  """A missing file is named."""
  coprocessor_checkpoint.save(
      tmp_path / 'new', full, file_bytes=5000 if '-of' in name else 1 << 30)
  next((tmp_path / 'new').glob(f'{name}*')).unlink()
  with pytest.raises(UserError, match=name):
    coprocessor_checkpoint.load(tmp_path / 'new')


def test_changed_params(copied, saved, full):
  """Parameters that were exchanged, or changed by a bit, are refused."""
  path = copied / 'coprocessor.safetensors'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=f'fingerprint [0-9a-f]+, .*{fingerprint(full.params)}'):
    coprocessor_checkpoint.load(copied)
  shutil.copy(saved / path.name, path)
  edit(copied, fingerprint='f0')
  with pytest.raises(UserError, match=f'fingerprint {fingerprint(full.params)}, .*f0'):
    coprocessor_checkpoint.load(copied)


@pytest.fixture
def described(quickstart) -> Description:
  return describe(quickstart / 'coprocessor/coprocessor')


def find(experiment, directory, vocabulary_hash):
  return find_coprocessor(
      directory, decoder_config=experiment.decoder, config=experiment.deliberation,
      vocabulary_hash=vocabulary_hash)


def read(directory, decoder_fingerprint, frozen_dtype='float32'):
  return load_coprocessor(
      directory, decoder_fingerprint=decoder_fingerprint, frozen_dtype=frozen_dtype,
      mesh=make_mesh(MeshConfig(2, 2, 2)), rules=DEFAULT_RULES)


def test_find_by_run_or_checkpoint(quickstart, described):
  """The directory of a run and that of its coprocessor find the same."""
  expected = quickstart / 'coprocessor/coprocessor'
  for directory in (expected, expected.parent):
    assert find(finished.experiment(), directory, described.vocabulary_hash) == expected


def test_find_unfinished_run(quickstart, tmp_path, described):
  """A run that has not ended is refused."""
  run = shutil.copytree(quickstart / 'coprocessor', tmp_path / 'run',
                        ignore=lambda *_: ['coprocessor'])
  with pytest.raises(UserError, match=f'{run}.*no trained coprocessor'):
    find(finished.experiment(), run, described.vocabulary_hash)


@pytest.mark.parametrize('change, message', [
    ({'deliberation__gate': 'channel'}, "config.deliberation.gate.*'matrix'.*'channel'"),
    ({'deliberation__num_latents': 1}, 'config.deliberation.num_latents.*2.*1'),
    ({'decoder__window': 9}, 'config.decoder.window.*8.*9')])
def test_find_other_config(quickstart, described, change, message):
  """Another config is refused with the key and both values."""
  with pytest.raises(UserError, match=f'\n  {message}.*\n[^ ]'):  # no other key
    find(finished.experiment(**change), quickstart / 'coprocessor', described.vocabulary_hash)


def test_find_other_evaluation(quickstart, described):
  """Settings of scoring and optimisation may differ."""
  experiment = finished.experiment(
      evaluation__num_traces=3, evaluation__num_ahead=9, training__batch_size=16, seed=5,
      training__loop__num_steps=4, deliberation__num_traces=5, deliberation__lora_rank=3)
  assert find(experiment, quickstart / 'coprocessor', described.vocabulary_hash)


def test_find_other_vocabulary(quickstart, described):
  """Text of another vocabulary is refused with both."""
  with pytest.raises(UserError, match=f'vocabulary {described.vocabulary_hash}.*another'):
    find(finished.experiment(), quickstart / 'coprocessor', 'another')


def test_load_onto_mesh(quickstart, described):
  """It is loaded onto the mesh for its own decoder alone."""
  directory = quickstart / 'coprocessor/coprocessor'
  params = read(directory, described.decoder_fingerprint)
  assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
  assert fingerprint(params) == fingerprint(coprocessor_checkpoint.load(directory).params)
  with pytest.raises(UserError, match=(
      f'{directory}.*fingerprint {described.decoder_fingerprint}.*another')):
    read(directory, 'another')


def test_load_warns_of_int8(quickstart, described, caplog):
  """An int8 decoder is warned of where training had none."""
  read(quickstart / 'coprocessor/coprocessor', described.decoder_fingerprint, 'int8')
  assert any(re.search('float32.*int8', text) for text in caplog.messages)
