"""Copies between an object store and a disk of this machine.

`fetch` copies what libraries can only read as files: weights, rows, vocabularies. `Mirror` copies
what libraries can only write as files that grow: metrics, events.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from fsspec.callbacks import Callback

from latent_deliberation.errors import MissingError, StoreError, UserError
from latent_deliberation.files import explain_failed_write, lock
from latent_deliberation.paths import CACHE_VARIABLE, cache_directory
from latent_deliberation.progress import Progress
from latent_deliberation.stores import StorePath

MIRROR_SECONDS = 15.0  # between two copies of files that grow
_AT_ONCE = 8  # files that are copied at a time
# What tells one version of an object from another, as gcsfs and s3fs call it.
_VERSION = ('size', 'ETag', 'etag', 'generation', 'md5Hash')


def fetch(path: StorePath, beside: str = '') -> Path:
  """Returns the copy of a file or directory on this machine, and makes it if it is not there.

  A copy belongs to one version of the objects. Processes of a machine share it.

  Args:
    path: a file or directory of a store.
    beside: pattern of names of further files, in the directory of a file.

  Raises:
    MissingError: there is nothing.
    UserError: the disk has too little space, or objects change meanwhile.
    StoreError: the store fails.
  """
  root, objects = _list(path, beside)
  version = _version(objects)
  copy = cache_directory('stores').joinpath(*root.parts[1:], version)
  found = copy if root is path else copy / path.name
  if _is_whole(copy, objects):
    return found
  with explain_failed_write(copy):
    copy.parent.mkdir(parents=True, exist_ok=True)
  partial = copy.with_name(f'.{version}.partial')
  # Processes of this machine wait for the one that copies.
  with lock(copy.with_name(f'.{version}.lock'), f'copies {path}', wait=True):
    if _is_whole(copy, objects):
      return found
    for left in (partial, copy):  # by a killed process, or by a machine that lost its power
      shutil.rmtree(left, ignore_errors=True)
    _check_space(path, copy.parent, objects)
    with explain_failed_write(copy):
      _copy(root, objects, partial)
      # A copy that mixes two versions must not pass for either.
      if _version(_list(path, beside)[1]) != version:
        raise UserError(f'{path} changed while it was copied to {copy}: run the same command again')
      partial.rename(copy)
  return found


def _list(path: StorePath, beside: str) -> tuple[StorePath, dict[str, Mapping[str, Any]]]:
  """Returns the directory of what is copied, and the properties of each file by its name there."""
  objects = path.objects()
  if not objects:
    raise MissingError(f'{path} does not exist: give what is in the bucket')
  if list(objects) != ['']:
    return path, objects
  others = path.parent.glob(beside) if beside else ()
  return path.parent, {path.name: objects['']} | {
      file.name: found[''] for file in others if '' in (found := file.objects())}


def _version(objects: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a hash of names, sizes and versions of objects."""
  states = {name: [str(about.get(key)) for key in _VERSION] for name, about in objects.items()}
  return hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(copy: Path, objects: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether a copy has all objects, in their sizes."""
  return copy.is_dir() and all(
      (copy / name).is_file() and (copy / name).stat().st_size == about['size']
      for name, about in objects.items())


def _check_space(path: StorePath, place: Path, objects: Mapping[str, Mapping[str, Any]]) -> None:
  needed, free = sum(about['size'] for about in objects.values()), shutil.disk_usage(place).free
  if needed > free:
    raise UserError(f'{path} has {needed:,} bytes, and {place} has room for {free:,}: set '
                    f'{CACHE_VARIABLE} to a directory on a larger disk, or remove older copies '
                    'there')


def _copy(root: StorePath, objects: Mapping[str, Mapping[str, Any]], target: Path) -> None:
  """Copies objects into a new directory, several at a time."""
  total = sum(about['size'] for about in objects.values())
  logging.info('copying %s to %s: %d files, %s bytes', root, target.parent, len(objects),
               f'{total:,}')
  counter = _Counter(Progress(f'copying {root}', 'MB', total // 10**6))

  def copy(name: str) -> None:
    local = target / name
    local.parent.mkdir(parents=True, exist_ok=True)
    with (root / name).explained():
      root.filesystem.get_file((root / name).url, str(local), callback=counter)
    if local.stat().st_size != objects[name]['size']:
      raise StoreError(f'{root / name} has {objects[name]["size"]:,} bytes, of which '
                       f'{local.stat().st_size:,} came: run the same command again')

  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    for _ in pool.map(copy, objects):
      pass


class _Counter(Callback):
  """Adds up the bytes of all files that are copied."""

  def __init__(self, progress: Progress):
    super().__init__()
    self._progress, self._bytes, self._lock = progress, 0, threading.Lock()

  def relative_update(self, inc: int = 1) -> None:
    with self._lock:
      self._bytes += inc
      self._progress.update(self._bytes // 10**6)

  def set_size(self, size: int | None) -> None:
    """Nothing: the size of all files is known."""


@contextlib.contextmanager
def new_file(path: StorePath) -> Iterator[Path]:
  """Yields a path of this machine to write a file to, which becomes the object `path`."""
  with tempfile.TemporaryDirectory(prefix='latent_deliberation-') as place:
    local = Path(place, path.name)
    yield local
    send(local, path)


def send(local: Path, path: StorePath) -> None:
  """Copies a file of this machine to a store."""
  with path.explained(is_written=True):
    path.filesystem.put_file(str(local), path.url)


@contextlib.contextmanager
def mirror(directory: StorePath, *names: str) -> Iterator[Path]:
  """Yields a directory of this machine, whose files are copied into `directory` as they grow.

  A killed process loses what it wrote in the last MIRROR_SECONDS.

  Args:
    directory: directory of a store.
    names: files of it to begin with, where they are there.

  Raises:
    StoreError: at the end, if the store then fails.
  """
  with tempfile.TemporaryDirectory(prefix='latent_deliberation-') as place:
    local, ended = Path(place), threading.Event()
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        content = (directory / name).read_bytes()
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)
    sent = _states(local)

    def copy_changes() -> None:
      for file, state in _states(local).items():
        if sent.get(file) != state:
          send(file, directory.joinpath(*file.relative_to(local).parts))
          sent[file] = state

    def copy_often() -> None:
      while not ended.wait(MIRROR_SECONDS):
        try:
          copy_changes()
        except (StoreError, OSError) as error:  # the next time, or the last, may succeed
          logging.warning('%s', error)

    copier = threading.Thread(target=copy_often, daemon=True)
    copier.start()
    try:
      yield local
    finally:
      ended.set()
      copier.join()
      copy_changes()


def _states(directory: Path) -> dict[Path, tuple[int, int]]:
  """Returns size and time of each file below a directory."""
  states = {}
  for file in directory.rglob('*'):
    with contextlib.suppress(FileNotFoundError):  # some writers remove files again
      if file.is_file():
        stat = file.stat()
        states[file] = stat.st_size, stat.st_mtime_ns
  return states
