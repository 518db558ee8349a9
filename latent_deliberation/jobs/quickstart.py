"""The main job, end to end: text, decoder, coprocessor, controls, report."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.files import write_whole
from latent_deliberation.jobs.evaluate import constant_variant, evaluate
from latent_deliberation.jobs.experiment import Experiment
from latent_deliberation.jobs.prepared import prepare_data
from latent_deliberation.jobs.pretrain import pretrain
from latent_deliberation.jobs.train import train_coprocessor
from latent_deliberation.training.metrics import format_duration


def quickstart(experiment: Experiment, workdir: Path) -> dict[str, Any]:
  """Runs every phase in `workdir`; those that are complete are not run again.

  Returns: the content of <workdir>/report.json.
  """
  clock = PhaseClock(workdir / 'seconds.json')
  with clock.phase('data'):
    prepare_data(experiment, workdir)
  with clock.phase('decoder'):
    decoder = pretrain(experiment, workdir / 'pretraining', workdir)
  with clock.phase('coprocessor'):
    train_coprocessor(experiment, decoder, workdir / 'coprocessor', workdir)
  with clock.phase('constant soft tokens'):
    train_coprocessor(constant_variant(experiment), decoder, workdir / 'constant', workdir)
  return evaluate(
      experiment, decoder=decoder, coprocessor=workdir / 'coprocessor',
      constant=workdir / 'constant', data=workdir, output=workdir, seconds=clock.seconds,
      runs={'decoder': workdir / 'pretraining', 'coprocessor': workdir / 'coprocessor',
            'constant soft tokens': workdir / 'constant'})


class PhaseClock:
  """Seconds of each phase, summed over the launches of a run that was interrupted."""

  def __init__(self, path: Path):
    self._path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Times a phase and keeps what it took, also when it is stopped."""
    logging.info('=== %s', name)
    begun = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
      write_whole(self._path, json.dumps(self.seconds, indent=2).encode())
      logging.info('=== %s: %s', name, format_duration(self.seconds[name]))
