"""Files and directories that are written whole or not at all, and texts that are read.

Where one cannot be written, these functions raise a UserError that names the path.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from latent_deliberation.distributed import barrier
from latent_deliberation.errors import UserError
from latent_deliberation.paths import TOKENIZER_CONFIG, TOKENIZER_JSON


def read_text(path: Path, what: str) -> str:
  """Returns the text of a file.

  Args:
    path: path of the file.
    what: what the file should hold, for the error message.

  Raises:
    UserError: there is no such file, or it is not UTF-8.
  """
  if not path.is_file():
    raise UserError(f'no file {path}: give one with {what}')
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 ({error}): convert it') from error


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
  partial = path.with_name(f'.{path.name}.partial-{os.getpid()}')
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


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
  """Yields a directory to write into, which becomes `directory` if the block raises no error.

  Every process enters. Process 0 creates the directory and renames it at the end.

  Raises:
    UserError: `directory` exists already; nothing is overwritten.
    UserError: the directory cannot be created or renamed. Errors of the block stay as they are.
  """
  directory = directory.absolute()
  if directory.exists():
    raise UserError(f'{directory} exists already and is not overwritten: name another directory, '
                    'or remove this one')
  partial = directory.with_name(f'.{directory.name}.partial')  # a name that no user chooses
  is_writer = jax.process_index() == 0
  if is_writer:
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    with explain_failed_write(directory):
      partial.mkdir(parents=True)
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
    UserError: the directory is a URL, or cannot be created or written to.
  """
  if ':/' in str(directory):
    raise UserError(f'{directory} is a URL, and must be a path: mount the bucket (gcsfuse, for '
                    'instance) and give the path under the mount')
  try:
    directory.mkdir(parents=True, exist_ok=True)
    # Only a write shows whether writing works, on mounted buckets for instance.
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b'probe')
  except OSError as error:
    raise UserError(f'{directory} cannot be written to ({error}): name another directory, or free '
                    'some space there') from error
