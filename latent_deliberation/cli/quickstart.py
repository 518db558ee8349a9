"""The quickstart: data, decoder, coprocessor, constant soft tokens and report, in one command.

With `decoder_from`, the decoder exists already, and is not pretrained.
"""

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from latent_deliberation.build import open_frozen
from latent_deliberation.data.loading import (
  check_known_vocabulary,
  check_rows_vocabulary,
  prepare_data,
)
from latent_deliberation.data.text_sizes import (
  fit_to_rows,
  fit_to_text,
  read_choices,
  with_choices,
  write_choices,
)
from latent_deliberation.errors import problems_of, raise_problems
from latent_deliberation.evaluation.evaluate import constant_variant, evaluate, open_held_out
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.paths import CONSTANT, COPROCESSOR, PHASES_FILE, PRETRAINING, RUN_FILE
from latent_deliberation.progress import PhaseClock
from latent_deliberation.sharding import batch_shards, make_mesh
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.train import describe_training, train_coprocessor


def quickstart(experiment: Experiment, workdir: Path,
               given: Set[str] = frozenset()) -> dict[str, Any]:
  """Runs every phase in `workdir`. Phases that are complete are not run again.

  Args:
    experiment: the experiment. With a small text of the user's, some sizes follow from the text.
    workdir: work directory of all phases.
    given: dotted paths of the keys that the user gave, which do not follow from the text.

  Returns: the content of <workdir>/report.json.

  Raises:
    UserError: a phase cannot run with this experiment; raised before the first one begins.
  """
  runs = {'coprocessor': workdir / COPROCESSOR, 'constant soft tokens': workdir / CONSTANT}
  if not experiment.decoder_from:
    runs = {'decoder': workdir / PRETRAINING} | runs
  make_writable(workdir)
  mesh = make_mesh(experiment.mesh)

  clock = PhaseClock(workdir / PHASES_FILE)
  experiment = _prepare(experiment, workdir, given, mesh, runs, clock)
  if experiment.decoder_from:
    decoder_dir = Path(experiment.decoder_from)
  else:
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


def _prepare(experiment: Experiment, workdir: Path, given: Set[str], mesh: Mesh,
             runs: Mapping[str, Path], clock: PhaseClock) -> Experiment:
  """Prepares the data and checks all phases. Returns the experiment with sizes for its text."""
  chosen = read_choices(workdir, given)
  if chosen is None and any((run / RUN_FILE).exists() for run in runs.values()):
    chosen = {}  # trained before sizes followed from the text
  choices = fit_to_text(experiment, given) if chosen is None else chosen
  experiment = with_choices(experiment, choices)
  check_phases(experiment, mesh, runs)
  checkpoint = None
  if experiment.decoder_from:
    checkpoint = open_frozen(experiment.decoder, Path(experiment.decoder_from))
    check_known_vocabulary(experiment.data, workdir, checkpoint)
  with clock.phase('data'):
    prepare_data(experiment.data, experiment.decoder.vocab_size, workdir)
    if chosen is None:
      shards = batch_shards(mesh, experiment.rules)
      choices |= fit_to_rows(experiment, given, workdir, shards)
      experiment = with_choices(experiment, choices)
      check_phases(experiment, mesh, runs)
    # Fails now, not hours later, if there is too little held-out text for the report.
    held_out = open_held_out(experiment, workdir, mesh)
    if checkpoint:
      check_rows_vocabulary(held_out.rows, checkpoint)
  write_choices(workdir, 'quickstart', dataclasses.asdict(experiment), choices)
  return experiment


def check_phases(experiment: Experiment, mesh: Mesh, runs: Mapping[str, Path]) -> None:
  """Checks all phases before the first one begins.

  Args:
    experiment: the experiment of all phases.
    mesh: the mesh of all phases.
    runs: work directories of the runs by phase; without 'decoder', no decoder is pretrained.

  Raises:
    UserError: runs cannot start, or their directories belong to other runs; a line for each.
  """
  constant = constant_variant(experiment)
  phases = {'decoder': lambda: describe_pretraining(experiment, runs['decoder'], mesh),
            'coprocessor': lambda: describe_training(experiment, runs['coprocessor'], mesh),
            'constant soft tokens': lambda: describe_training(
                constant, runs['constant soft tokens'], mesh)}
  problems = [found for name in runs
              for found in problems_of(lambda phase=phases[name]: phase().check())]
  raise_problems(dict.fromkeys(problems))  # phases share some
