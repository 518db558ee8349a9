import dataclasses
import re

import pytest

from latent_deliberation.data.data_config import DataConfig, with_given_source
from latent_deliberation.data.text_files import OF_DIRECTORIES
from latent_deliberation.errors import UserError
from tests import finished

SYNTHETIC = {'source': 'synthetic', 'name': 'pointer_chasing'}


def test_default_source_is_stdlib():
  assert DataConfig().source == 'stdlib'


def test_files_become_a_tuple():
  config = DataConfig(source='text', files=['a.txt', 'b/*.jsonl'])
  assert config.files == ('a.txt', 'b/*.jsonl')
  assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(('fields', 'source'), [
    ({}, 'stdlib'), ({'files': 'a.txt'}, 'text'), ({'name': 'c4/en:3.1.0'}, 'tfds'),
    ({'source': 'tfds', 'name': 'c4/en:3.1.0'}, 'tfds'),
    ({'data_dir': 'sets', 'name': 'c4/en:3.1.0'}, 'tfds')])
def test_source_follows(fields, source):
  assert DataConfig(**fields).source == source


def test_files_of_one_string(tmp_path):
  """Commas separate files, but not in the name of a file that exists."""
  (tmp_path / 'a,b.txt').write_text('x')
  assert DataConfig(files='a.txt, b/*.jsonl').files == ('a.txt', 'b/*.jsonl')
  assert DataConfig(files=f'{tmp_path}/a,b.txt').files == (f'{tmp_path}/a,b.txt',)


def test_all_problems_are_named():
  with pytest.raises(UserError, match="(?s)mode = 'fast'.*length = 1.*seed = -1"):
    DataConfig(mode='fast', length=1, seed=-1)


STDLIB = dataclasses.asdict(DataConfig())
C4 = dataclasses.asdict(DataConfig(source='tfds', name='c4/en:3.1.0', data_dir='sets'))


@pytest.mark.parametrize(('data', 'given', 'expected'), [
    # What the config file has for its own source does not stand in the way.
    (C4, {'files': ('a',)}, {'source': 'text', 'name': '', 'data_dir': ''}),
    (C4, {'data_dir': 'others'}, {'source': 'tfds', 'name': 'c4/en:3.1.0'}),
    (STDLIB, {'name': 'c4/en:3.1.0'}, {'source': 'tfds'}),
    (STDLIB, {'length': 128}, {'source': 'stdlib'})])
def test_source_follows_from_overrides(data, given, expected):
  data = data | given
  data |= with_given_source(data, set(given))
  assert expected.items() <= dataclasses.asdict(DataConfig(**data)).items()


@pytest.mark.parametrize('given', [
    {'files': ('a',), 'source': 'stdlib'}, {'files': ('a',), 'name': 'c4/en:3.1.0'}])
def test_two_sources_are_refused(given):
  data = STDLIB | given
  data |= with_given_source(data, set(given))
  with pytest.raises(UserError, match='files|name'):
    DataConfig(**data)


def test_files_that_are_given_and_empty():
  """An empty variable in a command must not mean the standard library."""
  data = STDLIB | {'files': ()}
  with pytest.raises(UserError, match='data.files is empty.*data.source'):
    with_given_source(data, {'files'})
  assert with_given_source(data, {'files', 'source'})['source'] == 'stdlib'


def test_folder_with_a_number_for_a_name():
  assert DataConfig(files=(2024,)).files == ('2024',)
  with pytest.raises(UserError, match='files = '):
    DataConfig(files=(True,))


@pytest.mark.parametrize(('fields', 'message'), [
    ({'source': 'web'}, r"source = 'web': choose one of \('stdlib'"),
    ({'vocabulary': 'words'}, "vocabulary = 'words'"),
    ({'mode': 'fast'}, "mode = 'fast'"),
    ({'source': 'text'}, "source = 'text' needs files"),
    ({'source': 'stdlib', 'files': ('a.txt',)}, "files = .*'a.txt'.*source = 'stdlib'"),
    ({'source': 'tfds'}, "source = 'tfds' needs name"),
    ({'source': 'tfds', 'name': 'c4/en'}, "name = 'c4/en' has no version"),
    ({'source': 'mixture'}, "source = 'mixture' needs name"),
    ({'source': 'stdlib', 'name': 'c4/en:3.1.0'}, "name = 'c4/en:3.1.0'.*source = 'stdlib'"),
    ({'source': 'synthetic'}, "source = 'synthetic' needs name"),
    ({'options': {'nodes': 8}}, "options = {'nodes': 8}.*source = 'stdlib'"),
    ({'documents': 10}, "documents = 10 .*source = 'stdlib'.*100000"),
    ({'questions': 2}, "questions = 2 .*source = 'stdlib'"),
    (SYNTHETIC | {'options': 'nodes'}, "options = 'nodes'.*mapping"),
    (SYNTHETIC | {'documents': 1}, 'documents = 1: .* of 2 or more'),
    (SYNTHETIC | {'questions': 0}, 'questions = 0: .* of 1 or more'),
    ({'source': 'stdlib', 'data_dir': '/data'}, "data_dir = '/data'.*source = 'stdlib'.*tfds"),
    ({'text_key': ''}, "text_key = ''"),
    ({'vocabulary': 'byte', 'vocabulary_path': 'v.model'}, "'v.model'.*vocabulary = 'byte'"),
    ({'source': 'mixture', 'name': 'm', 'vocabulary_path': 'v.model'}, "'v.model'.*'m'"),
    ({'vocabulary_size': 261}, 'vocabulary_size = 261: .* of 262 or more'),
    ({'length': 1}, 'length = 1: .* of 2 or more'),
    ({'length': 256.0}, 'length = 256.0: .*integer'),
    ({'validation_percent': 0}, 'validation_percent = 0'),
    ({'validation_percent': 100}, 'validation_percent = 100'),
    ({'seed': -1}, 'seed = -1'),
    ({'seed': True}, 'seed = True: .*integer'),
    ({'max_tokens': 255}, 'max_tokens = 255 .*length = 256'),
])
def test_bad_field_is_named(fields, message):
  with pytest.raises(UserError, match=message):
    DataConfig(**fields)


def test_options_are_copied():
  """They leave a configuration hashable."""
  options = {'nodes': 6}
  config = DataConfig(source='synthetic', name='pointer_chasing', options=options)
  options['nodes'] = 7
  assert config.options == {'nodes': 6}
  assert hash(config) == hash(dataclasses.replace(config))
  assert config != dataclasses.replace(config, options={'nodes': 7})


@pytest.mark.parametrize('text', [DataConfig.__doc__, (finished.ROOT / 'docs/data.md').read_text()],
                         ids=['docstring', 'page'])
def test_endings_are_named(text):
  """Whoever writes a file sees whether a directory gives it."""
  assert not [ending for ending in OF_DIRECTORIES if not re.search(rf'{ending}\b', text)]
