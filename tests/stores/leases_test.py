"""A lock on a store has one holder at a time, and is free again when its holder is killed."""

import json
import os
import threading
import time

import pytest

from latent_deliberation import locks
from latent_deliberation.errors import UserError
from latent_deliberation.files import lock
from tests.stores.object_store import Fault


def leave(path):
  """Leaves a lease as a killed process does."""
  locks._Lease(path, 'works').take(wait=False)


def test_holder_that_lives(place):
  """A second process is refused, however long the first one works, and told who that is."""
  path = place / 'run.lock'
  with lock(path, 'works'):
    time.sleep(1.5)  # longer than a lease without a sign of life
    with (pytest.raises(UserError, match=f'process {os.getpid()} on .* works: .*{path}'),
          lock(path, 'works')):
      pytest.fail('two hold the lock')
  assert not path.exists()


@pytest.mark.parametrize('content', ['3', '{"holder": "x"}', '{'])
def test_lock_that_is_none(place, content):
  (place / 'run.lock').write_text(content)
  with pytest.raises(UserError, match='run.lock is no lock'), lock(place / 'run.lock', 'works'):
    pytest.fail('the block was entered')


def test_holder_that_was_killed(place):
  """Its lease is taken over."""
  path = place / 'run.lock'
  leave(path)
  with lock(path, 'works'):
    assert json.loads(path.read_bytes())['holder'].startswith(f'process {os.getpid()} ')
  assert not path.exists()


def test_answer_that_was_lost(place, monkeypatch):
  """The lease was created, and the store's answer said that it was there: it is held."""
  create = type(place).create
  monkeypatch.setattr(type(place), 'create', lambda path, content: create(path, content) and False)
  monkeypatch.setattr(locks._Lease, '_watch', lambda *unused: pytest.fail('its own is watched'))
  with lock(place / 'run.lock', 'works'):
    assert (place / 'run.lock').exists()


def test_takeover_that_was_slow(place, monkeypatch):
  """One removes a dead lease after another took it over: the other works on, and it is told so."""
  path, unlink, entered = place / 'run.lock', type(place).unlink, []
  removing, works, done = threading.Event(), threading.Event(), threading.Event()
  leave(path)

  def in_turn(self, missing_ok=False):
    if threading.current_thread().name == 'slow':
      removing.set()
      works.wait(20)
    removing.wait(20)
    unlink(self, missing_ok=missing_ok)

  def work():
    try:
      with lock(path, 'works'):
        entered.append(threading.current_thread().name)
        works.set()
        done.wait(20)
    except UserError as error:
      entered.append(str(error))

  monkeypatch.setattr(type(place), 'unlink', in_turn)
  monkeypatch.setattr(os, '_exit', lambda code: entered.append('ended'))
  workers = [threading.Thread(target=work, name=name) for name in ('slow', 'fast')]
  for worker in workers:
    worker.start()
  end = time.monotonic() + 20
  while len(entered) < 2 and time.monotonic() < end:
    time.sleep(0.05)
  done.set()
  for worker in workers:
    worker.join(20)
  assert entered[0] == 'fast' and 'works: let it end' in entered[1], entered


def test_lease_that_cannot_be_read_for_a_while(place, monkeypatch):
  """A short answer of the store does not end the beats."""
  read, failures = locks._Lease._read, [UserError('no lock')]

  def once(lease):
    if failures:
      raise failures.pop()
    return read(lease)

  with lock(place / 'run.lock', 'works'):
    before = json.loads((place / 'run.lock').read_bytes())['beats']
    monkeypatch.setattr(locks._Lease, '_read', once)
    end = time.monotonic() + 20
    while failures or json.loads((place / 'run.lock').read_bytes())['beats'] <= before + 1:
      assert time.monotonic() < end
      time.sleep(0.05)


def test_lock_that_is_waited_for(place):
  """One who waits gets the lease after the other."""
  order = []

  def wait():
    with lock(place / 'data.lock', 'packs', wait=True):
      order.append('second')

  with lock(place / 'data.lock', 'packs'):
    second = threading.Thread(target=wait)
    second.start()
    time.sleep(1)
    order.append('first')
  second.join(10)
  assert order == ['first', 'second']


def test_many_launches_after_a_killed_one(place):
  """Of many who watch the same dead lease, one holds it at a time, and each in its turn."""
  path, inside, most = place / 'data.lock', [], []
  leave(path)

  def work():
    with lock(path, 'packs', wait=True):
      inside.append(1)
      most.append(len(inside))
      time.sleep(0.05)
      inside.pop()

  workers = [threading.Thread(target=work) for _ in range(3)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join(30)
  assert most == [1] * 3 and not path.exists()


def test_lost_lease(place, monkeypatch):
  """A process that finds another holder ends, and leaves the lease to it."""
  path, ended = place / 'run.lock', threading.Event()

  def end(code):
    ended.set()
    threading.Event().wait()  # the process would be gone; here only this thread stops

  monkeypatch.setattr(os, '_exit', end)
  with lock(path, 'works'):
    path.write_bytes(json.dumps({'holder': 'process 7', 'owner': 'x', 'beats': 0}).encode())
    assert ended.wait(5)
  assert json.loads(path.read_bytes())['owner'] == 'x'


def test_store_that_fails_for_a_while(store, place):
  """The holder goes on, and is the holder still."""
  path = place / 'run.lock'
  with lock(path, 'works'):
    store.faults['refuse'] = Fault(status=403)
    time.sleep(0.5)
    store.faults.clear()
    before, end = json.loads(path.read_bytes()), time.monotonic() + 20
    while json.loads(path.read_bytes())['beats'] < before['beats'] + 2:
      assert time.monotonic() < end
      time.sleep(0.05)
  assert not path.exists()
