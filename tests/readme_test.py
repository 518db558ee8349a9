"""The README's two commands are those that the gate and the sources know."""

import re
import runpy
import sys
import types

from tests import finished


def commands() -> list[str]:
  """Contents of the README's bash blocks, in order."""
  text = (finished.ROOT / 'README.md').read_text()
  return [block.strip() for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL)]


def test_the_first_command_installs_and_runs_the_quickstart():
  first = commands()[0]
  assert '\n' not in first
  assert first == 'pip install -r requirements.txt -e . && python launch/quickstart.py'
  assert (finished.ROOT / 'requirements.txt').exists()
  assert (finished.ROOT / 'launch/quickstart.py').exists()


def test_the_gate_runs_the_second_command_and_nothing_else():
  second = commands()[1]
  assert '\n' not in second
  gate = (finished.ROOT / '.ci/run').read_text().splitlines()
  assert gate[-1] == second
  assert not any('pip install' in line or 'pytest' in line for line in gate[:-1])


def test_every_library_of_setup_is_pinned(monkeypatch):
  """requirements.txt holds what the tests ran with."""
  declared = {}
  monkeypatch.setitem(sys.modules, 'setuptools', types.SimpleNamespace(
      setup=declared.update, find_packages=lambda include: []))
  monkeypatch.chdir(finished.ROOT)
  runpy.run_path('setup.py')
  lines = (finished.ROOT / 'requirements.txt').read_text().lower().splitlines()
  pinned = {re.split('[=<> @\\[]', line)[0].replace('_', '-') for line in lines if '==' in line}
  names = {re.split('[>=<\\[]', item)[0].lower() for item in declared['install_requires']}
  assert names and names <= pinned
