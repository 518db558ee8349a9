"""A trained coprocessor survives the disk to the bit; anything else on it is refused."""

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
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint, describe
from latent_deliberation.errors import UserError
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny

INDEX = 'model.safetensors.index.json'


def trained(decoder_params, **choices) -> CoprocessorCheckpoint:
  """A coprocessor with every parameter far from zero."""
  deliberator = tiny.deliberator(**choices)
  return CoprocessorCheckpoint(tiny.CONFIG, deliberator.config, decoder='d0', vocabulary='v0', steps=7,
                 frozen_dtype='int8',
                 params=tiny.coprocessor_params(deliberator, decoder_params))


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
  directory = tmp_path_factory.mktemp('package') / 'coprocessor'
  coprocessor_checkpoint.save(directory, full)
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of a saved package, to be damaged."""
  return shutil.copytree(saved, tmp_path / 'copied')


@pytest.mark.parametrize('choices', [
    {}, {'trainable': 'lora'}, {'trainable': 'constant'}, {'latents': 'paper'},
    {'gate': 'channel'}])
def test_what_is_loaded_is_what_was_saved(decoder_params, tmp_path, choices):
  expected = trained(decoder_params, **choices)
  coprocessor_checkpoint.save(tmp_path / 'package', expected)
  assert_same(coprocessor_checkpoint.load(tmp_path / 'package'), expected)


def test_bfloat16_and_mixed_dtypes_survive_the_disk(full, tmp_path):
  short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full.params)
  mixed = dataclasses.replace(full, params=short | {'gate': full.params['gate']})
  coprocessor_checkpoint.save(tmp_path / 'package', mixed)
  loaded = coprocessor_checkpoint.load(tmp_path / 'package')
  assert loaded.params['soft_tokens'].dtype == jnp.bfloat16
  assert_same(loaded, mixed)


def test_parameters_may_be_kept_rounded(saved, full):
  loaded = coprocessor_checkpoint.load(saved, dtype='bfloat16')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
               loaded.params, full.params)


@pytest.mark.parametrize('file_bytes', [1 << 30, 5000])
def test_sharded_parameters_are_saved_whole_and_read_straight_onto_a_mesh(
    saved, full, tmp_path, file_bytes):
  sharded = coprocessor_checkpoint.load(saved, on_mesh)
  query = sharded.params['transformer']['blocks']['attention']['query']['w']
  assert query.shape == (3, 16, 4, 6)
  assert query.addressable_shards[0].data.shape == (3, 8, 2, 6)
  assert_same(sharded, full)
  coprocessor_checkpoint.save(tmp_path / 'again', sharded, file_bytes)
  assert_same(coprocessor_checkpoint.load(tmp_path / 'again'), full)


def test_a_large_coprocessor_is_split_over_files_with_an_index(full, saved, tmp_path):
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


def test_a_small_one_is_two_files_that_say_what_they_are(saved, full):
  assert sorted(path.name for path in saved.iterdir()) == [
      'coprocessor.json', 'coprocessor.safetensors']
  assert [path.name for path in saved.parent.iterdir()] == ['coprocessor']
  said = json.loads((saved / 'coprocessor.json').read_text())
  assert said['format'] == 1
  assert said['fingerprint'] == fingerprint(full.params)
  assert (said['decoder'], said['vocabulary'], said['steps']) == ('d0', 'v0', 7)
  assert said['config']['num_latents'] == 3 and said['model']['embed_dim'] == 16


def test_it_is_described_without_reading_its_parameters(copied, full):
  (copied / 'coprocessor.safetensors').unlink()
  described = describe(copied)
  assert dataclasses.replace(full, params=0) == CoprocessorCheckpoint(**vars(described), params=0)


def test_nothing_is_written_over(saved, full):
  before = (saved / 'coprocessor.json').read_bytes()
  with pytest.raises(UserError, match=f'{saved} exists already'):
    coprocessor_checkpoint.save(saved, dataclasses.replace(full, steps=8))
  assert (saved / 'coprocessor.json').read_bytes() == before


def test_a_failure_while_writing_leaves_nothing_behind(full, tmp_path, monkeypatch):
  def full_disk(*unused, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(
      'latent_deliberation.model.checkpoints.safetensors_io.save_file', full_disk)
  with pytest.raises(UserError, match='No space left'):
    coprocessor_checkpoint.save(tmp_path / 'package', full)
  assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_config_are_not_written(full, tmp_path):
  wrong = dataclasses.replace(
      full, config=dataclasses.replace(full.config, num_latents=5, latents='paper'))
  with pytest.raises(UserError, match=(
      r'(?s)gate: \[16, 16\] there, \(nothing\) expected\n'
      r'  soft_tokens: \[3, 16\] there, \[5, 16\] expected\nGive the configs')):
    coprocessor_checkpoint.save(tmp_path / 'package', wrong)
  assert not (tmp_path / 'package').exists()


def edit(directory, **changes):
  path = directory / 'coprocessor.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tensors_that_are_missing_misshapen_or_too_many_are_all_named(copied):
  path = copied / 'coprocessor.safetensors'
  tensors = load_file(path)
  del tensors['gate']
  tensors['soft_tokens'] = tensors['soft_tokens'][:2]
  tensors['head'] = np.zeros(4, np.float32)
  save_file(tensors, path)
  with pytest.raises(UserError, match=re.escape(
      f'{copied} does not hold the coprocessor that its coprocessor.json describes:\n'
      '  gate: (nothing) there, [16, 16] expected\n'
      '  head: [4] there, (nothing) expected\n'
      '  soft_tokens: [2, 16] there, [3, 16] expected\nCopy the package again')):
    coprocessor_checkpoint.load(copied)


def test_a_truncated_file_is_refused(copied):
  path = copied / 'coprocessor.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match='coprocessor.safetensors .* is truncated or damaged'):
    coprocessor_checkpoint.load(copied)


@pytest.mark.parametrize('name', ['coprocessor.safetensors', 'coprocessor-00002-of'])
def test_a_file_that_is_absent_is_named(full, tmp_path, name):
  coprocessor_checkpoint.save(
      tmp_path / 'package', full, file_bytes=5000 if '-of' in name else 1 << 30)
  next((tmp_path / 'package').glob(f'{name}*')).unlink()
  with pytest.raises(UserError, match=name):
    coprocessor_checkpoint.load(tmp_path / 'package')


def test_parameters_that_were_exchanged_or_changed_by_a_bit_are_refused(copied, saved, full):
  path = copied / 'coprocessor.safetensors'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=f'have fingerprint [0-9a-f]+, coprocessor.json says '
                     f'{fingerprint(full.params)}: one of the two was replaced or damaged'):
    coprocessor_checkpoint.load(copied)
  shutil.copy(saved / path.name, path)
  edit(copied, fingerprint='f0')
  with pytest.raises(UserError, match=f'fingerprint {fingerprint(full.params)}, .* says f0'):
    coprocessor_checkpoint.load(copied)
