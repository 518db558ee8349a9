"""README and guides: their commands, links and Python work as written."""

import ast
import functools
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind
from latent_deliberation.studies.study_config import Study
from tests import finished

README = finished.ROOT / 'README.md'
GUIDES = sorted((finished.ROOT / 'docs').glob('*.md'))
HISTORY = ('log.md',)  # its commands may be of earlier versions
MAX_LINES, MAX_PYTHON = 130, 10


def blocks(page: Path, language: str = '') -> list[str]:
  """Contents of the page's fenced blocks of a language, in order."""
  fenced = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
  return [content.strip() for kind, content in fenced if kind == language]


def prose(page: Path) -> str:
  return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
  """Words of each command of a launch script or recipe, from the script on."""
  text = '\n'.join(blocks(page) + blocks(page, 'bash')).replace('\\\n', ' ')
  lines = text.splitlines() + re.findall(r'`([^`\n]*launch/[^`\n]*)`', prose(page))
  found = []
  for line in lines:
    for command in line.split('&&'):
      start = re.search(r'launch/[\w/]+\.(py|sh)\b', command)
      if start:
        found.append(shlex.split(command[start.start():], comments=True))
  return found


def calls(path: Path) -> Iterator[tuple[str, str]]:
  """(function, first argument) of each call in a source file whose first argument is a string."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and node.args:
      name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      first = node.args[0]
      if name == 'define_config':
        yield name, 'config'
      elif isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield name, first.value


@functools.cache
def flags_of(script: Path) -> frozenset[str]:
  """Names of the flags that a launch script defines."""
  app = finished.ROOT / 'latent_deliberation/cli/app.py'
  return frozenset(argument for path in (script, app) for name, argument in calls(path)
                   if name.lower().startswith('define_'))


def saved_configs() -> dict[str, str]:
  """Config files that a guide tells its readers to save, by path."""
  found = (block for page in GUIDES for block in blocks(page, 'python'))
  return {block.split()[1]: block for block in found if block.startswith('# configs/')}


@functools.cache
def load_config(path: str, choice: str):
  """The config of a file; a directory that a reader is to give is the file's own default."""
  get_config = runpy.run_path(str(finished.ROOT / path))['get_config']
  try:
    return get_config(choice) if choice else get_config()
  except UserError:
    if not choice.startswith('gemma-'):
      raise
    return get_config()


def has_key(config, key: str) -> bool:
  for part in key.split('.'):
    if not hasattr(config, 'keys') or part not in config:
      return False
    config = config[part]
  return True


def faults(words: list[str]) -> Iterator[str]:
  """What a command names that does not exist."""
  script = finished.ROOT / words[0]
  if not script.exists():
    yield words[0]
  if not script.exists() or script.suffix != '.py':
    return
  given = dict(word[2:].partition('=')[::2] for word in words[1:] if word.startswith('--'))
  path, _, choice = given.get('config', 'configs/quickstart.py').partition(':')
  if not (finished.ROOT / path).exists() and path not in saved_configs():
    yield f'{words[0]} --config={path}'
    return
  for name in given:
    section, _, key = name.partition('.')
    if section not in flags_of(script):
      yield f'{words[0]} --{name}'
    elif key and path not in saved_configs() and not has_key(load_config(path, choice), key):
      yield f'{words[0]} --{name}'


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(finished.ROOT)


def test_readme_is_short():
  assert len(README.read_text().splitlines()) <= MAX_LINES


def test_first_command_is_the_quickstart():
  """README's first bash block installs and runs the main job."""
  first = blocks(README, 'bash')[0]
  assert first == 'pip install -r requirements.txt -e . && python launch/quickstart.py'
  assert (finished.ROOT / 'requirements.txt').exists()


def test_gate_runs_the_second_command():
  """The gate runs README's second bash block, and nothing else that installs or tests."""
  second = blocks(README, 'bash')[1]
  assert second == "pip install -r requirements.txt -e '.[test]' && pytest"
  gate = (finished.ROOT / '.ci/run').read_text().splitlines()
  assert gate[-1] == second
  assert not any('pip install' in line or 'pytest' in line for line in gate[:-1])


def test_every_library_is_pinned(monkeypatch):
  """requirements.txt has a version of every library that the README installs."""
  declared = {}
  monkeypatch.setitem(sys.modules, 'setuptools', types.SimpleNamespace(
      setup=declared.update, find_packages=lambda include: []))
  runpy.run_path('setup.py')
  lines = (finished.ROOT / 'requirements.txt').read_text().lower().splitlines()
  pinned = {re.split('[=<> @\\[]', line)[0].replace('_', '-') for line in lines if '==' in line}
  names = {re.split('[>=<\\[]', item)[0].lower().replace('_', '-')
           for item in [*declared['install_requires'], *declared['extras_require']['test']]}
  assert names and names <= pinned


def test_python_of_readme_runs(quickstart, capsys):
  """The ten lines load the quickstart's decoder and coprocessor, generate and score."""
  code, = blocks(README, 'python')
  assert len([line for line in code.splitlines() if line]) <= MAX_PYTHON
  assert 'runs/quickstart' in code
  exec(compile(code.replace('runs/quickstart', str(quickstart)), 'README.md', 'exec'), {})
  printed = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in printed] == ['False', 'True']


@pytest.mark.parametrize('page', ['experts.md', 'gemma.md', 'inference.md'])
def test_python_of_guides_runs(quickstart, page):
  """Blocks that are no config files run on a finished quickstart."""
  for code in blocks(finished.ROOT / 'docs' / page, 'python'):
    if not code.startswith('# configs/'):
      for path, ours in (('runs/quickstart', ''), ('runs/gemma', ''),
                         ('gemma3-270m', '/pretraining/decoder')):
        code = code.replace(path, f'{quickstart}{ours}')
      exec(compile(code, page, 'exec'), {'tokens': np.ones((1, 4), np.int32)})


@pytest.mark.usefixtures('one_device')
def test_training_from_python_runs(tmp_path, capsys):
  """The block of the quickstart's page, on a tiny config."""
  code, = blocks(finished.ROOT / 'docs/quickstart.md', 'python')
  config = tmp_path / 'tiny.py'
  config.write_text('from latent_deliberation.experiment import as_config\n'
                    'from tests import finished\n'
                    'get_config = lambda: as_config(finished.experiment())\n')
  for path, ours in (('configs/quickstart.py', config), ('runs/python', tmp_path / 'run')):
    assert path in code
    code = code.replace(path, str(ours))
  exec(compile(code, 'quickstart.md', 'exec'), {})
  assert capsys.readouterr().out


def test_index_of_guides():
  """It has every page, and every launch script with the first sentence of its docstring."""
  index = (finished.ROOT / 'docs/README.md').read_text()
  assert {page.name for page in GUIDES} - {'README.md'} <= set(re.findall(r'\]\((\S+)\)', index))
  expected = {}
  for script in (finished.ROOT / 'launch').glob('*.py'):
    docstring = ' '.join(ast.get_docstring(ast.parse(script.read_text())).split())
    expected[f'launch/{script.name}'] = re.match(r'.*?\.(?= |$)', docstring)[0]
  assert dict(re.findall(r'^\| `(launch/\w+\.py)` \| (.*) \|$', index, re.MULTILINE)) == expected


@pytest.mark.parametrize('path, kind', [
    ('configs/study/mine.py', Study),
    ('configs/study/existing.py', Study)])
def test_config_of_guide_builds(quickstart, tmp_path, path, kind):
  """A config file that a guide shows gives a checked experiment or study."""
  file = tmp_path / 'config.py'
  file.write_text(saved_configs()[path])
  choice = (f'{quickstart}/pretraining/decoder',) if kind is Experiment else ()
  bind(runpy.run_path(str(file))['get_config'](*choice), kind)


@pytest.mark.parametrize('page', [README, *GUIDES], ids=lambda page: page.name)
def test_commands_exist(page):
  """Scripts, configs, flags and config keys of every command exist."""
  found = [] if page.name in HISTORY else commands(page)
  assert [fault for words in found for fault in faults(words)] == []


def test_faults_are_found():
  """A script, a config, a flag and a key that do not exist are each named."""
  assert list(faults(['launch/nothing.py'])) == ['launch/nothing.py']
  assert list(faults(['launch/train.py', '--config=configs/no.py', '--decoder=d'])) == [
      'launch/train.py --config=configs/no.py']
  assert list(faults(['launch/train.py', '--decode=d', '--config.training.batchsize=4'])) == [
      'launch/train.py --decode', 'launch/train.py --config.training.batchsize']


def slugs(page: Path) -> set[str]:
  """Names by which headings of a page can be linked to."""
  headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


PAGES = [README, finished.ROOT / 'BUILD_NOTES.md', *sorted((finished.ROOT / 'docs').rglob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(finished.ROOT)))
def test_links_resolve(page):
  """Links to files and headings of this repository lead somewhere."""
  broken = []
  for target, heading in re.findall(r'\]\(([^)#\s]*)#?([^)\s]*)\)', prose(page)):
    file = (page.parent / target).resolve() if target else page
    if '://' not in target and (
        not file.exists() or heading and heading not in slugs(file)):
      broken.append(f'{target}#{heading}')
  assert broken == []
