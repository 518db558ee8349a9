"""Runs that are killed or stopped at random moments, and must end as if nothing had happened.

A case is one run. Its launches are ended until the last is left alone. Then every number that it
logged, and every file that it made, is compared with a run that nobody touched.
"""

import collections
import dataclasses
import hashlib
import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.benchmarks.fault_launches import Launch, Launcher
from latent_deliberation.distributed import START_SECONDS, WAITING
from latent_deliberation.paths import COPROCESSOR, DECODER, METRICS_FILE
from latent_deliberation.training.metrics import read_metrics

STEPS, SAVE_EVERY = 24, 3
MINUTE = 60.0  # in which the processes that are left must end
PATIENCE = 900.0  # seconds for a launch that is left alone, also on a busy machine
MOST_KILLS = 6  # of one run
# What a process says that ends since another was lost, or was stopped with it.
ENDED_BY_OTHERS = 'another (process|task)|timed out task|stopped by'
# Keys of metrics.jsonl that depend on the clock or on the machine.
_OF_CLOCK = re.compile(r'seconds|tokens_per_second|teraflops_per_device|mfu|memory_gib|time/.*')
# What a launch is at, by the last of these texts in its log.
_PHASES = {
    'pack': ('the corpus has', 'packed train'), 'prepare a run': ('parameters train',),
    'compile': ('the first step of a launch compiles',), 'train': ('  loss ',),
    'evaluate': ('validation/loss',), 'finish': ('goodput ',)}


@dataclasses.dataclass(frozen=True)
class Job:
  """A kind of launch.

  Attributes:
    name: name of the job, for tables.
    processes: number of processes that run together.
    script: launch script.
    flags: its flags, but for those of the work directory.
    results: files whose bytes must be equal, as patterns inside of the work directory.
    is_training: whether it is one training and nothing else.
  """
  name: str
  processes: int
  script: str
  flags: Sequence[str]
  results: Sequence[str]
  is_training: bool = True


def jobs(place: Path) -> dict[str, Job]:
  """Returns all jobs by name. `place` has what `prepare_base` makes."""
  base = base_flags(place)
  given = [*base, f'--data={place / "data"}']

  def cadences(section: str) -> list[str]:
    loop = {'num_steps': STEPS, 'save_every': SAVE_EVERY, 'eval_every': 12, 'log_every': 1}
    return [f'--config.{section}.loop.{key}={value}' for key, value in loop.items()] + [
        f'--config.{section}.optimizer.skip_spikes=6']

  pretrain = [*given, *cadences('pretraining')]
  train = [*given, *cadences('training'), f'--decoder={place / "decoder" / DECODER}']
  found = [
      Job('pack', 1, 'launch/prepare.py', base,
          ('vocabulary.model', 'rows/*/manifest.json', 'rows/*/*.npy'), is_training=False),
      Job('pretrain', 1, 'launch/pretrain.py', pretrain, (f'{DECODER}/decoder.json',)),
      Job('train', 1, 'launch/train.py', train, (f'{COPROCESSOR}/*',)),
      Job('pretrain on two', 2, 'launch/pretrain.py', pretrain, (f'{DECODER}/decoder.json',)),
      Job('train on two', 2, 'launch/train.py', train, (f'{COPROCESSOR}/*',)),
      Job('quickstart', 1, 'launch/quickstart.py', base,
          (f'pretraining/{DECODER}/decoder.json', f'*/{COPROCESSOR}/*'), is_training=False)]
  return {job.name: job for job in found}


def base_flags(place: Path) -> list[str]:
  """Returns the flags of the smallest decoder, on the texts in `place`."""
  return ['--config=configs/tiny.py', '--config.data.source=text',
          f'--config.data.files={place / "texts"}', '--config.data.validation_percent=30',
          '--config.data.vocabulary=sentencepiece', '--config.data.vocabulary_size=320']


def prepare_base(launcher: Launcher, place: Path) -> None:
  """Makes texts, data and a decoder, which the jobs share; does nothing where they are there."""
  if (place / 'decoder' / DECODER).is_dir():
    return
  random = np.random.default_rng(0)
  words = ['the', 'run', 'ends', 'as', 'if', 'nothing', 'had', 'happened', 'here', 'and', 'there']
  for number in range(40):
    path = place / 'texts' / f'{number}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{number}: ' + ' '.join(random.choice(words, 150)) + '.\n')
  base = base_flags(place)
  for script, flags in (('prepare', [f'--workdir={place / "data"}']), (
      'pretrain', [f'--data={place / "data"}', f'--workdir={place / "decoder"}'])):
    launch = launcher.start([f'launch/{script}.py', *base, *flags], place / f'{script}.log')
    if launch.wait(PATIENCE) != 0:
      raise RuntimeError(f'launch/{script}.py failed:\n{launch.said()[-4000:]}')


def start(launcher: Launcher, job: Job, workdir: Path, logs: Path, **options: Any) -> list[Launch]:
  """Starts a launch of a job, with one process or several."""
  arguments = [job.script, *job.flags, f'--workdir={workdir}']
  if job.processes == 1:
    return [launcher.start(arguments, logs / '0.log', **options)]
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{found.getsockname()[1]}'
  return [launcher.start(
      [*arguments, f'--coordinator_address={address}', f'--process_count={job.processes}',
       f'--process_id={index}'], logs / f'{index}.log', variables={'JAX_NUM_CPU_DEVICES': '2'},
      **options) for index in range(job.processes)]


def reference(launcher: Launcher, job: Job, place: Path) -> dict[str, Any]:
  """Returns the digest of an undisturbed run, and the seconds that its parts took."""
  kept = place / 'undisturbed' / f'{job.name}.json'
  if not kept.is_file():
    workdir = kept.with_suffix('')
    seconds = {}
    # The first launch compiles for all that follow. The second tells how long they take.
    for count in ('first', 'second'):
      shutil.rmtree(workdir, ignore_errors=True)
      begun = time.monotonic()
      launches = start(launcher, job, workdir, place / 'logs' / job.name)
      launches[0].wait_for('compiles', PATIENCE)
      seconds['until steps'] = time.monotonic() - begun
      for launch in launches:
        if launch.wait(PATIENCE) != 0:
          raise RuntimeError(f'{job.name}, {count} launch: {launch.said()[-4000:]}')
      seconds['all'] = time.monotonic() - begun
    kept.write_text(json.dumps({'digest': digest(job, workdir), 'seconds': seconds}))
  return json.loads(kept.read_bytes())


def digest(job: Job, workdir: Path) -> dict[str, str]:
  """Returns what a run made: a hash of each result, and of every number that it logged."""
  found = {}
  for pattern in job.results:
    for path in sorted(workdir.glob(pattern)):
      found[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
  for path in sorted(workdir.rglob(METRICS_FILE)):
    rows = [{key: value for key, value in row.items() if not _OF_CLOCK.fullmatch(key)}
            for row in read_metrics(path)]
    found[str(path.relative_to(workdir))] = hashlib.sha256(
        json.dumps(rows, sort_keys=True).encode()).hexdigest()
  return found


def run_case(launcher: Launcher, job: Job, place: Path, seed: Sequence[int],
             number: int = signal.SIGKILL, kills: int | None = None) -> dict[str, Any]:
  """Runs one case: launches that are ended at random moments, and one that is not.

  Args:
    launcher: starts the launches.
    job: the job.
    place: directory of the campaign.
    seed: seed of the moments.
    number: signal that ends a launch.
    kills: number of launches to end; default is a random number up to MOST_KILLS.

  Returns: 'kills', the number of launches that were ended, 'phases', what they were at, and
    'faults', messages of what went wrong; none if all is well.
  """
  random = np.random.default_rng(seed)
  kills = int(random.integers(1, MOST_KILLS + 1)) if kills is None else kills
  undisturbed = reference(launcher, job, place)
  workdir = place / 'cases' / '-'.join(map(str, seed))
  shutil.rmtree(workdir, ignore_errors=True)
  phases, faults = collections.Counter(), []
  for kill in range(kills):
    whole = newest_checkpoint(workdir)
    launches = start(launcher, job, workdir, workdir.with_suffix('.logs'))
    from_first = (kill + random.random()) / kills if (
        random.random() < 0.5 or not job.is_training) else None
    ended, phase = _end_somewhere(launches, random, undisturbed['seconds'], number, from_first)
    faults += judge(launches, ended, number)
    if newest_checkpoint(workdir) < whole:
      faults.append(f'the checkpoint of step {whole} is lost')
    if ended is None:  # it was done before its moment came
      break
    phases[phase] += 1
  return {'job': job.name, 'kills': sum(phases.values()), 'phases': dict(phases),
          'faults': finish(launcher, job, place, workdir, faults)}


def finish(launcher: Launcher, job: Job, place: Path, workdir: Path,
           faults: Sequence[str]) -> list[str]:
  """Runs a job to its end, compares the result, and removes the work directory if all is well.

  Returns: the faults so far, and what went wrong here.
  """
  undisturbed, found = reference(launcher, job, place)['digest'], []
  for launch in start(launcher, job, workdir, workdir.with_suffix('.logs') / 'last'):
    if launch.wait(PATIENCE) != 0:
      found.append(f'the last launch ended with {launch.code}: {launch.said()[-2000:]}')
      launch.kill()
  if not found and (made := digest(job, workdir)) != undisturbed:
    changed = [name for name in {**made, **undisturbed} if made.get(name) != undisturbed.get(name)]
    found.append(f'the result differs in {changed}')
  if not faults and not found:
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.rmtree(workdir.with_suffix('.logs'), ignore_errors=True)
  return [*faults, *found]


def _end_somewhere(launches: Sequence[Launch], random: np.random.Generator,
                   seconds: Mapping[str, float], number: int,
                   from_first: float | None) -> tuple[Launch | None, str]:
  """Ends one process of a launch, unless it was done before its moment.

  Args:
    launches: the processes.
    random: source of the choice and the moment.
    seconds: seconds of an undisturbed launch.
    number: signal to send.
    from_first: part of the launch before the moment; None for a random moment after the first step
      began, where a run trains, saves and evaluates.

  Returns: the process, or None, and what it was at when the signal was sent.
  """
  chosen = launches[int(random.integers(len(launches)))]
  if from_first is not None:
    chosen.wait(seconds['all'] * from_first)
  else:
    launches[0].wait_for('compiles', PATIENCE)
    chosen.wait((seconds['all'] - seconds['until steps']) * random.random())
  if chosen.poll() is not None:
    return None, ''
  phase = phase_of(chosen.said())  # before the signal, which a run answers with lines of its own
  chosen.kill(number)
  return chosen, phase


def judge(launches: Sequence[Launch], ended: Launch | None, number: int) -> list[str]:
  """Returns what went wrong when a process was ended.

  Args:
    launches: the processes to wait for.
    ended: the process that was ended, which may be one of them; None if none was.
    number: signal that was sent.
  """
  faults, end = [], time.monotonic() + MINUTE
  for launch in launches:
    code = launch.wait(end - time.monotonic())
    if code is None and WAITING in ''.join(launch.said().splitlines()[-1:]):
      code = launch.wait(START_SECONDS)  # the other was ended before it came: as a late host
    said = launch.said()
    if code is None:
      faults.append(f'a process still ran a minute after the other was ended: {said[-2000:]}')
      launch.kill()
    elif launch is ended:
      # A run may have ended just before the signal came, or answered it with its own code.
      if code not in (-number, 128 + number, 0):
        faults.append(f'ended with code {code} by signal {number}: {said[-2000:]}')
    elif ended is None and code != 0:
      faults.append(f'ended with code {code} on its own: {said[-2000:]}')
    elif code != 0 and not re.search(ENDED_BY_OTHERS, said[-8000:]):
      faults.append(f'ended with code {code} and without a message: {said[-2000:]}')
  return faults


def phase_of(said: str) -> str:
  """Returns what a launch was at, by its log."""
  at, phase = -1, 'start'
  for name, texts in _PHASES.items():
    found = max(said.rfind(text) for text in texts)
    if found > at:
      at, phase = found, name
  return phase


def newest_checkpoint(workdir: Path) -> int:
  """Returns the step of the newest whole checkpoint; 0 without one."""
  return max((int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdecimal()),
             default=0)
