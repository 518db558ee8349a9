"""Runs launch scripts in forks of a process that has imported what takes seconds.

  python forks.py <commands.json >results.json

reads a list of argument lists, script first, and writes a list of [exit status, stdout, stderr].
"""

import json
import os
import runpy
import sys
import tempfile

from latent_deliberation.jobs import quickstart  # noqa: F401


def run(arguments: list[str]) -> tuple[int, str, str]:
  """One launch, as `python <arguments>` would run it."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
    child = os.fork()
    if child == 0:
      os.dup2(out.fileno(), 1)
      os.dup2(errors.fileno(), 2)
      sys.argv = arguments
      runpy.run_path(arguments[0], run_name='__main__')
      os._exit(0)  # not reached: app.run exits
    _, status = os.waitpid(child, 0)
    texts = []
    for file in (out, errors):
      file.seek(0)
      texts.append(file.read().decode())
  return os.waitstatus_to_exitcode(status), *texts


if __name__ == '__main__':
  print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
