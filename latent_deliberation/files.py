"""Files and directories that are written whole or not at all, and files as people have them.

Where one cannot be written, these functions raise a UserError that names the path. The others read
text as editors save it, leave out what nobody meant to give, pass paths on to orbax, and seal JSON.

A path is one of this machine, a pathlib.Path, or one of an object store (stores.py), which has the
same methods. What else differs between the two is here.
"""

import codecs
import contextlib
import hashlib
import importlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from etils import epath

from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import StoreError, UserError
from latent_deliberation.paths import TOKENIZER_CONFIG, TOKENIZER_JSON

# Endings of files with a JSON object on each line.
JSON_LINES = ('.jsonl', '.ndjson', '.jsonlines', '.ldjson', '.json')
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_STRAY_ENDINGS = ('~', '.bak', '.orig', '.swp', '.tmp', '.part', '.partial')
STORES = ('gs://', 's3://')


def as_path(text: str | os.PathLike) -> Path:
  """Returns the path that a text means, of this machine or of an object store."""
  text = os.fspath(text)
  return _import('stores').StorePath(text) if text.startswith(STORES) else Path(text)


def check_path(text: str) -> None:
  """Raises UserError for a URL that is of no store, StoreError for one that does not answer."""
  if ':/' in text:
    _import('stores').check(text)


def is_here(path: Path) -> bool:
  """Whether a path is of this machine."""
  return isinstance(path, Path)


def _import(name: str) -> ModuleType:
  """Returns a module for locks, or one that only paths of object stores need."""
  return importlib.import_module(f'latent_deliberation.{name}')


def at_hand(path: Path, beside: str = '') -> Path:
  """Returns the path of a file or directory on this machine; of a store, that of a copy.

  Args:
    beside: pattern of names of further files, which a file of a store must have beside it.

  Raises: as `fetch` of staging.py does.
  """
  return path if is_here(path) else _import('staging').fetch(path, beside)


def new_file(path: Path) -> contextlib.AbstractContextManager[Path]:
  """Yields where on this machine to write a new file, which is then at `path`."""
  return contextlib.nullcontext(path) if is_here(path) else _import('staging').new_file(path)


def growing_files(directory: Path, *names: str) -> contextlib.AbstractContextManager[Path]:
  """Yields a directory of this machine for files that grow; what is in it comes to `directory`.

  Args:
    names: files that go on, where they are there.
  """
  return (contextlib.nullcontext(directory) if is_here(directory)
          else _import('staging').mirror(directory, *names))


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
  for folder in list_directory(directory):
    if not folder.is_dir():
      continue
    with contextlib.suppress(PermissionError):
      if is_wanted(folder):
        found.append(folder)
      elif depth > 1:
        found += find_inside(folder, is_wanted, depth - 1)
  return found


def find_encoding(content: bytes) -> str:
  """Returns the encoding of a text by the mark at its beginning; UTF-8 without one."""
  return 'utf-16' if content.startswith(_UTF16_MARKS) else 'utf-8-sig'


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
  if '\0' in text:  # UTF-16 without a mark is valid UTF-8 with a NUL a character
    raise UserError(f'{path} has a NUL at character {text.index(chr(0))}: if it is UTF-16, '
                    'convert it (iconv -f utf-16 -t utf-8); otherwise it is no text')
  return text.replace('\r\n', '\n')


class LiteralPath(type(epath.Path())):
  """A path for orbax whose own characters, as in 'lr[1e-2]', are no pattern.

  orbax lists its directories with `glob` of epath, which takes the directory for a pattern, too.
  """

  def glob(self, pattern: str) -> Iterator['LiteralPath']:
    """Yields the entries that match the pattern, which follows this path."""
    return (type(self)(path) for path in Path(self).glob(pattern))


def path_for_orbax(directory: Path) -> LiteralPath:
  """Returns the absolute path of a directory of orbax. Raises as `refuse_backslash` does."""
  refuse_backslash(directory)
  if is_here(directory):
    return LiteralPath(directory.absolute())
  if directory.scheme == 's3':
    _import('orbax_s3').teach_orbax()
  return directory


def orbax_options(directory: Path) -> dict[str, Any]:
  """Returns options with which orbax writes a checkpoint whole or not at all in this place."""
  if is_here(directory):
    return {}  # it renames a directory
  options = importlib.import_module('orbax.checkpoint').options
  # It writes a file last, which says that the directory is whole.
  return {'atomicity_options': options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)}


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
  except StoreError as error:  # says itself what to do
    raise UserError(str(error)) from error
  except OSError as error:
    raise UserError(f'{path} cannot be written to ({error}): make it writable or free some '
                    'space') from error


def write_whole(path: Path, content: bytes) -> None:
  """Writes `content` to `path`, which always holds the old or the new content and never a part.

  Raises:
    UserError: the file cannot be written.
  """
  if not is_here(path):
    with explain_failed_write(path):
      path.write_bytes(content)
    return
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


def read_lines(path: Path) -> list[Any]:
  """Returns the values of a file of this machine that grows by lines of JSON.

  A process that was killed may have written a part of the last line. That part is cut off, so that
  the next line begins anew.

  Raises:
    UserError: the part cannot be cut off.
    ValueError: a whole line is no JSON; then nothing is cut off.
  """
  whole, _, rest = path.read_bytes().rpartition(b'\n')
  values = [json.loads(line) for line in whole.split(b'\n')] if whole else []
  if rest:
    with explain_failed_write(path), path.open('r+b') as file:
      file.truncate(len(whole) + 1 if whole else 0)
  return values


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
    verb = 'exists already and is' if len(there) == 1 else 'exist already and are'
    raise UserError(f'{", ".join(there)} {verb} not overwritten: name another place, or add '
                    '--overwrite')


def lock(path: Path, work: str, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
  """Holds the lock `path`, which one process of all hosts may hold at a time; see locks.py.

  Args:
    path: file of the lock; created, and removed at the end.
    work: what the holder does, to complete "process 7 on host ...".
    wait: whether to wait for another holder.

  Raises:
    UserError: another process holds it, and `wait` is false; or the file cannot be made.
  """
  return _import('locks').lock(path, work, wait)


@contextlib.contextmanager
def lock_for_all(path: Path, work: str) -> Iterator[None]:
  """Holds a lock for all processes of a run, on process 0. Raises as `lock` does, on every one."""
  with contextlib.ExitStack() as held:
    run_on_process_zero(f'lock {path}', lambda: held.enter_context(lock(path, work)))
    yield


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
  """Yields a directory to write into, which becomes `directory` if the block raises no error.

  Every process enters. Process 0 creates the directory and renames it at the end. A store has no
  rename: there the directory is written at its place, and does not exist before the end.

  Raises:
    UserError: `directory` exists already; nothing is overwritten. Or another process writes it.
    UserError: the directory cannot be created or renamed. Errors of the block stay as they are.
  """
  directory = directory.absolute()
  if directory.exists():
    raise UserError(f'{directory} exists already and is not overwritten: name another directory, '
                    'or remove this one')
  # Names that no user chooses.
  partial, locked = partial_of(directory), directory.with_name(f'.{directory.name}.lock')
  is_writer = jax.process_index() == 0
  if is_writer:
    with explain_failed_write(directory):
      directory.parent.mkdir(parents=True, exist_ok=True)
  with lock(locked, f'writes {directory}') if is_writer else contextlib.nullcontext():
    if is_writer:
      if directory.exists():  # another process wrote it, and its lock was waited for
        raise UserError(f'{directory} was just written by another process and is not overwritten: '
                        'name another directory')
      with explain_failed_write(directory):
        begin_directory(partial)
    # No process writes before the directory exists, or continues before it has its name.
    barrier(f'{directory} begun')
    try:
      yield partial
      barrier(f'{directory} written')
      if is_writer:
        with explain_failed_write(directory):
          finish_directory(partial, directory)
    except BaseException:
      if is_writer:
        remove_tree(partial)
      raise
    barrier(f'{directory} named')  # whatever becomes of another process, the directory is whole


def partial_of(directory: Path) -> Path:
  """Returns where a directory is written before it exists: beside it; in a store, at its place."""
  return directory.with_name(f'.{directory.name}.partial') if is_here(directory) else directory


def begin_directory(partial: Path) -> None:
  """Makes the directory of `partial_of`, empty."""
  remove_tree(partial)  # left by a killed process
  partial.mkdir(parents=True) if is_here(partial) else partial.begin()


def finish_directory(partial: Path, directory: Path) -> None:
  """Gives a directory that is whole its name."""
  os.replace(partial, directory) if is_here(partial) else directory.finish()


def remove_tree(directory: Path) -> None:
  """Removes a directory with all that is in it, where it is there and can be removed."""
  if is_here(directory):
    shutil.rmtree(directory, ignore_errors=True)
  else:
    with contextlib.suppress(StoreError):
      directory.rmtree(missing_ok=True)


def make_writable(directory: Path) -> None:
  """Creates a directory if it is missing, and tests that it can be written to.

  Long work calls this first.

  Raises:
    UserError: the directory is a URL of an unknown kind, has a backslash, or cannot be created or
      written to.
  """
  refuse_backslash(directory)
  if not is_here(directory):
    with explain_failed_write(directory):
      directory.probe()
    return
  if ':/' in str(directory):
    raise UserError(f'{directory} is a URL: give gs://BUCKET/PATH, s3://BUCKET/PATH or a path of '
                    'this machine')
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


def sha256_of(path: Path) -> str:
  """Returns the SHA-256 of a file, in hexadecimal digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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
