"""Locks, one holder at a time among all hosts: files on a disk, and leases on an object store.

The system frees the lock of a file when its process ends in any way. A store does not. There the
lock is a lease, an object that its holder writes again every few seconds. A process that wants it
watches it. If it is written again, its holder lives; if not for LEASE_SECONDS, it is free.
Only times of one process are compared, so clocks of hosts may differ.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from latent_deliberation.errors import StoreError, UserError
from latent_deliberation.files import explain_failed_write, is_here

POLL_SECONDS = 0.5  # between two looks at a lock that another process holds
_ATTEMPTS = 10  # to open the file of a lock while others remove it; some mounts change its number
BEAT_SECONDS = 5.0  # from one writing of a lease to the next
LEASE_SECONDS = 30.0  # without a writing, after which its holder counts as gone
_SETTLE_SECONDS = 1.0  # in which another process that took over the same lease would be seen


def lock(path: Path, work: str, wait: bool) -> contextlib.AbstractContextManager[None]:
  """Holds the lock `path`; see `lock` of files.py, which is what others call."""
  return (_lock_file if is_here(path) else _hold_lease)(path, work, wait)


@contextlib.contextmanager
def _lock_file(path: Path, work: str, wait: bool) -> Iterator[None]:
  """Holds a lock of the system, which frees it when the process ends in any way."""
  waiting = False
  while (file := _try_lock(path)) is None:
    # The holder may just have ended, and its file with it.
    with contextlib.suppress(FileNotFoundError):
      holder = path.read_text() or 'another process'
      if not wait:
        raise UserError(f'{holder} {work}: let it end, or end it first. Its lock is {path}')
      if not waiting:
        logging.info('%s %s: waiting for it', holder, work)
      waiting = True
    time.sleep(POLL_SECONDS)
  with file:
    with explain_failed_write(path):
      begun = time.strftime('%Y-%m-%d %H:%M:%S')
      file.write(f'process {os.getpid()} on {socket.gethostname()}, since {begun},'.encode())
      file.flush()
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def _try_lock(path: Path) -> BinaryIO | None:
  """Returns the open file of a lock that this process now holds; None where another holds it."""
  # The holder before may remove the file after it is opened here. Then the lock is of no file.
  for left in reversed(range(_ATTEMPTS)):
    with explain_failed_write(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      file = path.open('ab')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      return None
    except OSError as error:  # a mount of NFS or Lustre without locks
      logging.warning('%s: this file system has no locks (%s), so nothing keeps a second process '
                      'from working there', path, error)
      break
    if not left or _is_at(path, file):
      break
    file.close()
  file.truncate(0)  # of a process that was killed
  return file


def _is_at(path: Path, file: BinaryIO) -> bool:
  """Whether an open file is the one at `path`."""
  try:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _hold_lease(path: Path, work: str, wait: bool) -> Iterator[None]:
  """Holds a lease.

  A process that was suspended, or cut off from the store for longer than LEASE_SECONDS, may find
  that another one holds the lease. It then ends at once, without writing anything.
  """
  held = _Lease(path, work)
  held.take(wait)
  ended = threading.Event()
  beating = threading.Thread(target=held.beat, args=(ended,), daemon=True)
  beating.start()
  try:
    yield
  finally:
    ended.set()
    beating.join(BEAT_SECONDS)
    held.give_back()


class _Lease:
  """A lease that this process wants or holds."""

  def __init__(self, path: Path, work: str):
    self._path, self._work, self._beats = path, work, 0
    self._owner = secrets.token_hex(8)
    self._holder = (f'process {os.getpid()} on {socket.gethostname()}, since '
                    f'{time.strftime("%Y-%m-%d %H:%M:%S")},')

  def take(self, wait: bool) -> None:
    """Returns once this process holds the lease. Raises as `lock` does."""
    took_over = False
    while not self._path.create(self._content()):
      other = self._read()
      if other is None:  # given back meanwhile
        continue
      if other['owner'] == self._owner:  # the answer to `create` was lost on its way
        break
      if self._watch(other):
        if not wait:
          raise UserError(f'{other["holder"]} {self._work}: let it end, or end it first. Its lock '
                          f'is {self._path}')
        logging.info('%s %s: waiting for it', other['holder'], self._work)
        self._wait_for(other)
        continue
      looked = time.monotonic()
      if (self._read() or {}).get('owner') == other['owner']:
        logging.warning('%s %s, and gives no sign of life: its lock %s is taken over',
                        other['holder'], self._work, self._path)
        self._path.unlink(missing_ok=True)
        took_over = True
        if time.monotonic() - looked > _SETTLE_SECONDS / 2:
          # Another process may have taken the lease over meanwhile, and lost it by this. If so, it
          # writes it again at its next beat.
          time.sleep(2 * BEAT_SECONDS)
    if took_over:
      time.sleep(_SETTLE_SECONDS)
      if (self._read() or {}).get('owner') != self._owner:
        self.take(wait)

  def _watch(self, other: dict[str, Any]) -> bool:
    """Whether the holder of a lease lives: whether it writes the lease again."""
    logging.info('%s holds %s. Checking for up to %.0f seconds whether it is still alive',
                 other['holder'].rstrip(','), self._path, LEASE_SECONDS)
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
      time.sleep(POLL_SECONDS)
      now = self._read()
      if now is None or now['owner'] != other['owner']:
        return False
      if now['beats'] != other['beats']:
        return True
    return False

  def _wait_for(self, other: dict[str, Any]) -> None:
    """Returns once a lease has another holder, or none, or one that shows no life."""
    seen, changed = other, time.monotonic()
    while time.monotonic() - changed < LEASE_SECONDS:
      time.sleep(POLL_SECONDS)
      now = self._read()
      if now is None or now['owner'] != other['owner']:
        return
      if now['beats'] != seen['beats']:
        seen, changed = now, time.monotonic()

  def beat(self, ended: threading.Event) -> None:
    """Writes the lease every BEAT_SECONDS; ends the process if another one holds it."""
    while not ended.wait(BEAT_SECONDS):
      try:
        found = self._read()
        if found is not None and found['owner'] != self._owner:
          logging.error('%s now holds %s, since this process gave no sign of life for %.0f '
                        'seconds. It ends here', found['holder'], self._path, LEASE_SECONDS)
          logging.flush()
          os._exit(1)
        self._beats += 1
        if not ended.is_set():
          self._path.write_bytes(self._content())
      except (StoreError, UserError) as error:  # the next beat may succeed
        logging.warning('the lock could not be renewed: %s', error)

  def give_back(self) -> None:
    """Removes the lease if it is still that of this process."""
    with contextlib.suppress(StoreError):  # then it is taken over later
      if (self._read() or {}).get('owner') == self._owner:
        self._path.unlink(missing_ok=True)

  def _content(self) -> bytes:
    return json.dumps({'holder': self._holder, 'owner': self._owner,
                       'beats': self._beats}).encode()

  def _read(self) -> dict[str, Any] | None:
    """Returns the content of the lease; None if there is none."""
    try:
      content = json.loads(self._path.read_bytes())
      return {key: content[key] for key in ('holder', 'owner', 'beats')}
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{self._path} is no lock ({error}): remove it') from error
