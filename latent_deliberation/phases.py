"""How long each phase of a job took, also where it took several launches."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import logging

from latent_deliberation.files import write_json
from latent_deliberation.training.metrics import format_duration


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
