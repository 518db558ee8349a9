"""The quickstart: data, decoder, coprocessor, constant soft tokens and report, in one command.

With `decoder_from`, the decoder exists already, and is not pretrained.
"""

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from latent_deliberation.build import check_frozen_memory, open_frozen
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
from latent_deliberation.evaluation.evaluate import (
  check_reach,
  constant_variant,
  evaluate,
  open_held_out,
)
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path, make_writable
from latent_deliberation.paths import (
  CONSTANT,
  COPROCESSOR,
  PHASES_FILE,
  PRETRAINING,
  REPORT,
  RUN_FILE,
)
from latent_deliberation.progress import PhaseClock, format_duration
from latent_deliberation.sharding import batch_shards, make_mesh
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.run import Run, check_no_later_run
from latent_deliberation.training.run_identity import (
  WITHOUT_EFFECT,
  check_same_settings,
  hold_workdir,
)
from latent_deliberation.training.train import describe_training, train_coprocessor

# Phases that train, and the folders of their runs.
_DECODER, _COPROCESSOR, _CONSTANT = 'decoder', 'coprocessor', 'constant soft tokens'
_PLACES = {_DECODER: PRETRAINING, _COPROCESSOR: COPROCESSOR, _CONSTANT: CONSTANT}


def quickstart(experiment: Experiment, workdir: Path, given: Set[str] = frozenset(),
               overwrite: bool = False) -> dict[str, Any]:
  """Runs every phase in `workdir`. Phases that are complete are not run again.

  Args:
    experiment: the experiment. With a small text of the user's, some sizes follow from the text.
    workdir: work directory of all phases.
    given: dotted paths of the keys that the user gave, which do not follow from the text.
    overwrite: whether to overwrite a report of other settings.

  Returns: the content of <workdir>/report.json.

  Raises:
    UserError: a phase cannot run with this experiment, or the report would be overwritten; raised
      before the first phase begins.
  """
  make_writable(workdir)
  with hold_workdir(workdir):
    return _run_phases(experiment, workdir, given, overwrite)


def _run_phases(experiment: Experiment, workdir: Path, given: Set[str],
                overwrite: bool) -> dict[str, Any]:
  mesh, clock = make_mesh(experiment.mesh), PhaseClock(workdir / PHASES_FILE)
  report = workdir / f'{REPORT}.json'
  experiment, runs = prepare_phases(experiment, workdir, given, mesh, clock,
                                    None if overwrite else report)
  decoder_dir = train_phases(experiment, runs, workdir, clock)
  logging.info('=== evaluation')
  summary = evaluate(
      experiment, decoder_dir=decoder_dir, coprocessor_dir=runs[_COPROCESSOR].workdir,
      constant_dir=runs[_CONSTANT].workdir, prepared_dir=workdir, output=workdir,
      seconds=clock.seconds, runs={name: run.workdir for name, run in runs.items()},
      overwrite=True)
  logging.info('=== evaluation: done in %s', format_duration(summary['seconds']['evaluation']))
  return summary


def prepare_phases(experiment: Experiment, workdir: Path, given: Set[str], mesh: Mesh,
                   clock: PhaseClock, report: Path | None = None, job: str = 'quickstart',
                   ) -> tuple[Experiment, dict[str, Run]]:
  """Prepares the data and checks all phases, before the first one begins.

  Args:
    experiment, workdir, given: see `quickstart`.
    report: report that must be of the same settings if it is there; None for none.
    job: name of the job that `workdir` belongs to.

  Returns: the experiment with sizes for its text, and the runs by the names of their phases.
  """
  chosen = read_choices(workdir, job, experiment, given)
  if chosen is None and any((workdir / place / RUN_FILE).exists() for place in _PLACES.values()):
    chosen = {}  # trained before sizes followed from the text
  choices = fit_to_text(experiment, given) if chosen is None else chosen
  experiment = with_choices(experiment, choices)
  runs = check_phases(experiment, workdir, mesh)
  if report is not None and report.exists():
    check_same_settings(report, experiment, WITHOUT_EFFECT)
  checkpoint = None
  if experiment.decoder_from:
    checkpoint = open_frozen(experiment.decoder, as_path(experiment.decoder_from))
    check_frozen_memory(experiment, checkpoint, mesh)
    check_known_vocabulary(experiment.data, workdir, checkpoint)
  with clock.phase('data'):
    prepare_data(experiment.data, experiment.decoder.vocab_size, workdir)
    if chosen is None:
      shards = batch_shards(mesh, experiment.rules)
      choices |= fit_to_rows(experiment, given, workdir, shards)
      experiment = with_choices(experiment, choices)
      runs = check_phases(experiment, workdir, mesh)
    # Fails now, not hours later, if there is too little held-out text for the report.
    held_out = open_held_out(experiment, workdir, mesh)
    check_reach(experiment, held_out, 'the data')
    if checkpoint:
      check_rows_vocabulary(held_out.rows, checkpoint)
  write_choices(workdir, job, dataclasses.asdict(experiment), choices)
  return experiment, runs


def train_phases(experiment: Experiment, runs: Mapping[str, Run], workdir: Path,
                 clock: PhaseClock) -> Path:
  """Trains the decoder, if none exists, the coprocessor and the constant soft tokens.

  Args:
    experiment, runs: see `prepare_phases`.
    workdir: directory of prepared data.
    clock: takes the time of each phase.

  Returns: the directory of the decoder.
  """
  # Asked before the phases, which make their runs longer.
  further = {name: run.goes_further for name, run in runs.items()}
  if experiment.decoder_from:
    decoder_dir = as_path(experiment.decoder_from)
  else:
    with clock.phase(_DECODER, further[_DECODER]):
      decoder_dir = pretrain(experiment, runs[_DECODER].workdir, workdir)
  with clock.phase(_COPROCESSOR, further[_COPROCESSOR]):
    train_coprocessor(experiment, decoder_dir, runs[_COPROCESSOR].workdir, workdir)
  with clock.phase(_CONSTANT, further[_CONSTANT]):
    train_coprocessor(constant_variant(experiment), decoder_dir, runs[_CONSTANT].workdir, workdir)
  return decoder_dir


def check_phases(experiment: Experiment, workdir: Path, mesh: Mesh) -> dict[str, Run]:
  """Checks all runs before the first one begins; returns them by the names of their phases.

  Raises:
    UserError: runs cannot start, or their directories belong to other runs; a line for each.
  """
  describe = {
      _DECODER: lambda place: describe_pretraining(experiment, place, mesh),
      _COPROCESSOR: lambda place: describe_training(experiment, place, mesh),
      _CONSTANT: lambda place: describe_training(constant_variant(experiment), place, mesh)}
  if experiment.decoder_from:
    del describe[_DECODER]
  runs, problems = {}, []
  for name, make in describe.items():
    def check(name=name, make=make) -> None:
      runs[name] = make(workdir / _PLACES[name])
      runs[name].check()
    problems += problems_of(check)
  raise_problems(dict.fromkeys(problems))  # phases share some
  if _DECODER in runs:
    check_no_later_run(runs[_DECODER], (runs[_COPROCESSOR].workdir, runs[_CONSTANT].workdir))
  return runs
