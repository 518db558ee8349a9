"""Progress lines of long work."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import logging

from latent_deliberation.files import write_json
from latent_deliberation.training.metrics import format_duration


class Progress:
  """Logs how far a piece of work is and when it will end, every ten seconds at most.

  Args:
    work: what is being done, a noun phrase.
    unit: what is counted, a plural.
    total: how many units there are; None or infinite when nobody knows.
  """

  def __init__(self, work: str, unit: str, total: float | None):
    self._work, self._unit = work, unit
    self._total = total if total and math.isfinite(total) else None
    self._start = self._last = time.monotonic()

  def update(self, done: int) -> None:
    """Tells that `done` units are finished."""
    now = time.monotonic()
    if now - self._last < 10.0:
      return
    self._last = now
    if self._total is not None and done:
      left = (now - self._start) * max(self._total - done, 0) / done
      logging.info('%s: %d of %d %s, %.0f s left', self._work, done, self._total, self._unit, left)
    else:
      logging.info('%s: %d %s', self._work, done, self._unit)


class PhaseClock:
  """Seconds of each phase, summed over the launches that it took to complete it."""

  def __init__(self, path: Path):
    self._path = path
    kept = json.loads(path.read_text()) if path.exists() else {'seconds': {}, 'complete': []}
    self.seconds: dict[str, float] = kept['seconds']
    self._complete: list[str] = kept['complete']

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Times a phase and keeps what it took, also when it is stopped."""
    logging.info('=== %s', name)
    if name in self._complete:
      yield
      return
    begun = time.perf_counter()
    try:
      yield
      self._complete.append(name)
    finally:
      self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
      if jax.process_index() == 0:  # of several that share the file
        write_json(self._path, {'seconds': self.seconds, 'complete': self._complete})
      logging.info('=== %s: %s', name, format_duration(self.seconds[name]))
