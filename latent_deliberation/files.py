"""Files and directories that are written whole or not at all, locks, and files as people have them.

Where one cannot be written, these functions raise a UserError that names the path. The others read
text as editors save it, leave out what nobody meant to give, pass paths on to orbax, and seal JSON.
"""

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
from absl import logging
from etils import epath

from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.paths import TOKENIZER_CONFIG, TOKENIZER_JSON

# Endings of files with a JSON object on each line.
JSON_LINES = ('.jsonl', '.ndjson', '.jsonlines', '.ldjson', '.json')
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_STRAY_ENDINGS = ('~', '.bak', '.orig', '.swp', '.tmp', '.part', '.partial')


def is_stray(name: str) -> bool:
  """Whether nobody meant a file of this name: it is hidden, a backup or not finished."""
  is_autosave = name.startswith('#') and name.endswith('#')
  return name.startswith(('.', '~$')) or is_autosave or name.lower().endswith(_STRAY_ENDINGS)


def list_directory(directory: Path) -> list[Path]:
  """Returns the entries of a directory by name, without stray ones; none if it does not exist."""
  if not directory.is_dir():
    return []
  return sorted(path for path in directory.iterdir() if not is_stray(path.name))


def find_inside(directory: Path, is_wanted: Callable[[Path], bool], depth: int = 2) -> list[Path]:
  """Returns the nearest folders inside a directory, up to `depth` levels, that are wanted."""
  found = []
  for folder in filter(Path.is_dir, list_directory(directory)):
    with contextlib.suppress(PermissionError):
      if is_wanted(folder):
        found.append(folder)
      elif depth > 1:
        found += find_inside(folder, is_wanted, depth - 1)
  return found


def find_encoding(content: bytes) -> str:
  """Returns the encoding of a text by the mark at its beginning; UTF-8 without one."""
  return 'utf-16' if content.startswith(_UTF16_MARKS) else 'utf-8-sig'


POLL_SECONDS = 0.5  # between two looks at a lock that another process holds
_ATTEMPTS = 10  # to open the file of a lock while others remove it; some mounts change its number


def read_text(path: Path, what: str) -> str:
  r"""Returns the text of a file, without a byte order mark, and with \n for \r\n.

  Args:
    path: path of the file.
    what: what the file should hold, for the error message.

  Raises:
    UserError: there is no such file, or it is neither UTF-8 nor marked as UTF-16.
  """
  if not path.is_file():
    raise UserError(f'no file {path}: give one with {what}')
  content = path.read_bytes()
  try:
    text = content.decode(find_encoding(content))
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 ({error}): convert it') from error
  if '\0' in text:  # UTF-16 without a mark is valid UTF-8 with one NUL a letter
    raise UserError(f'{path} has a NUL at character {text.index(chr(0))}: if it is UTF-16, '
                    'convert it (iconv -f utf-16 -t utf-8); otherwise it is no text')
  return text.replace('\r\n', '\n')


class LiteralPath(type(epath.Path())):
  """A path for orbax whose own signs, as in 'lr[1e-2]', are no pattern.

  orbax lists its directories with `glob` of epath, which takes the directory for a pattern, too.
  """

  def glob(self, pattern: str) -> Iterator['LiteralPath']:
    """Yields the entries that match the pattern, which follows this path."""
    return (type(self)(path) for path in Path(self).glob(pattern))


def path_for_orbax(directory: Path) -> LiteralPath:
  """Returns the absolute path of a directory of orbax. Raises as `refuse_backslash` does."""
  refuse_backslash(directory)
  return LiteralPath(directory.absolute())


def refuse_backslash(directory: Path) -> None:
  """Raises UserError for a path in which TensorStore would take a backslash for a '/'."""
  if '\\' in str(directory.absolute()):
    raise UserError(f'{directory.absolute()} has a backslash, with which checkpoints would land in '
                    'another directory: rename it')


@contextlib.contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
  """Turns an OSError of the block, which writes to `path`, into a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written to ({error}): make it writable or free some '
                    'space') from error


def write_whole(path: Path, content: bytes) -> None:
  """Writes `content` to `path`, which always holds the old or the new content and never a part.

  Raises:
    UserError: the file cannot be written.
  """
  # Random, since processes in containers that share a disk may have the same number.
  partial = path.with_name(f'.{path.name}.partial-{secrets.token_hex(4)}')
  with explain_failed_write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      # On disk before the rename, so a crash leaves the old content or the new.
      with partial.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes a value as indented JSON. Raises as `write_whole` does."""
  write_whole(path, json.dumps(value, indent=2).encode() + b'\n')


def copy_vocabulary(path: Path, directory: Path, name: str) -> Path:
  """Copies a vocabulary into a directory, and returns the path of the copy.

  Args:
    path: a SentencePiece model, or a tokenizer.json.
    directory: directory of the copy.
    name: name of a SentencePiece model there. A tokenizer.json is called so, and its
      tokenizer_config.json comes with it.

  Raises: as `write_whole` does.
  """
  if path.suffix != '.json':
    copy = directory / name
  else:
    copy, config = directory / TOKENIZER_JSON, path.with_name(TOKENIZER_CONFIG)
    # First, so that a tokenizer.json is never alone.
    if config.is_file():
      write_whole(directory / TOKENIZER_CONFIG, config.read_bytes())
  write_whole(copy, path.read_bytes())
  return copy


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
  """Checks, before long work, that the files it will write do not exist.

  Args:
    paths: files that will be written.
    overwrite: whether they may exist.

  Raises:
    UserError: one exists, and must not.
  """
  there = [str(path) for path in paths if path.exists()]
  if there and not overwrite:
    raise UserError(f'{", ".join(there)} exists already and is not overwritten: name another '
                    'place, or add --overwrite')


@contextlib.contextmanager
def lock(path: Path, work: str, *, wait: bool = False) -> Iterator[None]:
  """Holds the lock `path`, which one process of all hosts may hold at a time.

  The system frees it when the process ends in any way. The file says who holds it. On a file system
  without locks there is only a warning.

  Args:
    path: file of the lock; created, and removed at the end.
    work: what the holder does, to complete "process 7 on host ...".
    wait: whether to wait for another holder.

  Raises:
    UserError: another process holds it, and `wait` is false; or the file cannot be made.
  """
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
def lock_for_all(path: Path, work: str) -> Iterator[None]:
  """Holds a lock for all processes of a run, on process 0. Raises as `lock` does, on every one."""
  with contextlib.ExitStack() as held:
    run_on_process_zero(f'lock {path}', lambda: held.enter_context(lock(path, work)))
    yield


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
  """Yields a directory to write into, which becomes `directory` if the block raises no error.

  Every process enters. Process 0 creates the directory and renames it at the end.

  Raises:
    UserError: `directory` exists already; nothing is overwritten. Or another process writes it.
    UserError: the directory cannot be created or renamed. Errors of the block stay as they are.
  """
  directory = directory.absolute()
  if directory.exists():
    raise UserError(f'{directory} exists already and is not overwritten: name another directory, '
                    'or remove this one')
  # Names that no user chooses.
  partial, locked = (directory.with_name(f'.{directory.name}.{end}') for end in ('partial', 'lock'))
  is_writer = jax.process_index() == 0
  if is_writer:
    with explain_failed_write(directory):
      directory.parent.mkdir(parents=True, exist_ok=True)
  with lock(locked, f'writes {directory}') if is_writer else contextlib.nullcontext():
    if is_writer:
      shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
      with explain_failed_write(directory):
        partial.mkdir()
    # No process writes before the directory exists, or continues before it has its name.
    barrier(f'{directory} begun')
    try:
      yield partial
      barrier(f'{directory} written')
      if is_writer:
        with explain_failed_write(directory):
          os.replace(partial, directory)
      barrier(f'{directory} named')
    finally:
      if is_writer:
        shutil.rmtree(partial, ignore_errors=True)


def make_writable(directory: Path) -> None:
  """Creates a directory if it is missing, and tests that it can be written to.

  Long work calls this first.

  Raises:
    UserError: the directory is a URL, has a backslash, or cannot be created or written to.
  """
  if ':/' in str(directory):
    raise UserError(f'{directory} is a URL, and must be a path: mount the bucket (gcsfuse, for '
                    'instance) and give the path under the mount')
  refuse_backslash(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    # Only a write shows whether writing works, on mounted buckets for instance.
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b'probe')
  except OSError as error:
    raise UserError(f'{directory} cannot be written to ({error}): name another directory, or free '
                    'some space there') from error


# --- JSON that knows whether it was changed ---

# A changed learning rate is valid JSON, and would be used without a word. So files that describe
# our data have a checksum of themselves. Those of earlier code have none, and are read as they are.
CHECKSUM = 'checksum'  # the key


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the content of a file with its checksum, in place of an earlier one."""
  plain = {key: value for key, value in content.items() if key != CHECKSUM}
  return {**plain, CHECKSUM: _checksum(plain)}


def unseal(text: bytes, origin: Path) -> Any:
  """Returns the content of a file without its checksum.

  Args:
    text: the file, whose spaces and lines may have changed.
    origin: its path, for the error message.

  Raises:
    UserError: the content is not that of the checksum.
    ValueError: it is no JSON.
  """
  content = json.loads(text)
  if not isinstance(content, dict) or CHECKSUM not in content:
    return content
  given = content.pop(CHECKSUM)
  if given != _checksum(content):
    raise UserError(f'{origin} has changed since it was written: its {CHECKSUM} is {given}, and '
                    f'its content has {_checksum(content)}. Restore the file. If you changed it '
                    f'on purpose, remove its {CHECKSUM}')
  return content


def _checksum(content: Mapping[str, Any]) -> str:
  # As it reads back: tuples are lists, and keys are strings.
  text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
