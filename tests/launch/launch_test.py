"""The launch scripts as their users meet them: help, results, messages for what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import finished
from tests.launch.bad_commands import BAD, Bad

SCRIPTS = ('quickstart', 'prepare', 'pretrain', 'train', 'evaluate', 'gate', 'compile',
           'benchmark_attention', 'benchmark_plan')
WITHOUT_CONFIG = ('convert', 'augment', 'generate', 'benchmark_weights', 'benchmark_inference',
                  'benchmark_step')


def arguments_of(bad: Bad, files: Path) -> list[str]:
  run, _ = finished.quickstart()
  arguments = bad.arguments.format(run=run, new=files / 'new', files=files).split()
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
  commands = {script: command(script, '--help') for script in SCRIPTS + WITHOUT_CONFIG}
  run, _ = finished.quickstart()
  commands['a list'] = command('convert', f'--source={run}/pretraining/decoder', '--list')
  commands['a plan'] = command('compile', '--topology=cpu:2', f'--output={files}/plan.json',
                               '--config.decoder.num_layers=1')
  commands |= {name: arguments_of(bad, files) for name, bad in BAD.items()}
  process = subprocess.run(
      [sys.executable, str(Path(__file__).with_name('forks.py'))], cwd=finished.ROOT, text=True,
      input=json.dumps([command[1:] for command in commands.values()]), capture_output=True,
      timeout=300, env=finished.environment())
  assert process.returncode == 0, process.stderr
  return dict(zip(commands, json.loads(process.stdout), strict=True))


@pytest.mark.parametrize('script', SCRIPTS + WITHOUT_CONFIG)
def test_help_shows_a_command_its_flags_and_what_comes_next(answers, script):
  _, printed, _ = answers[script]
  own = {'quickstart': 'workdir', 'prepare': 'workdir', 'pretrain': 'workdir', 'train': 'decoder',
         'evaluate': 'output', 'gate': 'output', 'compile': 'topology', 'convert': 'target',
         'augment': 'document', 'generate': 'prompt', 'benchmark_weights': 'output',
         'benchmark_inference': 'output', 'benchmark_step': 'output',
         'benchmark_attention': 'output', 'benchmark_plan': 'output'}
  assert f'python launch/{script}.py' in printed
  for flag in (['config'] if script in SCRIPTS else []) + [own[script]]:
    assert re.search(fr'^ +--{flag}: ', printed, re.MULTILINE), printed
  assert re.search(r'\b[Nn]ext\b', printed)


def test_convert_says_what_is_there_and_lists_tensors_without_a_target(answers):
  status, printed, _ = answers['a list']
  assert status == 0
  assert 'decoder: native\narchitecture   tiny' in printed
  assert re.search(r'^embedder/table +float32 +\[\d+, \d+\]$', printed, re.MULTILINE), printed


def test_compile_plans_the_step_on_virtual_devices_and_says_where(answers):
  status, printed, said = answers['a plan']
  assert status == 0, said
  path, = re.findall('^Plan: (.*)$', printed, re.MULTILINE)
  plan = json.loads(Path(path).read_text())
  assert (plan['topology'], plan['mesh']['data'], plan['mfu']) == ('cpu:2', 2, None)
  assert plan['hbm_bytes_per_chip'] > plan['memory']['frozen'] > 0


def test_compile_gives_the_compiler_the_flags_of_the_recipes_unless_it_has_some(answers):
  path, = re.findall('^Plan: (.*)$', answers['a plan'][1], re.MULTILINE)
  plan = json.loads(Path(path).read_text())
  recipe = (finished.ROOT / 'launch/recipes/tpu.env').read_text()
  name = 'LIBTPU_INIT_ARGS'
  flags = finished.environment().get(name, re.search(f'^{name}=(.+)$', recipe, re.MULTILINE)[1])
  assert plan['settings'][name.lower()] == flags


@pytest.mark.parametrize('name', BAD)
def test_bad_input_ends_with_a_message_and_no_traceback(answers, name):
  status, printed, said = answers[name]
  assert re.search(BAD[name].message, printed + said, re.DOTALL), printed + said
  assert 'Traceback' not in said
  assert status == 1
  assert 'The corpus has' not in said  # nothing long came before it


def test_the_quickstart_prints_its_table_once_and_where_the_report_is():
  run, printed = finished.quickstart()
  assert printed.count('ahead  perplexity') == printed.count('Gain ') == 1
  assert printed.endswith(f'Report: {run}/report.md\n')
