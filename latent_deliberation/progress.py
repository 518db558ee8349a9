"""Progress lines of long work."""

import math
import time

from absl import logging


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
