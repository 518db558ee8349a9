"""One tiny quickstart, run once by its launch script for all tests that need a finished run.

pytest's workers share it and its compilations. The first worker that needs it runs it.
"""

import fcntl
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.experiment import Experiment, bind

ROOT = Path(__file__).parents[1]
# Compiled programs, which all processes share and the next run finds. `pytest --cache-clear`
# removes them, and so does a run that finds more than 4 GB.
_KEPT, _MOST_BYTES = ROOT / '.pytest_cache/d/compiled', 4e9
_VARIABLE = 'LATENT_DELIBERATION_TESTS'
if _VARIABLE not in os.environ:  # otherwise inherited from pytest's first process, or from a test
  _OWN = tempfile.TemporaryDirectory(prefix='finished-')  # removed when the tests end
  os.environ[_VARIABLE] = _OWN.name
  if _KEPT.is_dir() and sum(file.stat().st_size for file in _KEPT.iterdir()) > _MOST_BYTES:
    shutil.rmtree(_KEPT)
_PLACE = Path(os.environ[_VARIABLE])
TEXTS, QUICKSTART, _PRINTED = _PLACE / 'texts', _PLACE / 'run', _PLACE / 'printed'
COMPILED = _KEPT if os.access(ROOT, os.W_OK) else _PLACE / 'compiled'

# Keys by which the runs of these tests differ from configs/tiny.py.
OVERRIDES = {
    'data.source': 'text',
    'data.files': (str(TEXTS),),
    'data.validation_percent': 30,
    'training.loop.num_steps': 2,
    'training.loop.save_every': 1,
}


def environment() -> dict[str, str]:
  """Variables for processes that tests start: this source tree, shared compilations."""
  return {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(COMPILED),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


def command(script: str, *arguments: str) -> list[str]:
  """Returns the command of a launch script on the configuration of `experiment()`."""
  overrides = [f'--config.{key}={value}' for key, value in OVERRIDES.items()]
  return [sys.executable, f'launch/{script}.py', '--config=configs/tiny.py', *overrides, *arguments]


def launch(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
  """Runs a launch script to its end."""
  return subprocess.run(command(script, *arguments), cwd=ROOT, env=environment(), text=True,
                        capture_output=True, timeout=300, **options)


def launch_in_forks(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
  """Runs commands of launch scripts one after the other, in forks of one process.

  Returns:
    exit status, standard output and standard error of each.
  """
  process = subprocess.run(
      [sys.executable, 'tests/forks.py'], cwd=ROOT, env=environment(), text=True, timeout=300,
      input=json.dumps([command[1:] for command in commands]), capture_output=True)
  if process.returncode:
    raise RuntimeError(f'tests/forks.py failed:\n{process.stderr}')
  return json.loads(process.stdout)


def config_of(name: str, *arguments: str) -> Any:
  """Returns get_config(...) of configs/<name>.py."""
  return runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config'](*arguments)


def experiment(**overrides: Any) -> Experiment:
  """Returns the experiment of the finished quickstart with overrides, such as data__mode='x'."""
  config = config_of('tiny')
  config.update_from_flattened_dict(
      OVERRIDES | {key.replace('__', '.'): value for key, value in overrides.items()})
  return bind(config)


def write_texts(directory: Path, documents: Sequence[str]) -> None:
  """Writes half of the documents as .txt files, the other half as lines of one .jsonl."""
  directory.mkdir(parents=True)
  half = len(documents) // 2
  for number, text in enumerate(documents[:half]):
    (directory / f'{number}.txt').write_text(text)
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in documents[half:])
  (directory / 'more.jsonl').write_text(lines)


@functools.cache
def quickstart() -> tuple[Path, str]:
  """Returns the work directory of the finished quickstart, and its standard output."""
  with (_PLACE / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not _PRINTED.exists():
      _PRINTED.write_text(_run_quickstart())
  return QUICKSTART, _PRINTED.read_text()


def _run_quickstart() -> str:
  for earlier in (TEXTS, QUICKSTART):  # left by a worker that failed
    shutil.rmtree(earlier, ignore_errors=True)
  write_texts(TEXTS, [f'Document {number}: ' + f'the {number}th of the forty. ' * 25
                      for number in range(40)])
  process = launch('quickstart', f'--workdir={QUICKSTART}')
  if process.returncode:
    raise RuntimeError(f'the quickstart failed:\n{process.stderr}')
  return process.stdout
