"""Progress of long work: lines with the time so far or the time left, and seconds of each phase."""

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.files import write_json

Item = TypeVar('Item')


def format_duration(seconds: float) -> str:
  """'42s', '3m12s', '2h05m' or '1d04h': the two largest units."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  if days:
    return f'{days}d{hour:02}h'
  if hours:
    return f'{hours}h{minute:02}m'
  if minutes:
    return f'{minutes}m{second:02}s'
  return f'{second}s'


@contextmanager
def announced(task: str, after: float = 2.0, every: float | None = 30.0) -> Iterator[None]:
  """Logs that a task is at work, and at its end how long it took.

  Args:
    task: the task, such as 'loading the decoder'.
    after: seconds until the first line; a shorter task logs nothing.
    every: seconds between further lines; None for a task that counts its parts by a Progress.
  """
  begun, ended = time.monotonic(), threading.Event()

  def tell() -> None:
    wait = after
    while not ended.wait(wait):
      logging.info('%s: at work for %s', task, format_duration(time.monotonic() - begun))
      wait = every

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    ended.set()
    teller.join()
  if (seconds := time.monotonic() - begun) >= after:
    logging.info('%s: took %s', task, format_duration(seconds))


class Progress:
  """Logs the progress of a piece of work and the time left, every ten seconds at most.

  Args:
    work: the work, a noun phrase.
    unit: the unit that is counted, a plural.
    total: number of units; None or infinite where it is not known.
    first: number of units that were finished before.
  """

  def __init__(self, work: str, unit: str, total: float | None, first: int = 0):
    self._work, self._unit, self._first = work, unit, first
    self._total = total if total and math.isfinite(total) else None
    self._start = self._last = time.monotonic()

  def update(self, done: int) -> None:
    """Notes that `done` units are finished."""
    now = time.monotonic()
    if now - self._last < 10.0:
      return
    self._last = now
    if self._total is not None and done > self._first:
      # At the mean speed so far.
      left = (now - self._start) * max(self._total - done, 0) / (done - self._first)
      logging.info('%s: %d of %d %s  ETA %s', self._work, done, self._total, self._unit,
                   format_duration(left))
    else:
      logging.info('%s: %d %s', self._work, done, self._unit)


def counted(batches: Sequence[Item], work: str) -> Iterator[Item]:
  """Yields the batches of a piece of work and logs its progress.

  The work on the first batch compiles, and is announced.

  Args:
    batches: the batches.
    work: the work, a noun phrase.
  """
  for first in batches[:1]:
    with announced(f'{work}: the first of {len(batches)} batches'):
      yield first
  # The time that compiling took must not count as speed.
  progress = Progress(work, 'batches', len(batches), first=1)
  for done, batch in enumerate(batches[1:], start=1):
    progress.update(done)
    yield batch


class PhaseClock:
  """Seconds of each phase, kept in a file and summed over the launches of a resumed run.

  The time of a phase that failed is left out, since the next launch may do its work again.
  """

  def __init__(self, path: Path):
    self._path = path
    try:
      kept = json.loads(path.read_bytes()) if path.exists() else {'seconds': {}, 'complete': []}
      self.seconds: dict[str, float] = dict(kept['seconds'])
      self._complete: list[str] = list(kept['complete'])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{path} is damaged ({error!r}): delete it, since it only has the seconds of '
                      'phases') from error

  @contextmanager
  def phase(self, name: str, further: bool = False) -> Iterator[None]:
    """Times a phase, also one that was stopped and saved.

    A resumed study passes again through phases that are complete. They are not timed again, unless
    they go `further`.
    """
    logging.info('=== %s', name)
    if further and name in self._complete:
      self._complete.remove(name)
      self._write()  # also true for the next launch, if this one is killed
    if name in self._complete:
      yield
      return
    begun = time.perf_counter()
    try:
      yield
    except (KeyboardInterrupt, SystemExit):  # stopped by a signal; what is complete is saved
      logging.info('=== %s: stopped after %s', name, format_duration(self._add(name, begun)))
      raise
    except BaseException:
      logging.info('=== %s: failed after %s', name, format_duration(time.perf_counter() - begun))
      raise
    self._complete.append(name)
    logging.info('=== %s: done in %s', name, format_duration(self._add(name, begun)))

  def _add(self, name: str, begun: float) -> float:
    """Adds the time since `begun` to a phase; returns the seconds of all its launches."""
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
    self._write()
    return self.seconds[name]

  def _write(self) -> None:
    if jax.process_index() == 0:  # processes share the file
      write_json(self._path, {'seconds': self.seconds, 'complete': self._complete})
