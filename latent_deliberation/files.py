"""Writing a file, or a directory, whole or not at all; reading a text."""

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


def read_text(path: Path, what: str) -> str:
  """The text of a file.

  Args:
    what: that it should hold, for the message where there is none.

  Raises:
    UserError: there is no such file.
    UserError: it is no UTF-8.
  """
  if not path.is_file():
    raise UserError(f'no file {path}: give one with {what}')
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 ({error}): convert it') from error


def write_whole(path: Path, content: bytes) -> None:
  """Writes `content` to `path`, which holds the old content or the new one, never a part of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.partial-{os.getpid()}')
  try:
    with partial.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """The same for a value as JSON, indented to be read."""
  write_whole(path, json.dumps(value, indent=2).encode() + b'\n')


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
  """A directory to write into, which becomes `directory` when the block ends without an error.

  Every process enters; process 0 makes the directory and gives it its name.

  Raises:
    UserError: `directory` exists already; nothing is overwritten.
  """
  directory = directory.absolute()
  if directory.exists():
    raise UserError(f'{directory} exists already and is not written over: give another, or '
                          'remove it')
  partial = directory.with_name(f'.{directory.name}.partial')  # no user has one of this name
  is_writer = jax.process_index() == 0
  if is_writer:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
  barrier(f'{directory} begun')
  try:
    yield partial
    barrier(f'{directory} written')
    if is_writer:
      os.replace(partial, directory)
    barrier(f'{directory} named')
  finally:
    if is_writer:
      shutil.rmtree(partial, ignore_errors=True)


def make_writable(directory: Path) -> None:
  """Creates a directory if it is missing, and writes to it now, before any long work.

  Raises: UserError when either cannot be done.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b'probe')
  except OSError as error:
    raise UserError(f'{directory} cannot be written to ({error}): name another directory, or make '
                  'room there') from error
