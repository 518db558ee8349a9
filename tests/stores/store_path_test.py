"""Paths of object stores do what paths of a disk do, and say clearly when the store does not."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from latent_deliberation import stores
from latent_deliberation.errors import StoreError, UserError
from latent_deliberation.files import (
  as_path,
  check_free,
  check_path,
  find_inside,
  list_directory,
  make_writable,
  read_text,
  whole_directory,
  write_json,
  write_whole,
)
from tests.stores.object_store import Fault

_WRITING = ('PUT', 'POST')


def fill(place):
  """Writes a small tree below a path."""
  for name in ('a.json', 'a.txt', 'lr[1e-2]/run.json', 'lr1/run.json', 'deep/er/x.bin'):
    write_whole(place / name, name.encode())


def describe(place):
  """What a tree of `fill` looks like by the methods of pathlib."""
  paths = [place, place / 'a.json', place / 'deep', place / 'deep/er', place / 'gone',
           place / 'a.json' / 'below', place / 'lr[1e-2]', place / 'a.j', place / 'lr']
  seen = {str(path.relative_to(place)): (path.exists(), path.is_file(), path.is_dir())
          for path in paths}

  def names(found):
    return sorted(str(path.relative_to(place)) for path in found)

  return seen | {
      'inside': names(place.iterdir()), 'listed': names(list_directory(place)),
      'json': names(place.glob('*.json')), 'runs': names(place.glob('*/run.json')),
      'literal': names((place / 'lr[1e-2]').glob('*')),
      'files': names(path for path in place.rglob('*') if path.is_file()),
      'found': names(find_inside(place, lambda folder: (folder / 'x.bin').is_file())),
      'content': (place / 'a.txt').read_bytes(), 'text': read_text(place / 'a.txt', 'a text'),
      'size': (place / 'a.txt').stat().st_size,
      'parent': (place / 'deep/er').parent.name, 'suffix': (place / 'a.txt').suffix}


def test_as_on_a_disk(place, tmp_path):
  """The same tree looks the same on a disk and in a store."""
  fill(place)
  fill(tmp_path)
  assert describe(place) == describe(tmp_path)


def test_as_path():
  """Only addresses of stores are paths of stores, and they keep both slashes."""
  assert str(as_path('s3://bucket/run/') / 'x') == 's3://bucket/run/x'
  assert as_path('gs://bucket/a').absolute() == as_path(as_path('gs://bucket/a'))
  for text in ('runs/x', '/tmp', 'hf://org/name', 'gs:/x'):
    assert as_path(text) == Path(text)


def test_written_whole(place):
  """New content replaces old, and a file that exists is named."""
  write_json(place / 'x.json', 1)
  write_json(place / 'x.json', {'a': 2})
  assert json.loads((place / 'x.json').read_bytes()) == {'a': 2}
  with pytest.raises(UserError, match=f'{place}/x.json exists'):
    check_free([place / 'y.json', place / 'x.json'], overwrite=False)
  (place / 'x.json').unlink()
  (place / 'x.json').unlink(missing_ok=True)
  assert not place.exists()


def test_make_writable(place):
  """It leaves nothing behind."""
  make_writable(place)
  assert not place.exists()


def test_whole_directory(place):
  """A directory exists from the end of the block on, and is not overwritten."""
  with whole_directory(place / 'target') as partial:
    (partial / 'file').write_text('content')
    (partial / 'deep/er').write_bytes(b'more')
    assert not (place / 'target').exists() and not (place / 'target').is_dir()
  assert sorted((place / 'target').objects()) == ['deep/er', 'file']
  assert [path.name for path in place.iterdir()] == ['target']
  with pytest.raises(UserError, match=f'{place}/target exists'), whole_directory(place / 'target'):
    pytest.fail('the block was entered')


def test_directory_of_a_killed_process(place):
  """What it left does not exist, and is no part of what the next one writes."""
  (place / 'target').begin()
  (place / 'target/old').write_text('of the killed')
  assert not (place / 'target').exists()
  with whole_directory(place / 'target') as partial:
    (partial / 'new').write_text('of the next')
  assert list((place / 'target').objects()) == ['new']


def test_signs_of_a_pattern(place):
  """They mean themselves where things are removed, too."""
  for name in ('lr[1e-2]', 'lr1', 'lr*'):
    with whole_directory(place / name) as partial:
      (partial / 'a?b').write_text(name)
  (place / 'lr*').rename(place / 'l?')
  (place / 'lr[1e-2]').rmtree()
  assert sorted(place.objects()) == ['l?/a?b', 'lr1/a?b']


def test_answer_that_was_lost_at_the_end(place, monkeypatch):
  """A library asks again to remove what is removed already; the directory is whole all the same."""
  remove = type(place.filesystem).rm_file

  def twice(self, path):
    remove(self, path)
    raise FileNotFoundError(path)

  monkeypatch.setattr(type(place.filesystem), 'rm_file', twice)
  place.probe()
  with whole_directory(place / 'target') as partial:
    (partial / 'file').write_text('content')
  assert (place / 'target/file').read_text() == 'content'


def test_failed_directory(place):
  """An error of the block leaves no directory, and stays as it is."""
  with pytest.raises(ZeroDivisionError), whole_directory(place / 'target') as partial:
    (partial / 'file').write_text('content')
    raise ZeroDivisionError
  assert not (place / 'target').objects()


@pytest.mark.parametrize('passed', [0, 1, 2, 4, 5, 6, 7, 8])
def test_rename_that_breaks_off(store, place, passed):
  """Wherever it breaks off, neither path is a part that looks whole, and nothing is lost."""
  names = ['one', 'three/four', 'two']
  for name in names:
    (place / 'old' / name).write_bytes(name.encode())
  # From the request after these on, nothing may be written or removed.
  done = Fault(where=lambda method, path: method not in ('GET', 'HEAD'), times=passed)
  store.faults = {'let pass': done, 'refuse': Fault(
      where=lambda method, path: method not in ('GET', 'HEAD'), status=403)}
  try:
    (place / 'old').rename(place / 'new')
  except StoreError:
    pass
  store.faults.clear()
  whole = [path for path in (place / 'old', place / 'new') if path.exists()]
  assert whole
  for path in whole:
    assert sorted(path.objects()) == names


def test_rename(place):
  """A directory and a file get other names."""
  (place / 'old/file').write_bytes(b'1')
  (place / 'old').rename(place / 'new')
  (place / 'new/file').rename(place / 'new/other')
  assert list(place.objects()) == ['new/other']


@pytest.mark.parametrize('look', [
    lambda path: path.exists(), lambda path: path.is_dir(), lambda path: path.is_file(),
    lambda path: list(path.iterdir()), lambda path: list(path.glob('*')),
    lambda path: path.read_bytes(), lambda path: path.write_bytes(b''),
    lambda path: path.create(b''), lambda path: path.unlink(missing_ok=True),
    lambda path: path.rmtree(missing_ok=True), make_writable],
    ids=['exists', 'is_dir', 'is_file', 'iterdir', 'glob', 'read', 'write', 'create', 'unlink',
         'rmtree', 'make_writable'])
def test_no_permission(store, place, look):
  """It is an error that names the path and how to log in, and never means that nothing is there."""
  write_whole(place / 'file', b'1')
  store.faults['refuse'] = Fault(status=403)
  remedy = {'s3': 'AWS_PROFILE', 'gs': 'gcloud auth'}[store.scheme]
  with pytest.raises((StoreError, UserError), match=f'{place}.*no permission.*{remedy}'):
    look(place)


def test_few_errors_of_the_server(store, place):
  """Reading and writing go on after errors that pass."""
  store.faults['fail'] = Fault(status=503, times=2)
  write_whole(place / 'file', b'content')
  store.faults['fail'] = Fault(status=500, times=2)
  assert (place / 'file').read_bytes() == b'content'
  store.faults['fail'] = Fault(lambda method, path: method == 'GET', times=1, cut_after=3)
  assert (place / 'file').read_bytes() == b'content'


@pytest.mark.slow
def test_server_that_fails(store, place):
  """An error that stays is an error, in a minute."""
  write_whole(place / 'file', b'content')
  store.faults['fail'] = Fault(status=500)
  with pytest.raises(StoreError, match=f'{place}/file: the store failed.*again'):
    (place / 'file').exists()


def test_missing_bucket(store):
  """It is named, with the command that makes one."""
  url = f'{store.scheme}://nobody/run'
  for act in (check_path, lambda url: make_writable(as_path(url))):
    with pytest.raises((StoreError, UserError), match=f"{url}.*no bucket 'nobody'.*{store.scheme}://nobody`"):
      act(url)


def test_slow_region(store, place, monkeypatch):
  """A check waits only so long; slow answers are answers."""
  store.faults['slow'] = Fault(seconds=0.2)
  check_path(str(place))
  monkeypatch.setattr(stores, 'CHECK_SECONDS', 0.5)
  store.faults['slow'] = Fault(seconds=5)
  with pytest.raises(StoreError, match=f'{place}: the store did not answer in time.*region'):
    check_path(str(place))


def test_unreachable_store(place):
  """No server at all is another error."""
  error = type('EndpointConnectionError', (Exception,), {})('no route')
  assert re.match(f'{place}: the store cannot be reached .*no route.*network',
                  stores.describe(place, error))


@pytest.mark.parametrize('url', ['az://bucket/run', 'gs://', 's3:///run', 'gs:/bucket/run',
                                 'http://host/run', 'runs/a:/b'])
def test_unknown_scheme(url):
  """Only two kinds of URLs are paths."""
  with pytest.raises(UserError, match=f'{url!r}.*gs://BUCKET/PATH or s3://BUCKET/PATH'):
    check_path(url)


@pytest.mark.parametrize('scheme, library', stores.LIBRARIES.items())
def test_missing_library(monkeypatch, scheme, library):
  """A library that is not installed is named, with the pip command."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  url = f'{scheme}://b/run'
  with pytest.raises(UserError, match=rf'{url} needs .*{library}.*pip install .*buckets'):
    check_path(url)
