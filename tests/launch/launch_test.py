"""The launch scripts as their users meet them: help, messages for what is wrong, and bad luck."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from latent_deliberation.jobs.pretrain import pretrain
from latent_deliberation.training.metrics import FILE_NAME, read_metrics
from tests import finished

SCRIPTS = ('quickstart', 'prepare', 'pretrain', 'train', 'evaluate', 'gate', 'compile',
           'benchmark_attention', 'benchmark_plan')
WITHOUT_CONFIG = ('convert', 'augment', 'generate', 'benchmark_weights', 'benchmark_inference',
                  'benchmark_step')


@dataclasses.dataclass(frozen=True)
class Bad:
  """A command that must end with a message. {run} is a finished quickstart, {new} is empty."""
  script: str
  arguments: str
  message: str


BAD = {
    'misspelt key': Bad(
        'pretrain', '--workdir={new} --config.training.batchsize=4',
        r"ValueError: --config names what is not there: 'batchsize'\nDid you mean \"batch_size\""),
    'misspelt section': Bad(
        'quickstart', '--workdir={new} --config.trainin.batch_size=4',
        "'trainin'\nDid you mean \"training\""),
    'value of another type': Bad(
        'pretrain', '--workdir={new} --config.training.batch_size=four',
        "--config.training.batch_size=four: invalid literal for int.*'four'"),
    'misspelt key in a file': Bad(
        'pretrain', '--workdir={new} --config={files}/typo.py',
        "typo.py.*DeliberationConfig.* unexpected keyword argument 'num_latent'"),
    'impossible value in a file': Bad(
        'quickstart', '--workdir={new} --config={files}/ahead.py',
        'ahead.py.*num_ahead = 64 tokens do not fit behind an anchor in a trunk of 64 .*lower'),
    'impossible value': Bad(
        'quickstart', '--workdir={new} --config.deliberation.num_traces=63',
        'num_traces = 63, but a trunk of 64 tokens has 62 places .*: lower num_traces'),
    'no config': Bad(
        'pretrain', '--workdir={new} --config=configs/nothing.py',
        'No such file .*configs/nothing.py'),
    'no directory': Bad('pretrain', '', '--workdir must have a value'),
    'misspelt flag': Bad(
        'train', '--workdi={new}', "Unknown.*'workdi'. Did you mean: workdir"),
    'no flag': Bad('train', '--workdir={new} --decoder={run} more', r"\['more'\] are not flags"),
    'a file as directory': Bad(
        'pretrain', '--workdir={files}/typo.py',
        'workdir=.*/typo.py: it is a file, and must be a directory: give another'),
    'a URL as directory': Bad(
        'pretrain', '--workdir=gs://bucket/run',
        'workdir=gs://bucket/run: it is a URL, and must be a path: mount'),
    'an indivisible batch': Bad(
        'quickstart', '--workdir={new} --config.training.accumulation=3',
        'ValueError: training: batch_size = 8 does not divide into 3 micro.* a multiple of 3'),
    'a multiplier of nothing': Bad(
        'quickstart', "--workdir={new} --config.training.multipliers={{'gat':2.0}}",
        r"training.multipliers names \['gat'\]: what learns there is among"),
    'no decoder': Bad(
        'train', '--workdir={new} --data={run} --decoder={files}',
        'holds no decoder: neither decoder.json'),
    'a decoder of other sizes': Bad(
        'train', '--workdir={new} --data={run} --decoder={run}/pretraining/decoder '
        '--config.decoder.window=9',
        'decoder.window: 8 there, 9 in the config\nChange the config'),
    'another config': Bad(
        'train', '--workdir={run}/coprocessor --data={run} --decoder={run}/pretraining/decoder '
        '--config.seed=1',
        'coprocessor belongs to another run:\n  config.seed: 0 there, 1 now\nUse another'),
    'another job': Bad(
        'pretrain', '--workdir={run}/coprocessor --data={run}',
        "job: 'train' there, 'pretrain' now"),
    'evaluation of another config': Bad(
        'evaluate', '--coprocessor={run}/constant --data={run} '
        '--decoder={run}/pretraining/decoder --output={new}',
        "trainable: 'constant' there, 'full' now"),
    'a target that exists': Bad(
        'convert', '--source={run}/pretraining/decoder --target={files}',
        'files[0-9]* exists already and is not written over'),
    'a source without a decoder': Bad(
        'convert', '--source={run}/rows', 'rows holds no decoder: neither decoder.json'),
    'an unknown format': Bad(
        'convert', '--source={run}/pretraining/decoder --target={new} --format=pickle',
        "pickle.* should be one of <native|huggingface>"),
    'a negative temperature': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --temperature=-1',
        'temperature = -1.0: it must be 0'),
    'a prompt longer than the cache': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=abcdef --length=9 --max_tokens=3',
        'text 0 has 7 tokens, 3 more are asked for, and the cache has room for 9: shorten it'),
    'a decoder as coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a '
        '--coprocessor={run}/pretraining/decoder', 'holds no trained coprocessor'),
    'a run as gate': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --gate={run}',
        'holds no gate.json: give the output of launch/gate.py'),
    'a document that is not there': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--document={new}.txt --output={new}.cache', 'no file .*new.txt: give one with the text'),
    'an unknown size': Bad(
        'benchmark_weights', '--preset=gemma9 --output={new}', 'gemma9.* should be one of .*gemma'),
    'an unknown topology': Bad(
        'compile', '--topology=v9:2x2 --output={files}/plan.json',
        'topology=v9:2x2: a topology is .*\n  v5e: 2x2, .*v5p: .*v6e: '),
    'a mesh of no devices': Bad(
        'compile', '--topology=cpu:2 --mesh=fsdp=3 --output={files}/plan.json',
        "'fsdp': 3, 'tensor': 1} has .* for 2 devices: the sizes must multiply"),
    'a misspelt mesh': Bad(
        'compile', '--topology=cpu:2 --mesh=fdsp=2 --output={files}/plan.json',
        "mesh=fdsp=2: 'fdsp=2' must be AXIS=SIZE"),
    'a rule for no axis of a mesh': Bad(
        'compile', '--topology=cpu:2 --rules=embed=rows --output={files}/plan.json',
        r"rule 'embed' -> \('rows',\): \['rows'\] are not mesh axes"),
    'a misspelt axis of a rule': Bad(
        'compile', '--topology=cpu:2 --rules=emebd=fsdp --output={files}/plan.json',
        r"rule 'emebd' -> \('fsdp',\): no tensor has .* did you mean 'embed'"),
    'heads that do not divide': Bad(
        'compile', '--topology=cpu:8 --mesh=tensor=4 --output={files}/plan.json',
        "its axis 'kv_heads' of 2 does not divide by the 4 shards .*change the mesh or the rule"),
    'an output in no directory': Bad(
        'benchmark_weights', '--preset=tiny --output={files}/typo.py/weights.json',
        'must be a file in a directory that exists'),
    'an output with the name of its picture': Bad(
        'benchmark_step', '--output={files}/step.png', 'step.png: .* and end in .json'),
    'no document': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--output={new}.cache', '--document must have a value'),
}


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


def test_an_unforeseen_error_keeps_its_traceback(tmp_path):
  script = tmp_path / 'launch/broken.py'
  script.parent.mkdir()
  script.write_text('from latent_deliberation.jobs import command_line\n'
                    "command_line.run(lambda: int('one'))\n")
  process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                           env=finished.environment(), timeout=60)
  assert process.returncode == 1
  assert 'Traceback' in process.stderr and "invalid literal for int" in process.stderr


def test_ctrl_c_ends_at_once_whatever_other_threads_do(tmp_path):
  script = tmp_path / 'launch/slow.py'
  script.parent.mkdir()
  script.write_text('import threading, time\n'
                    'from latent_deliberation.jobs import command_line\n'
                    'def job():\n'
                    '  threading.Thread(target=time.sleep, args=(600,)).start()\n'
                    '  raise KeyboardInterrupt\n'
                    'command_line.run(job)\n')
  process = subprocess.run([sys.executable, str(script)], cwd=finished.ROOT, text=True,
                           capture_output=True, timeout=60, env=finished.environment())
  assert process.returncode == 1
  assert 'Interrupted: the same command goes on' in process.stderr
  assert 'Traceback' not in process.stderr


def test_the_quickstart_prints_its_table_once_and_where_the_report_is():
  run, printed = finished.quickstart()
  assert printed.count('ahead  perplexity') == printed.count('Gain ') == 1
  assert printed.endswith(f'Report: {run}/report.md\n')


def begin(said: Path | None, *arguments: str,
          largest_file: str = 'unlimited') -> subprocess.Popen:
  """Starts pretraining that goes on for some seconds.

  Args:
    said: file for what it says, which a disk that is full would cut short; default is a pipe.
    largest_file: where the disk is full, in KiB.
  """
  run, _ = finished.quickstart()
  command = finished.command(
      'pretrain', f'--data={run}', '--config.pretraining.loop.num_steps=150',
      '--config.pretraining.loop.eval_every=150', '--config.pretraining.loop.save_every=15',
      *arguments)
  limited = ['bash', '-c', f'ulimit -f {largest_file}; exec "$@"', 'bash', *command]
  with contextlib.nullcontext(subprocess.PIPE) if said is None else said.open('wb') as errors:
    return subprocess.Popen(limited, cwd=finished.ROOT, env=finished.environment(),
                            stdout=subprocess.DEVNULL, stderr=errors)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, said: Path) -> None:
  """Returns once the condition holds; fails when the process ends before."""
  end = time.monotonic() + 120
  while not condition():
    assert process.poll() is None and time.monotonic() < end, said.read_text()
    time.sleep(0.02)


def newest(workdir: Path) -> int:
  """Step of the newest whole checkpoint, 0 without any."""
  steps = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return max(steps, default=0)


@pytest.mark.slow
def test_a_run_survives_a_kill_a_full_disk_and_a_sigterm_and_then_ends(tmp_path, monkeypatch):
  workdir, said = tmp_path / 'run', tmp_path / 'said'

  process = begin(said, f'--workdir={workdir}')
  wait_until(lambda: newest(workdir) >= 15, process, said)
  process.kill()
  assert process.wait(60) == -signal.SIGKILL
  killed_at = newest(workdir)

  process = begin(None, f'--workdir={workdir}', largest_file='49')
  complaint = process.communicate(timeout=120)[1].decode()
  assert process.returncode == 1
  assert re.search(rf'RuntimeError: the checkpoint of step {killed_at + 15} could not be written '
                   rf'.*\nOther checkpoints there: .*{killed_at}. Make it writable or ',
                   complaint, re.DOTALL), complaint
  assert newest(workdir) == killed_at

  process = begin(said, f'--workdir={workdir}')
  wait_until(lambda: newest(workdir) > killed_at, process, said)
  process.terminate()
  assert process.wait(60) == 0, said.read_text()
  assert f'at step {killed_at} of 150' in said.read_text()
  assert f'stopped by SIGTERM at step {newest(workdir)}/150. Saved in' in said.read_text()

  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  run, _ = finished.quickstart()
  pretrain(finished.experiment(pretraining__loop__num_steps=150), workdir, run)
  assert newest(workdir) == 150
  assert (workdir / 'decoder/decoder.json').exists()
  assert [row['step'] for row in read_metrics(workdir / FILE_NAME)] == list(range(1, 151))
