"""Writing a file, or a directory, whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils


def write_whole(path: Path, content: bytes) -> None:
  """Writes `content` to `path`, which holds the old content or the new one, never a part of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # The process id keeps two hosts that write the same state apart.
  partial = path.with_name(f'.{path.name}.partial-{os.getpid()}')
  try:
    with partial.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
  """A directory to write into, which becomes `directory` when the block ends without an error.

  Every process enters; process 0 makes the directory and gives it its name.

  Raises:
    FileExistsError: `directory` exists already; nothing is overwritten.
  """
  directory = directory.absolute()
  if directory.exists():
    raise FileExistsError(f'{directory} exists already and is not written over: give another, or '
                          'remove it')
  partial = directory.with_name(f'{directory.name}.partial')
  is_writer = jax.process_index() == 0
  if is_writer:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
  _wait_for_all(f'{directory} begun')
  try:
    yield partial
    _wait_for_all(f'{directory} written')
    if is_writer:
      os.replace(partial, directory)
    _wait_for_all(f'{directory} named')
  finally:
    if is_writer:
      shutil.rmtree(partial, ignore_errors=True)


def _wait_for_all(name: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
