"""The quickstart: data, decoder, coprocessor, constant soft tokens and report, in one command."""

from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from latent_deliberation.data.loading import prepare_data
from latent_deliberation.evaluation.evaluate import constant_variant, evaluate, open_held_out
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.paths import CONSTANT, COPROCESSOR, PHASES_FILE, PRETRAINING
from latent_deliberation.progress import PhaseClock
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.train import describe_training, train_coprocessor


def quickstart(experiment: Experiment, workdir: Path) -> dict[str, Any]:
  """Runs every phase in `workdir`. Phases that are complete are not run again.

  Returns: the content of <workdir>/report.json.

  Raises:
    UserError: a phase cannot run with this experiment; raised before the first one begins.
  """
  runs = {'decoder': workdir / PRETRAINING, 'coprocessor': workdir / COPROCESSOR,
          'constant soft tokens': workdir / CONSTANT}
  make_writable(workdir)
  mesh = make_mesh(experiment.mesh)
  check_phases(experiment, mesh, *runs.values())

  clock = PhaseClock(workdir / PHASES_FILE)
  with clock.phase('data'):
    prepare_data(experiment.data, experiment.decoder.vocab_size, workdir)
    # Fails now, not hours later, if there is too little held-out text for the report.
    open_held_out(experiment, workdir, mesh)
  with clock.phase('decoder'):
    decoder_dir = pretrain(experiment, runs['decoder'], workdir)
  with clock.phase('coprocessor'):
    train_coprocessor(experiment, decoder_dir, runs['coprocessor'], workdir)
  with clock.phase('constant soft tokens'):
    train_coprocessor(constant_variant(experiment), decoder_dir, runs['constant soft tokens'],
                      workdir)
  logging.info('=== evaluation')
  return evaluate(
      experiment, decoder_dir=decoder_dir, coprocessor_dir=runs['coprocessor'],
      constant_dir=runs['constant soft tokens'], prepared_dir=workdir, output=workdir,
      seconds=clock.seconds, runs=runs)


def check_phases(experiment: Experiment, mesh: Mesh, pretraining: Path, coprocessor: Path,
                 constant: Path) -> None:
  """Checks all phases before the first one begins.

  Args:
    experiment: the experiment of all phases.
    mesh: the mesh of all phases.
    pretraining, coprocessor, constant: work directories of the three runs.

  Raises:
    UserError: one of the runs cannot start, or its directory belongs to another run.
  """
  describe_pretraining(experiment, pretraining, mesh).check()
  describe_training(experiment, coprocessor, mesh).check()
  describe_training(constant_variant(experiment), constant, mesh).check()
