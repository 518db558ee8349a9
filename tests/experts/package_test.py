"""A package comes back to the bit, and nothing about it is believed before it is checked."""

import dataclasses
import functools
import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.experts import package
from latent_deliberation.experts.package import (
  ABOUT,
  CARD,
  PICTURE,
  README,
  ROUTING,
  SAMPLE,
  WEIGHTS,
  check_package,
  load_package,
  read_card,
  read_sample,
  write_card,
  write_package,
)
from latent_deliberation.files import sha256_of
from tests.experts import small

ROWS = {'stars': {'tokens': np.arange(24).reshape(4, 6), 'segments': np.ones((4, 6), int),
                  'texts': np.array([0, 0, 1, 1])}}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('packages') / 'stars'
  write_package(directory, small.card(), small.lora(1), routing=small.routing(), sample=ROWS,
                picture=b'picture')
  return directory


@pytest.fixture
def copy(written, tmp_path):
  return shutil.copytree(written, tmp_path / 'copy')


def listed_again(directory, name):
  """Has the card list a changed file, as somebody who means harm would."""
  card = read_card(directory)
  path = directory / name
  files = {**card.files, name: {'bytes': path.stat().st_size, 'sha256': sha256_of(path)}}
  write_card(directory, dataclasses.replace(card, files=files))


def test_round_trip(written):
  """Card, weights, routing and sample come back to the bit."""
  expert = load_package(written)
  trained = small.lora(1)
  jax.tree.map(np.testing.assert_array_equal, expert.coprocessor.params, trained.params)
  assert expert.coprocessor.config == trained.config
  for name, value in vars(small.routing()).items():
    np.testing.assert_allclose(getattr(expert.routing, name), value, rtol=1e-6)
  found = read_sample(written)
  assert list(found) == ['stars']
  for part, values in ROWS['stars'].items():
    np.testing.assert_array_equal(found['stars'][part], values)
  assert expert.card.files.keys() == {
      'coprocessor/coprocessor.json', WEIGHTS, ROUTING, SAMPLE, 'scores.png'}
  assert expert.card.address in (written / README).read_text()
  # launch scripts that know nothing of experts find the coprocessor, too.
  assert coprocessor_checkpoint.locate_coprocessor(written) == written / 'coprocessor'


def test_same_content_has_the_same_address(written, tmp_path):
  card = write_package(tmp_path / 'again', small.card(), small.lora(1), routing=small.routing(),
                       sample=ROWS, picture=b'picture')
  assert card.address == read_card(written).address
  other = write_package(tmp_path / 'other', small.card(), small.lora(2))
  assert other.fingerprint != card.fingerprint


def test_bare_package(tmp_path):
  """Routing, sample and picture may be absent."""
  write_package(tmp_path / 'bare', small.card(), small.lora(1))
  assert load_package(tmp_path / 'bare').routing is None and read_sample(tmp_path / 'bare') is None


def test_nothing_is_overwritten(written):
  with pytest.raises(UserError, match='exists already'):
    write_package(written, small.card(), small.lora(1))


def test_card_of_another_coprocessor_is_not_written(tmp_path):
  with pytest.raises(UserError, match="latents.form = 'anchored'"):
    write_package(tmp_path / 'x', small.card(latents={'number': 3, 'form': 'anchored'}),
                  small.lora(1))
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('name', [ROUTING, SAMPLE, PICTURE, CARD, README])
def test_failed_write_leaves_nothing(name, tmp_path, monkeypatch):
  """A disk that is full while a package is written leaves no half of it, and is explained."""
  def full(self, content, write=None):
    if self.name == name:
      raise OSError(28, 'No space left on device')
    return write(self, content)
  for method in ('write_bytes', 'write_text'):
    monkeypatch.setattr(Path, method, functools.partialmethod(full, write=getattr(Path, method)))
  with pytest.raises(UserError, match='No space.*free some space'):
    write_package(tmp_path / 'x', small.card(), small.lora(1), routing=small.routing(),
                  sample=ROWS, picture=b'picture')
  assert not (tmp_path / 'x').exists()


def flip(directory):
  path = directory / WEIGHTS
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def cut(directory):
  path = directory / WEIGHTS
  path.write_bytes(path.read_bytes()[:-8])


def link(directory):
  path = directory / WEIGHTS
  path.rename(directory.parent / 'elsewhere')
  path.symlink_to(directory.parent / 'elsewhere')


def link_folder(directory):
  (directory / 'coprocessor').rename(directory.parent / 'folder')
  (directory / 'coprocessor').symlink_to(directory.parent / 'folder')


def drop(directory):
  (directory / WEIGHTS).unlink()


def unlisted(directory):
  (directory / 'coprocessor/model.safetensors').write_bytes(b'other')


def pickled(directory):
  (directory / 'model.pkl').write_bytes(b'cos\nsystem\n')


def traversal(directory):
  card = read_card(directory)
  (directory.parent / 'secret').write_bytes(b'secret')
  content = json.loads((directory / CARD).read_text())
  content['files']['../secret'] = {'bytes': 6, 'sha256': sha256_of(directory.parent / 'secret')}
  del content['fingerprint'], content['format']
  write_card(directory, dataclasses.replace(card, files=content['files']))


def large(directory):
  card = read_card(directory)
  files = {**card.files, ROUTING: {**card.files[ROUTING], 'bytes': 2**40}}
  write_card(directory, dataclasses.replace(card, files=files))


def huge_header(directory):
  content = (directory / ROUTING).read_bytes()
  (directory / ROUTING).write_bytes(struct.pack('<Q', 2**40) + content[8:])
  listed_again(directory, ROUTING)


def broken_header(directory):
  content = (directory / ROUTING).read_bytes()
  (directory / ROUTING).write_bytes(content[:8] + b'[' * 40 + content[48:])
  listed_again(directory, ROUTING)


def no_header(directory):
  (directory / ROUTING).write_bytes(b'123')
  listed_again(directory, ROUTING)


def wrong_dtype(directory):
  arrays = load_file(directory / WEIGHTS)
  save_file({name: array.astype(np.int8) for name, array in arrays.items()}, directory / WEIGHTS)
  listed_again(directory, WEIGHTS)


def wrong_shape(directory):
  arrays = load_file(directory / ROUTING)
  save_file({**arrays, 'centroid': np.zeros(3, np.float32)}, directory / ROUTING)
  listed_again(directory, ROUTING)


def other_tensor(directory):
  arrays = load_file(directory / ROUTING)
  save_file({**arrays, 'more': np.zeros(3, np.float32)}, directory / ROUTING)
  listed_again(directory, ROUTING)


def no_number(directory):
  arrays = load_file(directory / ROUTING)
  save_file({**arrays, 'gain_bias': np.array([np.nan], np.float32)}, directory / ROUTING)
  listed_again(directory, ROUTING)


def other_base(directory):
  card = read_card(directory)
  write_card(directory, dataclasses.replace(card, base={**card.base, 'fingerprint': 'd1'}))


def large_card(directory):
  (directory / CARD).write_bytes(b' ' * (package.CARD_BYTES + 1))


def deep_card(directory):
  (directory / CARD).write_text('[' * 100_000)


def infinite_card(directory):
  path = directory / CARD
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1e999', 1))


def long_number(directory):
  path = directory / CARD
  path.write_text(path.read_text().replace('"seed": 0', f'"seed": {"9" * 400}', 1))


def nested_card(directory):
  path = directory / CARD
  path.write_text(path.read_text().replace('"seed": 0', f'"seed": {"[" * 600}{"]" * 600}', 1))


def deep_description(directory):
  (directory / ABOUT).write_text('[' * 100_000)
  listed_again(directory, ABOUT)


def empty_routing(directory):
  save_file({'centroid': np.zeros(0, np.float32)}, directory / ROUTING)
  listed_again(directory, ROUTING)


def cut_card(directory):
  path = directory / CARD
  path.write_bytes(path.read_bytes()[:-40])


def changed_card(directory):
  path = directory / CARD
  path.write_text(path.read_text().replace('Stars and planets', 'Stars and malware'))


def no_card(directory):
  (directory / CARD).unlink()


FAULTS = {
    flip: 'has the hash', cut: 'bytes, and its card says', link: 'no regular file',
    link_folder: 'coprocessor is a link', drop: 'is missing', unlisted: r"model.safetensors'\]",
    pickled: r"\['model.pkl'\]", traversal: r"'../secret'", large: '1,099,511,627,776 bytes',
    huge_header: 'header would take', broken_header: 'header is damaged', no_header: 'header',
    wrong_dtype: r"dtypes \['I8'\]", wrong_shape: r'centroid has shape \(3,\)',
    other_tensor: 'more has shape', no_number: 'gain_bias holds numbers that are not finite',
    other_base: "base.fingerprint = 'd1'", large_card: 'more than', deep_card: 'damaged',
    infinite_card: '1e999', long_number: 'damaged', nested_card: 'nested more than',
    deep_description: 'coprocessor.json: damaged', empty_routing: 'centroid has shape',
    cut_card: 'damaged', changed_card: 'it was changed', no_card: f'holds no {CARD}'}


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_hostile_packages_are_refused(copy, fault):
  """The message names the file and what is wrong with it."""
  fault(copy)
  with pytest.raises(UserError, match=FAULTS[fault]):
    load_package(copy)


def test_files_are_checked_before_they_are_read(copy, monkeypatch):
  """No tensor is read from a package with any file that is not the card's."""
  flip(copy)
  monkeypatch.setattr(coprocessor_checkpoint, 'load', lambda *unused: pytest.fail('it was read'))
  with pytest.raises(UserError, match='has the hash'):
    load_package(copy)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
  write_package(tmp_path / 'nan', small.card(), small.broken(small.lora(1)))
  check_package(tmp_path / 'nan')
  with pytest.raises(UserError, match='weights that are not finite'):
    load_package(tmp_path / 'nan')


def test_damaged_sample(copy):
  save_file({'stars/tokens': np.zeros((2, 3), np.int32)}, copy / SAMPLE)
  listed_again(copy, SAMPLE)
  with pytest.raises(UserError, match='stars/segments has shape None'):
    read_sample(copy)


def test_stray_files_are_no_matter(copy):
  """What a file manager leaves behind is not read, and no reason to refuse a package."""
  (copy / '.DS_Store').write_bytes(b'x')
  (copy / 'README.md~').write_bytes(b'x')
  assert load_package(copy).card.name == 'stars'
