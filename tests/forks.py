"""Runs launch scripts in forks of a process that has imported what takes seconds.

  python forks.py <commands.json >results.json

reads a list of argument lists, script first, and writes a list of [exit status, stdout, stderr].
"""

import gc
import json
import os
import runpy
import sys
import tempfile
import traceback
from typing import NoReturn

from latent_deliberation.cli import generate, quickstart  # noqa: F401  (once, for all forks)


def run(arguments: list[str]) -> tuple[int, str, str]:
  """One launch, as `python <arguments>` would run it."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
    child = os.fork()
    if child == 0:
      os.dup2(out.fileno(), 1)
      os.dup2(errors.fileno(), 2)
      sys.argv = arguments
      _launch(arguments[0])
    _, status = os.waitpid(child, 0)
    texts = []
    for file in (out, errors):
      file.seek(0)
      texts.append(file.read().decode())
  return os.waitstatus_to_exitcode(status), *texts


def _launch(script: str) -> NoReturn:
  """Runs a script and ends the process at once: an interpreter's shutdown takes longer."""
  try:
    runpy.run_path(script, run_name='__main__')
    status = 0
  except SystemExit as end:
    status = end.code or 0
  except BaseException:
    traceback.print_exc()
    status = 1
  if isinstance(status, str):
    print(status, file=sys.stderr)
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


if __name__ == '__main__':
  gc.freeze()  # or every fork would copy what its first collection marks
  print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
