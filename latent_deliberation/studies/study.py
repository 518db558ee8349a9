"""Runs a study: one frozen decoder, several arms over several seeds, one report."""

import dataclasses
import functools
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.build import (
  check_frozen_memory,
  count_parameters,
  load_frozen,
  open_frozen,
  with_decoder,
)
from latent_deliberation.data.loading import (
  check_known_vocabulary,
  check_rows_vocabulary,
  open_rows,
  prepare_data,
)
from latent_deliberation.data.rows import fingerprint_of
from latent_deliberation.data.text_sizes import (
  Choices,
  fit_to_rows,
  fit_to_text,
  read_choices,
  with_choices,
  write_choices,
)
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError, raise_problems
from latent_deliberation.evaluation.perplexity import CHAIN, CONTROLS, FROZEN, OWN
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path, copy_vocabulary, make_writable
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import (
  ARM_DATA,
  CHAIN_SCORES_FILE,
  DECODER,
  PHASES_FILE,
  RESULTS,
  RUN_FILE,
  SCORES_FILE,
  VOCABULARY_FILE,
  arm_directory,
  kept_vocabulary,
)
from latent_deliberation.progress import PhaseClock, Progress
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import batch_shards, make_mesh
from latent_deliberation.studies.arms import (
  ScoredRun,
  describe_arm,
  describe_chain,
  describe_frozen,
  read_diagnostics,
)
from latent_deliberation.studies.kept_scores import Scores, keep_scores, scores_identity
from latent_deliberation.studies.scoring import (
  QuestionScorer,
  TextScorer,
  draw_questions,
  open_scorer,
)
from latent_deliberation.studies.study_config import LATENT_ARM, Study
from latent_deliberation.studies.study_report import summarise_study, write_study
from latent_deliberation.studies.study_result import ChainOutcomes, StudyResult
from latent_deliberation.studies.tune import describe_tuning, tune_decoder
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.run import Run, check_no_later_run
from latent_deliberation.training.run_identity import (
  WITHOUT_EFFECT,
  check_same_settings,
  hold_workdir,
)
from latent_deliberation.training.train import describe_training, train_coprocessor


def run_study(study: Study, workdir: Path, only: Sequence[str] = (),
              given: Collection[str] = (), overwrite: bool = False) -> dict[str, Any]:
  """Trains and scores every arm with every seed. Complete runs are not trained again.

  Args:
    study: the study.
    workdir: work directory of the study.
    only: names of the arms to train and report; all arms if empty. The scores of an arm
      do not depend on this choice.
    given: dotted paths of the keys that the user gave. Of the others, some follow from a small
      text of the user's; see data/text_sizes.py.
    overwrite: whether to overwrite results of other settings or of more arms.

  Returns: the content of <workdir>/results.json; a page and plots are written to the same
    directory.

  Raises:
    UserError: the study has no such arm, or results would be overwritten; or see `check_arms`.
  """
  # Check everything that can be wrong before the first phase.
  names = choose_arms(study, only)
  mesh = make_mesh(study.experiment.mesh)
  make_writable(workdir)
  with hold_workdir(workdir):
    return _run_phases(study, names, workdir, given, mesh, overwrite)


def _run_phases(study: Study, names: Sequence[str], workdir: Path, given: Collection[str],
                mesh: Mesh, overwrite: bool) -> dict[str, Any]:

  # Data and decoder, which all arms share.
  clock = PhaseClock(workdir / PHASES_FILE)
  study, runs, arm_prepared_dir, scorer = _prepare(
      study, names, workdir, given, mesh, clock, overwrite)
  # Asked before the phases, which make their runs longer.
  further = {phase for phase, run in runs.items() if run.goes_further}
  with clock.phase('decoder', 'decoder' in further):
    frozen = _open_decoder(study.experiment, workdir, mesh)
  arms = {FROZEN: describe_frozen(
      study.experiment, _score_frozen(study.experiment, frozen, workdir, scorer), scorer,
      clock.seconds['decoder'])}
  if study.questions.chain_tokens:
    with clock.phase(CHAIN):
      outcomes = _score_chains(study, frozen, workdir, scorer)
    arms[CHAIN] = describe_chain(study.experiment.decoder, arms[FROZEN], scorer, outcomes,
                                 float(np.mean(outcomes.tokens)), clock.seconds[CHAIN])

  # Every arm with every seed.
  progress = Progress(study.name, 'runs', len(names) * len(study.seeds))
  for number, name in enumerate(names):
    runs, seconds = [], []
    for seed in study.seeds:
      with clock.phase(phase := _phase_of(name, seed), phase in further):
        runs.append(_run_arm(study, name, seed, frozen, workdir, arm_prepared_dir, scorer, mesh))
      seconds.append(clock.seconds[phase])
      progress.update(number * len(study.seeds) + len(runs))
    arms |= describe_arm(study, name, runs, scorer, tuple(seconds))

  # Figures, page and plots.
  summary = summarise_study(StudyResult(
      name=study.name, arms=arms, config=dataclasses.asdict(study), git_commit=git_commit(),
      command=shlex.join(['python', *sys.argv]), machine=_machine(),
      seconds=sum(clock.seconds.values()),
      difficulty=scorer.difficulty, positions=scorer.positions,
      diagnostics=_diagnostics(study, names, workdir)),
      study.experiment.evaluation.bootstrap_samples)
  if jax.process_index() == 0:
    write_study(summary, workdir)
  return summary


def _prepare(
    study: Study, names: Sequence[str], workdir: Path, given: Collection[str], mesh: Mesh,
    clock: PhaseClock, overwrite: bool,
) -> tuple[Study, dict[str, Run], Path, QuestionScorer | TextScorer]:
  """Checks all arms before the first phase, and prepares their data.

  Returns: the study with sizes for its text, the runs by the names of their phases, the directory
    of the arms' text, and the scorer.
  """
  keys = {key.removeprefix('experiment.') for key in given}

  def with_sizes(choices: Choices) -> Study:
    return dataclasses.replace(study, experiment=with_choices(study.experiment, choices))

  chosen = read_choices(workdir, 'study', study.experiment, keys)
  if chosen is None and any(workdir.glob(f'arms/*/*/{RUN_FILE}')):
    chosen = {}  # trained before sizes followed from the text
  choices = fit_to_text(study.experiment, keys) if chosen is None else chosen
  study = with_sizes(choices)
  runs, results = check_arms(study, names, workdir, mesh), workdir / f'{RESULTS}.json'
  if results.exists() and not overwrite:
    check_results(study, names, results)
  with clock.phase('data'):
    prepare_data(study.experiment.data, study.experiment.decoder.vocab_size, workdir)
    if chosen is None:
      shards = batch_shards(mesh, study.experiment.rules)
      choices |= fit_to_rows(study.experiment, keys, workdir, shards)
      study = with_sizes(choices)
      runs = check_arms(study, names, workdir, mesh)
    arm_prepared_dir = _prepare_arm_data(study, workdir)
    # Fails now, not hours later, if there is too little text to score on.
    scorer = open_scorer(study, workdir, mesh)
  write_choices(workdir, 'study', dataclasses.asdict(study), choices)
  return study, runs, arm_prepared_dir, scorer


def take_decoder(study: Study, decoder: str = '', given: Collection[str] = ()) -> Study:
  """Returns the study on a decoder that exists; see `with_decoder`.

  Args:
    study: the study.
    decoder: directory, GGUF file or name; default is `decoder_from` of the experiment.
    given: dotted paths of the keys of the study that the user gave.
  """
  keys = [key.removeprefix('experiment.') for key in given]
  return dataclasses.replace(study, experiment=with_decoder(study.experiment, decoder, keys))


@dataclasses.dataclass(frozen=True)
class FrozenDecoder:
  """The frozen decoder of a study.

  Attributes:
    directory: its directory, or its file.
    params: its weights, on devices.
    fingerprint: fingerprint of its weights as stored.
  """
  directory: Path
  params: Params
  fingerprint: str


def _open_decoder(experiment: Experiment, workdir: Path, mesh: Mesh) -> FrozenDecoder:
  """Loads the decoder that the study takes, or pretrains one."""
  directory = (as_path(experiment.decoder_from) if experiment.decoder_from
               else pretrain(experiment, workdir / DECODER, workdir))
  checkpoint = open_frozen(experiment.decoder, directory)
  check_rows_vocabulary(open_rows(
      workdir, 'validation', length=experiment.data.length,
      vocab_size=experiment.decoder.vocab_size), checkpoint)
  return FrozenDecoder(directory, *load_frozen(experiment, checkpoint, mesh))


def choose_arms(study: Study, only: Sequence[str]) -> tuple[str, ...]:
  """Returns the named arms in the study's order, or every arm if no name is given."""
  unknown = sorted(set(only) - set(study.arms))
  if unknown:
    raise UserError(f'--arm={unknown[0]}: the study has no such arm. Choose from '
                    f'{tuple(study.arms)}.')
  return tuple(name for name in study.arms if name in only) if only else tuple(study.arms)


def _prepare_arm_data(study: Study, workdir: Path) -> Path:
  """Prepares the text that arms train on, in the decoder's vocabulary; returns its directory."""
  if not study.arm_data_options:
    return workdir
  arm_prepared_dir = workdir / ARM_DATA
  # Arms must use the decoder's vocabulary, so it is copied before data are prepared.
  vocabulary = kept_vocabulary(workdir)

  def copy() -> None:
    if vocabulary.exists() and not kept_vocabulary(arm_prepared_dir).exists():
      make_writable(arm_prepared_dir)
      copy_vocabulary(vocabulary, arm_prepared_dir, VOCABULARY_FILE)

  run_on_process_zero(f'copy the vocabulary to {arm_prepared_dir}', copy)
  # All arms read the same text, so any of them describes it.
  variant = study.variant(next(iter(study.arms)), study.seeds[0])
  prepare_data(variant.data, variant.decoder.vocab_size, arm_prepared_dir)
  return arm_prepared_dir


def check_results(study: Study, names: Sequence[str], path: Path) -> None:
  """Checks that results of these arms lose nothing of the results at `path`.

  Raises:
    UserError: the results are of other settings, or of other arms too.
  """
  saved = check_same_settings(
      path, study, tuple(f'experiment.{key}' for key in WITHOUT_EFFECT))
  lost = sorted((set(saved['arms']) & set(study.arms)) - set(names))
  if lost:
    raise UserError(f'{path} has the arm {lost[0]!r}, which --arm leaves out: leave out --arm, or '
                    'add --overwrite')


def check_arms(study: Study, names: Sequence[str], workdir: Path, mesh: Mesh) -> dict[str, Run]:
  """Checks the decoder and these arms before the first phase; returns their runs by phase.

  Raises:
    UserError: a later phase could not start.
  """
  # The questions, the decoder's run, and the run of every arm and seed.
  if study.questions.per_difficulty:
    draw_questions(study.questions, study.experiment.data)
  decoder_from, problems = study.experiment.decoder_from, []
  describe: dict[str, Callable[[], Run]] = {}
  if decoder_from:
    checkpoint = open_frozen(study.experiment.decoder, as_path(decoder_from))
    check_frozen_memory(study.experiment, checkpoint, mesh)
    check_known_vocabulary(study.experiment.data, workdir, checkpoint)
  else:
    describe['decoder'] = functools.partial(
        describe_pretraining, study.experiment, workdir / DECODER, mesh)
  for name in names:
    learns = study.arms[name].learns
    for seed in study.seeds:
      experiment, run_dir = study.variant(name, seed), arm_directory(workdir, name, seed)
      describe[_phase_of(name, seed)] = functools.partial(
          _describe_run, experiment, run_dir, learns, mesh)
  # Check all runs, and say at once what is wrong with any of them.
  runs = {}
  for phase, make in describe.items():
    try:
      runs[phase] = make()
      runs[phase].check()
    except UserError as error:
      problems.append(f'{phase}: {error}')
  raise_problems(problems)
  if 'decoder' in runs:
    # Arms that this command leaves out count too.
    check_no_later_run(runs['decoder'], [arm_directory(workdir, name, seed) for name in study.arms
                                         for seed in study.seeds])
  return runs


def _describe_run(experiment: Experiment, run_dir: Path, learns: str, mesh: Mesh) -> Run:
  """Returns the run of an arm with one seed."""
  if learns == LATENT_ARM:
    return describe_training(experiment, run_dir, mesh)
  return describe_tuning(experiment, learns, run_dir, mesh)


def _phase_of(arm: str, seed: int) -> str:
  """Returns the name of the phase that trains and scores an arm."""
  return f'{arm}, seed {seed}'


def _score_frozen(experiment: Experiment, frozen: FrozenDecoder, workdir: Path,
                  scorer: QuestionScorer | TextScorer) -> ScoredRun:
  count = count_parameters(frozen.params)
  return ScoredRun(count, count, _score(
      experiment, (FROZEN,), {}, frozen.params, frozen.fingerprint, workdir, scorer))


def _score_chains(study: Study, frozen: FrozenDecoder, workdir: Path,
                  scorer: QuestionScorer) -> ChainOutcomes:
  """Scores the frozen decoder after chains of its own, unless `workdir` has these scores."""
  limit = study.questions.chain_tokens
  identity = scores_identity(study.experiment, (CHAIN,), {}, frozen.fingerprint,
                             fingerprint_of({'questions': scorer.identity, 'chain_tokens': limit}))
  return keep_scores(workdir / CHAIN_SCORES_FILE, identity, lambda: {
      CHAIN: scorer.score_chains(study.experiment, frozen.params)})[CHAIN]


def _score(experiment: Experiment, controls: tuple[str, ...], params: Params,
           decoder_params: Params, decoder_fingerprint: str, run_dir: Path,
           scorer: QuestionScorer | TextScorer) -> Scores:
  """Scores one run, unless its directory has these scores."""
  identity = scores_identity(experiment, controls, params, decoder_fingerprint, scorer.identity)
  return keep_scores(run_dir / SCORES_FILE, identity,
                     lambda: scorer(experiment, controls, params, decoder_params))


def _run_arm(study: Study, name: str, seed: int, frozen: FrozenDecoder, workdir: Path,
             arm_prepared_dir: Path, scorer: QuestionScorer | TextScorer, mesh: Mesh) -> ScoredRun:
  """Trains one arm with one seed, unless it is complete, and scores it."""
  experiment, run_dir = study.variant(name, seed), arm_directory(workdir, name, seed)
  learns = study.arms[name].learns
  if learns == LATENT_ARM:
    params = train_coprocessor(experiment, frozen.directory, run_dir, arm_prepared_dir,
                               (frozen.params, frozen.fingerprint))
    constant = experiment.deliberation.trainable == 'constant'
    count = count_parameters(params)
    # Constant soft tokens are the same for every question, so they have no controls.
    scores = _score(experiment, (OWN,) if constant else (OWN, *CONTROLS), params, frozen.params,
                    frozen.fingerprint, run_dir, scorer)
    return ScoredRun(count, count_parameters(frozen.params) + count, scores)
  tuned = tune_decoder(experiment, learns, frozen.params, frozen.fingerprint, run_dir,
                       arm_prepared_dir, mesh)
  # Only 'joint' training gives the tuned decoder latents to read.
  scores = _score(experiment, (OWN if tuned.soft_tokens else FROZEN,), tuned.soft_tokens,
                  tuned.decoder_params, fingerprint(tuned.decoder_params), run_dir, scorer)
  total = count_parameters(tuned.decoder_params) + count_parameters(tuned.soft_tokens)
  return ScoredRun(tuned.trained, total, scores)


def _diagnostics(study: Study, names: Sequence[str],
                 workdir: Path) -> dict[str, list[dict[str, float]]]:
  """Returns the diagnostics that each run with latents logged, by arm and seed."""
  return {f'{name}, seed {seed}': read_diagnostics(arm_directory(workdir, name, seed))
          for name in names if study.arms[name].learns == LATENT_ARM for seed in study.seeds}


def _machine() -> str:
  return (f'{jax.device_count()} {jax.default_backend()}, {platform.machine()}, Python '
          f'{platform.python_version()}, jax {jax.__version__}')
