"""The main job, end to end: text, decoder, coprocessor, controls, report."""

from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.data.loading import prepare_data
from latent_deliberation.evaluation.evaluate import constant_variant, evaluate, scored_batches
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.progress import PhaseClock
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.train import describe_training, train_coprocessor


def quickstart(experiment: Experiment, workdir: Path) -> dict[str, Any]:
  """Runs every phase in `workdir`; those that are complete are not run again.

  Returns: the content of <workdir>/report.json.
  """
  runs = {'decoder': workdir / 'pretraining', 'coprocessor': workdir / 'coprocessor',
          'constant soft tokens': workdir / 'constant'}
  make_writable(workdir)
  check_phases(experiment, *runs.values())
  clock = PhaseClock(workdir / 'phases.json')
  with clock.phase('data'):
    prepare_data(experiment, workdir)
    scored_batches(experiment, workdir)  # there must be enough of them, hours later
  with clock.phase('decoder'):
    decoder = pretrain(experiment, runs['decoder'], workdir)
  with clock.phase('coprocessor'):
    train_coprocessor(experiment, decoder, runs['coprocessor'], workdir)
  with clock.phase('constant soft tokens'):
    train_coprocessor(constant_variant(experiment), decoder, runs['constant soft tokens'], workdir)
  logging.info('=== evaluation')
  return evaluate(
      experiment, decoder=decoder, coprocessor=runs['coprocessor'],
      constant=runs['constant soft tokens'], data=workdir, output=workdir, seconds=clock.seconds,
      runs=runs)


def check_phases(experiment: Experiment, pretraining: Path, coprocessor: Path,
                 constant: Path) -> None:
  """Raises before the first phase what would stop a later one; takes the runs' directories."""
  mesh = make_mesh(experiment.mesh)
  describe_pretraining(experiment, pretraining, mesh).check()
  describe_training(experiment, coprocessor, mesh).check()
  describe_training(constant_variant(experiment), constant, mesh).check()
