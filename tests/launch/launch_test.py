"""The launch scripts as users see them: help, results, and messages for bad input."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import finished
from tests.launch.bad_commands import BAD, Bad

SCRIPTS = ('quickstart', 'prepare', 'pretrain', 'train', 'evaluate', 'gate', 'compile',
           'benchmark_attention', 'benchmark_plan', 'config', 'experts')
# Scripts without --config, or with a config of their own.
WITHOUT_CONFIG = ('convert', 'augment', 'generate', 'benchmark_weights', 'benchmark_inference',
                  'benchmark_step', 'study', 'render_results', 'fault_campaign', 'serve',
                  'benchmark_retrieval', 'benchmark_serving', 'benchmark_experts',
                  'benchmark_lora', 'benchmark_tasks', 'benchmark_harness')
FLAGS = {
    'quickstart': 'workdir', 'prepare': 'workdir', 'pretrain': 'workdir', 'train': 'decoder',
    'evaluate': 'output', 'gate': 'output', 'compile': 'topology', 'convert': 'target',
    'augment': 'document', 'generate': 'prompt', 'study': 'arm', 'config': 'reference',
    'benchmark_weights': 'output', 'benchmark_inference': 'output', 'benchmark_step': 'output',
    'benchmark_attention': 'output', 'benchmark_plan': 'output', 'render_results': 'check',
    'fault_campaign': 'kills', 'serve': 'port', 'benchmark_retrieval': 'data',
    'benchmark_serving': 'clients', 'experts': 'text', 'benchmark_experts': 'output',
    'benchmark_lora': 'output', 'benchmark_tasks': 'tasks', 'benchmark_harness': 'data'}


def arguments_of(bad: Bad, files: Path) -> list[str]:
  run, _ = finished.quickstart()
  arguments = bad.arguments.format(run=run, new=files / 'new', files=files).split()
  if bad.alone:
    return [sys.executable, f'launch/{bad.script}.py', *arguments]
  return command(bad.script, *arguments)


def command(script: str, *arguments: str) -> list[str]:
  if script in WITHOUT_CONFIG:
    return [sys.executable, f'launch/{script}.py', *arguments]
  return finished.command(script, *arguments)


@pytest.fixture(scope='module')
def answers(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
  """Exit status and output of each script on --help, and of each bad command."""
  files = tmp_path_factory.mktemp('files')
  tiny = (finished.ROOT / 'configs/tiny.py').read_text()
  (files / 'typo.py').write_text(tiny.replace('num_latents=', 'num_latent='))
  (files / 'ahead.py').write_text(tiny.replace('num_ahead=4', 'num_ahead=64'))
  (files / 'gguf').mkdir()
  (files / 'gguf/cut.gguf').write_bytes(b'GGUF')
  (files / 'cut.json').write_bytes(b'{"model":')
  commands = {script: command(script, '--help') for script in SCRIPTS + WITHOUT_CONFIG}
  run, _ = finished.quickstart()
  shutil.copytree(run / 'coprocessor', files / 'moved')
  commands['a list'] = command('convert', f'--source={run}/pretraining/decoder', '--list')
  commands['a plan'] = command('compile', '--topology=cpu:2', f'--output={files}/plan.json',
                               '--config.decoder.num_layers=1')
  commands['values'] = [sys.executable, 'launch/config.py', '--config=configs/smollm2_135m.py',
                        f'--config.decoder_from={run}/pretraining/decoder']
  commands['rows'] = command('prepare', f'--workdir={files}/data')
  commands['a report'] = [sys.executable, 'launch/evaluate.py', f'--coprocessor={run}/coprocessor',
                          f'--constant={run}/constant', f'--output={files}/report']
  commands['a cache'] = command(
      'augment', f'--decoder={run}/pretraining/decoder', f'--coprocessor={run}/coprocessor',
      f'--document={finished.TEXTS}/0.txt', '--length=1024', f'--output={files}/cache')
  commands['a text'] = command(
      'generate', f'--decoder={run}/pretraining/decoder', f'--coprocessor={run}/coprocessor',
      f'--cache={files}/cache', '--length=1024', '--prompt=Document', '--max_tokens=3', '--json')
  commands |= {name: arguments_of(bad, files) for name, bad in BAD.items()}
  return dict(zip(commands, finished.launch_in_forks(list(commands.values())), strict=True))


def test_every_script_is_here():
  assert sorted(SCRIPTS + WITHOUT_CONFIG) == sorted(
      path.stem for path in (finished.ROOT / 'launch').glob('*.py')) == sorted(FLAGS)


@pytest.mark.parametrize('script', SCRIPTS + WITHOUT_CONFIG)
def test_help(answers, script):
  """--help shows a command, the own flags of the script, and what comes next."""
  status, printed, _ = answers[script]
  assert status == 0
  assert f'python launch/{script}.py' in printed
  for flag in ('config', FLAGS[script]) if script in (*SCRIPTS, 'study') else (FLAGS[script],):
    assert re.search(fr'^ +--(\[no\])?{flag}: ', printed, re.MULTILINE), printed
  assert re.search(r'\bNext\b', printed)
  # absl appends this to flags of several values, after a semicolon.
  assert not re.search(r'may be repeated|\.;\s+repeat this option', printed)


def test_required_flags(answers):
  """The help says which flags are required."""
  flags = re.split(r'^ +--(?=\w+: )', answers['train'][1], flags=re.MULTILINE)[1:]
  required = {flag.partition(':')[0] for flag in flags if 'Required.' in flag}
  assert 'workdir' in required and 'data' not in required


def test_convert_lists_tensors(answers):
  """Without --target, convert describes the decoder and lists its tensors."""
  status, printed, _ = answers['a list']
  assert status == 0
  assert 'decoder: native\narchitecture   tiny' in printed
  assert re.search(r'^embedder/table +float32 +\[\d+, \d+\]$', printed, re.MULTILINE), printed


def test_compile_on_virtual_devices(answers):
  """compile plans the step on virtual devices, and prints where the plan is."""
  status, printed, said = answers['a plan']
  assert status == 0, said
  path, = re.findall('^Plan: (.*)$', printed, re.MULTILINE)
  plan = json.loads(Path(path).read_text())
  assert (plan['topology'], plan['mesh']['data'], plan['mfu']) == ('cpu:2', 2, None)
  assert plan['hbm_bytes_per_chip'] > plan['memory']['frozen'] > 0


def test_prepare(answers):
  """prepare makes the rows of the quickstart."""
  status, printed, said = answers['rows']
  assert status == 0, said
  rows = Path(re.findall(r'--data=(\S+)', printed)[0]) / 'rows/train/manifest.json'
  assert rows.read_bytes() == (finished.quickstart()[0] / 'rows/train/manifest.json').read_bytes()


def test_evaluate(answers):
  """evaluate prints the table of the quickstart, in a report of its own."""
  status, printed, said = answers['a report']
  assert status == 0, said
  table = printed[printed.index('ahead  perplexity'):printed.index('Report: ')]
  assert table in finished.quickstart()[1]


def test_augment_and_continue(answers):
  """augment writes a cache with latents, and generate continues it."""
  status, printed, said = answers['a cache']
  assert status == 0 and 'tokens and' in printed, said
  status, printed, said = answers['a text']
  assert status == 0, said
  assert len(json.loads(printed)['tokens']) == 3, printed


def test_plan_for_cpu(answers):
  """A plan for virtual devices has memory of the computation, and no flags of TPU's compiler."""
  path, = re.findall('^Plan: (.*)$', answers['a plan'][1], re.MULTILINE)
  plan = json.loads(Path(path).read_text())
  assert plan['settings']['libtpu_init_args'] == ''
  assert plan['memory']['temporary'] > plan['memory']['trainable']


def test_values_of_a_decoder(answers):
  """The sizes are those of a decoder that was given, and not those of the config."""
  status, printed, said = answers['values']
  assert status == 0, said
  assert re.search(r'decoder.embed_dim +32\b', printed), printed


@pytest.mark.parametrize('script', SCRIPTS + WITHOUT_CONFIG)
def test_flags_are_used(script):
  """Every flag is read, and none is given as an argument that has the name of another one."""
  tree = ast.parse((finished.ROOT / f'launch/{script}.py').read_text())
  names = dict(flags_of(tree))
  read = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute)
          and node.attr in ('value', 'present') and isinstance(node.value, ast.Name)}
  assert names.keys() <= read
  for node in ast.walk(tree):
    match node:
      case ast.keyword(arg, ast.Attribute(ast.Name(variable), 'value')) if arg in names.values():
        assert names[variable] == arg


def flags_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """Yields the variables that hold flags, with the names of these."""
  for node in tree.body:
    match node:
      case ast.Assign([ast.Name(variable)],
                      ast.Call(ast.Attribute(attr='define_overwrite' | 'define_dtype' |
                                             'define_vocabulary' as function))):
        yield variable, function.removeprefix('define_')
      case ast.Assign([ast.Name(variable)], ast.Call(ast.Attribute(), [ast.Constant(name), *_])):
        yield variable, name


@pytest.mark.parametrize('name', BAD)
def test_bad_input(answers, name):
  """Bad input ends with a message, code 1 and no traceback, before long work."""
  status, printed, said = answers[name]
  assert re.search(BAD[name].message, printed + said, re.DOTALL | re.MULTILINE), printed + said
  assert 'Traceback' not in said
  assert status == 1
  assert 'the corpus has' not in said  # nothing long came before it


def test_quickstart_prints_table():
  """The quickstart prints its table once, the place of its report, and what comes next."""
  run, printed = finished.quickstart()
  assert printed.count('ahead  perplexity') == printed.count('Too few texts') == 1
  report, after = printed.splitlines()[-2:]
  assert report == f'Report: {run}/report.md'
  assert after.startswith(f'Next: python launch/generate.py --decoder={run}/pretraining/decoder ')
