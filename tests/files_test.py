"""Files and directories are written whole or not at all, and failures name the path."""

import os
from pathlib import Path

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.files import (
  find_inside,
  list_directory,
  make_writable,
  path_for_orbax,
  read_text,
  whole_directory,
  write_whole,
)


def test_write_whole(tmp_path):
  """New content replaces the old."""
  write_whole(tmp_path / 'deep' / 'file', b'old')
  write_whole(tmp_path / 'deep' / 'file', b'new')
  assert (tmp_path / 'deep' / 'file').read_bytes() == b'new'


def test_write_whole_on_full_disk(tmp_path, monkeypatch):
  """A full disk is named, keeps the old content and leaves no other file."""
  path = tmp_path / 'file'
  write_whole(path, b'old')

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match=f'{path}.*No space left'):
    write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_whole_directory(tmp_path):
  """A directory appears with everything that was written into it."""
  target = tmp_path / 'deep' / 'target'
  with whole_directory(target) as partial:
    (partial / 'file').write_text('content')
    assert not target.exists()
  assert [path.name for path in target.iterdir()] == ['file']
  assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize('error', [ValueError, OSError, KeyboardInterrupt])
def test_error_inside(tmp_path, error):
  """An error of the block leaves no directory, and stays as it is."""
  with pytest.raises(error) as raised, whole_directory(tmp_path / 'target') as partial:
    (partial / 'inner').mkdir()
    (partial / 'inner' / 'file').write_text('content')
    raise error
  assert raised.type is error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['directory', 'empty directory', 'file'])
def test_no_overwriting(tmp_path, kind):
  """An existing file or directory is not overwritten."""
  target = tmp_path / 'target'
  if kind == 'file':
    target.write_text('old')
  else:
    target.mkdir()
  if kind == 'directory':
    (target / 'file').write_text('old')
  with pytest.raises(UserError, match=f'{target}.*exists'), whole_directory(target):
    pytest.fail('the block was entered')
  assert list(tmp_path.rglob('*')) == [target] + [target / 'file'] * (kind == 'directory')


def test_target_appears(tmp_path):
  """A target that appears meanwhile is not overwritten."""
  target = tmp_path / 'target'
  with pytest.raises(UserError, match=str(target)), whole_directory(target) as partial:
    (partial / 'file').write_text('new')
    target.mkdir()
    (target / 'file').write_text('old')
  assert (target / 'file').read_text() == 'old'
  assert list(tmp_path.iterdir()) == [target]


def test_killed_process(tmp_path):
  """The files of a killed process are removed."""
  killed = whole_directory(tmp_path / 'target')
  left = killed.__enter__()
  (left / 'old').write_text('old')
  with whole_directory(tmp_path / 'target') as partial:
    (partial / 'new').write_text('new')
  assert [path.name for path in (tmp_path / 'target').iterdir()] == ['new']
  assert list(tmp_path.iterdir()) == [tmp_path / 'target']


def test_relative_path(tmp_path, monkeypatch):
  """A relative path is that of the start."""
  (tmp_path / 'other').mkdir()
  monkeypatch.chdir(tmp_path)
  with whole_directory(Path('target')):
    monkeypatch.chdir(tmp_path / 'other')
  assert (tmp_path / 'target').is_dir()


def test_other_processes(tmp_path, monkeypatch):
  """Other processes than the first write nothing."""
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with whole_directory(tmp_path / 'target') as partial:
    assert partial.parent == tmp_path
    assert not list(tmp_path.iterdir())
  assert not list(tmp_path.iterdir())


def test_failed_directory(tmp_path):
  """A directory that cannot be created is named."""
  (tmp_path / 'file').touch()
  for write in (lambda path: whole_directory(path).__enter__(), make_writable,
                lambda path: write_whole(path, b'')):
    with pytest.raises(UserError, match=f'{tmp_path}/file/inner'):
      write(tmp_path / 'file/inner')


def test_url(tmp_path, monkeypatch):
  """A URL is refused, and does not become a local folder."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='gs:/bucket/run.*mount'):
    make_writable(Path('gs://bucket/run'))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', [
    '.DS_Store', '._model.safetensors', '.nfs0001', 'a.txt~', '#a.txt#', '~$a.txt', 'a.BAK',
    'a.tmp', 'model.safetensors.part'])
def test_list_directory(tmp_path, name):
  """Stray names are left out, and others are in order."""
  for other in ('b~b', 'a', name, '#1'):
    (tmp_path / other).touch()
  assert [path.name for path in list_directory(tmp_path)] == ['#1', 'a', 'b~b']
  assert list_directory(tmp_path / 'gone') == []


def test_find_inside(tmp_path):
  """The nearest folders are found, at most two levels down."""
  for name in ('a', 'b/c', 'a/inside', 'd/e/f', '.hidden'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / 'mark').touch()
  found = find_inside(tmp_path, lambda folder: (folder / 'mark').is_file())
  assert found == [tmp_path / 'a', tmp_path / 'b' / 'c']


@pytest.mark.parametrize('content', [
    'größe\nb'.encode(), 'größe\r\nb'.encode('utf-8-sig'), 'größe\nb'.encode('utf-16'),
    '\ufeffgröße\r\nb'.encode('utf-16-be')])
def test_read_text(tmp_path, content):
  """Texts come without the mark of their encoding."""
  (tmp_path / 'a.txt').write_bytes(content)
  assert read_text(tmp_path / 'a.txt', 'a text') == 'größe\nb'


def test_read_text_keeps_other_signs(tmp_path):
  text = 'a\rb\u2028c\x85d\ve\ufefff'
  (tmp_path / 'a.txt').write_bytes(text.encode())
  assert read_text(tmp_path / 'a.txt', 'a text') == text


def test_read_text_without_mark(tmp_path):
  (tmp_path / 'a.txt').write_bytes('two boats'.encode('utf-16-le'))
  with pytest.raises(UserError, match=r'a\.txt .*NUL at character 1.*iconv -f utf-16'):
    read_text(tmp_path / 'a.txt', 'a text')


@pytest.mark.parametrize('name', ['lr[1e-2]', 'a*', '?', '[!a]'])
def test_path_for_orbax(tmp_path, name):
  """Only the argument of its glob is a pattern, also below it."""
  for folder in (name, 'a1', 'lr1'):
    (tmp_path / folder / 'below').mkdir(parents=True)
    (tmp_path / folder / 'below' / 'file').touch()
  path = path_for_orbax(tmp_path / name)
  assert [str(found) for found in path.glob('b*/f*')] == [f'{tmp_path}/{name}/below/file']
  assert [str(found) for found in (path / 'below').glob('*')] == [
      f'{tmp_path}/{name}/below/file']
  assert [str(found) for found in next(path.iterdir()).glob('*')] == [
      f'{tmp_path}/{name}/below/file']


def test_backslash(tmp_path):
  """A backslash is refused before anything is written."""
  with pytest.raises(UserError, match=r'a\\b.* has a backslash'):
    make_writable(tmp_path / 'a\\b' / 'c')
  with pytest.raises(UserError, match=r'a\\b has a backslash'):
    path_for_orbax(tmp_path / 'a\\b')
  assert not list(tmp_path.iterdir())
