"""Runs benchmarks in several arms: each context is read once, and a stopped run goes on.

  <output>/run.json            what the run depends on; another run needs another directory
  <output>/answers.jsonl       scores and texts of finished batches
  <output>/tasks/TASK.json     outcomes of a finished task
  <output>/samples/ARM/        samples of lm-evaluation-harness, a file a task
  <output>/results.json        everything, for tables and pictures
  <output>/results.md, results.png
  <output>/run.lock            while a command works there

lm-evaluation-harness builds the prompts and judges the answers, once for each arm. Its first
request scores all arms; see task_answers.py.
"""

import collections
import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from latent_deliberation.distributed import barrier
from latent_deliberation.errors import UserError, check_integer, differences
from latent_deliberation.evaluation import task_catalog
from latent_deliberation.evaluation.answer_texts import EncodedCounts
from latent_deliberation.evaluation.answers import ARMS
from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.ledger import Ledger
from latent_deliberation.evaluation.perplexity import CHAIN, FROZEN
from latent_deliberation.evaluation.shared_work import STOP, lead
from latent_deliberation.evaluation.task_answers import Settings, TaskAnswers, mean_cost
from latent_deliberation.evaluation.task_outcomes import (
  WRITTEN,
  ArmOutcomes,
  TaskOutcomes,
  find_gold,
  gold_continuation,
  guesses,
  outcomes_of,
)
from latent_deliberation.evaluation.task_report import summarise, write_results
from latent_deliberation.files import (
  growing_files,
  list_directory,
  lock,
  make_writable,
  remove_tree,
  write_json,
  write_whole,
)
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import RESULTS, RUN_FILE, RUN_LOCK
from latent_deliberation.progress import announced
from latent_deliberation.provenance import git_commit

LAST_NUMBER = 'flexible-extract'  # a filter of lm-evaluation-harness
ANSWERS, TASKS, SAMPLES = 'answers.jsonl', 'tasks', 'samples'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to run.

  Attributes:
    tasks: names of tasks.
    arms: names of `answers.ARMS`, and 'chain' for a chain of thought in the tasks that have one.
    data: data directories; '' for lm-evaluation-harness's own tasks from the hub.
    limit: number of items of each task, the first ones; None for all.
    num_fewshot: examples in a prompt; None for the paper's.
    run_code: whether programs that the model writes may be run.
  """
  tasks: tuple[str, ...]
  arms: tuple[str, ...]
  data: str = ''
  limit: int | None = None
  num_fewshot: int | None = None
  run_code: bool = False

  def check(self) -> None:
    """Checks what is quick: names, numbers, and that there are data.

    Raises:
      UserError: an arm or a task is unknown, or has no data; see `check_tasks`.
    """
    unknown = [arm for arm in self.arms if arm not in (*ARMS, CHAIN)]
    if unknown or not set(self.arms) - {CHAIN}:
      raise UserError(f'arms = {",".join(self.arms)}: give some of {", ".join(ARMS)}; and {CHAIN} '
                      'for a chain of thought beside them')
    if CHAIN in self.arms and not self.data:
      raise UserError(f'arm {CHAIN} needs local data: give --data=DIRECTORY, or leave it out')
    if self.limit is not None:
      check_integer('limit', self.limit, 1)
    if self.num_fewshot is not None:
      check_integer('num_fewshot', self.num_fewshot, 0)
    task_catalog.check_tasks(self.tasks, self.data, self.run_code)

  def check_documents(self) -> None:
    """Reads all documents, on process 0, which has the tasks.

    Raises:
      UserError: a document cannot be used; see `requests_of`.
    """
    if jax.process_index() == 0:
      with announced('reading tasks'):
        for name in self.tasks:
          task_catalog.requests_of(name, self.data, self.limit, self.num_fewshot)


def run_tasks(model: ArmModel, plan: Plan, settings: Settings, output: Path, *,
              overwrite: bool = False) -> dict[str, Any]:
  """Runs the tasks, or what is left of them, and writes the results.

  With several processes all of them call this. Process 0 has the tasks, and the others take part in
  the computation.

  Args:
    model: the decoder and what makes its latents.
    plan: what to run; checked already.
    settings: how latents come.
    output: directory of the results.
    overwrite: whether the results there are removed, those of the same run included.

  Returns: the content of results.json; {} on other processes than 0.

  Raises:
    UserError: the directory holds another run, or another process works there, or an answer cannot
      be scored.
  """
  arms = tuple(arm for arm in ARMS if arm in plan.arms)
  identity = _identity(model, plan, settings)
  if jax.process_index():
    TaskAnswers(model, arms, settings).follow()
    barrier('benchmarks done')
    return {}
  # Whatever can be wrong without a computation, before the directory is this run's.
  answers = TaskAnswers(model, arms, settings)
  identity = _join(output, {
      **identity, 'lm_eval': importlib.metadata.version('lm_eval'),
      'data': task_catalog.data_hashes(plan.tasks, plan.data)}, overwrite)
  finished = {} if overwrite else _read_finished(output)
  _check_requests(answers, plan, [name for name in plan.tasks if name not in finished])
  with lock(output / RUN_LOCK, f'works in {output}'):
    # Another command may have worked here since it was looked at.
    identity = _join(output, identity, overwrite)
    finished = {} if overwrite else _read_finished(output)
    _claim(output, identity, overwrite)
    with growing_files(output, ANSWERS) as here:
      answers = TaskAnswers(model, arms, settings, Ledger(here / ANSWERS))
      for name in plan.tasks:
        if name in finished:
          logging.info('%s is finished already', name)
          continue
        logging.info('=== %s', name)
        finished[name] = _run_task(name, answers, plan, output)
        write_json(_finished(output, name), finished[name].to_json())
    # Tasks of earlier commands stay in the results.
    outcomes = [finished[name] for name in dict.fromkeys((*plan.tasks, *finished))]
    summary = summarise(outcomes, {**identity, 'git_commit': git_commit()})
    write_results(summary, output)
  lead(STOP)
  barrier('benchmarks done')
  return summary


def _identity(model: ArmModel, plan: Plan, settings: Settings) -> dict[str, Any]:
  """Returns what results depend on beside their data, as JSON gives it back."""
  sources = {name: None if checkpoint is None else {
      'fingerprint': fingerprint(checkpoint.params), 'steps': checkpoint.steps,
      **dataclasses.asdict(checkpoint.config)}
             for name, checkpoint in (('coprocessor', model.own), ('constant', model.constant))}
  policy = {key: str(value) if key == 'gate' else value
            for key, value in vars(settings.policy).items()}
  return json.loads(json.dumps({
      'decoder': model.fingerprint, 'vocabulary': model.tokenizer.hash, **sources,
      'dtype': model.dtype, 'max_length': model.max_length, 'arms': sorted(plan.arms),
      'limit': plan.limit, 'num_fewshot': plan.num_fewshot, 'from_hub': not plan.data,
      'place': settings.place, 'policy': policy, 'plain_if_short': settings.plain_if_short}))


def _finished(output: Path, name: str) -> Path:
  return output / TASKS / f'{name}.json'


def _read_finished(output: Path) -> dict[str, TaskOutcomes]:
  """Returns the outcomes of finished tasks by name.

  Raises:
    UserError: a file is damaged, or of something else.
  """
  found = {}
  for path in list_directory(output / TASKS):
    if path.suffix != '.json':
      continue
    try:
      found[path.stem] = TaskOutcomes.from_json(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f'{path} holds no outcomes of a task ({type(error).__name__}: {error}): '
                      'remove it, and the task is scored again from answers.jsonl') from error
  return found


def _check_requests(answers: TaskAnswers, plan: Plan, names: Sequence[str]) -> None:
  """Checks the requests of tasks as far as the tokenizer can tell: their places and lengths.

  Raises:
    UserError: a request cannot be scored or continued; see TaskAnswers.
  """
  for name in names:
    with announced(f'checking {name}'):
      _check_task(name, answers, plan)
      if CHAIN in plan.arms and name in task_catalog.CHAIN_OF:
        _check_task(task_catalog.CHAIN_OF[name], answers.frozen(), plan, scores_gold=False)


def _check_task(name: str, answers: TaskAnswers, plan: Plan, scores_gold: bool = True) -> None:
  found = collections.defaultdict(list)
  for task, instance, gold in task_catalog.requests_of(name, plan.data, plan.limit,
                                                       plan.num_fewshot):
    found[task.task_name].append((task, instance, gold))
  for name_of_part, requests in found.items():
    task, instance, _ = requests[0]
    items = [f'{name_of_part} {instance.doc_id}' for _, instance, _ in requests]
    if task.OUTPUT_TYPE != WRITTEN:
      answers.check(name_of_part, [instance.args for _, instance, _ in requests], items)
      continue
    prompts = [instance.args[0] for _, instance, _ in requests]
    answers.check_prompts(name_of_part, prompts, instance.args[1])
    if scores_gold:
      answers.check(f'{name_of_part}/gold', [
          (prompt, gold_continuation(task, gold))
          for prompt, (*_, gold) in zip(prompts, requests, strict=True)], items)


def _join(output: Path, identity: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
  """Returns the identity, with the data of earlier tasks. Tasks may be added later.

  Raises:
    UserError: there are results of another run, or the directory is of another kind of job.
  """
  saved, data = _read_identity(output), identity['data']
  if saved is None:
    # Without run.json these may be scores of any decoder, or files of somebody else.
    unknown = [name for name in (ANSWERS, TASKS, SAMPLES) if (output / name).exists()]
    if unknown:
      raise UserError(f'{output} holds {", ".join(unknown)} and no {RUN_FILE}, which says what '
                      'they are of: restore it, or give another --output')
    if not overwrite and (output / f'{RESULTS}.json').exists():
      raise UserError(f'{output} holds a {RESULTS}.json of something else: give another --output, '
                      'or add --overwrite')
  if saved is None or overwrite:
    return dict(identity)
  saved_data = saved.get('data', {})
  found = [*differences({**saved, 'data': {}}, {**identity, 'data': {}}),
           *differences({name: saved_data.get(name, value) for name, value in data.items()},
                        data, 'data of ')]
  if found:
    raise UserError('\n'.join([f'{output} holds results of another run:', *found,
                               'Give another --output, or add --overwrite.']))
  return {**identity, 'data': {**saved_data, **data}}


def check_output(output: Path) -> None:
  """Raises UserError where a directory is of another kind of job, or its run.json is damaged."""
  if jax.process_index() == 0:
    _read_identity(output)


def _read_identity(output: Path) -> dict[str, Any] | None:
  """Returns the identity of the benchmarks in a directory; None where there are none.

  Raises:
    UserError: run.json is damaged, or of a training, a study or a quickstart.
  """
  path = output / RUN_FILE
  if not path.exists():
    return None
  try:
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(
        f'{path} is not JSON ({error}): restore it, or give another --output') from error
  # Never overwritten: other jobs need their run.json to be resumed.
  if not isinstance(saved, dict) or 'lm_eval' not in saved:
    raise UserError(f'{path} is not of benchmarks: give another --output')
  return saved


def _claim(output: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
  """Notes whose results these are; removes those of before where that is asked for."""
  make_writable(output)
  if overwrite:
    for name in (TASKS, SAMPLES):
      remove_tree(output / name)
      if (output / name).exists():
        raise UserError(f'{output / name} cannot be removed: remove it, or give another --output')
    for name in (ANSWERS, *(f'{RESULTS}.{ending}' for ending in ('json', 'md', 'png'))):
      (output / name).unlink(missing_ok=True)
  write_json(output / RUN_FILE, identity)


def _run_task(name: str, answers: TaskAnswers, plan: Plan, output: Path) -> TaskOutcomes:
  """Runs one task in every arm."""
  begun = time.monotonic()
  arms: dict[str, ArmOutcomes] = {}
  shared: dict[str, Any] = {}
  tasks = task_catalog.load_tasks(name, plan.data, plan.num_fewshot)
  counts: list[EncodedCounts] = []
  for arm in (*answers.arms, *((CHAIN,) if CHAIN in plan.arms else ())):
    found, tasks_of_arm, answers_of_arm = name, tasks, answers
    if arm == CHAIN:
      if name not in task_catalog.CHAIN_OF:
        continue
      found, answers_of_arm = task_catalog.CHAIN_OF[name], answers.frozen()
      tasks_of_arm = task_catalog.load_tasks(found, plan.data, plan.num_fewshot)
    samples = _evaluate(found, answers_of_arm, FROZEN if arm == CHAIN else arm, plan)
    _write_samples(output / SAMPLES / arm, samples)
    items = [f'{task} {sample["doc_id"]}' for task, rows in samples.items() for sample in rows]
    golds = [find_gold(tasks_of_arm[task], sample['doc'])
             for task, rows in samples.items() for sample in rows]
    prompts = [sample['prompt_hash'] for rows in samples.values() for sample in rows]
    if arm != CHAIN:
      # Pairing needs the same prompts in every arm.
      if shared and shared['prompts'] != prompts:
        raise AssertionError(f'task {name} has other prompts in arm {arm}: it draws them anew')
      shared = shared or {'items': items, 'golds': golds, 'prompts': prompts}
    arms[arm], metric = _outcomes(answers_of_arm, tasks_of_arm, samples, golds, arm)
    shared.setdefault('metric', metric)
    if arm == CHAIN:
      counts += answers_of_arm.counts.values()  # its prompts are its own
  chance, majority = guesses(shared['golds'])
  # Of written tasks, prompts and gold answers are counted apart, and their contexts are the same.
  names = [(task, f'{task}/gold') for task in tasks]
  counts += [answers.counts[each] for pair in names for each in pair if each in answers.counts]
  short = sum(max(answers.short.get(each, 0) for each in pair) for pair in names)
  return TaskOutcomes(
      name, shared['metric'], task_catalog.shots_shown(name, plan.data, plan.num_fewshot),
      shared['items'],
      chance, majority, arms, sum(count.truncated for count in counts),
      sum(count.merged for count in counts), short, round(time.monotonic() - begun, 1),
      git_commit())


def _evaluate(name: str, answers: TaskAnswers, arm: str,
              plan: Plan) -> dict[str, list[dict[str, Any]]]:
  """Returns the samples of a task in one arm, by task of lm-evaluation-harness."""
  from latent_deliberation.evaluation.harness import DeliberationLM, simple_evaluate
  results = simple_evaluate(
      model=DeliberationLM.of(answers, arm), tasks=task_catalog.names_of(name, plan.data),
      task_manager=task_catalog.open_tasks(name, plan.data, plan.num_fewshot), limit=plan.limit,
      num_fewshot=task_catalog.shots_of(name, plan.data, plan.num_fewshot),
      bootstrap_iters=0, log_samples=True, fewshot_as_multiturn=False,
      confirm_run_unsafe_code=plan.run_code)
  return {task: _one_filter(samples) for task, samples in results['samples'].items()}


def _one_filter(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the samples of one filter, in the order of the documents.

  It is the one that takes the last number of a text, as GSM8K's, or else the first.
  """
  filters = [sample['filter'] for sample in samples]
  name = LAST_NUMBER if LAST_NUMBER in filters else filters[0]
  return sorted((sample for sample in samples if sample['filter'] == name),
                key=lambda sample: sample['doc_id'])


def _outcomes(answers: TaskAnswers, tasks: Mapping[str, Any],
              samples: Mapping[str, Sequence[dict[str, Any]]], golds: Sequence[Any],
              arm: str) -> tuple[ArmOutcomes, str]:
  """Returns the outcomes of an arm on all items, and the metric."""
  parts, metric, tokens, flops, start = [], '', 0.0, 0.0, 0
  for task, rows in samples.items():
    of_task = golds[start:start + len(rows)]
    start += len(rows)
    nats = []
    # The gold answer of a written task is scored beside what was written.
    if tasks[task].OUTPUT_TYPE == WRITTEN and arm != CHAIN:
      pairs = [(row['arguments'][0][0], gold_continuation(tasks[task], gold))
               for row, gold in zip(rows, of_task, strict=True)]
      scores = answers.score(f'{task}/gold', pairs, [f'{task} {row["doc_id"]}' for row in rows])
      nats = [value for value, _ in scores[arm]]
    part, metric = outcomes_of(tasks[task], rows, nats)
    parts.append(part)
    cost = answers.costs[task, FROZEN if arm == CHAIN else arm]
    tokens, flops = tokens + cost.tokens, flops + cost.flops
  joined = ArmOutcomes(*(
      [value for part in parts for value in getattr(part, key)]
      for key in ('nats', 'p', 'correct', 'norm')))
  joined.texts = [text for part in parts for text in part.texts]
  joined.cost = mean_cost(tokens, flops, len(joined.correct))
  return joined, metric


def _write_samples(directory: Path, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
  """Writes lm-evaluation-harness's samples, a JSON object a line, as its own log has them."""
  for task, rows in samples.items():
    lines = [json.dumps(row, default=_plain, ensure_ascii=False) for row in rows]
    write_whole(directory / f'samples_{task}.jsonl', ('\n'.join(lines) + '\n').encode())


def _plain(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic) else str(value)
