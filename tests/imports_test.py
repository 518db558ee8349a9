"""Imports point one way, down; and training runs where neither TensorFlow nor seqio is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import finished

PACKAGE = 'latent_deliberation'

# Three rings: what a train step and a prompt need; studies; tools. No ring imports the next one.
STUDIES, TOOLS = ('studies',), ('benchmarks', 'planning')
HEAVY = ('seqio', 'tensorflow', 'tensorflow_datasets')
# Modules that import those, and so may not be imported by a module that must do without.
NEED_TENSORFLOW = tuple(f'{PACKAGE}.data.{name}' for name in (
    'host_tensorflow', 'online', 'packing', 'sources', 'tasks', 'vocabularies'))


def modules() -> list[Path]:
  return sorted((finished.ROOT / PACKAGE).rglob('*.py'))


def folder_of(path: Path) -> str:
  return path.relative_to(finished.ROOT / PACKAGE).parts[0].removesuffix('.py')


def imports_of(tree: ast.AST) -> Iterator[str]:
  """Dotted names of everything imported below a node; 'from a import b' gives a and a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute here'
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def imports_when_loaded(path: Path) -> set[str]:
  """What importing a module imports: not what its functions import when they are called."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      node.body = []
  return set(imports_of(tree))


@pytest.mark.parametrize('path', modules(), ids=lambda path: f'{folder_of(path)}-{path.stem}')
def test_rings(path):
  """A module imports nothing of a ring further out."""
  folder = folder_of(path)
  further = () if folder in TOOLS else TOOLS if folder in STUDIES else (*STUDIES, *TOOLS)
  imported = {name.split('.')[1] for name in imports_of(ast.parse(path.read_text()))
              if name.startswith(f'{PACKAGE}.')}
  assert not imported & set(further)


def test_no_two_modules_share_a_name():
  stems = [path.stem for path in modules() if path.stem != '__init__']
  assert sorted(stems) == sorted(set(stems))


def test_nothing_in_the_library_imports_launch_configs_or_tests():
  for path in modules():
    roots = {name.split('.')[0] for name in imports_of(ast.parse(path.read_text()))}
    assert not roots & {'launch', 'configs', 'tests'}, path


def test_launch_scripts_stay_short_and_call_the_library():
  scripts = list((finished.ROOT / 'launch').glob('*.py'))
  assert len(scripts) >= 4
  for path in scripts:
    assert len(path.read_text().splitlines()) <= 60, path
    roots = {name.split('.')[0] for name in imports_of(ast.parse(path.read_text()))}
    assert roots <= {'absl', 'pathlib', PACKAGE}, path


@pytest.mark.parametrize('path', modules(), ids=lambda path: f'{folder_of(path)}-{path.stem}')
def test_only_the_pipeline_imports_tensorflow_when_it_is_loaded(path):
  needed = {name for name in imports_when_loaded(path)
            if name.split('.')[0] in HEAVY or name in NEED_TENSORFLOW}
  module = '.'.join((PACKAGE, *path.relative_to(finished.ROOT / PACKAGE).with_suffix('').parts))
  if module in NEED_TENSORFLOW:
    assert needed, 'no longer needs TensorFlow: leave it out of NEED_TENSORFLOW'
  else:
    assert not needed


def test_training_loads_neither_tensorflow_nor_seqio():
  code = ('import sys\nfrom latent_deliberation.cli import quickstart\n'
          f'print(sorted(set(sys.modules) & set({HEAVY!r})))')
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env=finished.environment(), timeout=120)
  assert process.stdout == '[]\n', process.stderr
