"""Scores the arms of a study: on questions with one right answer, or on text by ahead position.

A study of questions may also score chains of thought that the frozen decoder writes by itself.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.build import build_deliberator
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.rows import fingerprint_of
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answers import nll_and_likeliest
from latent_deliberation.evaluation.evaluate import check_reach, open_held_out, score_traces
from latent_deliberation.evaluation.perplexity import FROZEN, AheadNLL, arm_states
from latent_deliberation.experiment import Experiment
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.prompt_arrays import Prompts
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.inference.tokenizer import tokenizer_of_data
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.model.layers import output_head
from latent_deliberation.progress import Progress, counted
from latent_deliberation.studies.study_config import QuestionsConfig, Study
from latent_deliberation.studies.study_result import ChainOutcomes, Outcomes
from latent_deliberation.studies.synthetic.documents import build
from latent_deliberation.studies.synthetic.question import Question, Task
from latent_deliberation.studies.synthetic.word_problems import ANSWER


@struct.dataclass
class Questions:
  """B questions, each with its answer.

  Attributes:
    batch: [B, T] one document a row, then padding.
    anchors: int32 [B] index of the last token before the latents.
    start: int32 [B] index of the first token of the answer.
    end: int32 [B] index after the last token of the answer.
    span: A, ahead tokens that reach from any anchor to the end of its answer.
  """
  batch: Batch
  anchors: Array
  start: Array
  end: Array
  span: int = struct.field(pytree_node=False)


def batch_questions(parts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
                    batch_size: int, offline: bool = False) -> list[Questions]:
  """Packs questions into batches of one shape.

  Args:
    parts: ids of context, question and answer, for each question.
    batch_size: largest B; there are no more rows than questions. The last batch is filled up with
      the first questions, so that its controls are like those of the others. `score_questions`
      drops these again.
    offline: put latents after the context and not after the question.

  Raises:
    UserError: there is no question, an answer is empty, or latents would come before any token.
  """
  if not parts:
    raise UserError('there are no questions: set questions.per_difficulty to 2 or more')
  # Places of the anchor and of the answer in each question's row.
  lengths = np.array([[len(part) for part in question] for question in parts])
  start, end = lengths[:, :2].sum(axis=1), lengths.sum(axis=1)
  anchors = (lengths[:, 0] if offline else start) - 1
  if anchors.min() < 0 or (end <= start).any():
    wrong = int(np.argmax((anchors < 0) | (end <= start)))
    raise UserError(f'question {wrong} has {lengths[wrong].tolist()} tokens of context, question '
                    'and answer. Give it a token before the latents, and an answer.')
  tokens = np.zeros((len(parts), end.max()), np.int32)
  for row, question in zip(tokens, parts, strict=True):
    ids = np.concatenate([np.asarray(part, np.int32) for part in question])
    row[:len(ids)] = ids
  # One span and one shape for all batches, so the scorer is compiled once.
  span = int((end - 1 - anchors).max())
  # No question is twice in a batch: it could become its own control.
  batches, batch_size = [], min(batch_size, len(parts))
  for first in range(0, len(parts), batch_size):
    # Past the last question, the first ones fill up the batch.
    rows = np.arange(first, first + batch_size) % len(parts)
    order = np.arange(tokens.shape[1])
    inside = order < end[rows, None]
    batches.append(Questions(
        Batch(tokens[rows], inside.astype(np.int32), np.where(inside, order, 0).astype(np.int32)),
        anchors[rows].astype(np.int32), start[rows].astype(np.int32), end[rows].astype(np.int32),
        span))
  return batches


# (params, decoder_params, questions) -> {arm: nats of the answers [B], whether they are right [B]}
AnswerScorer = Callable[[Params, Params, Questions], Mapping[str, tuple[Array, Array]]]


def make_question_scorer(deliberator: Deliberator, arms: Sequence[str], *, loss_chunk: int,
                         mesh: Mesh, rules: Mapping[str, Sequence[str]],
                         delay: int = 0) -> AnswerScorer:
  """Compiles the scoring of one batch under several arms.

  An answer is right if each of its tokens is the likeliest one after the tokens before it: greedy
  decoding would write it.

  Args:
    deliberator: decoder and coprocessor.
    arms: 'frozen' (the decoder alone) and names of perplexity.OUTPUTS.
    loss_chunk: targets of a question whose logits exist at the same time.
    mesh: devices to compute on.
    rules: logical axis rules.
    delay: ahead tokens that are read before latents join the cache.
  """

  def score(params: Params, decoder_params: Params,
            questions: Questions) -> dict[str, tuple[Array, Array]]:
    with nn.logical_axis_rules(tuple(rules.items())):
      # One trace for each question. Its ahead tokens reach to the end of the answer.
      anchors = questions.anchors[:, None]
      traces = gather_traces(questions.batch, anchors, anchors >= 0, questions.span)
      traces = traces.replace(delay=jnp.full_like(anchors, delay) if delay else None)
      # Only tokens of the answer count. Others may come between it and the anchor.
      index = anchors + 1 + jnp.arange(questions.span)
      answer = (index >= questions.start[:, None]) & (index < questions.end[:, None])
      states = arm_states(deliberator, arms, params, decoder_params, questions.batch, traces)
      # Nats of the whole answer, and whether greedy decoding would write it.
      cap, scores = deliberator.decoder.config.final_softcap, {}
      for arm, hidden in states.items():
        nll, right = nll_and_likeliest(hidden[:, 0], traces.ahead_tokens[:, 0],
                                       output_head(decoder_params), cap, loss_chunk)
        scores[arm] = jnp.sum(nll * answer, axis=1), jnp.all(right | ~answer, axis=1)
    return scores

  compiled = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def scorer(params: Params, decoder_params: Params,
             questions: Questions) -> Mapping[str, tuple[Array, Array]]:
    with jax.set_mesh(mesh):
      return compiled(params, decoder_params, questions)

  return scorer


def score_questions(scorer: AnswerScorer, params: Params, decoder_params: Params,
                    batches: Iterable[Questions], count: int) -> dict[str, Outcomes]:
  """Returns the outcomes of each arm of the scorer on the first `count` questions."""
  scored: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for questions in batches:
    for arm, outcome in jax.device_get(scorer(params, decoder_params, questions)).items():
      scored.setdefault(arm, []).append(outcome)
  return {arm: Outcomes(np.concatenate([nll for nll, _ in outcomes])[:count].astype(np.float64),
                        np.concatenate([right for _, right in outcomes])[:count])
          for arm, outcomes in scored.items()}


def write_chains(engine: Engine, prompts: Prompts, ending: Sequence[int], max_tokens: int,
                 batch_size: int, eos: int) -> list[list[int]]:
  """Writes a chain after each prompt with the decoder; every chain ends in `ending`.

  Args:
    engine: the plain decoder.
    prompts: [N] ids.
    ending: ids that end a chain. A chain that ends otherwise gets them appended, in the place of
      an `eos`, so that an answer can follow.
    max_tokens: most tokens that the decoder writes for a chain.
    batch_size: prompts at a time, of similar lengths.
    eos: id that ends a text.

  Raises:
    UserError: see `generate`.
  """
  ending = list(ending)
  options = DecodingOptions(
      max_tokens, eos=(eos,), stop=lambda tokens: list(tokens[-len(ending):]) == ending)
  # Prompts of similar lengths share a batch, which saves padding.
  order = np.argsort([len(prompt) for prompt in prompts], kind='stable').tolist()
  chains: list[list[int]] = [[] for _ in prompts]
  progress = Progress('writing chains', 'questions', len(prompts))
  for first in range(0, len(order), batch_size):
    chosen = order[first:first + batch_size]
    filler = [chosen[0]] * (batch_size - len(chosen))  # one shape for all batches, compiled once
    written = generate(engine, [prompts[number] for number in [*chosen, *filler]], options)
    for number, completion in zip(chosen, written, strict=False):
      ended = completion.finish_reason == 'stop'
      chains[number] = completion.tokens if ended else [
          *(token for token in completion.tokens if token != eos), *ending]
    progress.update(first + len(chosen))
  return chains


class QuestionScorer:
  """Scores arms on the same questions.

  Attributes:
    identity: fingerprint of the questions.
    difficulty: int [items] difficulty of each question.
    positions: None; only text has ahead positions.
    prompt_tokens, answer_tokens: mean number of tokens of a prompt and of an answer.
  """
  positions = None

  def __init__(self, study: Study, prepared_dir: Path, mesh: Mesh):
    self._mesh, self._config, config = mesh, study.questions, study.experiment.data
    self._tokenizer = tokenizer_of_data(config, prepared_dir)
    # The questions, as ids in batches, and their mean lengths for the operations.
    self._task, self._questions = draw_questions(self._config, config)
    self.difficulty = np.array([question.difficulty for question in self._questions])
    parts = [self._encode(question) for question in self._questions]
    self.prompt_tokens = float(np.mean(
        [len(context) + len(question) for context, question, _ in parts]))
    self.answer_tokens = float(np.mean([len(answer) for *_, answer in parts]))
    self._batches = batch_questions(parts, self._config.batch_size, self._config.offline)
    _check_room(study, min(int(batch.anchors.min()) for batch in self._batches))
    self.identity = fingerprint([
        (each.batch.tokens, each.anchors, each.start, each.end) for each in self._batches])

  def __call__(self, experiment: Experiment, arms: tuple[str, ...], params: Params,
               decoder_params: Params) -> Mapping[str, Outcomes]:
    """Returns outcomes by arm, 'frozen' and names of controls; see `make_question_scorer`."""
    return self._score(experiment, arms, params, decoder_params, self._batches)

  def score_chains(self, experiment: Experiment, decoder_params: Params) -> ChainOutcomes:
    """Lets the plain decoder write a chain for each question, and scores the answers after them.

    An answer is right if greedy decoding would write it next. A chain has at most
    `questions.chain_tokens` tokens; see `write_chains`.
    """
    parts = [self._encode(self._task.ask_for_chain(question)) for question in self._questions]
    prompts = [[*context, *question] for context, question, _ in parts]
    ending = self._tokenizer.encode(ANSWER)[1:]
    # The cache must hold the longest prompt and a whole chain.
    room = max(map(len, prompts)) + self._config.chain_tokens
    computation = experiment.computation.on(jax.default_backend())
    engine = Engine(experiment.decoder, decoder_params, length=room, mesh=self._mesh,
                    rules=experiment.rules, dtype=computation.dtype)
    chains = write_chains(engine, prompts, ending, self._config.chain_tokens,
                          self._config.batch_size, self._tokenizer.eos)
    # The chain takes the place of the question, after the prompt as context.
    batches = batch_questions(
        [(prompt, chain, answer) for prompt, chain, (*_, answer)
         in zip(prompts, chains, parts, strict=True)], self._config.batch_size)
    found = self._score(experiment, (FROZEN,), {}, decoder_params, batches)[FROZEN]
    return ChainOutcomes(found.nll, found.correct, np.array([len(chain) for chain in chains]))

  def _encode(self, question: Question) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of context, question and answer."""
    # Only the context keeps the token that begins a text.
    encode = self._tokenizer.encode
    return encode(question.context), encode(question.question)[1:], encode(question.answer)[1:]

  def _score(self, experiment: Experiment, arms: tuple[str, ...], params: Params,
             decoder_params: Params, batches: list[Questions]) -> Mapping[str, Outcomes]:
    scorer = make_question_scorer(
        build_deliberator(experiment), arms, loss_chunk=experiment.computation.loss_chunk,
        mesh=self._mesh, rules=experiment.rules, delay=experiment.evaluation.delay)
    return score_questions(scorer, params, decoder_params,
                           counted(batches, f'scoring {", ".join(arms)}'), len(self.difficulty))


def draw_questions(settings: QuestionsConfig, data: DataConfig) -> tuple[Task, list[Question]]:
  """Draws the questions of a study from its task, without any prepared data.

  Raises:
    UserError: the file of the questions is missing or wrong.
    UserError: a difficulty has only one question.
  """
  task = build(data.name, {**data.options, **settings.options})
  questions = task.examine(np.random.default_rng(settings.seed), settings.per_difficulty)
  # Every difficulty gets an interval, which one question does not have.
  levels, counts = np.unique([question.difficulty for question in questions], return_counts=True)
  if counts.min() < 2:
    raise UserError(f'difficulty {levels[counts.argmin()]} has 1 question, and an interval needs '
                    '2. Ask more of this difficulty, or raise questions.per_difficulty.')
  return task, questions


def _check_room(study: Study, first: int) -> None:
  """Raises UserError if an arm's latents do not fit up to `first`, the first anchor's index."""
  for name in study.arms:
    config = study.variant(name, study.seeds[0]).deliberation
    if config.first_anchor > first:
      raise UserError(
          f'arms.{name} has {config.num_latents} {config.latents} latents, which replace as many '
          f'tokens, and the shortest question has {first + 1}. Lower num_latents, or choose '
          "latents = 'anchored' or 'paper', which come after the question.")


def check_same_anchor_tokens(choices: Mapping[str, DeliberationConfig]) -> None:
  """Raises UserError if text would be scored at different anchors."""
  (first, expected), *others = ((name, each.anchor_tokens) for name, each in choices.items())
  for name, anchor_tokens in others:
    if anchor_tokens != expected:
      raise UserError(
          f'{name} has anchor_tokens = {anchor_tokens}, {first} has {expected}. All are scored on '
          "text at the same anchors. Set anchor_tokens in the study's experiment.")


class TextScorer:
  """Scores arms on the same held-out text, by ahead position.

  Attributes:
    identity: fingerprint of the text and of the places in it.
    difficulty: None; text has no difficulty.
    positions: ahead positions of the report.
    prompt_tokens: mean number of tokens before an anchor.
    answer_tokens: number of scored tokens after it.
  """
  difficulty = None

  def __init__(self, study: Study, prepared_dir: Path, mesh: Mesh):
    self._mesh, experiment = mesh, study.experiment
    self.positions = experiment.evaluation.positions
    self.prompt_tokens = experiment.data.length / 2
    self.answer_tokens = float(experiment.evaluation.num_ahead)
    self._held_out = open_held_out(experiment, prepared_dir, mesh)
    # The same traces for all arms and seeds, so that each text's targets are the same.
    self._seed = experiment.seed
    # Anchors that every arm can use, so that all arms get the same ones. The frozen decoder's are
    # those of the experiment.
    choices = {'experiment': experiment.deliberation, **{
        f'arms.{name}': study.variant(name, study.seeds[0]).deliberation for name in study.arms}}
    check_same_anchor_tokens(choices)
    self._first_anchor = max(choice.first_anchor for choice in choices.values())
    check_reach(experiment, self._held_out, study.name, self._first_anchor)
    self.identity = fingerprint_of({
        'rows': self._held_out.rows.fingerprint, 'seed': self._seed,
        'first_anchor': self._first_anchor})

  def __call__(self, experiment: Experiment, arms: tuple[str, ...], params: Params,
               decoder_params: Params) -> Mapping[str, AheadNLL]:
    """Returns scores by text and ahead position for each arm; see `make_scorer`."""
    experiment = dataclasses.replace(experiment, seed=self._seed)
    scores = score_traces(experiment, arms, params, decoder_params, self._held_out.batches,
                          self._mesh, self._first_anchor)
    return {arm: score.merged(self._held_out.texts) for arm, score in scores.items()}


def open_scorer(study: Study, prepared_dir: Path, mesh: Mesh) -> QuestionScorer | TextScorer:
  """Returns the scorer of a study, on the data in `prepared_dir`."""
  kind = QuestionScorer if study.questions.per_difficulty else TextScorer
  return kind(study, prepared_dir, mesh)
