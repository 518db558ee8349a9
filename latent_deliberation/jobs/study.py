"""Runs a study: one frozen decoder, several arms over several seeds, one report."""

import dataclasses
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.data.config import VOCABULARY_FILE
from latent_deliberation.deliberation import flops
from latent_deliberation.distributed import first_does
from latent_deliberation.evaluation.outcomes import Outcomes
from latent_deliberation.evaluation.report import BASELINE, git_commit
from latent_deliberation.evaluation.study_page import write_study
from latent_deliberation.evaluation.study_report import summarise_study
from latent_deliberation.evaluation.study_result import CONTROLS, Arm, StudyResult, control_name
from latent_deliberation.files import write_whole
from latent_deliberation.jobs.directories import make_writable
from latent_deliberation.jobs.measures import (
  QuestionMeasure,
  TextMeasure,
  draw_questions,
  open_measure,
)
from latent_deliberation.jobs.models import count_parameters, load_frozen, open_frozen
from latent_deliberation.jobs.phases import PhaseClock
from latent_deliberation.jobs.prepared import prepare_data
from latent_deliberation.jobs.pretrain import describe_pretraining, pretrain
from latent_deliberation.jobs.study_config import CHAIN, LATENTS, OWN, Study
from latent_deliberation.jobs.train import describe_training, train_coprocessor
from latent_deliberation.jobs.tune import describe_tuning, tune_decoder
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.flops import head_flops
from latent_deliberation.progress import Progress
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.metrics import FILE_NAME as METRICS_FILE
from latent_deliberation.training.metrics import read_metrics

Scores = Mapping[str, Any]  # control -> Outcomes or AheadNLL


def run_study(study: Study, workdir: Path) -> dict[str, Any]:
  """Trains and scores every arm with every seed; what is complete is not trained again.

  Returns: the content of <workdir>/results.json, which is written with a page and plots beside it.
  """
  mesh = make_mesh(study.experiment.mesh)
  make_writable(workdir)
  check_arms(study, workdir, mesh)
  clock = PhaseClock(workdir / 'phases.json')
  with clock.phase('data'):
    prepare_data(study.experiment, workdir)
    lessons = _prepare_lessons(study, workdir)
    measure = open_measure(study, workdir, mesh)  # there must be enough text for it, hours later
  with clock.phase('decoder'):
    decoder = pretrain(study.experiment, workdir / 'decoder', workdir)
  frozen, digest = load_frozen(study.experiment, open_frozen(study.experiment, decoder), mesh)
  arms = {BASELINE: _frozen_arm(study, measure, frozen, clock.seconds['decoder'])}
  if study.questions.chain_tokens:
    with clock.phase(CHAIN):
      arms[CHAIN] = _chain_arm(study, measure, frozen, arms[BASELINE])
  progress = Progress(study.name, 'runs', len(study.arms) * len(study.seeds))
  for number, name in enumerate(study.arms):
    runs, seconds = [], []
    for seed in study.seeds:
      with clock.phase(phase := f'{name}, seed {seed}'):
        runs.append(_run(study, name, seed, decoder, frozen, digest, workdir, lessons, measure,
                         mesh))
      seconds.append(clock.seconds[phase])
      progress.update(number * len(study.seeds) + len(runs))
    arms |= _arms(study, name, runs, measure, tuple(seconds))
  summary = summarise_study(StudyResult(
      name=study.name, arms=arms, config=dataclasses.asdict(study), git_commit=git_commit(),
      command=' '.join(sys.argv), machine=_machine(), seconds=sum(clock.seconds.values()),
      difficulty=measure.difficulty, positions=measure.positions,
      diagnostics=_diagnostics(study, workdir)))
  if jax.process_index() == 0:
    write_study(summary, workdir)
  return summary


def _prepare_lessons(study: Study, workdir: Path) -> Path:
  """The directory of the text that arms train on, in the vocabulary of the decoder's."""
  if not study.lessons:
    return workdir
  lessons = workdir / 'lessons'
  vocabulary, kept = workdir / VOCABULARY_FILE, lessons / VOCABULARY_FILE

  def copy() -> None:
    if vocabulary.exists() and not kept.exists():
      make_writable(lessons)
      write_whole(kept, vocabulary.read_bytes())

  first_does(f'copy the vocabulary to {kept}', copy)
  prepare_data(study.variant(next(iter(study.arms)), study.seeds[0]), lessons)
  return lessons


@dataclasses.dataclass(frozen=True)
class _Run:
  """One arm with one seed: parameters that learnt and that are in use, and scores by control."""
  trained: int
  total: int
  scores: Scores


def check_arms(study: Study, workdir: Path, mesh: Mesh) -> None:
  """Raises before the first phase what would stop a later one."""
  shapes = nn.unbox(boxed_shapes(study.experiment.decoder))
  if study.questions.per_difficulty:
    draw_questions(study)
  describe_pretraining(study.experiment, workdir / 'decoder', mesh).check()
  for name, arm in study.arms.items():
    for seed in study.seeds:
      experiment, place = study.variant(name, seed), _place(workdir, name, seed)
      if arm.learns == LATENTS:
        describe_training(experiment, place, shapes, '', mesh).check()
      else:
        describe_tuning(experiment, arm.learns, shapes, '', place, mesh).check()


def _place(workdir: Path, name: str, seed: int) -> Path:
  return workdir / 'arms' / name / f'seed{seed}'


def _run(study: Study, name: str, seed: int, decoder: Path, frozen: Params, digest: str,
         workdir: Path, lessons: Path, measure: QuestionMeasure | TextMeasure, mesh: Mesh) -> _Run:
  experiment, place = study.variant(name, seed), _place(workdir, name, seed)
  learns = study.arms[name].learns
  if learns == LATENTS:
    params = train_coprocessor(experiment, decoder, place, lessons)
    constant = experiment.deliberation.trainable == 'constant'
    count = count_parameters(params)
    scores = measure(experiment, (OWN,) if constant else (OWN, *CONTROLS), params, frozen)
    return _Run(count, count_parameters(frozen) + count, scores)
  tuned = tune_decoder(experiment, learns, frozen, digest, place, lessons, mesh)
  scores = measure(experiment, (OWN if tuned.latents else BASELINE,), tuned.latents, tuned.decoder)
  total = count_parameters(tuned.decoder) + count_parameters(tuned.latents)
  return _Run(tuned.trained, total, scores)


def _frozen_arm(study: Study, measure: QuestionMeasure | TextMeasure, frozen: Params,
                seconds: float) -> Arm:
  experiment = study.experiment
  model, settings = experiment.decoder, experiment.pretraining
  texts = settings.loop.num_steps * settings.batch_size
  scores = measure(experiment, (BASELINE,), {}, frozen)[BASELINE]
  count = count_parameters(frozen)
  return Arm(
      kind='decoder', trained=count, total=count,
      flops_per_token=flops.answer_flops(model, measure.prompt, measure.answer) / measure.answer,
      train_flops=texts * flops.text_flops(model, experiment.data.length),
      seeds=(experiment.seed,), seconds=(seconds,), **_scored([scores]))


def _chain_arm(study: Study, measure: QuestionMeasure, frozen: Params, plain: Arm) -> Arm:
  """The frozen decoder again, behind chains of its own."""
  outcomes, tokens = measure.write_out(study.experiment, frozen)
  answer = flops.answer_flops(study.experiment.decoder, measure.prompt + tokens, measure.answer)
  return dataclasses.replace(
      plain, kind=f'decoder with its own chain, {tokens:.0f} tokens', outcomes=(outcomes,),
      flops_per_token=(answer + tokens * head_flops(study.experiment.decoder)) / measure.answer)


def _arms(study: Study, name: str, runs: list[_Run], measure: QuestionMeasure | TextMeasure,
          seconds: tuple[float, ...]) -> dict[str, Arm]:
  """The arm itself and its controls, as the report has them."""
  experiment, learns = study.variant(name, study.seeds[0]), study.arms[name].learns
  model, config, settings = experiment.decoder, experiment.deliberation, experiment.training
  texts, length = settings.loop.num_steps * settings.batch_size, experiment.data.length
  answer = flops.answer_flops(model, measure.prompt, measure.answer)
  training = flops.text_flops(model, length)
  if learns in (LATENTS, 'unified'):
    answer += flops.latents_flops(model, config, measure.prompt)
    training = flops.traces_flops(model, config, length, tuned=learns == 'unified')
  kind = f'{config.trainable} {config.latents} latents' if learns == LATENTS else learns
  arms = {}
  for control in (BASELINE, OWN, *CONTROLS):  # as the report shows them
    if control not in runs[0].scores:
      continue
    label = name if control in (OWN, BASELINE) else control_name(name, control)
    arms[label] = Arm(
        kind=kind, trained=runs[0].trained, total=runs[0].total,
        flops_per_token=answer / measure.answer, train_flops=texts * training, seeds=study.seeds,
        seconds=seconds, **_scored([run.scores[control] for run in runs]))
  return arms


def _scored(scores: list) -> dict[str, tuple]:
  """The field of Arm that scores of this kind belong to."""
  kind = 'outcomes' if isinstance(scores[0], Outcomes) else 'text'
  return {kind: tuple(scores)}


def _diagnostics(study: Study, workdir: Path) -> dict[str, list[dict[str, float]]]:
  """What each run logged about its latents and their content, by arm and seed."""
  wanted = {'validation/content': 'content'}
  kept = {}
  for name, arm in study.arms.items():
    for seed in study.seeds if arm.learns == LATENTS else ():
      rows = {}  # by step: a run that was started again has repeated an evaluation
      for row in read_metrics(_place(workdir, name, seed) / METRICS_FILE):
        found = {wanted[key] if key in wanted else key.removeprefix('latents/'): value
                 for key, value in row.items() if key in wanted or key.startswith('latents/')}
        if found:
          rows[row['step']] = {'step': row['step'], **found}
      kept[f'{name}, seed {seed}'] = list(rows.values())
  return kept


def _machine() -> str:
  return (f'{jax.device_count()} {jax.default_backend()}, {platform.machine()}, Python '
          f'{platform.python_version()}, jax {jax.__version__}')
