"""Runs benchmarks in several arms: each context is read once, and a stopped run goes on.

  <output>/run.json            what the run depends on; another run needs another directory
  <output>/answers.jsonl       scores and texts of finished batches
  <output>/tasks/TASK.json     outcomes of a finished task
  <output>/samples/ARM/        samples of lm-evaluation-harness, a file a task
  <output>/results.json        everything, for tables and pictures
  <output>/results.md, results.png

lm-evaluation-harness builds the prompts and judges the answers, once for each arm. Its first
request scores all arms; see task_answers.py.
"""

import dataclasses
import json
import shutil
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
from latent_deliberation.evaluation.answers import ARMS
from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.ledger import Ledger
from latent_deliberation.evaluation.perplexity import FROZEN
from latent_deliberation.evaluation.shared_work import END, lead
from latent_deliberation.evaluation.task_answers import Settings, TaskAnswers, mean_cost
from latent_deliberation.evaluation.task_outcomes import (
  ArmOutcomes,
  TaskOutcomes,
  find_gold,
  guesses,
  outcomes_of,
)
from latent_deliberation.evaluation.task_report import summarise, write_results
from latent_deliberation.files import make_writable, write_json, write_whole
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import RESULTS, RUN_FILE
from latent_deliberation.provenance import git_commit

CHAIN = 'chain'  # the arm in which the frozen decoder writes a chain of thought first
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
    """Checks everything that needs no weights.

    Raises:
      UserError: an arm or a task is unknown, or data are missing; see `check_tasks`.
    """
    unknown = [arm for arm in self.arms if arm not in (*ARMS, CHAIN)]
    if unknown or not set(self.arms) - {CHAIN}:
      raise UserError(f'arms = {",".join(self.arms)}: give some of {", ".join(ARMS)}; and {CHAIN} '
                      'for a chain of thought beside them')
    if self.limit is not None:
      check_integer('limit', self.limit, 1)
    if self.num_fewshot is not None:
      check_integer('num_fewshot', self.num_fewshot, 0)
    task_catalog.check_tasks(self.tasks, self.data, self.run_code)


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
    overwrite: whether the results of another run there may be removed.

  Returns: the content of results.json; {} on other processes than 0.

  Raises:
    UserError: the directory holds another run, or an answer cannot be scored.
  """
  arms = tuple(arm for arm in ARMS if arm in plan.arms)
  identity = _identity(model, plan, settings)
  if jax.process_index():
    TaskAnswers(model, arms, settings).follow()
    barrier('benchmarks done')
    return {}
  make_writable(output)
  _claim(output, identity, overwrite)
  answers = TaskAnswers(model, arms, settings, Ledger(output / ANSWERS))
  outcomes = []
  manager = None
  for name in plan.tasks:
    finished = output / TASKS / f'{name}.json'
    if finished.exists():
      logging.info('%s is finished already', name)
      outcomes.append(TaskOutcomes.from_json(json.loads(finished.read_bytes())))
      continue
    manager = manager or task_catalog.open_tasks(plan.data, plan.num_fewshot)
    logging.info('=== %s', name)
    done = _run_task(name, answers, plan, manager, output)
    write_json(finished, done.to_json())
    outcomes.append(done)
  summary = summarise(outcomes, {**identity, 'git_commit': git_commit()})
  write_results(summary, output)
  lead(END)
  barrier('benchmarks done')
  return summary


def _identity(model: ArmModel, plan: Plan, settings: Settings) -> dict[str, Any]:
  """Returns everything that results depend on, as JSON gives it back. Tasks may be added later."""
  sources = {name: None if checkpoint is None else {
      'fingerprint': fingerprint(checkpoint.params), 'steps': checkpoint.steps,
      **dataclasses.asdict(checkpoint.config)}
             for name, checkpoint in (('coprocessor', model.own), ('constant', model.constant))}
  policy = {key: str(value) if key == 'gate' else value
            for key, value in vars(settings.policy).items()}
  return json.loads(json.dumps({
      'decoder': model.fingerprint, **sources, 'dtype': model.dtype,
      'max_length': model.max_length, 'arms': sorted(plan.arms), 'limit': plan.limit,
      'num_fewshot': plan.num_fewshot, 'from_hub': not plan.data, 'place': settings.place,
      'policy': policy, 'plain_if_short': settings.plain_if_short}))


def _claim(output: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
  """Notes whose results these are.

  Raises:
    UserError: there are results of another run.
  """
  path = output / RUN_FILE
  if path.exists():
    saved = json.loads(path.read_bytes())
    if saved == identity:
      return
    if not overwrite:
      raise UserError('\n'.join([f'{output} holds results of another run:',
                                 *differences(saved, identity),
                                 'Give another --output, or add --overwrite.']))
    for name in (TASKS, SAMPLES):
      shutil.rmtree(output / name, ignore_errors=True)
    (output / ANSWERS).unlink(missing_ok=True)
  elif (output / f'{RESULTS}.json').exists() and not overwrite:
    raise UserError(f'{output} holds a {RESULTS}.json of something else: give another --output, or '
                    'add --overwrite')
  write_json(path, dict(identity))


def _run_task(name: str, answers: TaskAnswers, plan: Plan, manager: Any,
              output: Path) -> TaskOutcomes:
  """Runs one task in every arm."""
  begun = time.monotonic()
  arms: dict[str, ArmOutcomes] = {}
  shared: dict[str, Any] = {}
  tasks = _load(name, plan, manager)
  for arm in (*answers.arms, *((CHAIN,) if CHAIN in plan.arms else ())):
    if arm == CHAIN:
      if name not in task_catalog.CHAIN_OF or not plan.data:
        continue
      found, tasks_of_arm = task_catalog.CHAIN_OF[name], None
    else:
      found, tasks_of_arm = name, tasks
    samples = _evaluate(found, answers, FROZEN if arm == CHAIN else arm, plan, manager)
    _write_samples(output / SAMPLES / arm, samples)
    tasks_of_arm = tasks_of_arm or _load(found, plan, manager)
    items = [f'{task} {sample["doc_id"]}' for task, rows in samples.items() for sample in rows]
    golds = [find_gold(tasks_of_arm[task], sample['doc'])
             for task, rows in samples.items() for sample in rows]
    prompts = [sample['prompt_hash'] for rows in samples.values() for sample in rows]
    if arm != CHAIN:
      # Pairing needs the same prompts in every arm.
      if shared and shared['prompts'] != prompts:
        raise AssertionError(f'task {name} has other prompts in arm {arm}: it draws them anew')
      shared = shared or {'items': items, 'golds': golds, 'prompts': prompts}
    arms[arm], metric = _outcomes(name, answers, tasks_of_arm, samples, golds, arm)
    shared.setdefault('metric', metric)
  chance, majority = guesses(shared['golds'])
  counts = [count for task, count in answers.counts.items() if task in tasks]
  return TaskOutcomes(
      name, shared['metric'], task_catalog.shots_shown(name, plan.num_fewshot), shared['items'],
      chance, majority, arms, sum(count.truncated for count in counts),
      sum(count.merged for count in counts), sum(answers.short.get(task, 0) for task in tasks),
      round(time.monotonic() - begun, 1))


def _load(name: str, plan: Plan, manager: Any) -> dict[str, Any]:
  """Returns the tasks of lm-evaluation-harness that a task consists of, by name."""
  return manager.load([name if plan.data else task_catalog.hub_name(name)])['tasks']


def _evaluate(name: str, answers: TaskAnswers, arm: str, plan: Plan,
              manager: Any) -> dict[str, list[dict[str, Any]]]:
  """Returns the samples of a task in one arm, by task of lm-evaluation-harness."""
  from latent_deliberation.evaluation.harness import DeliberationLM, simple_evaluate
  results = simple_evaluate(
      model=DeliberationLM.of(answers, arm),
      tasks=[name if plan.data else task_catalog.hub_name(name)], task_manager=manager,
      limit=plan.limit, num_fewshot=task_catalog.shots_of(name, plan.data, plan.num_fewshot),
      bootstrap_iters=0, log_samples=True, fewshot_as_multiturn=False,
      confirm_run_unsafe_code=plan.run_code)
  return {task: _first_filter(samples) for task, samples in results['samples'].items()}


def _first_filter(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the samples of the first filter, in the order of the documents."""
  name = samples[0]['filter']
  return sorted((sample for sample in samples if sample['filter'] == name),
                key=lambda sample: sample['doc_id'])


def _outcomes(name: str, answers: TaskAnswers, tasks: Mapping[str, Any],
              samples: Mapping[str, Sequence[dict[str, Any]]], golds: Sequence[Any],
              arm: str) -> tuple[ArmOutcomes, str]:
  """Returns the outcomes of an arm on all items, and the metric."""
  parts, metric, tokens, flops, start = [], '', 0.0, 0.0, 0
  for task, rows in samples.items():
    of_task = golds[start:start + len(rows)]
    start += len(rows)
    nats = []
    # The gold answer of a written task is scored beside what was written.
    if tasks[task].OUTPUT_TYPE == 'generate_until' and arm != CHAIN:
      delimiter = tasks[task].config.target_delimiter
      pairs = [(row['arguments'][0][0], f'{delimiter}{gold.text}')
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
