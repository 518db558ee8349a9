"""A UserError is printed without a traceback. Every other error keeps its traceback."""

import subprocess
import sys

import numpy as np
import pytest

from latent_deliberation.errors import (
  MissingError,
  UserError,
  check_integer,
  check_number,
  differences,
)
from tests import finished


def launch(tmp_path, job, **variables):
  """Runs a launch script that consists of one function with the lines of `job`."""
  script = tmp_path / 'launch/script.py'
  script.parent.mkdir()
  script.write_text('from latent_deliberation.cli import app\n'
                    'from latent_deliberation.errors import MissingError, UserError\n'
                    f'def job():\n  {job}\napp.run(job)\n')
  return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120,
                        env={**finished.environment(), **variables})


@pytest.mark.parametrize('job, variables, message', [
    ("int('one')", {}, "ValueError: invalid literal for int() with base 10: 'one'"),
    ('first, second = [1]', {}, 'ValueError: not enough values to unpack (expected 2, got 1)'),
    # An int('one') inside the library, which reads this variable.
    ('pass', {'SLURM_STEP_NUM_TASKS': 'one', 'SLURM_STEP_NODELIST': 'node'}, "'one'")],
    ids=['int', 'unpack', 'library'])
def test_bug_keeps_traceback(tmp_path, job, variables, message):
  """An error that Python raises in a frame of ours is a bug: traceback, and code 1."""
  process = launch(tmp_path, job, **variables)
  assert process.returncode == 1
  assert 'Traceback' in process.stderr and message in process.stderr.splitlines()[-1]


def test_user_error_is_one_line(tmp_path):
  """A UserError, here a subclass, is its message on one line, and code 1."""
  process = launch(tmp_path, "raise MissingError('size = 3: it must be 4')")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1].endswith('size = 3: it must be 4')
  assert 'Traceback' not in process.stderr and 'MissingError' not in process.stderr


def test_classes():
  """MissingError is a UserError, and UserError a ValueError."""
  assert issubclass(MissingError, UserError) and issubclass(UserError, ValueError)


def test_differences():
  """Keys that differ are listed with both values, also where one of the two lacks the key."""
  saved, current = {'b': 1, 'a': None, 'same': [2]}, {'b': '1', 'c': 3, 'same': [2]}
  assert differences(saved, current, 'x.') == [
      '  x.a: None saved, (nothing) now', "  x.b: 1 saved, '1' now",
      '  x.c: (nothing) saved, 3 now']


@pytest.mark.parametrize('check, good, bad', [
    (check_integer, [0, 2**31 - 1, np.int64(3)], [-1, 2**31, 10**400, 2.5, True, '3', None]),
    (check_number, [0, 0.5, 1e300, np.float32(2), 5e-324],
     [-0.1, float('nan'), float('inf'), 10**400, True, '3', None])])
def test_numbers_are_checked(check, good, bad):
  """The message has the key and the value."""
  for value in good:
    check('key', value, 0)
  for value in bad:
    with pytest.raises(UserError) as raised:
      check('key', value, 0)
    assert str(raised.value).startswith(f'key = {value!r}: give a')
