"""The quickstart: data, decoder, coprocessor, constant soft tokens and report, in one command."""

from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from latent_deliberation.data.loading import prepare_data
from latent_deliberation.evaluation.evaluate import constant_variant, evaluate, open_held_out
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.paths import CONSTANT, COPROCESSOR, PHASES_FILE, PRETRAINING, REPORT
from latent_deliberation.progress import PhaseClock
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.run import (
  WITHOUT_EFFECT,
  Run,
  check_no_later_run,
  check_same_settings,
  hold_workdir,
)
from latent_deliberation.training.train import describe_training, train_coprocessor


def quickstart(experiment: Experiment, workdir: Path, overwrite: bool = False) -> dict[str, Any]:
  """Runs every phase in `workdir`. Phases that are complete are not run again.

  Args:
    experiment: the experiment of all phases.
    workdir: work directory of the quickstart.
    overwrite: whether to overwrite a report of other settings.

  Returns: the content of <workdir>/report.json.

  Raises:
    UserError: a phase cannot run with this experiment, or the report would be overwritten; raised
      before the first phase begins.
  """
  make_writable(workdir)
  with hold_workdir(workdir):
    return _run_phases(experiment, workdir, overwrite)


def _run_phases(experiment: Experiment, workdir: Path, overwrite: bool) -> dict[str, Any]:
  mesh, report = make_mesh(experiment.mesh), workdir / f'{REPORT}.json'
  runs = check_phases(experiment, workdir, mesh)
  if report.exists() and not overwrite:
    check_same_settings(report, experiment, WITHOUT_EFFECT)
  # Asked before the phases, which make their runs longer.
  further = {name: run.goes_further for name, run in runs.items()}
  decoder, coprocessor, constant = runs

  clock = PhaseClock(workdir / PHASES_FILE)
  with clock.phase('data'):
    prepare_data(experiment.data, experiment.decoder.vocab_size, workdir)
    # Fails now, not hours later, if there is too little held-out text for the report.
    open_held_out(experiment, workdir, mesh)
  with clock.phase(decoder, further[decoder]):
    decoder_dir = pretrain(experiment, runs[decoder].workdir, workdir)
  with clock.phase(coprocessor, further[coprocessor]):
    train_coprocessor(experiment, decoder_dir, runs[coprocessor].workdir, workdir)
  with clock.phase(constant, further[constant]):
    train_coprocessor(constant_variant(experiment), decoder_dir, runs[constant].workdir, workdir)
  logging.info('=== evaluation')
  return evaluate(
      experiment, decoder_dir=decoder_dir, coprocessor_dir=runs[coprocessor].workdir,
      constant_dir=runs[constant].workdir, prepared_dir=workdir, output=workdir,
      seconds=clock.seconds, runs={name: run.workdir for name, run in runs.items()},
      overwrite=True)


def check_phases(experiment: Experiment, workdir: Path, mesh: Mesh) -> dict[str, Run]:
  """Checks all runs before the first one begins; returns them by the names of their phases.

  Raises:
    UserError: one of the runs cannot start, or its directory belongs to another run.
  """
  decoder = describe_pretraining(experiment, workdir / PRETRAINING, mesh)
  decoder.check()
  coprocessor = describe_training(experiment, workdir / COPROCESSOR, mesh)
  coprocessor.check()
  constant = describe_training(constant_variant(experiment), workdir / CONSTANT, mesh)
  constant.check()
  check_no_later_run(decoder, (coprocessor.workdir, constant.workdir))
  return {'decoder': decoder, 'coprocessor': coprocessor, 'constant soft tokens': constant}
