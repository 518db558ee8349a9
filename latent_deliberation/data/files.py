"""Writing a file whole or not at all."""

import os
from pathlib import Path


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
