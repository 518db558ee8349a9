"""Describes the arms of a study for its report: costs, scores and diagnostics."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_deliberation.deliberation import flops
from latent_deliberation.evaluation.perplexity import CONTROLS, FROZEN, OWN, AheadNLL
from latent_deliberation.experiment import Experiment, TrainingConfig
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.studies.scoring import QuestionScorer, TextScorer
from latent_deliberation.studies.study_config import LATENT_ARM, Study
from latent_deliberation.studies.study_result import Arm, Outcomes, control_name
from latent_deliberation.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class ScoredRun:
  """One arm with one seed.

  Attributes:
    trained: number of trained parameters.
    total: number of parameters in use.
    scores: scores by control.
  """
  trained: int
  total: int
  scores: Mapping[str, Outcomes | AheadNLL]


def describe_frozen(experiment: Experiment, run: ScoredRun, scorer: QuestionScorer | TextScorer,
                    seconds: float) -> Arm:
  """Returns the arm of the frozen decoder, which was pretrained or loaded in `seconds`."""
  decoder_config, settings = experiment.decoder, experiment.pretraining
  # What a decoder that exists has cost is not known here. Its operations count as 0.
  texts = 0 if experiment.decoder_from else settings.loop.num_steps * settings.batch_size
  answer = flops.answer_flops(decoder_config, scorer.prompt_tokens, scorer.answer_tokens)
  return Arm(
      kind='decoder', trained=run.trained, total=run.total,
      flops_per_token=answer / scorer.answer_tokens,
      train_flops=texts * flops.text_flops(decoder_config, experiment.data.length),
      seeds=(experiment.seed,), seconds=(seconds,), **_scored([run.scores[FROZEN]]))


def describe_chain(decoder_config: TransformerConfig, frozen: Arm, scorer: QuestionScorer,
                   outcomes: Outcomes, tokens: float, seconds: float) -> Arm:
  """Returns the arm of the frozen decoder that answers after its own chain.

  Args:
    decoder_config: config of the frozen decoder.
    frozen: the frozen decoder without a chain.
    scorer: scorer of the study.
    outcomes: answers after the chains.
    tokens: mean number of tokens of a chain.
    seconds: time of writing and answering.
  """
  # A chain makes the prompt longer, and each of its tokens needs logits.
  answer = flops.answer_flops(decoder_config, scorer.prompt_tokens + tokens, scorer.answer_tokens)
  chain = tokens * flops.head_flops(decoder_config)
  return dataclasses.replace(
      frozen, kind=f'decoder with its own chain, {tokens:.0f} tokens', outcomes=(outcomes,),
      flops_per_token=(answer + chain) / scorer.answer_tokens, seconds=(seconds,))


def describe_arm(study: Study, name: str, runs: Sequence[ScoredRun],
                 scorer: QuestionScorer | TextScorer,
                 seconds: tuple[float, ...]) -> dict[str, Arm]:
  """Returns an arm and its controls, by their names in the report.

  Args:
    study: the study.
    name: name of the arm.
    runs: the run of each seed.
    scorer: scorer of the study.
    seconds: wall-clock time of each run.
  """
  experiment, learns = study.variant(name, study.seeds[0]), study.arms[name].learns
  decoder_config, config = experiment.decoder, experiment.deliberation
  settings, length = experiment.training, experiment.data.length
  texts = settings.loop.num_steps * settings.batch_size
  training = texts * flops.training_flops(learns, decoder_config, config, length)
  # Tuned decoders cost what the decoder costs; arms with latents also make and read latents.
  answer = flops.answer_flops(decoder_config, scorer.prompt_tokens, scorer.answer_tokens)
  if learns in (LATENT_ARM, 'joint'):
    answer += flops.latents_flops(decoder_config, config, scorer.prompt_tokens)
  kind = f'{config.trainable} {config.latents} latents' if learns == LATENT_ARM else learns
  arms = {}
  for control in (FROZEN, OWN, *CONTROLS):  # the order of the report
    if control not in runs[0].scores:
      continue
    label = name if control in (OWN, FROZEN) else control_name(name, control)
    arms[label] = Arm(
        kind=kind, trained=runs[0].trained, total=runs[0].total,
        flops_per_token=answer / scorer.answer_tokens, train_flops=training,
        seeds=study.seeds, seconds=seconds,
        note=_describe_budget(experiment, learns, study.experiment.training),
        **_scored([run.scores[control] for run in runs]))
  return arms


def _describe_budget(experiment: Experiment, learns: str, common: TrainingConfig) -> str:
  """Returns a note on whether an arm has the steps and texts of the study (`common`)."""
  settings = experiment.training
  same = (settings.loop.num_steps, settings.batch_size) == (
      common.loop.num_steps, common.batch_size)
  budget = f'{settings.loop.num_steps:,} steps of {settings.batch_size} texts'
  if learns == LATENT_ARM and experiment.start:  # tuned decoders start from the decoder alone
    return f'not matched: {budget}, after those of the coprocessor that it starts from'
  return f'matched in tokens and steps: {budget}' if same else f'not matched: {budget}'


def read_diagnostics(workdir: Path) -> list[dict[str, float]]:
  """Reads what a run logged about its latents, their gain and their content, by step.

  Args:
    workdir: work directory of the run.
  """
  wanted, rows = {'validation/gain': 'gain', 'validation/content': 'content'}, []
  for row in read_metrics(workdir / METRICS_FILE):
    # Names without their prefix. Most logged steps have no diagnostics.
    found = {wanted[key] if key in wanted else key.removeprefix('latents/'): value
             for key, value in row.items() if key in wanted or key.startswith('latents/')}
    if found:
      rows.append({'step': row['step'], **found})
  return rows


def _scored(scores: Sequence[Outcomes] | Sequence[AheadNLL]) -> dict[str, tuple]:
  """Returns the field of Arm that holds scores of this kind, with the scores."""
  field = 'outcomes' if isinstance(scores[0], Outcomes) else 'text_scores'
  return {field: tuple(scores)}
