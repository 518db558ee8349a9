"""Flags of paths mean what people write, and the log keeps what other libraries warn of."""

import logging
import os

import jax
import pytest
from absl import flags

from latent_deliberation import progress
from latent_deliberation.cli import app


@pytest.fixture
def flag():
  """Defines a flag with one of the functions of app.py, and forgets it afterwards."""
  before = set(flags.FLAGS)

  def define(function, *arguments):
    return function(f'app_test_{function.__name__}', 'Meaning.', *arguments)

  yield define
  for name in set(flags.FLAGS) - before:  # a function may define --overwrite too
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


@pytest.mark.parametrize('address', ['hf://org/name', 'hf:/org/name'])
def test_decoders_of_a_hub(flag, address):
  """The next command of launch/gate.py has the address as a Path prints it, with one slash."""
  holder = flag(app.define_decoder)
  flags.FLAGS(['test', f'--{holder.name}={address}'])
  assert holder.value == address


@pytest.mark.parametrize('url', ['gs://bucket/run', 's3://bucket/run', 'gs:/run'])
def test_directories_of_a_disk(flag, url):
  """A command whose files must be on a disk says so, and asks no store."""
  holder = flag(lambda name, meaning: app.define_directory(
      name.replace('<lambda>', 'disk'), meaning, '', on_disk=True))
  with pytest.raises(flags.Error, match=f'{holder.name}={url}.*must be on a disk'):
    flags.FLAGS(['test', f'--{holder.name}={url}'])


@pytest.mark.parametrize('there', ['plan.json', 'plan.md', 'plan.png', 'plan.csv'])
def test_nothing_is_overwritten(flag, tmp_path, there):
  """Neither the JSON nor what commands write beside it."""
  (tmp_path / there).write_text('mine')
  holder = flag(app.define_json)
  with pytest.raises(flags.Error, match=there):
    flags.FLAGS(['test', f'--{holder.name}={tmp_path}/plan.json'])
  flags.FLAGS(['test', f'--{holder.name}={tmp_path}/plan.json', '--overwrite'])


@pytest.mark.parametrize('path, level, is_shown', [
    (progress.__file__, logging.INFO, True),
    (f'site-packages{os.sep}orbax{os.sep}checkpoint.py', logging.INFO, False),
    (f'site-packages{os.sep}orbax{os.sep}checkpoint.py', logging.WARNING, True),
    (f'site-packages{os.sep}tensorflow{os.sep}save.py', logging.INFO, False),
    (f'site-packages{os.sep}tensorflow{os.sep}save.py', logging.ERROR, True)])
def test_lines_of_the_log(path, level, is_shown):
  """Of other libraries, only warnings and errors are shown."""
  record = logging.LogRecord('absl', level, path, 1, 'said', (), None)
  assert app._is_worth_a_line(record) is is_shown


def test_settings_of_jax_elsewhere():
  """The API computes with ours, and leaves those of a notebook as they are."""
  def found():
    return jax.numpy.arange(2.0).dtype, jax.config.jax_default_prng_impl

  before = found()
  jax.config.update('jax_enable_x64', True)
  jax.config.update('jax_default_prng_impl', 'rbg')
  try:
    elsewhere = found()
    with app.settled_jax():
      assert found() == before != elsewhere
    assert found() == elsewhere
  finally:
    jax.config.update('jax_enable_x64', False)
    jax.config.update('jax_default_prng_impl', 'threefry2x32')


def test_settings_of_jax():
  """Every setting exists, and has its value without any variable."""
  for name, value in app.JAX_SETTINGS.items():
    found = getattr(jax.config, name)
    assert getattr(found, 'value', found) == value, name
