"""Benchmarks during training: a fixed sample of chosen tasks, scored at every evaluation.

training/train.py imports this module only where `evaluation.tasks` names tasks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.errors import UserError, raise_problems
from latent_deliberation.evaluation import task_catalog
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.evaluation.answer_texts import AnswerEncoder
from latent_deliberation.evaluation.answers import AnswerScorer, Source
from latent_deliberation.evaluation.perplexity import FROZEN, OWN, SHUFFLED
from latent_deliberation.evaluation.shared_work import from_leader
from latent_deliberation.evaluation.task_outcomes import WRITTEN, gold_continuation
from latent_deliberation.experiment import EvaluationConfig, Experiment
from latent_deliberation.inference.tokenizer import Tokenizer, tokenizer_of_data
from latent_deliberation.progress import announced

MAX_LENGTH = 1024  # tokens of a context and its answer


@dataclasses.dataclass(frozen=True)
class Sample:
  """The items of a task that are scored.

  Attributes:
    requests: continuations of all items, one item after the other.
    gold: for each item, the number of the request with its gold answer.
    items: for each request, the number of its item.
    is_choice: whether the item is right if its gold answer is the likeliest of its requests;
      otherwise it is right if greedy decoding would write it.
  """
  requests: list[Request]
  gold: np.ndarray
  items: np.ndarray
  is_choice: bool


def check(config: EvaluationConfig) -> None:
  """Checks tasks and their files, before any long work.

  Raises:
    UserError: a task is unknown or has no data; or it runs programs.
  """
  if not config.task_data:
    raise UserError(f'evaluation.tasks = {config.tasks}: set evaluation.task_data to the directory '
                    'with their data')
  known = set(task_catalog.local_names())
  raise_problems(f'evaluation.tasks has {name!r}, which runs programs: training scores answers '
                 'alone, so leave it out' for name in known & set(config.tasks)
                 if task_catalog.task_file(f'{name}.yaml').get('unsafe_code'))
  task_catalog.check_tasks(config.tasks, config.task_data, run_code=False)


def read_samples(experiment: Experiment, prepared_dir: Path) -> dict[str, Sample]:
  """Reads the items to score of each task, without any weights.

  Items without room for latents are left out.

  Args:
    experiment: the whole configuration.
    prepared_dir: directory of the prepared data, with the vocabulary.

  Raises:
    UserError: no item of a task has room for latents; or see `requests_of`.
  """
  tokenizer = tokenizer_of_data(experiment.data, prepared_dir)
  # Process 0 has lm-evaluation-harness, whose samples may differ from host to host.
  plain = None
  if jax.process_index() == 0:
    with announced('reading tasks'):
      first = experiment.deliberation.first_anchor
      plain = {name: _read(name, experiment.evaluation, tokenizer, first)
               for name in experiment.evaluation.tasks}
  return {name: _sample(values) for name, values in from_leader(plain).items()}


def make_evaluator(experiment: Experiment, deliberator: Deliberator, decoder_params: Params,
                   samples: Mapping[str, Sample],
                   mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Returns an evaluator of the coprocessor's parameters.

  Its values are by task, as in 'piqa/gain'. 'gain' is nats that own latents take off the gold
  answer, against the frozen decoder. 'content' is the same against another example's latents.
  'accuracy' and 'frozen_accuracy' are fractions. Of tasks whose answers are written, the gold
  answer is scored, and counts as right if greedy decoding would write it.

  Args:
    experiment: the whole configuration.
    deliberator: decoder and coprocessor.
    decoder_params: weights of the frozen decoder.
    samples: items of each task; see `read_samples`.
    mesh: devices of the training.
  """
  scorers: list[AnswerScorer] = []

  def evaluate(params: Params) -> Mapping[str, float]:
    if not scorers:
      scorers.append(AnswerScorer(
          deliberator.decoder, decoder_params, (FROZEN, OWN, SHUFFLED), mesh=mesh,
          rules=experiment.rules, own=Source(deliberator.coprocessor, params)))
    scorers[0].set_params(params)
    return {f'{name}/{key}': value for name, sample in samples.items()
            for key, value in _score(scorers[0], sample).items()}

  return evaluate


def _read(name: str, config: EvaluationConfig, tokenizer: Tokenizer,
          first_anchor: int) -> dict[str, Any]:
  """Returns the requests of a task's first items, as JSON values.

  Items without room for latents, whose gain would be zero, are left out.

  Raises:
    UserError: no item has room for latents; or see `requests_of`.
  """
  encoder = AnswerEncoder(tokenizer, MAX_LENGTH)
  by_item: dict[int, list[tuple[Request, bool]]] = {}
  for task, instance, answer in task_catalog.requests_of(name, config.task_data,
                                                         config.task_items):
    context, continuation = instance.args[:2]
    if task.OUTPUT_TYPE == WRITTEN:
      continuation = gold_continuation(task, answer)
    by_item.setdefault(instance.doc_id, []).append((
        encoder.encode(context, continuation, instance.doc_id),
        answer.index is None or instance.idx == answer.index))
  fit = [requests for requests in by_item.values()
         if all(request.anchor >= first_anchor for request, _ in requests)]
  if not fit:
    raise UserError(f'evaluation.tasks has {name!r}, but none of its {len(by_item)} items has room '
                    'for the latents: leave it out, or raise evaluation.task_items')
  if encoder.counts.truncated or len(fit) < len(by_item):
    logging.warning('%s: %d of %d requests have more than %d tokens, and are cut at the left; %d '
                    'of %d items have no room for latents, and are left out', name,
                    encoder.counts.truncated, encoder.counts.requests, MAX_LENGTH,
                    len(by_item) - len(fit), len(by_item))
  flat = [(item, request, is_gold) for item, requests in enumerate(fit)
          for request, is_gold in requests]
  return {'requests': [[request.context, request.continuation, request.anchor]
                       for _, request, _ in flat],
          'gold': [number for number, (*_, is_gold) in enumerate(flat) if is_gold],
          'items': [item for item, *_ in flat], 'is_choice': task.OUTPUT_TYPE == 'multiple_choice'}


def _sample(values: Mapping[str, Any]) -> Sample:
  requests = [Request(tuple(context), tuple(continuation), anchor, item)
              for (context, continuation, anchor), item in zip(
                  values['requests'], values['items'], strict=True)]
  return Sample(requests, np.array(values['gold']), np.array(values['items']),
                values['is_choice'])


def _score(scorer: AnswerScorer, sample: Sample) -> dict[str, float]:
  nats = np.zeros((len(sample.requests), len(scorer.arms)))
  greedy = np.zeros(nats.shape, bool)
  for scored, _ in scorer.score(sample.requests):
    nats[scored.numbers], greedy[scored.numbers] = scored.nats, scored.greedy
  frozen, own, shuffled = nats[sample.gold].mean(axis=0)
  right = _right(nats, sample) if sample.is_choice else greedy[sample.gold]
  return {'gain': frozen - own, 'content': shuffled - own,
          'frozen_accuracy': right[:, 0].mean(), 'accuracy': right[:, 1].mean()}


def _right(nats: np.ndarray, sample: Sample) -> np.ndarray:
  """Returns whether the gold answer is the first likeliest of its item's, bool [items, arms]."""
  firsts = np.flatnonzero(np.diff(sample.items, prepend=-1))
  chosen = [first + answers.argmin(axis=0) for first, answers in zip(
      firsts, np.split(nats, firsts[1:]), strict=True)]
  return np.array(chosen) == sample.gold[:, None]
