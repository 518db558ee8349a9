import os

import pytest

from latent_deliberation.files import write_whole


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
  with pytest.raises(OSError, match='No space left'):
    write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]
