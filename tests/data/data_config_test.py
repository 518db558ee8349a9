import dataclasses
import subprocess
import sys

import pytest

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError


def test_the_defaults_read_the_standard_library():
  assert DataConfig().source == 'stdlib'


def test_a_list_of_files_becomes_a_tuple():
  config = DataConfig(source='text', files=['a.txt', 'b/*.jsonl'])
  assert config.files == ('a.txt', 'b/*.jsonl')
  assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(('fields', 'message'), [
    ({'source': 'web'}, r"source = 'web': choose one of \('stdlib'"),
    ({'vocabulary': 'words'}, "vocabulary = 'words': choose"),
    ({'mode': 'fast'}, "mode = 'fast': choose"),
    ({'source': 'text'}, "source = 'text' needs files"),
    ({'source': 'text', 'files': 'a.txt'}, 'is one string: write a tuple'),
    ({'files': ('a.txt',)}, "no meaning for source = 'stdlib'"),
    ({'source': 'tfds'}, 'needs name'),
    ({'source': 'tfds', 'name': 'c4/en'}, "name = 'c4/en' has no version"),
    ({'source': 'mixture'}, 'needs name'),
    ({'name': 'c4/en:3.1.0'}, "no meaning for source = 'stdlib'"),
    ({'source': 'synthetic'}, "source = 'synthetic' needs name"),
    ({'options': {'nodes': 8}}, "options = {'nodes': 8} has no meaning for source = 'stdlib'"),
    ({'documents': 10}, "documents = 10 has no meaning for source = 'stdlib': leave it at 100000"),
    ({'questions': 2}, "questions = 2 has no meaning for source = 'stdlib'"),
    ({'source': 'synthetic', 'name': 'pointer_chasing', 'options': 'nodes'}, 'write a mapping'),
    ({'source': 'synthetic', 'name': 'pointer_chasing', 'documents': 1}, 'documents = 1: it must lie betw'),
    ({'source': 'synthetic', 'name': 'pointer_chasing', 'questions': 0}, 'questions = 0: it must lie betw'),
    ({'data_dir': '/data'}, "belongs to source 'tfds', this is 'stdlib'"),
    ({'text_key': ''}, "text_key = ''"),
    ({'vocabulary': 'byte', 'vocabulary_path': 'v.model'}, "vocabulary = 'byte' has no file"),
    ({'source': 'mixture', 'name': 'm', 'vocabulary_path': 'v.model'}, "'m' brings its own"),
    ({'vocabulary_size': 261}, 'vocabulary_size = 261: it must lie between 262'),
    ({'length': 1}, 'length = 1: it must lie between 2'),
    ({'length': 256.0}, 'length = 256.0 is not an integer'),
    ({'validation_percent': 0}, 'validation_percent = 0'),
    ({'validation_percent': 100}, 'validation_percent = 100'),
    ({'seed': -1}, 'seed = -1'),
    ({'seed': True}, 'seed = True is not an integer'),
    ({'max_tokens': 255}, 'max_tokens = 255 is less than one row of length = 256'),
])
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(fields, message):
  with pytest.raises(UserError, match=message):
    DataConfig(**fields)


def test_options_of_a_task_are_copied_and_leave_a_configuration_hashable():
  options = {'nodes': 6}
  config = DataConfig(source='synthetic', name='pointer_chasing', options=options)
  options['nodes'] = 7
  assert config.options == {'nodes': 6}
  assert hash(config) == hash(dataclasses.replace(config))
  assert config != dataclasses.replace(config, options={'nodes': 7})


def test_configuring_does_not_import_tensorflow():
  code = ('import sys, latent_deliberation.data.data_config; '
          'sys.exit(bool({"tensorflow", "seqio"} & set(sys.modules)))')
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
