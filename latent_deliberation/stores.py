"""Paths of object stores, gs://BUCKET/PATH and s3://BUCKET/PATH, with the methods of pathlib.Path.

files.py imports this module when such a path is given; `as_path` makes one. gcsfs and s3fs do the
work, by etils.epath and fsspec. A store has neither directories nor a rename, and an object appears
whole or not at all. So a directory here is what objects have in common at the beginning of their
names. While it holds an object UNFINISHED it does not exist: it is being written, or was when its
process was killed.
"""

import concurrent.futures
import contextlib
import fnmatch
import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latent_deliberation.errors import StoreError, UserError
from latent_deliberation.paths import STEP_METADATA

# epath would import TensorFlow where it is installed, which knows no s3://.
os.environ.setdefault('EPATH_USE_TF', 'false')
# TensorStore reads and writes arrays. By default it waits without end, and asks Google alone.
for _name, _value in {
    'TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS': '30',
    'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS': '60',
    'TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES': '1',
    'TENSORSTORE_GCS_HTTP_URL': os.environ.get('STORAGE_EMULATOR_HOST')}.items():
  if _value:
    os.environ.setdefault(_name, _value)

from etils import epath  # noqa: E402

LIBRARIES = {'gs': 'gcsfs', 's3': 's3fs'}
UNFINISHED = '.unfinished'
COMMITTED = 'commit_success.txt'  # in a checkpoint of orbax that is whole
CHECK_SECONDS = 60  # for the first answer of a store
_CONNECT_SECONDS, _READ_SECONDS = 20, 30  # for every later one; the libraries then try again
_TRIES = 5
_AT_ONCE = 16  # objects that are removed at a time
_LOGIN = {
    'gs': 'log in with `gcloud auth application-default login`, or give this machine a service '
          'account with the roles storage.objectUser and storage.legacyBucketReader on the bucket',
    's3': 'set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a '
          'role that may list, get, put and delete objects of the bucket'}
_ENDPOINT = {'gs': 'STORAGE_EMULATOR_HOST', 's3': 'AWS_ENDPOINT_URL'}
# Names of classes of errors, with which libraries of stores say that nobody is logged in.
_NO_LOGIN = ('NoCredentialsError', 'PartialCredentialsError', 'ProfileNotFound', 'TokenRetrieval',
             'DefaultCredentialsError', 'RefreshError', 'UnauthorizedSSOTokenError')
_NO_NETWORK = ('EndpointConnectionError', 'ClientConnectorError', 'ConnectionClosedError',
               'ClientConnectorDNSError', 'ServerDisconnectedError', 'ConnectionError')


class _Stat(epath.stat_utils.StatResult):
  """Properties of an object, with pathlib's name for its size."""

  @property
  def st_size(self) -> int:
    return self.length


class StorePath(type(epath.Path())):
  """A path of an object store. orbax takes it as it is, since it is a path of epath."""

  @property
  def url(self) -> str:
    """gs://BUCKET/PATH or s3://BUCKET/PATH."""
    return str(self)

  @property
  def scheme(self) -> str:
    return self.parts[1]

  @property
  def bucket(self) -> str:
    """Name of the bucket; '' for a path above all buckets."""
    return self.parts[2] if len(self.parts) > 2 else ''

  @property
  def filesystem(self) -> Any:
    """The library's object for this kind of store; the same for all paths."""
    return open_filesystem(self.scheme, self.url)

  def absolute(self) -> 'StorePath':
    return self

  def resolve(self, strict: bool = False) -> 'StorePath':
    del strict
    return self

  def expanduser(self) -> 'StorePath':
    return self

  # What is there. An error of the store is raised, and never means that nothing is there.

  def exists(self) -> bool:
    kind = self._kind()
    return kind == 'file' or kind == 'directory' and not self._is_unfinished()

  def is_file(self) -> bool:
    return len(self.parts) > 3 and self._kind() == 'file'

  def is_dir(self) -> bool:
    return self._kind() == 'directory' and not self._is_unfinished()

  def _kind(self) -> str:
    """Returns 'file', 'directory' or ''."""
    if not self.bucket:
      return ''
    with contextlib.suppress(FileNotFoundError), self.explained():
      return self.filesystem.info(self.url)['type']
    return ''

  def _is_unfinished(self) -> bool:
    if len(self.parts) < 4 or self.name == UNFINISHED:
      return False
    with contextlib.suppress(FileNotFoundError):
      return bool((self / UNFINISHED).read_bytes())  # one request, where to ask would take two
    return False

  def _entries(self) -> list[tuple['StorePath', bool]]:
    """Returns what is directly inside, by name, and whether it is a directory."""
    with contextlib.suppress(FileNotFoundError), self.explained():
      found = self.filesystem.ls(self.url, detail=True)
      names = {each['name'].rstrip('/').rpartition('/')[2]: each for each in found
               if self._key(each['name']) not in ('', '/')}
      return [(self / name, names[name]['type'] == 'directory') for name in sorted(names)]
    return []

  def _key(self, name: str) -> str:
    """Returns what an object's name, BUCKET/PATH, has after this path."""
    return name.removeprefix(self.url.partition('://')[2])

  def iterdir(self) -> Iterator['StorePath']:
    return (path for path, _ in self._entries() if path.name != UNFINISHED)

  def glob(self, pattern: str) -> Iterator['StorePath']:
    """Yields what matches; characters of this path itself, as in 'lr[1e-2]', are no pattern."""
    first, _, rest = pattern.partition('/')
    for path, is_directory in self._entries():
      if fnmatch.fnmatchcase(path.name, first) and path.name != UNFINISHED:
        if not rest:
          yield path
        elif is_directory:
          yield from path.glob(rest)

  def rglob(self, pattern: str) -> Iterator['StorePath']:
    """Yields files at any depth whose names match the pattern; a store has no directories."""
    return (self / rest for rest in self.objects()
            if fnmatch.fnmatchcase(rest.rpartition('/')[2], pattern))

  def stat(self) -> '_Stat':
    with self.explained():
      about = self.filesystem.info(self.url)
    return _Stat(about['type'] == 'directory', about['size'], 0, None, None, None)

  def objects(self) -> dict[str, Mapping[str, Any]]:
    """Returns the properties of all objects below this path, by the rest of their names.

    A file has one, with the rest ''.
    """
    with self.explained():
      found = self.filesystem.find(self.url, detail=True)
    return {self._key(name).lstrip('/'): about for name, about in sorted(found.items())
            if not name.endswith('/')}

  # Reading and writing.

  def read_bytes(self) -> bytes:
    with self.explained():
      return self.filesystem.cat_file(self.url)

  def read_text(self, encoding: str | None = None) -> str:
    return self.read_bytes().decode(encoding or 'utf-8')

  def write_bytes(self, data: bytes) -> int:
    with self.explained(is_written=True):
      self.filesystem.pipe_file(self.url, data)
    return len(data)

  def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
    return self.write_bytes(data.encode(encoding or 'utf-8', errors or 'strict'))

  def create(self, data: bytes) -> bool:
    """Writes an object unless it exists; returns whether it did. Of many who try, one does."""
    try:
      with self.explained(is_written=True):
        self.filesystem.pipe_file(self.url, data, mode='create')
    except FileExistsError:
      return False
    return True

  def probe(self) -> None:
    """Writes an object below this path, and removes it. Raises StoreError if that fails."""
    with self.explained(is_written=True):
      name = f'{self.url}/.probe-{secrets.token_hex(4)}'
      self.filesystem.pipe_file(name, b'probe')
      with contextlib.suppress(FileNotFoundError):  # the answer was lost, and the request repeated
        self.filesystem.rm_file(name)

  def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: a directory begins with what is written into it."""

  def unlink(self, missing_ok: bool = False) -> None:
    try:
      with self.explained():
        self.filesystem.rm_file(self.url)
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self, missing_ok: bool = False) -> None:
    """Removes all that is below; UNFINISHED last, so that no rest looks whole."""
    names = list(self.objects())
    if not names and not missing_ok:
      raise FileNotFoundError(self.url)
    marks = [rest for rest in names if rest.rpartition('/')[2] == UNFINISHED]
    self._remove([rest for rest in names if rest not in marks])
    self._remove(marks)

  def _remove(self, names: Sequence[str]) -> None:
    """Removes objects below this path, several at a time."""
    # Each by its name: the library would take characters in a list of names, as in 'lr[1e-2]',
    # for a pattern.
    with self.explained(), concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      for _ in pool.map(lambda rest: (self / rest).unlink(missing_ok=True), names):
        pass

  def begin(self) -> 'StorePath':
    """Makes this an empty directory that does not exist until `finish`."""
    mark = self / UNFINISHED
    mark.write_bytes(b'This directory is being written, or was when its process ended.\n')
    self._remove([rest for rest in self.objects() if rest != UNFINISHED])
    return self

  def finish(self) -> None:
    # A library repeats a request whose answer was lost, and then finds nothing to remove.
    (self / UNFINISHED).unlink(missing_ok=True)

  def clear_unfinished(self) -> None:
    """Removes the steps of orbax below that a killed process left.

    These are all after the last whole one, and older ones that by their description never were.

    Raises:
      UserError: no step has orbax's last file, but one is complete by its description. An older
        orbax wrote it to a disk, without such a file, and it was copied here.
    """
    steps = {int(path.name): path for path, is_directory in self._entries()
             if is_directory and path.name.isdecimal()}
    whole = [step for step, path in steps.items() if (path / COMMITTED).is_file()]
    last = max(whole, default=-1)
    unfinished = [steps[step] for step in sorted(steps.keys() - whole)
                  if step > last or _was_cut_off(steps[step])]
    if not whole and not all(map(_was_cut_off, unfinished)):
      write = {'gs': 'gcloud storage cp -', 's3': 'aws s3 cp -'}[self.scheme]
      names = ', '.join(path.name for path in unfinished)
      raise UserError(
          f'{self} has checkpoints of steps {names}, and none has the file {COMMITTED}, which says '
          'that it is whole in a store. If the last was copied here completely, run '
          f'`echo whole | {write} {unfinished[-1] / COMMITTED}`, and the same command resumes from '
          'it. Or use another --workdir')
    for path in unfinished:
      logging.getLogger('absl').warning('%s is removed: its process ended while it wrote it', path)
      path.rmtree(missing_ok=True)

  def rename(self, target: 'StorePath') -> 'StorePath':
    """Copies a file or directory within the store, and then removes it here.

    If the process is killed, neither path ever has a part that looks whole.
    """
    names = list(self.objects())
    if names == ['']:
      with self.explained():
        self.filesystem.cp_file(self.url, target.url)
      self.unlink()
      return target
    if target.exists():
      raise FileExistsError(target.url)
    target.begin()
    with self.explained():
      for rest in names:
        self.filesystem.cp_file(f'{self.url}/{rest}', f'{target.url}/{rest}')
    target.finish()
    (self / UNFINISHED).write_bytes(b'This directory is being removed.\n')
    self.rmtree()
    return target

  @contextlib.contextmanager
  def explained(self, is_written: bool = False) -> Iterator[None]:
    """Turns an error of a library into a StoreError, but for those that pathlib raises too.

    Args:
      is_written: whether the block writes, for which nothing but the bucket can be missing.
    """
    try:
      yield
    except FileNotFoundError as error:
      if is_written or _is_of_bucket(error):
        raise StoreError(_no_bucket(self)) from error
      raise
    except (FileExistsError, StoreError, UserError):
      raise
    except Exception as error:  # the libraries of stores have dozens of classes
      raise StoreError(describe(self, error)) from error


def _was_cut_off(step: StorePath) -> bool:
  """Whether a step of orbax, by its own description, was never complete."""
  try:
    return json.loads((step / STEP_METADATA).read_bytes()).get('commit_timestamp_nsecs') is None
  except FileNotFoundError:  # orbax writes it before the step is whole
    return True
  except ValueError:
    return False


def check(url: str) -> None:
  """Checks, before long work, that a store answers for a path, whether or not it is there.

  Raises:
    UserError: the scheme is unknown, or the library is missing.
    StoreError: there is no such bucket or no permission, or no answer within CHECK_SECONDS.
  """
  scheme, separator, rest = url.partition('://')
  if scheme not in LIBRARIES or not separator or not re.match('[^/]', rest):
    raise UserError(f'{url!r} is no path that can be read or written: give a path of this machine, '
                    'gs://BUCKET/PATH or s3://BUCKET/PATH')
  path = StorePath(url)
  for place in (path, StorePath(f'{scheme}://{path.bucket}')):
    with contextlib.suppress(FileNotFoundError), path.explained():
      files = path.filesystem
      import fsspec.asyn
      fsspec.asyn.sync(files.loop, files._info, place.url, timeout=CHECK_SECONDS)
      return
  raise StoreError(_no_bucket(path))


def open_filesystem(scheme: str, url: str) -> Any:
  """Returns the filesystem of fsspec that epath, and so orbax, also takes for this scheme."""
  library = LIBRARIES[scheme]
  if importlib.util.find_spec(library) is None:
    raise UserError(f'{url} needs the library {library}: pip install -e \'.[buckets]\', or '
                    f'pip install {library}')
  import fsspec
  settings = fsspec.config.conf.setdefault(scheme, {})
  # Other hosts write too, so lists are not kept. Times are limited, so that nothing waits for ever.
  settings.setdefault('use_listings_cache', False)
  if scheme == 's3':
    settings.setdefault('config_kwargs', {
        'connect_timeout': _CONNECT_SECONDS, 'read_timeout': _READ_SECONDS,
        'retries': {'total_max_attempts': _TRIES, 'mode': 'standard'}})
  elif 'session_kwargs' not in settings:
    import aiohttp
    logging.getLogger(library).setLevel(logging.CRITICAL)  # errors are explained here
    settings['session_kwargs'] = {'timeout': aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)}
  return epath.backend.fsspec_backend.fs(f'{scheme}://')


def _is_of_bucket(error: BaseException) -> bool:
  """Whether an error says that the bucket itself is missing."""
  return any(word in f'{error} {error.__cause__}'
             for word in ('NoSuchBucket', 'bucket does not exist', 'bucket was not found'))


def _no_bucket(path: StorePath) -> str:
  make = {'gs': 'gcloud storage buckets create gs://', 's3': 'aws s3 mb s3://'}[path.scheme]
  return (f'{path}: there is no bucket {path.bucket!r}, or it is of another account: check the '
          f'name, or create it with `{make}{path.bucket}`')


def describe(path: StorePath, error: BaseException) -> str:
  """Returns a message for an error of a store: the path, what is wrong, and what to do."""
  kinds = {kind.__name__ for each in (error, error.__cause__, error.__context__)
           for kind in type(each).__mro__}
  text = ' '.join(str(error).split())[:300]
  said = f'{type(error).__name__}: {text}' if text else type(error).__name__
  if isinstance(error, PermissionError) or kinds & {*_NO_LOGIN} or re.search(
      r'Forbidden|(?<![\w/.-])40[13](?![\w/.-])|AccessDenied|Access Denied|Anonymous caller', text):
    return f'{path}: no permission ({said}): {_LOGIN[path.scheme]}'
  network = (f'check the network, the region of the bucket and {_ENDPOINT[path.scheme]} if it is '
             'set, then run the same command again; it continues from what is complete')
  if 'TimeoutError' in kinds or any('Timeout' in kind for kind in kinds):
    return f'{path}: the store did not answer in time ({said}): {network}'
  if kinds & {*_NO_NETWORK}:
    return f'{path}: the store cannot be reached ({said}): {network}'
  return f'{path}: the store failed ({said}): {network}'
