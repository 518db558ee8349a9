"""Programs of a model run with limits, without a network, and end with all that they began."""

import socket
import subprocess
import time

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import code_execution
from latent_deliberation.evaluation.code_execution import Limits, check_isolation, run_program

SHORT = Limits(seconds=2.0)


@pytest.fixture(autouse=True)
def isolation():
  try:
    check_isolation()
  except UserError:
    pytest.skip('this machine allows no namespaces')


@pytest.mark.parametrize('program, passed', [
    ('assert 1 + 1 == 2', True), ('assert 1 + 1 == 3', False), ('def broken(:', False),
    ('raise SystemExit(3)', False), ('import sys; sys.exit(0)\nassert False', False),
    ('import sys; sys.exit(77)\nassert False', False),
    *((f'import os; os._exit({code})\nassert False', False) for code in (0, 77)),
    ('import os, sys; os.write(int(sys.argv[1]), b"passed"); os._exit(0)', False)])
def test_outcome(program, passed):
  """Only a program that comes to its end passes, however it ends itself before."""
  assert run_program(program).passed == passed


def test_reason():
  """The end of the traceback says why a program failed."""
  assert run_program('assert False, "two is not three"').reason.endswith('two is not three')


@pytest.mark.parametrize('program', [
    'while True: pass', 'import time; time.sleep(60)',
    'import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n'
    'while True: pass'])
def test_time(program):
  begun = time.monotonic()
  assert run_program(program, Limits(seconds=1.0)).reason == 'timeout'
  assert time.monotonic() - begun < 10


def test_output():
  """A program that writes without an end is ended by the limit of a file's size."""
  program = 'import sys\nwhile True: sys.stderr.write("x" * 2**16)'
  outcome = run_program(program, Limits(seconds=20.0))
  assert not outcome.passed and outcome.reason != 'timeout'


def test_memory():
  outcome = run_program('x = bytearray(2**32)', SHORT)
  assert not outcome.passed and 'MemoryError' in outcome.reason


def test_network():
  """Not even this machine's own ports are in reach."""
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    server.listen()
    program = f'import socket; socket.create_connection({server.getsockname()!r}, 2)'
    assert not run_program(program, SHORT).passed


def test_socket_file(tmp_path):
  """Sockets in files, such as those of services of this machine, are out of reach, too."""
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / 's'))
    server.listen()
    outcome = run_program('import socket\nsocket.socket(socket.AF_UNIX).connect('
                          f'{str(tmp_path / "s")!r})', SHORT)
  assert not outcome.passed and 'PermissionError' in outcome.reason


@pytest.mark.parametrize('attempt', [
    'import os; os.fork()', 'import subprocess; subprocess.run(["/bin/true"])'])
def test_processes(attempt):
  """A program begins no process, so that its limits are those of all it does."""
  outcome = run_program(attempt, SHORT)
  assert not outcome.passed and 'PermissionError' in outcome.reason


def test_threads():
  program = 'import threading\nthread = threading.Thread(target=open, args=("x", "w"))\n' \
            'thread.start(); thread.join(); open("x")'
  assert run_program(program).passed


def test_files(tmp_path):
  """A program writes small files in its own directory, and nothing elsewhere."""
  kept = tmp_path / 'kept'
  kept.write_text('mine')
  assert run_program('open("x", "w").write("x"); assert open("x").read() == "x"').passed
  assert not run_program('open("x", "w").write("x" * 2**22)', SHORT).passed
  for attempt in (f'open({str(kept)!r}, "w")', f'import os; os.remove({str(kept)!r})',
                  f'open({str(tmp_path / "new")!r}, "w")'):
    assert not run_program(attempt, SHORT).passed
  assert kept.read_text() == 'mine' and list(tmp_path.iterdir()) == [kept]


def test_orphans():
  """A program that leaves its group and would outlive what began it is ended all the same."""
  seconds = 61.25 + time.time() % 1  # a sleep that is told apart from any other
  program = ('import ctypes, os\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.setsid()\n'
             f'os.execv("/bin/sleep", ["sleep", "{seconds}"])')
  assert run_program(program, Limits(seconds=1.0)).reason == 'timeout'
  time.sleep(0.2)
  running = subprocess.run(['ps', 'ax', '-o', 'args'], capture_output=True, text=True).stdout
  assert f'sleep {seconds}' not in running


def test_refusal(monkeypatch):
  """Where a program cannot be isolated, none is run."""
  monkeypatch.setattr(code_execution, '_SCRIPT', code_execution._SCRIPT.with_name('no_such.py'))
  with pytest.raises(UserError, match='--run_code'):
    check_isolation()
