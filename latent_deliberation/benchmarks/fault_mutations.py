"""Damaged files: each must be refused with a UserError, or read as if it were whole.

A case damages one file of a subject, reads the subject, and mends it again. A worker process runs
cases one after the other and notes each. `run_mutations` watches it: a worker that dies, hangs or
takes too much memory is a fault of its case, and the next worker goes on.
"""

import contextlib
import json
import logging as python_logging
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.benchmarks.fault_launches import Launch, Launcher
from latent_deliberation.benchmarks.fault_subjects import Subject, subjects
from latent_deliberation.errors import UserError

REFUSED, UNCHANGED = 'refused', 'read unchanged'  # all is well
CHANGED, CRASH = 'read changed', 'crash'
HANG, MEMORY, DIED = 'hang', 'too much memory', 'process died'
OUTCOMES = (REFUSED, UNCHANGED, CHANGED, CRASH, HANG, MEMORY, DIED)
MOST_SECONDS = 30.0  # of work in a case
MOST_WAIT = 900.0  # seconds until a worker says something, also on a machine that is busy
MOST_BYTES = 2 << 30  # that a case may add to the memory of the worker
_NOTE_BYTES = 1500  # of an error


def mutate(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
  """Returns a damaged content, which differs from the given one, and what was done to it."""
  while True:
    name = str(random.choice(list(_MUTATIONS)))
    changed = _MUTATIONS[name](bytearray(content), random)
    if bytes(changed) != content:
      return bytes(changed), name


def _place(content: bytearray, random: np.random.Generator) -> int:
  """Returns a place in a content: anywhere, or near its beginning, where headers are."""
  size = max(len(content), 1)
  return int(random.integers(size if random.random() < 0.5 else min(size, 512)))


def _flip(content: bytearray, random: np.random.Generator) -> bytearray:
  if content:
    content[_place(content, random)] ^= 1 << int(random.integers(8))
  return content


def _overwrite(content: bytearray, random: np.random.Generator) -> bytearray:
  start, size = _place(content, random), int(random.integers(1, 65))
  content[start:start + size] = random.bytes(len(content[start:start + size]))
  return content


def _zero(content: bytearray, random: np.random.Generator) -> bytearray:
  start, size = _place(content, random), int(random.integers(1, 4097))
  content[start:start + size] = bytes(len(content[start:start + size]))
  return content


def _truncate(content: bytearray, random: np.random.Generator) -> bytearray:
  return content[:_place(content, random)]


def _append(content: bytearray, random: np.random.Generator) -> bytearray:
  return content + random.bytes(int(random.integers(1, 65)))


def _delete(content: bytearray, random: np.random.Generator) -> bytearray:
  start = _place(content, random)
  del content[start:start + int(random.integers(1, 65))]
  return content


def _repeat(content: bytearray, random: np.random.Generator) -> bytearray:
  start, size = _place(content, random), int(random.integers(1, 257))
  return content[:start + size] + content[start:]


def _change_number(content: bytearray, random: np.random.Generator) -> bytearray:
  """Changes a number that is written in digits, in JSON for instance."""
  found = list(re.finditer(rb'-?\d+(\.\d+)?(e-?\d+)?', content))
  if found:
    number = found[int(random.integers(len(found)))]
    other = random.choice([b'0', b'-1', b'1', b'7', b'1e999', b'99999999999999999999', b'NaN',
                           b'null', b'"3"', b'2147483648', b'0.5'])
    content[number.start():number.end()] = other
  return content


def _change_length(content: bytearray, random: np.random.Generator) -> bytearray:
  """Writes a huge or a strange binary number, as a length in a header may be."""
  start = _place(content, random) // 4 * 4
  value = int(random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]))
  content[start:start + 8] = value.to_bytes(8, 'little')[:len(content[start:start + 8])]
  return content


_MUTATIONS = {
    'a bit flipped': _flip, 'bytes replaced': _overwrite, 'bytes zeroed': _zero,
    'cut off': _truncate, 'bytes added': _append, 'bytes removed': _delete,
    'bytes repeated': _repeat, 'another number': _change_number, 'another length': _change_length}
GONE, EMPTY, SWAPPED = 'file removed', 'file emptied', 'file of its neighbour'


def _damage(directory: Path, random: np.random.Generator) -> tuple[str, str]:
  """Damages one file below a directory. Returns its path inside, and what was done."""
  files = sorted(path for path in directory.rglob('*') if path.is_file())
  path = files[int(random.integers(len(files)))]
  name = str(path.relative_to(directory))
  kind = random.random()
  if kind < 0.05:
    path.unlink()
    return name, GONE
  if kind < 0.1:
    path.write_bytes(b'')
    return name, EMPTY
  others = [other for other in files if other != path and other.suffix == path.suffix]
  if kind < 0.15 and others:
    shutil.copyfile(others[int(random.integers(len(others)))], path)
    return name, SWAPPED
  content, done = mutate(path.read_bytes(), random)
  path.write_bytes(content)
  return name, done


def run_case(subject: Subject, whole: Path, expected: str,
             random: np.random.Generator) -> dict[str, Any]:
  """Damages a copy of a subject's files, and reads it.

  Args:
    subject: the subject.
    whole: directory of its files, which are left alone.
    expected: digest of what they hold.
    random: source of the damage.
  """
  with tempfile.TemporaryDirectory(dir=whole.parent) as place:
    damaged = Path(place) / 'files'
    shutil.copytree(whole, damaged)
    file, done = _damage(damaged, random)
    outcome, note = UNCHANGED, ''
    try:
      found = subject.read(damaged)
      if found != expected:
        outcome = CHANGED
    except UserError as error:
      outcome, note = REFUSED, str(error)
    except Exception as error:  # what the campaign looks for
      outcome, note = CRASH, f'{type(error).__name__}: {error}'
  return {'subject': subject.name, 'file': re.sub(r'[0-9a-f]{16,}', '...', file), 'damage': done,
          'outcome': outcome, 'note': note[:_NOTE_BYTES]}


def work(notes: str, seed: str, first: str, last: str) -> None:
  """Runs the cases from `first` up to `last` - 1, and notes each; the body of a worker."""
  python_logging.disable(python_logging.WARNING)
  found = subjects()
  with tempfile.TemporaryDirectory() as place, open(notes, 'a') as file:
    expected = []
    for number, subject in enumerate(found):
      directory = Path(place) / str(number) / 'whole'
      directory.mkdir(parents=True)
      subject.make(directory)
      expected.append(subject.read(directory))
      if subject.read(directory) != expected[-1]:
        raise ValueError(f'{subject.name} is not read twice the same')
    for case in range(int(first), int(last)):
      _note(file, {'case': case, 'begun': True})
      number = case % len(found)
      directory, begun = Path(place) / str(number) / 'whole', time.monotonic()
      result = run_case(found[number], directory, expected[number],
                        np.random.default_rng([int(seed), case]))
      _note(file, {'case': case, **result, 'seconds': round(time.monotonic() - begun, 3)})


def _note(file: Any, value: Any) -> None:
  file.write(json.dumps(value) + '\n')
  file.flush()


def run_mutations(launcher: Launcher, place: Path, seed: int, cases: Sequence[int],
                  worker: str = f'{__name__}:work') -> Iterator[dict[str, Any]]:
  """Yields the result of each case, in their order.

  Args:
    launcher: starts the workers.
    place: directory for notes and logs.
    seed: seed of the damage.
    cases: consecutive numbers of cases.
    worker: 'module:function' of a worker.
  """
  notes = place / 'mutations.jsonl'
  place.mkdir(parents=True, exist_ok=True)
  notes.write_bytes(b'')
  names = [subject.name for subject in subjects()]
  next_case, last = cases[0], cases[-1] + 1
  while next_case < last:
    launch = launcher.start([str(notes), str(seed), str(next_case), str(last)],
                            place / 'mutations.log', call=worker)
    at = None  # the case that the worker is at
    for note in _follow(launch, notes):
      if 'begun' in note:
        at = note['case']
      elif 'case' in note:
        at, next_case = None, note['case'] + 1
        yield note
      elif at is not None:
        next_case = at + 1
        yield {'case': at, 'subject': names[at % len(names)], 'file': '', 'damage': '',
               'outcome': note['ended'], 'note': launch.said()[-_NOTE_BYTES:], 'seconds': 0.0}
      elif next_case < last:
        raise RuntimeError(f'a worker of mutations ended between two cases ({note["ended"]}):\n'
                           f'{launch.said()[-4000:]}')


def _follow(launch: Launch, notes: Path) -> Iterator[dict[str, Any]]:
  """Yields what a worker notes from now on, and at last how it ended, as 'ended'.

  A worker that hangs or takes too much memory is killed.
  """
  position, ended = notes.stat().st_size, ''
  heard, memory, worked = time.monotonic(), 0, 0.0
  while not ended:
    # First whether it runs, then its notes, so that the last of them are not missed.
    ended = DIED if launch.poll() is not None else ''
    with notes.open('rb') as file:
      file.seek(position)
      whole = file.read().rpartition(b'\n')[0]
    if whole:
      position, heard = position + len(whole) + 1, time.monotonic()
      used, worked = _usage(launch.pid)
      memory = memory or used  # after the first case has begun
      yield from map(json.loads, whole.splitlines())
    used, work = _usage(launch.pid)
    # Work counts, since a busy machine may leave a worker without any for long.
    if not ended and (time.monotonic() - heard > MOST_WAIT
                      or memory and work > worked + MOST_SECONDS):
      ended = HANG
    elif not ended and memory and used > memory + MOST_BYTES:
      ended = MEMORY
    time.sleep(0.02)
  launch.kill(signal.SIGKILL)
  yield {'ended': ended}


def _usage(pid: int) -> tuple[int, float]:
  """Returns the bytes that a process holds now, and the seconds that it has worked; 0 if unknown.

  They are those of Linux; other systems give none.
  """
  with contextlib.suppress(OSError, IndexError):
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    ticks = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
    return (pages * os.sysconf('SC_PAGE_SIZE'),
            sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK'))
  return 0, 0.0
