"""The launch scripts in bad luck: a bug, Ctrl-C, a kill, a full disk, a SIGTERM."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.pretrain import pretrain
from tests import finished


@pytest.mark.parametrize('flag, advised', [('workdir', True), ('prompt', False)])
def test_ctrl_c_ends_at_once(tmp_path, flag, advised):
  """Ctrl-C ends the process although another thread runs; only a job with a workdir goes on."""
  script = tmp_path / 'launch/slow.py'
  script.parent.mkdir()
  script.write_text('import threading, time\n'
                    'from absl import flags\n'
                    'from latent_deliberation.cli import app\n'
                    f'flags.DEFINE_string("{flag}", "", "A flag.")\n'
                    'def job():\n'
                    '  threading.Thread(target=time.sleep, args=(600,)).start()\n'
                    '  raise KeyboardInterrupt\n'
                    'app.run(job)\n')
  process = subprocess.run([sys.executable, str(script)], cwd=finished.ROOT, text=True,
                           capture_output=True, timeout=60, env=finished.environment())
  assert process.returncode == 130
  assert 'Interrupted.' in process.stderr
  assert ('Run the same command again' in process.stderr) == advised
  assert 'Traceback' not in process.stderr


# Variables as people's machines have them: a notebook, a debugging session, a shell of Slurm.
ELSEWHERE = {
    'PYTHONIOENCODING': 'ascii', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
    'JAX_ENABLE_X64': '1', 'JAX_DISABLE_JIT': '1', 'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
    'JAX_THREEFRY_PARTITIONABLE': '0', 'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_STEP_NODELIST': 'node[1-4]', 'SLURM_PTY_PORT': '4711', 'SLURM_JOB_ID': '7',
    'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}


def begin_script(directory: Path, *lines: str, flags: tuple[str, ...] = (),
                 **options: Any) -> subprocess.Popen:
  """Starts a script whose job is these lines, in an environment from elsewhere."""
  script = directory / 'script.py'
  job = ''.join(f'  {line}\n' for line in lines)
  script.write_text('import os, signal, sys, jax, latent_deliberation.benchmarks.speed_plots\n'
                    f'from latent_deliberation.cli import app\ndef job():\n{job}app.run(job)\n')
  return subprocess.Popen([sys.executable, str(script), *flags], stderr=subprocess.PIPE, text=True,
                          env={**finished.environment(), **ELSEWHERE}, **options)


def test_machine_of_somebody_else(tmp_path):
  """Variables of the machine change no result and end nothing; SIGTERM has its own code."""
  process = begin_script(
      tmp_path, "print('8\u2020', jax.jit(lambda x: x)(1.0).dtype, jax.process_count())",
      'os.kill(os.getpid(), signal.SIGTERM)', stdout=subprocess.PIPE,
      flags=(f'--compilation_cache={tmp_path}/kept',))
  printed, said = process.communicate(timeout=120)
  assert list((tmp_path / 'kept').iterdir())  # what the flag names, and not the variable
  assert (process.returncode, printed) == (143, '8\\u2020 float32 1\n'), said
  assert 'Stopped by SIGTERM.' in said and 'Traceback' not in said
  for name in ('ENABLE_X64=1', 'DISABLE_JIT=1', 'NUMPY_DTYPE_PROMOTION=strict',
               'THREEFRY_PARTITIONABLE=0'):
    assert f'JAX_{name} is not used' in said


def test_reader_that_has_gone(tmp_path):
  """A reader of the output that ends early, as `head` does, ends a script without a traceback."""
  read, write = os.pipe()
  os.close(read)
  process = begin_script(tmp_path, "print('text')", stdout=write)
  os.close(write)
  _, said = process.communicate(timeout=120)
  assert process.returncode == 141 and 'Traceback' not in said and 'Exception' not in said, said


def test_file_without_permission(tmp_path):
  """It is named without a traceback. A typed line of another encoding can be read and refused."""
  typed = tmp_path / 'typed'
  typed.write_bytes(b'caf\xe9\n')
  with typed.open('rb') as lines:
    process = begin_script(
        tmp_path, 'print(ascii(sys.stdin.readline()))',
        "raise PermissionError(13, 'Permission denied', '/secret')", stdin=lines,
        stdout=subprocess.PIPE)
    printed, said = process.communicate(timeout=120)
  assert (process.returncode, printed) == (1, r"'caf\udce9\n'" + '\n'), said
  assert 'Error: /secret: Permission denied. Change' in said and 'Traceback' not in said


def begin(said: Path | None, *arguments: str,
          largest_file: str = 'unlimited') -> subprocess.Popen:
  """Starts a pretraining of some seconds.

  Args:
    said: file for its stderr, which a full disk would cut short; None for a pipe.
    arguments: further arguments of launch/pretrain.py.
    largest_file: size of a file at which the disk is full, in KiB.
  """
  run, _ = finished.quickstart()
  command = finished.command(
      'pretrain', f'--data={run}', '--config.pretraining.loop.num_steps=150',
      '--config.pretraining.loop.eval_every=150', '--config.pretraining.loop.save_every=15',
      *arguments)
  limited = ['bash', '-c', f'ulimit -f {largest_file}; exec "$@"', 'bash', *command]
  with contextlib.nullcontext(subprocess.PIPE) if said is None else said.open('wb') as errors:
    return subprocess.Popen(limited, cwd=finished.ROOT, env=finished.environment(),
                            stdout=subprocess.DEVNULL, stderr=errors)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, said: Path) -> None:
  """Returns when the condition holds; fails if the process ends before."""
  end = time.monotonic() + 120
  while not condition():
    assert process.poll() is None and time.monotonic() < end, said.read_text()
    time.sleep(0.02)


def newest(workdir: Path) -> int:
  """Step of the newest whole checkpoint; 0 without one."""
  steps = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return max(steps, default=0)


@pytest.mark.slow
def test_run_survives_bad_luck(tmp_path, monkeypatch):
  """A run survives a kill, a full disk and a SIGTERM, and then ends."""
  workdir, said = tmp_path / 'run', tmp_path / 'said'

  process = begin(said, f'--workdir={workdir}')
  wait_until(lambda: newest(workdir) >= 15, process, said)
  process.kill()
  assert process.wait(60) == -signal.SIGKILL
  killed_at = newest(workdir)

  process = begin(None, f'--workdir={workdir}', largest_file='49')
  complaint = process.communicate(timeout=120)[1].decode()
  assert process.returncode == 1
  assert re.search(rf'^Error: .*step {killed_at + 15} could not be written .*\n.*{killed_at}',
                   complaint, re.DOTALL | re.MULTILINE), complaint
  assert newest(workdir) == killed_at

  process = begin(said, f'--workdir={workdir}')
  wait_until(lambda: newest(workdir) > killed_at, process, said)
  second = begin(None, f'--workdir={workdir}')
  complaint = second.communicate(timeout=120)[1].decode()
  assert second.returncode == 1
  assert f'Error: process {process.pid} on ' in complaint and f'works in {workdir}' in complaint
  process.terminate()
  assert process.wait(60) == 143, said.read_text()
  assert f'at step {killed_at} of 150' in said.read_text()
  assert f'stopped by SIGTERM at step {newest(workdir)}/150. Saved in' in said.read_text()

  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  run, _ = finished.quickstart()
  pretrain(finished.experiment(pretraining__loop__num_steps=150), workdir, run)
  assert newest(workdir) == 150
  assert (workdir / 'decoder/decoder.json').exists()
  assert [row['step'] for row in read_metrics(workdir / METRICS_FILE)] == list(range(1, 151))
