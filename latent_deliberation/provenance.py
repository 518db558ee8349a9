"""The origin of a result: the commit of the code."""

import subprocess
from pathlib import Path


def git_commit(source: Path = Path(__file__).parent) -> str:
  """Returns the commit of the source tree, followed by '+changes' where tracked files differ.

  Returns 'unknown' where git does not track `source`, as in an installed copy.
  """
  def git(*arguments: str) -> str:
    return subprocess.run(('git', '--no-optional-locks', *arguments), cwd=source, check=True,
                          capture_output=True, text=True).stdout.strip()

  try:
    # An installed copy may be inside of somebody else's repository.
    if not git('ls-files', '.'):
      return 'unknown'
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+changes' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
