"""Directories that a job will write to."""

import tempfile
from pathlib import Path


def make_writable(directory: Path) -> None:
  """Creates a directory if it is missing, and writes to it now, before any long work.

  Raises: OSError when either cannot be done.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b'probe')
  except OSError as error:
    raise OSError(f'{directory} cannot be written to ({error}): name another directory, or make '
                  'room there') from error
