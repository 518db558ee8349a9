"""Files and directories are written whole or not at all, and failures name the path."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from absl import logging

from latent_deliberation import locks
from latent_deliberation.errors import UserError
from latent_deliberation.files import (
  check_free,
  find_inside,
  list_directory,
  lock,
  make_writable,
  path_for_orbax,
  read_lines,
  read_text,
  whole_directory,
  write_whole,
)


def test_write_whole(tmp_path):
  """New content replaces the old."""
  write_whole(tmp_path / 'deep' / 'file', b'old')
  write_whole(tmp_path / 'deep' / 'file', b'new')
  assert (tmp_path / 'deep' / 'file').read_bytes() == b'new'


@pytest.mark.parametrize('content, values, kept', [
    (b'', [], b''), (b'{"a": 1}\n[2]\n', [{'a': 1}, [2]], b'{"a": 1}\n[2]\n'),
    (b'{"a": 1}\n[2', [{'a': 1}], b'{"a": 1}\n'), (b'{"a', [], b''),
    ('"é"\n'.encode() + b'"\xc3', ['é'], '"é"\n'.encode())])
def test_read_lines(tmp_path, content, values, kept):
  """A last line that was cut off is dropped, also from the file."""
  (tmp_path / 'a.jsonl').write_bytes(content)
  assert read_lines(tmp_path / 'a.jsonl') == values
  assert (tmp_path / 'a.jsonl').read_bytes() == kept


def test_read_lines_of_something_else(tmp_path):
  """It stays as it is."""
  (tmp_path / 'a.txt').write_bytes(b'no JSON\nmore')
  with pytest.raises(ValueError, match='Expecting value'):
    read_lines(tmp_path / 'a.txt')
  assert (tmp_path / 'a.txt').read_bytes() == b'no JSON\nmore'


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
  left = tmp_path / '.target.partial'
  left.mkdir()
  (left / 'old').write_text('old')
  (tmp_path / '.target.lock').write_text('process 7')
  with whole_directory(tmp_path / 'target') as partial:
    (partial / 'new').write_text('new')
  assert [path.name for path in (tmp_path / 'target').iterdir()] == ['new']
  assert list(tmp_path.iterdir()) == [tmp_path / 'target']


def test_two_writers(tmp_path):
  """A second process that writes the same directory is refused, and removes nothing."""
  with whole_directory(tmp_path / 'target') as partial:
    (partial / 'file').write_text('first')
    with (pytest.raises(UserError, match=f'process {os.getpid()} .*writes {tmp_path}/target'),
          whole_directory(tmp_path / 'target')):
      pytest.fail('the block was entered')
  assert (tmp_path / 'target/file').read_text() == 'first'


# Takes a lock as `lock` does, says so, and keeps it until the process is killed.
HOLDER = '''
import fcntl, sys, time
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('process 7 on another, since then,', file=file, flush=True)
print('held', flush=True)
time.sleep(60)
'''


def test_lock_of_a_process(tmp_path):
  """A lock names its process while that lives, and is taken over when it was killed."""
  path = tmp_path / 'lock'
  process = subprocess.Popen([sys.executable, '-c', HOLDER, path], stdout=subprocess.PIPE)
  try:
    assert process.stdout.readline() == b'held\n'
    with (pytest.raises(UserError, match='(?s)process 7 on another.* works: .*/lock'),
          lock(path, 'works')):
      pytest.fail('two hold the lock')
  finally:
    process.kill()
    process.communicate()
  assert path.exists()
  with lock(path, 'works'):
    assert path.read_text().startswith(f'process {os.getpid()} on {socket.gethostname()}, since 20')
  assert not path.exists()


def test_lock_that_is_waited_for(tmp_path, monkeypatch):
  """One who waits gets the lock after the other, and says once for whom it waits."""
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *values: said.append(text % values))
  monkeypatch.setattr(locks, 'POLL_SECONDS', 0.01)
  order = []

  def wait():
    with lock(tmp_path / 'lock', 'packs', wait=True):
      order.append('second')

  with lock(tmp_path / 'lock', 'packs'):
    second = threading.Thread(target=wait)
    second.start()
    while not said:
      time.sleep(0.01)
    order.append('first')
  second.join(10)
  assert order == ['first', 'second']
  assert len(said) == 1 and f'process {os.getpid()} ' in said[0]


def test_many_launches(tmp_path, monkeypatch):
  """Of many that take and leave a lock at the same time, one holds it at a time."""
  monkeypatch.setattr(locks, 'POLL_SECONDS', 0.001)
  inside, most = [], []

  def work():
    for _ in range(20):
      with lock(tmp_path / 'lock', 'works', wait=True):
        inside.append(1)
        most.append(len(inside))
        inside.pop()

  workers = [threading.Thread(target=work) for _ in range(4)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join(30)
  assert most == [1] * 80


def test_no_locks(tmp_path, monkeypatch, caplog):
  """A file system without locks gives a warning, and the work goes on."""
  def no_locks(*unused):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with lock(tmp_path / 'lock', 'works'), lock(tmp_path / 'lock', 'works'):
    pass
  assert 'Function not implemented' in caplog.text


def test_check_free(tmp_path):
  """A file that exists is named, unless it may be overwritten."""
  (tmp_path / 'old').touch()
  check_free([tmp_path / 'new'], overwrite=False)
  check_free([tmp_path / 'old'], overwrite=True)
  with pytest.raises(UserError, match=f'{tmp_path}/old .*--overwrite'):
    check_free([tmp_path / 'new', tmp_path / 'old'], overwrite=False)


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
  with pytest.raises(UserError, match='gs:/bucket/run.*gs://BUCKET'):
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
