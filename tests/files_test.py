import os
from pathlib import Path

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.files import whole_directory, write_whole


def test_a_new_content_replaces_the_old_one(tmp_path):
  write_whole(tmp_path / 'deep' / 'file', b'old')
  write_whole(tmp_path / 'deep' / 'file', b'new')
  assert (tmp_path / 'deep' / 'file').read_bytes() == b'new'


def test_a_full_disk_keeps_the_old_content_and_leaves_nothing_behind(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  write_whole(path, b'old')

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match='No space left'):
    write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_with_all_that_was_written_into_it(tmp_path):
  target = tmp_path / 'deep' / 'target'
  with whole_directory(target) as partial:
    (partial / 'file').write_text('content')
    assert not target.exists()
  assert [path.name for path in target.iterdir()] == ['file']
  assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_nothing_of_a_directory(tmp_path, error):
  with pytest.raises(error), whole_directory(tmp_path / 'target') as partial:
    (partial / 'inner').mkdir()
    (partial / 'inner' / 'file').write_text('content')
    raise error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['directory', 'empty directory', 'file'])
def test_what_is_there_is_never_written_over(tmp_path, kind):
  target = tmp_path / 'target'
  if kind == 'file':
    target.write_text('old')
  else:
    target.mkdir()
  if kind == 'directory':
    (target / 'file').write_text('old')
  with pytest.raises(UserError, match=f'{target} exists already'), whole_directory(target):
    pytest.fail('the block was entered')
  assert list(tmp_path.rglob('*')) == [target] + [target / 'file'] * (kind == 'directory')


def test_a_target_that_appears_meanwhile_is_not_written_over(tmp_path):
  target = tmp_path / 'target'
  with pytest.raises(UserError), whole_directory(target) as partial:
    (partial / 'file').write_text('new')
    target.mkdir()
    (target / 'file').write_text('old')
  assert (target / 'file').read_text() == 'old'
  assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_cleared(tmp_path):
  killed = whole_directory(tmp_path / 'target')
  left = killed.__enter__()
  (left / 'old').write_text('old')
  with whole_directory(tmp_path / 'target') as partial:
    (partial / 'new').write_text('new')
  assert [path.name for path in (tmp_path / 'target').iterdir()] == ['new']
  assert list(tmp_path.iterdir()) == [tmp_path / 'target']


def test_a_relative_path_is_that_of_the_start(tmp_path, monkeypatch):
  (tmp_path / 'other').mkdir()
  monkeypatch.chdir(tmp_path)
  with whole_directory(Path('target')):
    monkeypatch.chdir(tmp_path / 'other')
  assert (tmp_path / 'target').is_dir()


def test_other_processes_than_the_first_touch_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with whole_directory(tmp_path / 'target') as partial:
    assert partial.parent == tmp_path
    assert not list(tmp_path.iterdir())
  assert not list(tmp_path.iterdir())
