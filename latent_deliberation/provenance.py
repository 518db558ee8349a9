"""Where a result comes from: the code that made it, and the memory that this took."""

import resource
import subprocess
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
  """Most memory that this process has held at once, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_commit(source: Path = Path(__file__).parent) -> str:
  """Commit of the source tree, '+changes' behind it where tracked files differ from it.

  'unknown' where `source` is not tracked by git, as in an installed copy.
  """
  def git(*arguments: str) -> str:
    return subprocess.run(('git', '--no-optional-locks', *arguments), cwd=source, check=True,
                          capture_output=True, text=True).stdout.strip()

  try:
    if not git('ls-files', '.'):
      return 'unknown'
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+changes' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
