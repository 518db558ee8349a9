"""Imports follow the rings, stay few, and need neither TensorFlow nor seqio for training."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import finished

PACKAGE = 'latent_deliberation'

# Three rings: what a train step and a prompt need; studies; tools. No ring imports the next one.
STUDIES, TOOLS = ('studies',), ('benchmarks', 'planning', 'serving')
HEAVY = ('seqio', 'tensorflow', 'tensorflow_datasets')
# Modules that import those. No other module may import one of these when it is loaded.
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
  """Everything that loading a module imports, without the imports inside its functions."""
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


def closure_of(script: Path) -> set[Path]:
  """A script and all files of the library, but for empty ones, that it may import."""
  found, waiting = set(), [script]
  while waiting:
    path = waiting.pop()
    if path in found or not path.read_text().strip():
      continue
    found.add(path)
    for name in imports_of(ast.parse(path.read_text())):
      if name.split('.')[0] == PACKAGE:
        place = finished.ROOT.joinpath(*name.split('.'))
        waiting += [each for each in (place.with_suffix('.py'), place / '__init__.py')
                    if each.is_file()]
  return found


@pytest.mark.parametrize('script', ['train', 'generate'])
def test_closure(script):
  """A train step, and a prompt, are read in at most 50 files of the inner ring."""
  files = closure_of(finished.ROOT / f'launch/{script}.py')
  assert 20 < len(files) <= 50
  library = {path for path in files if path.is_relative_to(finished.ROOT / PACKAGE)}
  assert not {folder_of(path) for path in library} & {*STUDIES, *TOOLS}


def test_module_names():
  """No two modules share a name."""
  stems = [path.stem for path in modules() if path.stem != '__init__']
  assert sorted(stems) == sorted(set(stems))


def test_library_is_closed():
  """The library imports nothing of launch, configs or tests."""
  for path in modules():
    roots = {name.split('.')[0] for name in imports_of(ast.parse(path.read_text()))}
    assert not roots & {'launch', 'configs', 'tests'}, path


def test_launch_scripts():
  """Launch scripts are short and import nothing but the library and absl."""
  scripts = list((finished.ROOT / 'launch').glob('*.py'))
  assert len(scripts) >= 4
  for path in scripts:
    assert len(path.read_text().splitlines()) <= 100, path
    roots = {name.split('.')[0] for name in imports_of(ast.parse(path.read_text()))}
    assert roots <= {'absl', 'pathlib', 'shlex', PACKAGE}, path


@pytest.mark.parametrize('path', modules(), ids=lambda path: f'{folder_of(path)}-{path.stem}')
def test_tensorflow(path):
  """Only the modules that prepare data import TensorFlow when they are loaded."""
  needed = {name for name in imports_when_loaded(path)
            if name.split('.')[0] in HEAVY or name in NEED_TENSORFLOW}
  module = '.'.join((PACKAGE, *path.relative_to(finished.ROOT / PACKAGE).with_suffix('').parts))
  if module in NEED_TENSORFLOW:
    assert needed, 'no longer needs TensorFlow: leave it out of NEED_TENSORFLOW'
  else:
    assert not needed


def test_matplotlib():
  """Only one module imports matplotlib, whatever MPLBACKEND says."""
  found = {path.stem for path in modules() if any(
      name.split('.')[0] == 'matplotlib' for name in imports_of(ast.parse(path.read_text())))}
  assert found == {'headless'}


def test_lm_eval():
  """lm-evaluation-harness is an extra, and slow to load: few modules import it."""
  found = {path.stem for path in modules() if any(
      name.split('.')[0] == 'lm_eval' for name in imports_of(ast.parse(path.read_text())))}
  assert found == {'harness', 'harness_speed', 'task_data'}
  loaded = {path.stem for path in modules() if any(
      name.split('.')[0] == 'lm_eval' for name in imports_when_loaded(path))}
  assert loaded == {'harness'}


def test_training_without_tensorflow():
  """Training loads neither TensorFlow nor seqio."""
  code = ('import sys\nfrom latent_deliberation.cli import quickstart\n'
          f'print(sorted(set(sys.modules) & set({HEAVY!r})))')
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env=finished.environment(), timeout=120)
  assert process.stdout == '[]\n', process.stderr
