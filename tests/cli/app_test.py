"""Flags of paths mean what people write, and the log keeps what other libraries warn of."""

import logging

import pytest
from absl import flags

from latent_deliberation.cli import app


@pytest.fixture
def flag():
  """Defines a flag with one of the functions of app.py, and forgets it afterwards."""
  names = []

  def define(function, *arguments):
    names.append(f'app_test_{function.__name__}')
    return function(names[-1], 'Meaning.', *arguments)

  yield define
  for name in names:
    delattr(flags.FLAGS, name)


@pytest.mark.parametrize('function, written, meant', [
    (app.define_file, '~/a.txt', '/a.txt'), (app.define_directory, '~/runs/a', '/runs/a'),
    (app.define_directory, '~', ''), (app.define_decoder, '~/gemma', '/gemma'),
    (app.define_json, '~/plan.json', '/plan.json')])
def test_home_directory(flag, tmp_path, monkeypatch, function, written, meant):
  """Shells leave a '~' after '=' as it is."""
  monkeypatch.setenv('HOME', str(tmp_path))
  holder = flag(function)
  flags.FLAGS(['test', f'--{holder.name}={written}'])
  assert holder.value == f'{tmp_path}{meant}'


@pytest.mark.parametrize('written', ['runs/~', 'runs/a~b', "lr[1e-2]", ''])
def test_other_paths_stay(flag, written):
  holder = flag(app.define_directory, '')
  flags.FLAGS(['test', f'--{holder.name}={written}'])
  assert holder.value == written


def test_log_keeps_warnings(monkeypatch):
  """Only other libraries' details are left out."""
  def kept(level, path):
    return app._is_worth_a_line(logging.LogRecord('absl', level, path, 1, 'text', (), None))

  assert kept(logging.WARNING, '/lib/orbax/checkpoint/a.py')
  assert kept(logging.INFO, '/lib/latent_deliberation/a.py')
  assert not kept(logging.INFO, '/lib/orbax/checkpoint/a.py')
