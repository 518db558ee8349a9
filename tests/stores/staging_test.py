"""Copies of a store's objects on this machine are whole, of one version, and made once."""

import collections
import shutil
import threading
import time

import pytest

from latent_deliberation import staging
from latent_deliberation.errors import MissingError, StoreError, UserError
from latent_deliberation.files import at_hand, growing_files, new_file, write_whole
from latent_deliberation.paths import CACHE_VARIABLE
from tests.stores.object_store import Fault


def reads(place):
  """A fault for requests of contents below a path, not of lists and properties."""
  name = place.name

  def where(method, path):
    return (method == 'GET' and name in path and 'list-type' not in path
            and ('alt=media' in path or 'storage/v1' not in path))

  return where


def test_directory(store, place):
  """A directory is copied once, and again when it has changed; older copies stay."""
  for name in ('a', 'deep/b'):
    write_whole(place / name, name.encode() * 1000)
  copy = at_hand(place)
  assert {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob('*')
          if file.is_file()} == {'a': b'a' * 1000, 'deep/b': b'deep/b' * 1000}
  store.requests = collections.Counter()
  assert at_hand(place) == copy
  assert store.requests['GET'] + store.requests['HEAD'] <= 3  # looks, and reads nothing
  write_whole(place / 'a', b'A' * 1000)
  newer = at_hand(place)
  assert newer != copy and (newer / 'a').read_bytes() == b'A' * 1000
  assert (copy / 'a').read_bytes() == b'a' * 1000


def test_damaged_copy(place):
  """A copy that lost a part, as when a machine loses its power, is made again."""
  for name in ('a', 'deep/b'):
    write_whole(place / name, name.encode() * 1000)
  copy = at_hand(place)
  (copy / 'a').write_bytes(b'a')
  (copy / 'deep/b').unlink()
  assert at_hand(place) == copy
  assert (copy / 'a').read_bytes() == b'a' * 1000
  assert (copy / 'deep/b').read_bytes() == b'deep/b' * 1000


def test_file(place):
  """A file is copied with those beside it that belong to it, and no others."""
  for name in ('tokenizer.json', 'tokenizer_config.json', 'model.safetensors', 'tokenizer.d/x'):
    write_whole(place / name, name.encode())
  copy = at_hand(place / 'tokenizer.json', 'tokenizer*.json')
  assert copy.name == 'tokenizer.json'
  assert sorted(file.name for file in copy.parent.iterdir()) == ['tokenizer.json',
                                                                 'tokenizer_config.json']


def test_nothing(place):
  """What does not exist is named."""
  with pytest.raises(MissingError, match=f'{place}/gone does not exist'):
    at_hand(place / 'gone')


def test_connections_that_are_cut(store, place):
  """A copy is whole although connections end too early, and a short one is refused."""
  content = bytes(range(256)) * 4000
  write_whole(place / 'big', content)
  store.faults['cut'] = Fault(reads(place), times=2, cut_after=100_000)
  assert at_hand(place / 'big').read_bytes() == content
  assert store.faults['cut'].seen == 2


def test_server_that_sends_less(store, place):
  """An answer that is whole but too short is no copy."""
  write_whole(place / 'big', b'x' * 1000)
  store.faults['short'] = Fault(reads(place), status=200, body=b'x' * 10)
  with pytest.raises(UserError, match=f'{place}/big has 1,000 bytes, of which 10 came'):
    at_hand(place / 'big')
  store.faults.clear()
  assert at_hand(place / 'big').read_bytes() == b'x' * 1000


def test_objects_that_change(place, monkeypatch):
  """Two versions are not mixed."""
  for name in ('a', 'b'):
    write_whole(place / name, b'old')
  copy = staging._copy

  def change(*arguments):
    copy(*arguments)
    write_whole(place / 'b', b'new')

  monkeypatch.setattr(staging, '_copy', change)
  with pytest.raises(UserError, match=f'{place} changed while'):
    at_hand(place)


def test_small_disk(place, monkeypatch):
  """Too little space is an error before anything is copied; it names the variable."""
  write_whole(place / 'a', b'x' * 1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 100, 10))
  with pytest.raises(UserError, match=f'{place} has 1,000 bytes.* 10: .*{CACHE_VARIABLE}'):
    at_hand(place)


def test_many_at_once(store, place):
  """Threads and processes of a machine share one copy."""
  write_whole(place / 'a', b'x' * 1000)
  seen = Fault(reads(place))
  store.faults['count'] = seen
  found = []
  workers = [threading.Thread(target=lambda: found.append(at_hand(place))) for _ in range(4)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join(30)
  assert len(found) == 4 and len(set(found)) == 1 and seen.seen == 1


def test_new_file(place):
  """A file of this machine becomes an object at the end, and not after an error."""
  with new_file(place / 'x.bin') as here:
    here.write_bytes(b'content')
    assert here.name == 'x.bin' and not (place / 'x.bin').exists()
  assert (place / 'x.bin').read_bytes() == b'content'
  with pytest.raises(ZeroDivisionError), new_file(place / 'y.bin') as here:
    here.write_bytes(b'half')
    raise ZeroDivisionError
  assert not (place / 'y.bin').exists()


def test_growing_files(store, place, monkeypatch):
  """Lines come to the store while they are written, also after errors, and are continued."""
  monkeypatch.setattr(staging, 'MIRROR_SECONDS', 0.1)
  with growing_files(place, 'metrics.jsonl') as here:
    file = (here / 'metrics.jsonl').open('ab')
    store.faults['refuse'] = Fault(status=403, times=2)
    file.write(b'1\n')
    file.flush()
    end = time.monotonic() + 10
    while not (store.faults['refuse'].seen == 2 and (place / 'metrics.jsonl').exists()):
      assert time.monotonic() < end
      time.sleep(0.05)
    file.write(b'2\n')
    file.close()
    (here / 'events').mkdir()
    (here / 'events/1').write_bytes(b'e')
  with growing_files(place, 'metrics.jsonl', 'events/1', 'gone/1') as here:
    with (here / 'metrics.jsonl').open('ab') as file:
      file.write(b'3\n')
    assert (here / 'events/1').read_bytes() == b'e' and not (here / 'gone').exists()
  assert (place / 'metrics.jsonl').read_bytes() == b'1\n2\n3\n'
  assert (place / 'events/1').read_bytes() == b'e'


def test_growing_files_that_cannot_be_copied(store, place):
  """The last copy says what is wrong."""
  with pytest.raises(StoreError, match=f'{place}/m.*no permission'), growing_files(place) as here:
    (here / 'm').write_bytes(b'1')
    store.faults['refuse'] = Fault(status=403)
