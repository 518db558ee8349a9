"""Answers scored by us and by lm-evaluation-harness's Hugging Face model: how fast, and how alike.

Both sides get the same token ids and the same weights. For speed they run in turns, torch in a
process of its own. Needs torch, transformers, accelerate and lm_eval.
"""

import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import linen as nn

from latent_deliberation.benchmarks.baseline import (
  LIBRARIES,
  THREADS,
  Baseline,
  Program,
  alternate,
  describe_turns,
  seconds_of,
)
from latent_deliberation.benchmarks.speed_plots import plot_harness
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation import task_catalog
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.evaluation.answer_texts import AnswerEncoder
from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.perplexity import FROZEN, MEAN, OWN, SHUFFLED, ZERO
from latent_deliberation.files import write_json
from latent_deliberation.model import weights

# Our programs, and the arms that each scores. Zero latents of the refining kind are the frozen
# decoder, which is computed once, so the last one has four arms that are all computed.
ARMS: Mapping[str, tuple[str, ...]] = {
    '1 arm': (FROZEN,), '4 arms': (FROZEN, OWN, SHUFFLED, ZERO),
    '4 arms, all computed': (FROZEN, OWN, SHUFFLED, MEAN)}
HF = 'lm_eval hf'
NUM_LATENTS = 4
TOLERANCE = 1e-2  # nats of an answer
Requests = Sequence[tuple[Sequence[int], Sequence[int]]]  # ids of contexts and continuations


def benchmark(decoder: str, coprocessor: str, data: str, tasks: Sequence[str], output: Path, *,
              limit: int, repeats: int, dtype: str, hf_dtype: str,
              hf_batch_size: int) -> dict[str, Any]:
  """Times tasks in turns, and writes `output` with a PNG next to it.

  Args:
    decoder: directory or name of the decoder.
    coprocessor: directory of a coprocessor; '' for one that is not trained, which is as fast.
    data: directories of local data.
    tasks: names of multiple-choice tasks.
    output: JSON file to write.
    limit: items of each task.
    repeats: turns.
    dtype, hf_dtype: dtype of the computation, ours and torch's.
    hf_batch_size: requests of a batch of lm-evaluation-harness.

  Returns: the content of `output`: items per second by task and program, how many times as fast as
    `HF` each of ours is, and how much longer than one arm four take.

  Raises:
    UserError: a library is missing, a task has no data or no choices, or JAX does not compute on
      the CPU, as torch does.
  """
  if jax.default_backend() != 'cpu':
    raise UserError(f'JAX computes on {jax.default_backend()}, and torch on the CPU, so that times '
                    'say nothing: set JAX_PLATFORMS=cpu, or give --compare')
  model = _open(decoder, coprocessor, data, tasks, limit, dtype)
  read = {name: read_task(name, data, limit, model) for name in tasks}
  threads = _usable_cores()
  result: dict[str, Any] = {
      'items_per_second': {}, 'times_as_fast': {}, 'arms_in_times_of_one': {}, 'seconds': {},
      'dtype': model.dtype, 'hf_dtype': hf_dtype, 'hf_batch_size': hf_batch_size, 'limit': limit,
      'decoder': decoder, **describe_turns(repeats), 'threads_of_torch': threads}
  for name, (requests, _) in read.items():
    items = len({request.item for request in requests})
    with tempfile.TemporaryDirectory() as place:
      directory = Path(place) / 'decoder'
      weights.save(directory, model.config, model.params, format='huggingface')
      with Baseline(build_harness, directory, _plain(requests), hf_dtype, hf_batch_size,
                    threads) as baseline:
        logging.info('%s: %d requests in turns', name, len(requests))
        programs = {HF: functools.partial(baseline.seconds, 'score'), **{
            label: functools.partial(seconds_of, _scoring(model, arms, requests))
            for label, arms in ARMS.items()}}
        seconds = alternate(programs, repeats)
    medians = {label: statistics.median(taken) for label, taken in seconds.items()}
    result['seconds'][name] = seconds
    result['items_per_second'][name] = {label: items / taken for label, taken in medians.items()}
    # In pairs, since a turn may be slow for all.
    result['times_as_fast'][name] = {label: statistics.median(
        theirs / ours for theirs, ours in zip(seconds[HF], seconds[label], strict=True))
                                     for label in ARMS}
    result['arms_in_times_of_one'][name] = {
        label: statistics.median(taken / one for taken, one in zip(
            seconds[label], seconds['1 arm'], strict=True)) for label in list(ARMS)[1:]}
    write_json(output, result)  # each task as soon as it is done
  plot_harness(result, output.with_suffix('.png'))
  return result


def compare(decoder: str, data: str, tasks: Sequence[str], output: Path, *, limit: int,
            hf_batch_size: int) -> dict[str, Any]:
  """Scores tasks by both in float32, and writes how far they are apart.

  Returns: the content of `output`: for each task the largest and the mean difference of a
    log-likelihood, the accuracy of both, and the number of items that one of the two has right.

  Raises:
    UserError: a library is missing, or a task has no data.
  """
  model = _open(decoder, '', data, tasks, limit, 'float32')
  read = {name: read_task(name, data, limit, model) for name in tasks}
  result: dict[str, Any] = {'tasks': {}, 'limit': limit, 'decoder': decoder,
                            'tolerance': TOLERANCE, **describe_turns(1)}
  with tempfile.TemporaryDirectory() as place:
    directory = Path(place) / 'decoder'
    weights.save(directory, model.config, model.params, format='huggingface')
    for name, (requests, gold) in read.items():
      ours, is_greedy = np.zeros(len(requests)), np.zeros(len(requests), bool)
      for scored, _ in model.score(requests, (FROZEN,)):
        ours[scored.numbers], is_greedy[scored.numbers] = (
            -scored.nats[:, 0], scored.greedy[:, 0])
      theirs, theirs_greedy = map(np.array, zip(*in_other_process(
          score_by_harness, directory, _plain(requests), 'float32', hf_batch_size), strict=True))
      result['tasks'][name] = _compare_scores(requests, gold, ours, theirs)
      result['tasks'][name]['greedy_differs'] = int((is_greedy != theirs_greedy).sum())
      write_json(output, result)
  return result


def _compare_scores(requests: Sequence[Request], gold: Mapping[int, int], ours: np.ndarray,
                    theirs: np.ndarray) -> dict[str, Any]:
  right = {}
  for side, scores in (('ours', ours), ('theirs', theirs)):
    chosen: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
      chosen.setdefault(request.item, []).append(number)
    right[side] = np.array([int(np.argmax(scores[numbers])) == gold[item]
                            for item, numbers in chosen.items()])
  return {
      'items': len(right['ours']), 'requests': len(requests),
      'largest_difference': float(np.abs(ours - theirs).max()),
      'mean_difference': float(np.abs(ours - theirs).mean()),
      'accuracy': {side: float(values.mean()) for side, values in right.items()},
      'decisions_differ': int((right['ours'] != right['theirs']).sum())}


def _open(decoder: str, coprocessor: str, data: str, tasks: Sequence[str], limit: int,
          dtype: str) -> ArmModel:
  """Checks everything, and loads the decoder with a coprocessor."""
  missing = [name for name in (*LIBRARIES, 'accelerate', 'lm_eval')
             if not importlib.util.find_spec(name)]
  if missing:
    raise UserError(f'{missing} are not installed, and this benchmark needs them: pip install -e '
                    "'.[parity,eval]' accelerate")
  check_integer('limit', limit, 2)
  task_catalog.check_tasks(tasks, data, run_code=False)
  model = open_arm_model(decoder, coprocessor, dtype=dtype)
  if model.own is None:
    # Speed does not depend on what was learned.
    config = DeliberationConfig(num_latents=NUM_LATENTS, num_ahead=8, num_traces=1,
                                trainable='lora', lora_rank=16)
    start = jax.jit(Coprocessor(model.config, config).init)(jax.random.key(0), model.params)
    model.own = CoprocessorCheckpoint(model.config, config, model.fingerprint, '', 0,
                                      params=nn.unbox(start))
  return model


def _usable_cores() -> int:
  """Returns the number of cores of this process, all of which JAX takes."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def read_task(name: str, data: str, limit: int,
              model: ArmModel) -> tuple[list[Request], dict[int, int]]:
  """Returns the requests of a multiple-choice task, and the gold choice of each item.

  Raises:
    UserError: the task has no choices.
  """
  found = task_catalog.requests_of(name, data, limit)
  if found[0][0].OUTPUT_TYPE != 'multiple_choice':
    raise UserError(f'task {name} has no choices: give a multiple-choice task')
  encoder = AnswerEncoder(model.tokenizer, model.max_length)
  return ([encoder.encode(*instance.args[:2], instance.doc_id) for _, instance, _ in found],
          {instance.doc_id: gold.index for _, instance, gold in found})


def _scoring(model: ArmModel, arms: tuple[str, ...],
             requests: Sequence[Request]) -> Callable[[], None]:
  def score() -> None:
    for _ in model.score(requests, arms):
      pass
  return score


def _plain(requests: Sequence[Request]) -> Requests:
  return [(list(request.context), list(request.continuation)) for request in requests]


# --- The other side, in a process of its own ---


def build_harness(directory: Path, requests: Requests, dtype: str, batch_size: int,
                  threads: int) -> dict[str, Program]:
  """Builds the program 'score' of lm-evaluation-harness's Hugging Face model."""
  score = _harness_model(directory, dtype, batch_size, threads)
  return {'score': lambda: score(requests)}


def score_by_harness(directory: Path, requests: Requests, dtype: str,
                     batch_size: int) -> list[tuple[float, bool]]:
  """Returns log-likelihoods, and whether continuations are greedy."""
  # Only eager attention has Gemma 2's soft-cap.
  return _harness_model(directory, dtype, batch_size, THREADS, attn_implementation='eager')(
      requests)


def _harness_model(directory: Path, dtype: str, batch_size: int, threads: int, **options: str,
                   ) -> Callable[[Requests], list[tuple[float, bool]]]:
  import torch
  import transformers
  from lm_eval.models.huggingface import HFLM
  from tokenizers import Tokenizer, models
  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=getattr(torch, dtype), **options)
  # Requests come as ids, so any tokenizer with the special tokens will do.
  vocabulary = {'<pad>': 0, '<eos>': 1, '<bos>': 2, '<unk>': 3}
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>')),
      bos_token='<bos>', eos_token='<eos>', pad_token='<pad>', unk_token='<unk>')
  lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size, device='cpu',
            max_length=2048)

  def score(requests: Requests) -> list[tuple[float, bool]]:
    found = lm._loglikelihood_tokens([(('', ''), context, continuation)
                                      for context, continuation in requests], disable_tqdm=True)
    return [(float(value), bool(greedy)) for value, greedy in found]

  return score


def in_other_process(function: Callable[..., Any], *arguments: Any) -> Any:
  """Returns the result of a function of a module, called in a process of its own."""
  # Unlike multiprocessing's pool, it notices if the process is killed.
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *arguments).result()
