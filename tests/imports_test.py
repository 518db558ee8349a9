"""Imports point one way, down; and training runs where neither TensorFlow nor seqio is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import finished

PACKAGE = 'latent_deliberation'

# What the modules of each folder (or single file) of the package may import from it, beside
# their own folder.
BELOW = {
    'array_types': (),
    'distributed': (),
    'files': ('distributed',),
    'batch': ('array_types',),
    'sharding': ('array_types',),
    'progress': (),
    'provenance': (),
    'model': ('array_types', 'files', 'progress'),
    'deliberation': ('array_types', 'batch', 'files', 'model', 'progress'),
    'data': ('array_types', 'batch', 'files', 'progress'),
    'training': ('array_types', 'batch', 'deliberation', 'distributed', 'files', 'model',
                 'sharding'),
    'evaluation': ('array_types', 'batch', 'deliberation', 'files', 'model', 'sharding'),
    'planning': ('array_types',),
    'inference': ('array_types', 'batch', 'deliberation', 'files', 'model', 'sharding'),
    'jobs': ('array_types', 'batch', 'data', 'deliberation', 'distributed', 'evaluation', 'files',
             'inference', 'model', 'planning', 'progress', 'provenance', 'sharding', 'training'),
}
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
def test_a_module_imports_from_its_folder_and_those_below_alone(path):
  folder = folder_of(path)
  if folder == '__init__':
    return
  imported = {name.split('.')[1] for name in imports_of(ast.parse(path.read_text()))
              if name.startswith(f'{PACKAGE}.')}
  assert imported <= {folder, *BELOW[folder]}


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
    assert roots <= {'pathlib', PACKAGE}, path


@pytest.mark.parametrize('path', modules(), ids=lambda path: f'{folder_of(path)}-{path.stem}')
def test_only_the_pipeline_imports_tensorflow_when_it_is_loaded(path):
  needed = {name for name in imports_when_loaded(path)
            if name.split('.')[0] in HEAVY or name in NEED_TENSORFLOW}
  module = '.'.join((PACKAGE, *path.relative_to(finished.ROOT / PACKAGE).with_suffix('').parts))
  if module in NEED_TENSORFLOW:
    assert needed, 'no longer needs TensorFlow: leave it out of NEED_TENSORFLOW'
  else:
    assert not needed


def test_the_jobs_load_neither_tensorflow_nor_seqio():
  code = ('import sys\nfrom latent_deliberation.jobs import evaluate, pretrain, quickstart, train\n'
          f'print(sorted(set(sys.modules) & set({HEAVY!r})))')
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env=finished.environment(), timeout=120)
  assert process.stdout == '[]\n', process.stderr
