"""Launches that may be killed: forks of one process that has imported what takes seconds.

Each launch is a process of its own, and runs a launch script as a shell would. Only the imports are
shared. Run as a module, this file is the process that forks.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.005


@dataclasses.dataclass
class Launch:
  """A process that was started.

  Attributes:
    launcher: what started it.
    pid: its number.
    log: file with its stdout and stderr.
    code: its exit code once it has ended; minus the signal that killed it.
  """
  launcher: 'Launcher'
  pid: int
  log: Path
  code: int | None = None

  def poll(self) -> int | None:
    """Returns the exit code, or None while the process runs."""
    if self.code is None:
      self.code = self.launcher.ask({'poll': self.pid})
    return self.code

  def wait(self, seconds: float) -> int | None:
    """Returns the exit code, or None where the process still runs after so long."""
    end = time.monotonic() + seconds
    while self.poll() is None and time.monotonic() < end:
      time.sleep(_POLL_SECONDS)
    return self.code

  def wait_for(self, text: str, seconds: float) -> bool:
    """Returns whether the log has the text before the process ends, in so many seconds."""
    end = time.monotonic() + seconds
    while text not in self.said() and time.monotonic() < end:
      if self.poll() is not None:
        return text in self.said()
      time.sleep(_POLL_SECONDS)
    return text in self.said()

  def kill(self, number: int = signal.SIGKILL) -> None:
    """Sends a signal, if the process still runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def said(self) -> str:
    """Returns the log so far."""
    return self.log.read_text(errors='replace')


class Launcher:
  """Starts launches. They end with it.

  Args:
    variables: environment variables of all launches, besides those of this process.
  """

  def __init__(self, variables: Mapping[str, str]):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **variables}
    self._process = subprocess.Popen(
        [sys.executable, '-m', __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env=environment, start_new_session=True)

  def start(self, arguments: Sequence[str], log: Path, *, call: str = '',
            variables: Mapping[str, str] | None = None, clock: Sequence[float] = (),
            file_bytes: int = 0) -> Launch:
    """Starts a launch.

    Args:
      arguments: a launch script and its flags; arguments of `call`, if there is one.
      log: file for its output, which is begun anew.
      call: 'module:function' to call in place of a script.
      variables: environment variables of this launch alone.
      clock: seconds by which time.time() jumps, one jump after each ten looks at it.
      file_bytes: size that no file may exceed, as if the disk were full; 0 for no limit.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b'')  # before the launch opens it, so that nobody reads an earlier one
    pid = self.ask({'start': list(arguments), 'log': str(log), 'call': call, 'clock': list(clock),
                    'variables': dict(variables or {}), 'file_bytes': file_bytes})
    return Launch(self, pid, log)

  def ask(self, request: Mapping[str, Any]) -> Any:
    """Returns the answer of the process that forks."""
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f'the launcher ended with code {self._process.wait()}')
    return json.loads(answer)

  def close(self) -> None:
    """Ends the launcher and all launches that still run."""
    self._process.stdin.close()
    self._process.wait(60)


@contextlib.contextmanager
def launcher(variables: Mapping[str, str]) -> Iterator[Launcher]:
  """Yields a launcher, and ends it and its launches after the block."""
  opened = Launcher(variables)
  try:
    yield opened
  finally:
    opened.close()


def _serve() -> None:
  """Forks on request: a line of JSON in, a line of JSON out."""
  running: set[int] = set()
  for line in sys.stdin:
    request = json.loads(line)
    if 'poll' in request:
      found, status = os.waitpid(request['poll'], os.WNOHANG)
      running.discard(found)
      answer = os.waitstatus_to_exitcode(status) if found else None
    else:
      answer = os.fork()
      if answer == 0:
        _run(request)
      running.add(answer)
    print(json.dumps(answer), flush=True)
  for pid in running:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


def _run(request: Mapping[str, Any]) -> NoReturn:
  """Is the launch: a script or a function in a fork, and the code with which it ends."""
  os.environ.update(request['variables'])
  file = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
  if request['file_bytes']:
    # The limit holds for the log, too, so another process writes it.
    file = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=file).stdin.fileno()
    resource.setrlimit(resource.RLIMIT_FSIZE, (request['file_bytes'],) * 2)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(file, 1)
  os.dup2(file, 2)
  # Those of the process that forked may be of another kind of file.
  sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))
  if request['clock']:
    _jump(request['clock'])
  status = 0
  try:
    if request['call']:
      module, _, function = request['call'].partition(':')
      getattr(importlib.import_module(module), function)(*request['start'])
    else:
      sys.argv = request['start']
      runpy.run_path(sys.argv[0], run_name='__main__')
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
  os._exit(status)  # an interpreter's shutdown would take longer than many a launch


def _jump(jumps: Sequence[float]) -> None:
  """Makes Python's clock on the wall jump, again and again."""
  real, looks = time.time, [0]

  def jumping() -> float:
    looks[0] += 1
    return real() + jumps[looks[0] // 10 % len(jumps)]

  time.time = jumping


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT / 'launch'))  # as for a script there
  # What the launches need, but for devices of jax: those may not be inherited.
  for name in ('cli.quickstart', 'data.packing', 'training.pretrain', 'training.train'):
    importlib.import_module(f'latent_deliberation.{name}')
  gc.collect()
  gc.freeze()  # or every fork would copy what its first collection marks
  _serve()
