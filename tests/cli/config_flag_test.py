"""--config takes files and runs, some keys follow from others, and misspelt ones are named."""

import sys

import pytest

from latent_deliberation.cli import config_flag
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind, keys_of, nearest_key
from latent_deliberation.studies.study_config import Study
from tests import finished

PARSER = config_flag._ConfigParser('config')


@pytest.mark.parametrize('key, expected', [
    ('training.stepz', 'training.loop.num_steps'),
    ('training.steps', 'training.loop.num_steps'),
    ('training.batchsize', 'training.batch_size'),
    ('trainin.batch_size', 'training.batch_size'),
    ('training.learning_rate', 'training.optimizer.learning_rate'),
    ('data.file', 'data.files'), ('num_latents', 'deliberation.num_latents'), ('zzz', '')])
def test_nearest_key(key, expected):
  assert nearest_key(key, tuple(keys_of(Experiment))) == expected


def test_nearest_key_of_a_study():
  assert nearest_key('training.num_steps', tuple(keys_of(Study))) == (
      'experiment.training.loop.num_steps')


def test_all_wrong_overrides_are_named(monkeypatch):
  monkeypatch.setattr(sys, 'argv', [
      'x', '--config.training.stepz=3', '--config.data.fils=a', '--noconfig.computation.scan',
      '--config.data.length=9', '--config.training.batch_size=x',
      '--config.training.optimizer.learning_rate=1e-3', '--config.computation.scan=perhaps'])
  with pytest.raises(UserError) as error:
    PARSER.parse(str(finished.ROOT / 'configs/tiny.py'))
  first, second, third, fourth, _ = str(error.value).splitlines()
  assert "'training.stepz'" in first and "'training.loop.num_steps'" in first
  assert "'data.fils'" in second and "'data.files'" in second
  assert 'training.batch_size=x' in third and 'computation.scan=perhaps' in fourth


def test_wrong_type_hides_no_wrong_value(monkeypatch):
  """What is not allowed is said beside a value of another type, after what follows from flags."""
  monkeypatch.setattr(sys, 'argv', [
      'x', '--config.training.batch_size=x', '--config.data.files=a.txt',
      '--config.evaluation.delay=99', "--config.computation.dtype='f16'"])
  with pytest.raises(UserError) as error:
    PARSER.parse(str(finished.ROOT / 'configs/tiny.py'))
  lines = str(error.value).splitlines()[:-1]
  assert [line.split(' =')[0].split('=')[0] for line in lines] == [
      f'--config.{key}' for key in ('training.batch_size', 'evaluation.delay', 'computation.dtype')]


def test_error_of_a_file_has_no_traceback(tmp_path):
  path = tmp_path / 'bad.py'
  text = (finished.ROOT / 'configs/tiny.py').read_text()
  path.write_text(text.replace('num_ahead=4', 'num_ahead=64'))
  with pytest.raises(UserError, match=r'^.*bad.py: .*num_ahead = 64') as error:
    PARSER.parse(str(path))
  assert 'Traceback' not in str(error.value)


def test_home_directory(tmp_path, monkeypatch):
  (tmp_path / 'own.py').write_text((finished.ROOT / 'configs/tiny.py').read_text())
  monkeypatch.setenv('HOME', str(tmp_path))
  config_flag._check_flag(['--config=~/own.py:argument'])
  assert bind(PARSER.parse('~/own.py')).training.batch_size == 8


@pytest.mark.parametrize('argument', [
    '', ':gemma3_1b', ':~/gemma', ':/tmp', ':hf://google/gemma-2b'])
def test_argument_after_a_colon(tmp_path, argument):
  """What get_config takes may be a path or a URL, and reaches it as it is."""
  path = tmp_path / 'own.py'
  path.write_text('from ml_collections import ConfigDict\n\n\n'
                  "def get_config(argument=''):\n  return ConfigDict({'argument': argument})\n")
  config_flag._check_flag([f'--config={path}{argument}'])
  config_flag._check_flag(['--config', f'{path}{argument}'])
  assert PARSER.parse(f'{path}{argument}').argument == argument[1:]


def test_config_is_repeated_for_the_next_command(monkeypatch):
  """A value may be a word of its own, and a switch has none."""
  monkeypatch.setattr(sys, 'argv', [
      'x', '--config', 'a.py', '--config.seed', '-1', '--noconfig.computation.scan', '--data=d',
      '--config.data.files=two words', '--config.computation.scan'])
  assert config_flag.config_arguments() == (
      "--config=a.py --config.seed=-1 --noconfig.computation.scan '--config.data.files=two words' "
      '--config.computation.scan')


@pytest.mark.parametrize('path', ['no.py:/tmp', 'no.py', 's3://no'])
def test_no_such_config(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(config_flag, 'as_path', type(tmp_path))
  shown = path if '://' in path else 'no.py'
  with pytest.raises(UserError, match=f'--config={shown}: there is no such file'):
    config_flag._check_flag([f'--config={path}'])


def test_run_as_config(quickstart):
  """The run.json of a training, and of the quickstart around it, is its config."""
  for run in (quickstart / 'coprocessor', quickstart):
    found = bind(PARSER.parse(str(run / 'run.json')))
    assert found.training == finished.experiment().training
    assert found.evaluation == finished.experiment().evaluation


@pytest.mark.parametrize('content, message', [
    (None, 'cannot be read'), ('{', 'no run.json'), ('[]', 'no run.json'),
    ('{"job": "pretrain", "config": {"data": {}}}', "'pretrain'")])
def test_other_file_as_config(tmp_path, content, message):
  path = tmp_path / 'run.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(UserError, match=f'run.json .*{message}'):
    PARSER.parse(str(path))


def test_run_of_a_flag(monkeypatch, quickstart):
  """A flag may name the run, or the coprocessor/ in it; of several, the last one counts."""
  for place in ('coprocessor', 'coprocessor/coprocessor'):
    monkeypatch.setattr(sys, 'argv', ['x', f'--coprocessor={quickstart / place}'])
    assert config_flag._find_run('coprocessor') == quickstart / 'coprocessor/run.json'
    assert bind(PARSER.parse(str(config_flag._find_run('coprocessor')))).data == (
        finished.experiment().data)
  monkeypatch.setattr(sys, 'argv', ['x', f'--coprocessor={quickstart / "coprocessor"}',
                                    '--coprocessor', str(quickstart / 'rows/train')])
  assert config_flag._find_run('coprocessor') is None
  assert config_flag._find_run('workdir') is None


@pytest.mark.parametrize('given, expected', [
    ('notes/*.txt', ('notes/*.txt',)), ('a.txt,b c.txt', ('a.txt', 'b c.txt')),
    ("('a', 'b')", ('a', 'b')), ('0', (0,)), ('(1,2)', (1, 2))])
def test_tuples(given, expected):
  assert config_flag._TupleParser().parse(given) == expected


def test_bad_tuple():
  with pytest.raises(ValueError, match='quotes'):
    config_flag._TupleParser().parse("('a', b c)")


def test_microbatches_follow():
  """A batch that is given has the most microbatches that divide it, up to those of the config."""
  config = finished.config_of('quickstart')
  config.training.accumulation, config.training.batch_size = 4, 6
  given = {'training.batch_size', 'training.accumulation'}
  assert dict(config_flag._follow(config, {'training.batch_size'}))['training.accumulation'] == 3
  assert 'training.accumulation' not in dict(config_flag._follow(config, given))


@pytest.mark.parametrize('given, expected', [
    ({'data.vocabulary_size': 900}, {'decoder.vocab_size': 900}),
    ({'data.vocabulary': 'byte'}, {'decoder.vocab_size': 260}),
    ({'data.vocabulary_size': 900, 'decoder.vocab_size': 2048}, {}),
    ({'data.vocabulary_size': 900, 'decoder_from': 'somewhere'}, {}),
    ({'training.loop.num_steps': 12}, {'training.optimizer.warmup_steps': 1}),
    ({'training.loop.num_steps': 12, 'training.optimizer.warmup_steps': 20}, {}),
    ({'training.loop.num_steps': 300}, {}),
    ({'data.files': ('a',)}, {'data.source': 'text'})])
def test_followers(given, expected):
  """Other keys follow from those that are given."""
  config = finished.config_of('quickstart')
  config.update_from_flattened_dict(given)
  found = dict(config_flag._follow(config, set(given)))
  assert {key: found.get(key) for key in expected} == expected
  assert set(found) - set(expected) <= {f'data.{key}' for key in (
      'name', 'options', 'documents', 'questions', 'data_dir')}
