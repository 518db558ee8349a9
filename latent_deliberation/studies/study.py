"""Runs a study: one frozen decoder, several arms over several seeds, one report."""

import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.data.loading import prepare_data
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import BASELINE, CONTROLS, OWN
from latent_deliberation.files import make_writable, write_whole
from latent_deliberation.models import count_parameters, load_frozen, open_frozen
from latent_deliberation.paths import (
  ARM_DATA,
  DECODER,
  PHASES_FILE,
  VOCABULARY_FILE,
  arm_directory,
)
from latent_deliberation.progress import PhaseClock, Progress
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import make_mesh
from latent_deliberation.studies.arms import (
  ScoredRun,
  describe_arm,
  describe_chain,
  describe_frozen,
  read_diagnostics,
)
from latent_deliberation.studies.scoring import (
  QuestionScorer,
  TextScorer,
  draw_questions,
  open_scorer,
)
from latent_deliberation.studies.study_config import CHAIN, LATENTS, Study
from latent_deliberation.studies.study_report import summarise_study, write_study
from latent_deliberation.studies.study_result import StudyResult
from latent_deliberation.studies.tune import describe_tuning, tune_decoder
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.train import describe_training, train_coprocessor


def run_study(study: Study, workdir: Path, only: Sequence[str] = ()) -> dict[str, Any]:
  """Trains and scores every arm with every seed; what is complete is not trained again.

  Args:
    only: names of arms, the only ones to train and report; all without a name. They are scored on
      what all arms of the study would be scored on.

  Returns: the content of <workdir>/results.json, which is written with a page and plots beside it.

  Raises:
    UserError: an arm that the study does not have, or see `check_arms`.
  """
  names = choose_arms(study, only)
  mesh = make_mesh(study.experiment.mesh)
  make_writable(workdir)
  check_arms(study, names, workdir, mesh)
  clock = PhaseClock(workdir / PHASES_FILE)
  with clock.phase('data'):
    prepare_data(study.experiment.data, study.experiment.decoder.vocab_size, workdir)
    arm_data = _prepare_arm_data(study, workdir)
    scorer = open_scorer(study, workdir, mesh)  # there must be enough text for it, hours later
  with clock.phase('decoder'):
    decoder = pretrain(study.experiment, workdir / DECODER, workdir)
  frozen, decoder_fingerprint = load_frozen(
      study.experiment, open_frozen(study.experiment, decoder), mesh)
  arms = {BASELINE: describe_frozen(
      study, _score_frozen(study, frozen, scorer), scorer, clock.seconds['decoder'])}
  if study.questions.chain_tokens:
    with clock.phase(CHAIN):
      written = scorer.write_out(study.experiment, frozen)
    arms[CHAIN] = describe_chain(study, arms[BASELINE], scorer, *written)
  progress = Progress(study.name, 'runs', len(names) * len(study.seeds))
  for number, name in enumerate(names):
    runs, seconds = [], []
    for seed in study.seeds:
      with clock.phase(phase := f'{name}, seed {seed}'):
        runs.append(_run(study, name, seed, decoder, frozen, decoder_fingerprint, workdir, arm_data, scorer,
                         mesh))
      seconds.append(clock.seconds[phase])
      progress.update(number * len(study.seeds) + len(runs))
    arms |= describe_arm(study, name, runs, scorer, tuple(seconds))
  summary = summarise_study(StudyResult(
      name=study.name, arms=arms, config=dataclasses.asdict(study), git_commit=git_commit(),
      command=' '.join(sys.argv), machine=_machine(), seconds=sum(clock.seconds.values()),
      difficulty=scorer.difficulty, positions=scorer.positions,
      diagnostics=_diagnostics(study, names, workdir)))
  if jax.process_index() == 0:
    write_study(summary, workdir)
  return summary


def choose_arms(study: Study, only: Sequence[str]) -> tuple[str, ...]:
  """The arms of these names, in the study's order; every arm where there is no name."""
  unknown = sorted(set(only) - set(study.arms))
  if unknown:
    raise UserError(f'--arm={unknown[0]}: the study has no such arm, choose among '
                     f'{tuple(study.arms)}')
  return tuple(name for name in study.arms if name in only) if only else tuple(study.arms)


def _prepare_arm_data(study: Study, workdir: Path) -> Path:
  """The directory of the text that arms train on, in the vocabulary of the decoder's."""
  if not study.arm_data_options:
    return workdir
  arm_data = workdir / ARM_DATA
  vocabulary, kept = workdir / VOCABULARY_FILE, arm_data / VOCABULARY_FILE

  def copy() -> None:
    if vocabulary.exists() and not kept.exists():
      make_writable(arm_data)
      write_whole(kept, vocabulary.read_bytes())

  run_on_process_zero(f'copy the vocabulary to {kept}', copy)
  variant = study.variant(next(iter(study.arms)), study.seeds[0])
  prepare_data(variant.data, variant.decoder.vocab_size, arm_data)
  return arm_data


def check_arms(study: Study, names: Sequence[str], workdir: Path, mesh: Mesh) -> None:
  """Raises before the first phase what would stop a later one of these arms."""
  if study.questions.per_difficulty:
    draw_questions(study)
  describe_pretraining(study.experiment, workdir / DECODER, mesh).check()
  for name in names:
    arm = study.arms[name]
    for seed in study.seeds:
      experiment, place = study.variant(name, seed), arm_directory(workdir, name, seed)
      if arm.learns == LATENTS:
        describe_training(experiment, place, mesh).check()
      else:
        describe_tuning(experiment, arm.learns, place, mesh).check()


def _score_frozen(study: Study, frozen: Params,
                  scorer: QuestionScorer | TextScorer) -> ScoredRun:
  count = count_parameters(frozen)
  return ScoredRun(count, count, scorer(study.experiment, (BASELINE,), {}, frozen))


def _run(study: Study, name: str, seed: int, decoder: Path, frozen: Params, decoder_fingerprint: str,
         workdir: Path, arm_data: Path, scorer: QuestionScorer | TextScorer,
         mesh: Mesh) -> ScoredRun:
  experiment, place = study.variant(name, seed), arm_directory(workdir, name, seed)
  learns = study.arms[name].learns
  if learns == LATENTS:
    params = train_coprocessor(experiment, decoder, place, arm_data)
    constant = experiment.deliberation.trainable == 'constant'
    count = count_parameters(params)
    scores = scorer(experiment, (OWN,) if constant else (OWN, *CONTROLS), params, frozen)
    return ScoredRun(count, count_parameters(frozen) + count, scores)
  tuned = tune_decoder(experiment, learns, frozen, decoder_fingerprint, place, arm_data, mesh)
  scores = scorer(experiment, (OWN if tuned.latents else BASELINE,), tuned.latents, tuned.decoder)
  total = count_parameters(tuned.decoder) + count_parameters(tuned.latents)
  return ScoredRun(tuned.trained, total, scores)


def _diagnostics(study: Study, names: Sequence[str],
                 workdir: Path) -> dict[str, list[dict[str, float]]]:
  """What each run of latents logged about them, by arm and seed."""
  return {f'{name}, seed {seed}': read_diagnostics(arm_directory(workdir, name, seed))
          for name in names if study.arms[name].learns == LATENTS for seed in study.seeds}


def _machine() -> str:
  return (f'{jax.device_count()} {jax.default_backend()}, {platform.machine()}, Python '
          f'{platform.python_version()}, jax {jax.__version__}')
