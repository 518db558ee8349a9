"""How a study scores an arm: on questions with one right answer, or on text by ahead position."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.data.data_config import VOCABULARY_FILE
from latent_deliberation.data.loading import validation_texts
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.evaluation.bootstrap import AheadNLL
from latent_deliberation.evaluation.controls import BASELINE
from latent_deliberation.evaluation.evaluate import score_traces, scored_batches
from latent_deliberation.experiment import Experiment
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.tokenizer import BYTES, open_tokenizer
from latent_deliberation.models import build_deliberator
from latent_deliberation.studies.chains import write_chains
from latent_deliberation.studies.outcomes import Outcomes
from latent_deliberation.studies.questions import (
  Questions,
  batch_questions,
  make_question_scorer,
  score_questions,
)
from latent_deliberation.studies.study_config import Study
from latent_deliberation.studies.synthetic.documents import build
from latent_deliberation.studies.synthetic.question import Question, Task
from latent_deliberation.studies.synthetic.word_problems import ANSWER


class QuestionMeasure:
  """Scores arms on the same questions.

  Attributes:
    difficulty: int [items].
    positions: None, as only text has them.
    prompt, answer: mean number of tokens.
  """
  positions = None

  def __init__(self, study: Study, data: Path, mesh: Mesh):
    self._mesh, self._asked, config = mesh, study.questions, study.experiment.data
    byte = config.vocabulary == 'byte'
    self._tokenizer = open_tokenizer(
        BYTES if byte else config.vocabulary_path or data / VOCABULARY_FILE)
    self._task, self._questions = draw_questions(study)
    self.difficulty = np.array([question.difficulty for question in self._questions])
    parts = [self._encode(question) for question in self._questions]
    self.prompt = float(np.mean([len(context) + len(question) for context, question, _ in parts]))
    self.answer = float(np.mean([len(answer) for *_, answer in parts]))
    self._batches = batch_questions(parts, self._asked.batch_size, self._asked.offline)
    _check_room(study, min(int(batch.anchors.min()) for batch in self._batches))

  def __call__(self, experiment: Experiment, arms: tuple[str, ...], params: Params,
               decoder: Params) -> Mapping[str, Outcomes]:
    """Outcomes by arm, 'frozen' and names of controls; see `make_question_scorer`."""
    return self._score(experiment, arms, params, decoder, self._batches)

  def write_out(self, experiment: Experiment, decoder: Params) -> tuple[Outcomes, float]:
    """Outcomes of the plain decoder behind chains that it writes itself, and tokens of a chain.

    What is scored is the answer behind the chain: it is right where greedy decoding would go on to
    write it. The chain has `questions.chain_tokens` tokens at most; see `write_chains`.
    """
    parts = [self._encode(self._task.ask_for_chain(question)) for question in self._questions]
    prompts = [[*context, *question] for context, question, _ in parts]
    sign = self._tokenizer.encode(ANSWER)[1:]
    room = max(map(len, prompts)) + self._asked.chain_tokens
    generator = Generator(experiment.decoder, decoder, length=room, mesh=self._mesh,
                          rules=experiment.rules, dtype=experiment.computation.dtype)
    chains = write_chains(generator, prompts, sign, self._asked.chain_tokens,
                          self._asked.batch_size, self._tokenizer.eos)
    batches = batch_questions(
        [(prompt, chain, answer) for prompt, chain, (*_, answer)
         in zip(prompts, chains, parts, strict=True)], self._asked.batch_size)
    scores = self._score(experiment, (BASELINE,), {}, decoder, batches)
    return scores[BASELINE], float(np.mean([len(chain) for chain in chains]))

  def _encode(self, question: Question) -> tuple[list[int], list[int], list[int]]:
    """Ids of context, question and answer."""
    encode = self._tokenizer.encode
    return encode(question.context), encode(question.question)[1:], encode(question.answer)[1:]

  def _score(self, experiment: Experiment, arms: tuple[str, ...], params: Params, decoder: Params,
             batches: list[Questions]) -> Mapping[str, Outcomes]:
    scorer = make_question_scorer(
        build_deliberator(experiment), arms, loss_chunk=experiment.computation.loss_chunk,
        mesh=self._mesh, rules=experiment.rules, delay=experiment.evaluation.delay)
    return score_questions(scorer, params, decoder, batches, len(self.difficulty))


def draw_questions(study: Study) -> tuple[Task, list[Question]]:
  """The task of a study and what it asks; nothing else need be there.

  Raises:
    FileNotFoundError: the file to ask from is absent.
    ValueError: its content is wrong, or there are too few questions of a difficulty.
  """
  asked, config = study.questions, study.experiment.data
  task = build(config.name, {**config.options, **asked.options})
  questions = task.examine(np.random.default_rng(asked.seed), asked.per_difficulty)
  levels, counts = np.unique([question.difficulty for question in questions], return_counts=True)
  if counts.min() < 2:
    raise ValueError(f'difficulty {levels[counts.argmin()]} has 1 question, an interval needs at '
                     'least 2: ask more of it, or raise questions.per_difficulty')
  return task, questions


def _check_room(study: Study, first: int) -> None:
  for name in study.arms:
    config = study.variant(name, study.seeds[0]).deliberation
    if config.first_anchor > first:
      raise ValueError(
          f'arms.{name}: {config.num_latents} {config.latents} latents need as many tokens up to '
          f'their anchor, and the shortest question has {first + 1}: lower num_latents, or choose '
          "latents = 'anchored' or 'paper', which stand behind it")


def check_same_signs(choices: Mapping[str, DeliberationConfig]) -> None:
  """Raises ValueError where arms on text would be scored at different anchors."""
  (first, expected), *others = ((name, each.anchor_tokens) for name, each in choices.items())
  for name, signs in others:
    if signs != expected:
      raise ValueError(
          f'arms.{name} has anchor_tokens = {signs}, arms.{first} {expected}: arms are scored on '
          "text at the same anchors, so set them alike in the study's experiment")


class TextMeasure:
  """Scores arms on the same held-out text, by ahead position.

  Attributes:
    difficulty: None, as text has none.
    positions: ahead positions of the report.
    prompt, answer: mean number of tokens before an anchor, and of scored ones behind it.
  """
  difficulty = None

  def __init__(self, study: Study, data: Path, mesh: Mesh):
    self._mesh, experiment = mesh, study.experiment
    self.positions = experiment.evaluation.positions
    self.prompt, self.answer = experiment.data.length / 2, float(experiment.evaluation.num_ahead)
    self._held_out = scored_batches(experiment, data)
    self._texts = validation_texts(experiment, data, len(self._held_out))
    # The same traces for all arms and seeds, so that each text's targets are the same.
    self._seed = experiment.seed
    choices = {name: study.variant(name, study.seeds[0]).deliberation for name in study.arms}
    check_same_signs(choices)
    self._first_anchor = max(choice.first_anchor for choice in choices.values())

  def __call__(self, experiment: Experiment, arms: tuple[str, ...], params: Params,
               decoder: Params) -> Mapping[str, AheadNLL]:
    """Sums by text and ahead position for each arm; see `make_scorer`."""
    experiment = dataclasses.replace(experiment, seed=self._seed)
    scores = score_traces(experiment, arms, params, decoder, self._held_out, self._mesh,
                          self._first_anchor)
    return {arm: score.merged(self._texts) for arm, score in scores.items()}


def open_measure(study: Study, data: Path, mesh: Mesh) -> QuestionMeasure | TextMeasure:
  """The measure that a study asks for, on data that are prepared in `data`."""
  kind = QuestionMeasure if study.questions.per_difficulty else TextMeasure
  return kind(study, data, mesh)
