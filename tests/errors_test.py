"""A UserError is printed without a traceback. Every other error keeps its traceback."""

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

# Lines before the library is imported, the line of the job, and the end of what is said.
SCRIPTS = {
    'int': ('', "int('one')", "ValueError: invalid literal for int() with base 10: 'one'"),
    'unpack': ('', 'first, second = [1]',
               'ValueError: not enough values to unpack (expected 2, got 1)'),
    # An int('one') inside the library, which reads this variable.
    'library': ("import os; os.environ.update(SLURM_STEP_NUM_TASKS='one', "
                "SLURM_STEP_NODELIST='node')", 'pass', "'one'"),
    'refusal': ('', "raise MissingError('size = 3: it must be 4')", 'size = 3: it must be 4')}


@pytest.fixture(scope='module')
def endings(tmp_path_factory):
  """Exit status, stdout and stderr of launch scripts that consist of one function with a line."""
  place, commands = tmp_path_factory.mktemp('launch'), []
  for name, (before, job, _) in SCRIPTS.items():
    script = place / f'{name}.py'
    script.write_text(f'{before}\nfrom latent_deliberation.cli import app\n'
                      'from latent_deliberation.errors import MissingError, UserError\n'
                      f'def job():\n  {job}\napp.run(job)\n')
    commands.append([sys.executable, str(script)])
  return dict(zip(SCRIPTS, finished.launch_in_forks(commands), strict=True))


@pytest.mark.parametrize('name', ['int', 'unpack', 'library'])
def test_bug_keeps_traceback(endings, name):
  """An error that Python raises in a frame of ours is a bug: traceback, and code 1."""
  status, _, said = endings[name]
  assert status == 1
  assert 'Traceback' in said and SCRIPTS[name][-1] in said.splitlines()[-1]


def test_user_error_is_one_line(endings):
  """A UserError, here a subclass, is its message on one line, and code 1."""
  status, _, said = endings['refusal']
  assert status == 1
  assert said.splitlines()[-1].endswith(SCRIPTS['refusal'][-1])
  assert 'Traceback' not in said and 'MissingError' not in said


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
