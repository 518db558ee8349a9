"""Runs programs that a model wrote, in a process with limits and without a network (Linux).

confined_program.py is that process. A program can read what this user can read. It can write to an
empty directory in memory alone, reaches no network and no other process, and begins none. Even so,
it runs only where a flag says so.
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from latent_deliberation.errors import UserError

TAIL = 500  # characters of an error that are kept
_SCRIPT = Path(__file__).with_name('confined_program.py')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  Attributes:
    seconds: wall-clock time, and time of a CPU.
    memory_bytes: address space of a process.
    file_bytes: size of a file that it writes.
    open_files: number of files that are open at a time.
  """
  seconds: float = 10.0
  memory_bytes: int = 2**30
  file_bytes: int = 2**20
  open_files: int = 64


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of a program.

  Attributes:
    passed: whether it reached its end. One that ends itself before, as by sys.exit, did not.
    reason: 'passed', 'timeout', or the end of what it wrote to stderr.
  """
  passed: bool
  reason: str


def check_isolation() -> None:
  """Raises UserError where this machine cannot keep a program from the network and from files."""
  outcome = run_program('import os, socket\n'
                        "assert os.listdir() == [] and not os.access('/', os.W_OK)\n"
                        'assert (os.getpid(), os.getppid()) == (2, 1)\n'
                        'for refused in (socket.socket, os.fork):\n'
                        '  try: refused()\n'
                        '  except PermissionError: continue\n'
                        '  raise AssertionError(refused)\n')
  if not outcome.passed:
    raise UserError('--run_code: this machine cannot run a program in isolation '
                    f'({outcome.reason.splitlines()[-1]}): allow user namespaces (Linux 5.12 or '
                    'later, x86_64 or aarch64), or leave out the tasks with programs')


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
  """Runs a Python program, and ends it with all processes that it began."""
  sizes = (int(limits.seconds) + 1, limits.memory_bytes, limits.file_bytes, limits.open_files)
  # What it says goes to a file, whose size is limited, too.
  with (tempfile.TemporaryDirectory(prefix='program-') as directory,
        tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as report):
    token = secrets.token_hex().encode() + b'\n'
    # Isolated: no packages but the standard library, and no variables of this process.
    process = subprocess.Popen(
        [sys.executable, '-I', '-S', str(_SCRIPT), str(report.fileno()), *map(str, sizes)],
        cwd=directory, env={}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
        pass_fds=(report.fileno(),), start_new_session=True)
    try:
      process.communicate(token + program.encode(errors='surrogatepass'), limits.seconds)
    except subprocess.TimeoutExpired:
      return Outcome(False, 'timeout')
    finally:
      _end(process)
    report.seek(0)
    if report.read() == token:
      return Outcome(True, 'passed')
    errors.seek(0)
    said = errors.read().decode(errors='replace').strip()[-TAIL:]
  return Outcome(False, said or f'ended with code {process.returncode}')


def _end(process: subprocess.Popen) -> None:
  """Ends the process and its group, whatever is left of it."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  process.stdin.close()
