"""Bad luck that is neither a kill nor a damaged file: disks, clocks, second launches, lost hosts.

Each scenario ends launches in one way, or hinders them, and then lets one run to its end. It must
give what an undisturbed run gives. A scenario returns a dict with 'faults', messages of what went
wrong.
"""

import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.benchmarks.fault_kills import (
  MINUTE,
  PATIENCE,
  finish,
  jobs,
  judge,
  reference,
  run_case,
  start,
)
from latent_deliberation.benchmarks.fault_launches import Launch, Launcher

_YEAR = 365.25 * 24 * 3600
_SMALLEST_DISK, _LARGEST_DISK = 512, 1 << 20  # bytes of a file at which the disk is full


def stopped(launcher: Launcher, place: Path, seed: Sequence[int]) -> dict[str, Any]:
  """SIGTERM, at one moment after the other of a quickstart, which has all phases."""
  return run_case(launcher, jobs(place)['quickstart'], place, seed, signal.SIGTERM, kills=6)


def full_disk(launcher: Launcher, place: Path, seed: Sequence[int]) -> dict[str, Any]:
  """A quickstart on a disk that is full at some size of a file, and then on one that is not.

  The size is drawn on a logarithmic scale, so that each kind of file is the first not to fit.
  """
  random = np.random.default_rng(seed)
  job, workdir = jobs(place)['quickstart'], _workdir(place, seed)
  size = int(np.exp(random.uniform(np.log(_SMALLEST_DISK), np.log(_LARGEST_DISK))))
  limited, = start(launcher, job, workdir, workdir.with_suffix('.logs'), file_bytes=size)
  faults = []
  if limited.wait(PATIENCE) is None:
    faults.append(f'still ran after {PATIENCE:.0f} s: {limited.said()[-2000:]}')
    limited.kill()
  elif limited.code == 1 and not re.search('^Error: ', limited.said()[-4000:], re.MULTILINE):
    faults.append(f'no message for people: {limited.said()[-2000:]}')
  elif limited.code not in (0, 1):
    faults.append(f'ended with code {limited.code}: {limited.said()[-2000:]}')
  return {'size': size, 'refused': limited.code == 1,
          'faults': finish(launcher, job, place, workdir, faults)}


def clock_jumps(launcher: Launcher, place: Path, seed: Sequence[int]) -> dict[str, Any]:
  """A run whose clock on the wall jumps by up to ten years, forth and back, all the time.

  It may give up a save, since orbax waits by that clock, and then ends with a message. Once the
  clock stands, the same command must end as if nothing had happened.
  """
  random = np.random.default_rng(seed)
  job, workdir = jobs(place)['train'], _workdir(place, seed)
  jumps = random.uniform(-10 * _YEAR, 10 * _YEAR, 32).tolist()
  jumping, = start(launcher, job, workdir, workdir.with_suffix('.logs'), clock=jumps)
  faults = []
  if jumping.wait(PATIENCE) is None:
    faults.append(f'still ran after {PATIENCE:.0f} s: {jumping.said()[-2000:]}')
    jumping.kill()
  elif jumping.code and not re.search('^Error: ', jumping.said()[-4000:], re.MULTILINE):
    faults.append(f'no message for people: {jumping.said()[-2000:]}')
  return {'ended': jumping.code != 0, 'faults': finish(launcher, job, place, workdir, faults)}


def two_runs(launcher: Launcher, place: Path, seed: Sequence[int]) -> dict[str, Any]:
  """Two launches in one directory: one is told of the other and ends, or finds it finished."""
  random = np.random.default_rng(seed)
  job, workdir = jobs(place)['train'], _workdir(place, seed)
  logs = workdir.with_suffix('.logs')
  first, = start(launcher, job, workdir, logs / 'first')
  first.wait(reference(launcher, job, place)['seconds']['all'] * random.random() * 0.8)
  second, = start(launcher, job, workdir, logs / 'second')
  faults, codes = [], [launch.wait(PATIENCE) for launch in (first, second)]
  if sorted(map(str, codes)) not in (['0', '1'], ['0', '0']):
    faults.append(f'ended with {codes}: {first.said()[-1500:]} {second.said()[-1500:]}')
  for launch in (first, second):
    if launch.code == 1 and 'works in' not in launch.said():
      faults.append(f'does not name the other launch: {launch.said()[-2000:]}')
  return {'told': 1 in codes, 'faults': finish(launcher, job, place, workdir, faults)}


def lost_host(launcher: Launcher, place: Path, seed: Sequence[int]) -> dict[str, Any]:
  """One of two hosts dies or hangs, and the other ends with a message within a minute."""
  random = np.random.default_rng(seed)
  job, workdir = jobs(place)['train on two'], _workdir(place, seed)
  number = signal.SIGKILL if seed[-1] % 2 else signal.SIGSTOP
  launches = start(launcher, job, workdir, workdir.with_suffix('.logs'))
  launches[0].wait_for('compiles', PATIENCE)
  seconds = reference(launcher, job, place)['seconds']
  launches[0].wait((seconds['all'] - seconds['until steps']) * 0.5 * random.random())
  lost, left = launches if random.random() < 0.5 else launches[::-1]
  faults, took = _lose(lost, left, number)
  return {'signal': number.name, 'seconds': took,
          'faults': finish(launcher, job, place, workdir, faults)}


def _lose(lost: Launch, left: Launch, number: signal.Signals) -> tuple[list[str], float | None]:
  """Sends a signal to one of two processes, and waits for the other.

  Returns: what went wrong, and the seconds until the other ended; None if it had ended before.
  """
  if lost.poll() is not None or left.poll() is not None:
    for launch in (lost, left):
      launch.wait(MINUTE)
    return [], None
  lost.kill(number)
  begun = time.monotonic()
  faults = judge([left], lost, number)
  took = time.monotonic() - begun
  for launch in (lost, left):
    launch.kill(signal.SIGKILL)
    launch.wait(MINUTE)
  return faults, round(took, 1)


def _workdir(place: Path, seed: Sequence[int]) -> Path:
  workdir = place / 'cases' / '-'.join(map(str, seed))
  shutil.rmtree(workdir, ignore_errors=True)
  return workdir


SCENARIOS: Mapping[str, Callable[[Launcher, Path, Sequence[int]], dict[str, Any]]] = {
    'SIGTERM in every phase': stopped, 'full disk': full_disk, 'clock that jumps': clock_jumps,
    'two runs in one directory': two_runs, 'lost host': lost_host}
