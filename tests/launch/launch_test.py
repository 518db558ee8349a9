"""The launch scripts as their users meet them: help, messages for what is wrong, and signals."""

import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import finished

SCRIPTS = ('quickstart', 'pretrain', 'train', 'evaluate')


@dataclasses.dataclass(frozen=True)
class Bad:
  """A command that must end with a message, and with nothing else."""
  script: str
  arguments: tuple[str, ...]
  message: str


def config_file(name: str, content: str) -> str:
  path = Path(tempfile.gettempdir(), f'{name}_{os.getpid()}.py')
  path.write_text(content)
  return f'--config={path}'


@functools.cache
def bad_commands() -> dict[str, Bad]:
  run, _ = finished.quickstart()
  scratch = Path(tempfile.mkdtemp(dir=run.parent))
  (scratch / 'file').write_text('')
  decoder, data = f'--decoder={run}/pretraining/decoder', f'--data={run}'
  new = f'--workdir={scratch}/new'
  tiny = (finished.ROOT / 'configs/tiny.py').read_text()

  def written(name: str, old: str, new: str) -> str:
    assert old in tiny
    (scratch / name).write_text(tiny.replace(old, new))
    return f'--config={scratch / name}'

  return {
      'misspelt key': Bad(
          'pretrain', (new, '--config.training.batchsize=4'),
          r"ValueError: --config names what is not there: 'batchsize'\nDid you mean \"batch_size\""),
      'misspelt section': Bad(
          'quickstart', (new, '--config.trainin.batch_size=4'), "'trainin'\nDid you mean \"train"),
      'value of another type': Bad(
          'pretrain', (new, '--config.training.batch_size=four'),
          "--config.training.batch_size=four: invalid literal for int.*'four'"),
      'misspelt key in a file': Bad(
          'pretrain', (written('typo.py', 'num_latents=', 'num_latent='), new),
          "typo.py.*DeliberationConfig.* unexpected keyword argument 'num_latent'"),
      'impossible value in a file': Bad(
          'quickstart', (written('ahead.py', 'num_ahead=4', 'num_ahead=64'), new),
          'ahead.py.*num_ahead = 64 tokens do not fit behind an anchor in a trunk of 64 .*lower'),
      'impossible value': Bad(
          'quickstart', (new, '--config.deliberation.num_traces=63'),
          'num_traces = 63, but a trunk of 64 tokens has 62 places .*: lower num_traces'),
      'no config': Bad(
          'pretrain', ('--config=configs/nothing.py', new), 'No such file .*configs/nothing.py'),
      'no directory': Bad('pretrain', (), '--workdir must have a value'),
      'misspelt flag': Bad('train', ('--workdi=x',), "Unknown.*'workdi'. Did you mean: workdir"),
      'a file as directory': Bad(
          'pretrain', (f'--workdir={scratch}/file',), 'workdir=.*/file: it is a file, and must be'),
      'a URL as directory': Bad(
          'pretrain', ('--workdir=gs://bucket/run',), 'workdir=gs://bucket/run: it is a URL.*mount'),
      'an indivisible batch': Bad(
          'quickstart', (new, '--config.training.batch_size=9', '--config.training.accumulation=2'),
          'ValueError: training: batch_size = 9 does not divide into 2 micro.* a multiple of 2'),
      'a multiplier of nothing': Bad(
          'quickstart', (new, "--config.training.multipliers={'gat': 2.0}"),
          r"training: learning-rate multipliers name \['gat'\], but the trainable parameters are"),
      'no decoder': Bad(
          'train', (new, data, f'--decoder={scratch}'), 'holds no decoder.json: pass the decoder/'),
      'a decoder of other sizes': Bad(
          'train', (new, data, decoder, '--config.decoder.window=9'),
          'decoder.window: 8 there, 9 in the config\nChange the config'),
      'another config': Bad(
          'train', (f'--workdir={run}/coprocessor', data, decoder, '--config.seed=1'),
          'coprocessor belongs to another run:\n  config.seed: 0 there, 1 now\nUse another'),
      'another job': Bad(
          'pretrain', (f'--workdir={run}/coprocessor', data), "job: 'train' there, 'pretrain' now"),
      'evaluation of another config': Bad(
          'evaluate', (f'--coprocessor={run}/constant', data, decoder, f'--output={scratch}/out'),
          "trainable: 'constant' there, 'full' now"),
  }


NAMES = ('misspelt key', 'misspelt section', 'value of another type', 'misspelt key in a file',
         'impossible value in a file', 'impossible value', 'no config', 'no directory',
         'misspelt flag', 'a file as directory', 'a URL as directory', 'an indivisible batch',
         'a multiplier of nothing', 'no decoder', 'a decoder of other sizes', 'another config',
         'another job', 'evaluation of another config')


@pytest.fixture(scope='module')
def answers() -> dict[str, tuple[int, str, str]]:
  """What each script said to --help, and to each bad command."""
  commands = {script: finished.command(script, '--help')[1:] for script in SCRIPTS}
  commands |= {name: finished.command(bad.script, *bad.arguments)[1:]
               for name, bad in bad_commands().items()}
  process = subprocess.run(
      [sys.executable, str(Path(__file__).with_name('forks.py'))], cwd=finished.ROOT, text=True,
      input=json.dumps(list(commands.values())), capture_output=True, timeout=300,
      env=finished.environment())
  assert process.returncode == 0, process.stderr
  return dict(zip(commands, json.loads(process.stdout), strict=True))


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_a_command_the_flags_and_what_comes_next(answers, script):
  _, printed, _ = answers[script]
  assert f'python launch/{script}.py' in printed
  own = {'quickstart': 'workdir', 'pretrain': 'workdir', 'train': 'decoder', 'evaluate': 'output'}
  for flag in ('config', own[script]):
    assert re.search(fr'^ +--{flag}: ', printed, re.MULTILINE), printed
  assert re.search(r'\b(Next|next)\b', printed)


@pytest.mark.parametrize('name', NAMES)
def test_bad_input_ends_with_a_message_and_no_traceback(answers, name):
  status, printed, said = answers[name]
  assert re.search(bad_commands()[name].message, said, re.DOTALL), said
  assert 'Traceback' not in said
  assert (status, printed) == (1, '')
  assert 'Packed' not in said and 'The corpus has' not in said  # no work was done before it


def test_all_bad_commands_were_run():
  assert set(NAMES) == set(bad_commands())
