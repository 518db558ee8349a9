"""An index anywhere lists experts; add brings them here, whole or not at all."""

import dataclasses
import functools
import http.server
import io
import json
import shutil
from pathlib import Path

import pytest
from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts import index
from latent_deliberation.experts.added import (
  add,
  added_directory,
  find_added,
  list_added,
  locate,
  remove,
)
from latent_deliberation.experts.index import Entry, Place, find_entry, publish, read_index, search
from latent_deliberation.experts.package import WEIGHTS, check_package, read_card, write_package
from tests.experts import small
from tests.loopback import served


@pytest.fixture(scope='module')
def market(tmp_path_factory):
  """An index with stars, law, and a newer law."""
  place = tmp_path_factory.mktemp('market')
  for number, (name, words) in enumerate((('stars', ('comet', 'orbit')), ('law', ('court',)),
                                          ('law', ('judge', 'court')))):
    package = place / f'package{number}'
    scores = {name: small.card().scores['stars']}
    write_package(package, small.card(name, keywords=words, scores=scores,
                                      description=f'About {words[0]}s'), small.lora(number + 1))
    publish(package, place / 'index')
  return place


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


def served_folder(directory):
  """Serves a directory over http; yields its address."""
  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *unused):
      pass
  return served(functools.partial(Quiet, directory=directory))


def test_published_experts_are_listed(market):
  """The index has the card's words, decoder and gain; packages are copies to the bit."""
  first, second, third = read_index(str(market / 'index'))
  assert [first.name, second.name, third.name] == ['stars', 'law', 'law']
  card = read_card(market / 'package0')
  assert first == Entry.of(card)
  assert first.gain == '+0.200 [+0.100, +0.300]' and first.base == card.base
  assert check_package(market / 'index' / card.address) == card


def test_search(market):
  """Words are looked for in name, description, text and decoder; the best come first."""
  entries = read_index(str(market / 'index'))
  assert [entry.name for entry in search(entries, ['stars'])] == ['stars']
  assert [entry.keywords[0] for entry in search(entries, ['COURT'])] == ['court', 'judge']
  assert len(search(entries, ['tiny'])) == 3 and search(entries, ['banana']) == []


def test_search_for_a_decoder(market):
  """A decoder is found by its whole name, digits included, and by the words of it."""
  first, second, third = read_index(str(market / 'index'))
  named = dataclasses.replace(second, base={'name': 'gemma3-270m', 'fingerprint': 'd1'})
  other = dataclasses.replace(third, base={'name': 'gemma2-2b', 'fingerprint': 'd2'})
  entries = [first, other, named]
  assert search(entries, ['gemma3-270m']) == [named, other]
  assert search(entries, ['Gemma']) == [other, named]


def test_newest_of_a_name_is_found(market):
  entries = read_index(str(market / 'index'))
  assert find_entry(entries, 'law', 'here') == entries[2]
  assert find_entry(entries, entries[1].address, 'here') == entries[1]
  with pytest.raises(UserError, match="no expert moon.*'law', 'stars'"):
    find_entry(entries, 'moon', 'here')


@pytest.mark.parametrize('way', ['directory', 'index', 'in index', 'http', 'http index'])
def test_add(market, tmp_path, way):
  """From a package, an index, or an address within one; here or over http."""
  card = read_card(market / 'package0')
  with served_folder(market) as url:
    source, given = {
        'directory': (str(market / 'package0'), ''), 'index': ('stars', str(market / 'index')),
        'in index': (f'{market}/index/stars', ''),
        'http': (f'{url}/index/{card.address}', ''),
        'http index': ('stars', f'{url}/index')}[way]
    found, directory = add(source, tmp_path, given)
  assert found == card and directory == tmp_path / card.address
  assert check_package(directory) == card and list_added(tmp_path) == [(card, directory)]
  assert add(str(market / 'package0'), tmp_path) == (card, directory)  # once more


def test_sources_with_an_at_sign(market, tmp_path):
  """A folder may have any name; an address that was cut off is no address without a promise."""
  card = read_card(market / 'package0')
  shutil.copytree(market / 'package0', tmp_path / 'notes@home')
  assert add(str(tmp_path / 'notes@home'), tmp_path / 'added')[0] == card
  for cut_off in (f'{card.name}@', card.address[:-3]):
    with pytest.raises(UserError, match='16 hexadecimal digits'):
      add(f'{market}/index/{cut_off}', tmp_path / 'added')


def test_names_of_added_experts(market, tmp_path):
  """Two experts of one name need their fingerprints; a directory is a name, too."""
  addresses = [add(str(market / f'package{number}'), tmp_path)[0].address for number in (1, 2)]
  with pytest.raises(UserError, match=f'2 experts are called law.*{addresses[0]}'):
    find_added('law', tmp_path)
  assert find_added(addresses[1], tmp_path).name == addresses[1]
  assert locate(str(market / 'package0'), tmp_path) == market / 'package0'
  with pytest.raises(UserError, match='no expert moon'):
    locate('moon', tmp_path)
  with pytest.raises(UserError, match='holds no expert.json'):
    locate('./moon', tmp_path)
  remove(addresses[1], tmp_path)
  assert locate('law', tmp_path).name == addresses[0]
  assert [path.name for path in tmp_path.iterdir()] == [addresses[0]]
  (tmp_path / addresses[0] / 'expert.json').write_text('{')
  remove(addresses[0], tmp_path)  # its folder still says what it was
  assert not list(tmp_path.iterdir())


def test_directory_of_added_experts(monkeypatch, tmp_path):
  monkeypatch.setenv('LATENT_DELIBERATION_EXPERTS', str(tmp_path))
  assert added_directory() == tmp_path and added_directory('/x').as_posix() == '/x'
  assert list_added(tmp_path / 'nothing') == []
  monkeypatch.setenv('LATENT_DELIBERATION_EXPERTS', 'gs://bucket/experts')
  with pytest.raises(UserError, match='gs://bucket/experts is a URL.*LATENT_DELIBERATION_EXPERTS'):
    added_directory()


def tampered(market, tmp_path, change):
  """Returns the address of a package in a copy of the index, one file of which is changed."""
  copy = tmp_path / 'copy'
  shutil.copytree(market / 'index', copy)
  card = read_card(market / 'package0')
  change(copy / card.address / WEIGHTS)
  return f'{copy}/{card.address}'


@pytest.mark.parametrize('change', [
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b'x'),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(path.read_bytes() + b'more'),
    lambda path: path.unlink()], ids=['changed', 'cut off', 'longer', 'absent'])
def test_changed_files_are_not_added(market, tmp_path, change):
  """Nothing is left behind."""
  source = tampered(market, tmp_path, change)
  with pytest.raises(UserError, match=WEIGHTS):
    add(source, tmp_path / 'added')
  assert not list((tmp_path / 'added').iterdir())


def test_replaced_package_is_not_added(market, tmp_path):
  """An address promises a fingerprint, which another card does not have."""
  first, second = (read_card(market / f'package{number}') for number in (1, 2))
  shutil.copytree(market / 'package2', tmp_path / first.address)
  with pytest.raises(UserError, match=f'fingerprint {second.fingerprint}, and {first.fingerprint}'):
    add(f'{tmp_path}/{first.address}', tmp_path / 'added')


def test_full_disk_leaves_nothing(market, tmp_path, monkeypatch):
  """The error names the directory, and what was downloaded so far is gone."""
  class Full(io.BytesIO):
    def write(self, chunk):
      raise OSError(28, 'No space left on device')

  path_open = type(tmp_path).open
  monkeypatch.setattr(type(tmp_path), 'open', lambda path, mode='r', *more, **options: (
      Full() if mode == 'xb' else path_open(path, mode, *more, **options)))
  with pytest.raises(UserError, match='cannot be written to.*No space left.*free some space'):
    add(str(market / 'package0'), tmp_path / 'added')
  assert not list((tmp_path / 'added').iterdir())


@pytest.mark.parametrize('content, message', [
    (None, 'there is no such file'), (b'{"format": 1, "exp', 'damaged'), (b'[]', 'no index'),
    (b'{"format": 2, "experts": []}', 'newer version'), (b'\xff\xfe', 'damaged'),
    (b'{"format": 1, "experts": {}}', 'no index'), (b'[' * 100_000, 'damaged')],
    ids=['absent', 'half', 'list', 'newer', 'binary', 'mapping', 'deep'])
def test_bad_index(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'index.json').write_bytes(content)
  with pytest.raises(UserError, match=f'index.json.*{message}'):
    read_index(str(tmp_path))


def test_unreachable_index():
  with pytest.raises(UserError, match='127.0.0.1:1/index.json.*cannot be re'):
    read_index('http://127.0.0.1:1')
  for address in ('ftp://host/x', 'file:///x', 'http://a::file:///etc'):
    with pytest.raises(UserError, match='give a path, or an address'):
      Place.at(address)


def test_unknown_and_damaged_entries(market, tmp_path, warnings):
  """Fields that are not known mean nothing; a damaged entry is left out with one warning."""
  content = json.loads((market / 'index/index.json').read_text())
  good, bad, hostile, strange = (dict(content['experts'][0]) for _ in range(4))
  good['colour'] = 'red'
  del bad['base']
  hostile['name'] = '../../etc'
  strange['description'] = 'a\x1b[2J'
  (tmp_path / 'index.json').write_text(json.dumps({
      'format': 1, 'by': 'somebody', 'experts': [good, bad, hostile, strange, 3]}))
  entry, = read_index(str(tmp_path))
  assert entry.name == 'stars' and len(warnings) == 4


def test_large_index(tmp_path, monkeypatch):
  monkeypatch.setattr(index, '_INDEX_BYTES', 10)
  (tmp_path / 'index.json').write_text('{"format": 1, "experts": []}')
  with pytest.raises(UserError, match='more than 10 bytes'):
    read_index(str(tmp_path))


def test_expert_without_a_gain_is_published_by_force_alone(tmp_path):
  write_package(tmp_path / 'x', small.card(scores={}), small.lora(1))
  with pytest.raises(UserError, match='shows no gain.*--force'):
    publish(tmp_path / 'x', tmp_path / 'index')
  assert not (tmp_path / 'index').exists()
  card = publish(tmp_path / 'x', tmp_path / 'index', force=True)
  with pytest.raises(UserError, match=f'{card.address} already'):
    publish(tmp_path / 'x', tmp_path / 'index', force=True)
  with pytest.raises(UserError, match='is a URL'):
    publish(tmp_path / 'x', Path('hf://a/b'), force=True)


def test_home_directory_is_expanded(market, tmp_path, monkeypatch):
  """publish takes '~' for the home directory, as list does."""
  monkeypatch.setenv('HOME', str(tmp_path))
  publish(market / 'package0', Path('~/index'))
  assert [entry.name for entry in read_index('~/index')] == ['stars']
  assert (tmp_path / 'index').exists() and not Path('~').exists()


def test_publishing_goes_on_after_a_stop(market, tmp_path):
  """A package that was copied and not listed is listed by the next launch."""
  card = read_card(market / 'package0')
  shutil.copytree(market / 'package0', tmp_path / card.address)
  publish(market / 'package0', tmp_path)
  assert [entry.address for entry in read_index(str(tmp_path))] == [card.address]


def test_damaged_added_expert_is_left_out(market, tmp_path, warnings):
  _, directory = add(str(market / 'package0'), tmp_path)
  (directory / 'expert.json').write_text('{')
  assert list_added(tmp_path) == [] and len(warnings) == 1
  card, again = add(str(market / 'package0'), tmp_path)  # as the messages say
  assert again == directory and list_added(tmp_path) == [(card, directory)]


def test_publishing_keeps_entries_of_newer_versions(market, tmp_path):
  """What this version does not know stays in the index, and in its place."""
  newer = {'name': 'moon', 'kind': 'of tomorrow'}
  (tmp_path / 'index.json').write_text(json.dumps(
      {'format': 1, 'experts': [newer], 'motto': 'more light'}))
  card = publish(market / 'package0', tmp_path)
  content = json.loads((tmp_path / 'index.json').read_text())
  assert content['experts'][0] == newer and content['motto'] == 'more light'
  assert [entry.address for entry in read_index(str(tmp_path))] == [card.address]
