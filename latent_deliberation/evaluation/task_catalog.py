"""The benchmarks by name: those of the paper with their shots, from local data or from the hub.

Local tasks are the files in tasks/. Without local data, lm-evaluation-harness's own tasks are
taken, but for a few, and documents are downloaded. The library is imported where tasks are loaded,
since that is slow.
"""

import difflib
import functools
import hashlib
import importlib.util
import logging as python_logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from latent_deliberation.errors import UserError, problems_of, raise_problems
from latent_deliberation.evaluation.code_execution import check_isolation
from latent_deliberation.evaluation.task_files import TASKS, find_file
from latent_deliberation.evaluation.task_outcomes import Gold, find_gold

# The paper's benchmarks and their examples in a prompt (table 2), under our names.
PAPER: Mapping[str, int] = {
    'mmlu': 5, 'gsm8k': 8, 'drop': 3, 'arc_easy': 0, 'arc_challenge': 0, 'math': 4,
    'winogrande': 0, 'piqa': 0, 'social_iqa': 0, 'hellaswag': 0, 'boolq': 0, 'mbpp': 3,
    'agieval': 0, 'triviaqa': 0, 'nq_open': 0, 'humaneval': 0, 'bbh': 3}
# Names of lm-evaluation-harness where they differ.
HUB: Mapping[str, tuple[str, ...]] = {
    'math': ('minerva_math',), 'bbh': ('bbh_cot_fewshot',), 'lambada': ('lambada_openai',),
    # The English tasks with choices; the library's own group has one more, which has none.
    'agieval': tuple(f'agieval_{part}' for part in (
        'aqua_rat', 'gaokao_english', 'logiqa_en', 'lsat_ar', 'lsat_lr', 'lsat_rc', 'sat_en',
        'sat_en_without_passage', 'sat_math'))}
# These are our own task files with documents of the hub. The library's tasks of programs run them
# without isolation, and the examples of its DROP show names of fields for answers.
OURS = ('drop', 'mbpp', 'humaneval')
NO_HUB = ('gsm8k_chain', 'agieval_math')
FEWSHOT_SEED = 1234  # the library's own, with which it draws examples
MATH_LIBRARIES = ('sympy', 'math_verify', 'antlr4')  # that judge the hub's `math`
CHAIN_OF = {'gsm8k': 'gsm8k_chain'}  # task -> the same questions, with a chain of thought


def task_file(name: str) -> dict[str, Any]:
  """Returns the values of a task file, with those that it includes and without its functions."""
  with (TASKS / name).open() as file:
    values = yaml.load(file, Loader=_Loader)
  included = values.pop('include', None)
  return {**(task_file(included) if included else {}), **values}


class _Loader(yaml.SafeLoader):
  """Reads task files; a function becomes its name."""


_Loader.add_constructor('!function', lambda loader, node: loader.construct_scalar(node))


def local_names() -> list[str]:
  """Returns the names of all local tasks."""
  return sorted(path.stem for path in TASKS.glob('*.yaml'))


def check_tasks(tasks: Sequence[str], data: str, run_code: bool) -> None:
  """Checks names and files of tasks, before long work.

  Args:
    tasks: names of tasks.
    data: data directories, with the system's separator of paths between; '' for the hub.
    run_code: whether programs that the model writes may be run.

  Raises:
    UserError: a task is unknown, has no data, or runs programs that may not be run. The message has
      a line for each.
  """
  if not tasks:
    raise UserError('no task is given: name some, such as --tasks=piqa,arc_easy; or --tasks=paper')
  known, problems, runs_code = local_names(), [], False
  for name in tasks:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
      hint = f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(known)}'
      problems.append(f'task {name!r} is unknown: {hint}')
      continue
    values = task_file(f'{name}.yaml')
    runs_code |= (is_code := bool(values.get('unsafe_code')))
    if is_code and not run_code:
      problems.append(f'task {name} runs programs that the model writes: allow it with --run_code, '
                      'or leave the task out')
    if not data and name == 'math' and (
        missing := [each for each in MATH_LIBRARIES if not importlib.util.find_spec(each)]):
      problems.append(f'task math of the hub needs {", ".join(missing)}, which are not installed: '
                      "pip install 'lm_eval[math]==0.4.13', or give --data=DIRECTORY")
    if not data and name in NO_HUB:
      problems.append(f'task {name} needs local data: give --data=DIRECTORY')
    elif data:
      given = values['dataset_kwargs']
      for file in given['files'].values():
        problems += problems_of(lambda folder=given['folder'], file=file: find_file(
            data, folder, file))
  raise_problems(dict.fromkeys(problems))
  if runs_code:
    check_isolation()


def expand(tasks: Sequence[str]) -> list[str]:
  """Returns names of tasks, each once, with 'paper' for all those of the paper."""
  return list(dict.fromkeys(
      name for each in tasks for name in (PAPER if each == 'paper' else (each,))))


def quieten() -> None:
  """Keeps the library's warnings about its own task files out of the log."""
  python_logging.getLogger('lm_eval').setLevel(python_logging.ERROR)


def stay_offline() -> None:
  """Keeps Hugging Face's libraries from the network, unless variables say otherwise.

  They read the variables when they are imported.
  """
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE'):
    os.environ.setdefault(name, '1')


def data_hashes(tasks: Sequence[str], data: str) -> dict[str, str]:
  """Returns a hash of the data files of each task; {} for data of the hub."""
  hashes = {}
  for name in tasks if data else ():
    given, found = task_file(f'{name}.yaml')['dataset_kwargs'], hashlib.sha256()
    for file in given['files'].values():
      found.update(hashlib.sha256(find_file(data, given['folder'], file).read_bytes()).digest())
    hashes[name] = found.hexdigest()
  return hashes


def open_tasks(name: str, data: str, num_fewshot: int | None) -> Any:
  """Returns the manager of lm-evaluation-harness that has a task: of our tasks, or of its own."""
  return _open_manager(data, num_fewshot, _is_ours(name, data))


def _is_ours(name: str, data: str) -> bool:
  """Whether a task is one of our files, and not the library's own."""
  return bool(data) or name in OURS


@functools.cache
def _open_manager(data: str, num_fewshot: int | None, is_ours: bool) -> Any:
  if data:
    stay_offline()
  from latent_deliberation.evaluation import harness
  quieten()
  if not is_ours:
    return harness.TaskManager()
  # Task files get these values. Those with examples in their documents take the number from here.
  shots = {} if num_fewshot is None else {'shots': num_fewshot}
  return harness.TaskManager(include_defaults=False, include_path=str(TASKS),
                             metadata={'data': data, **shots})


def load_tasks(name: str, data: str, num_fewshot: int | None) -> dict[str, Any]:
  """Returns the tasks of lm-evaluation-harness that a task consists of, by name."""
  return open_tasks(name, data, num_fewshot).load(names_of(name, data))['tasks']


def names_of(task: str, data: str) -> list[str]:
  """Returns the names of a task in its manager: ours with data, otherwise the library's own."""
  return [task] if _is_ours(task, data) else list(HUB.get(task, (task,)))


def requests_of(name: str, data: str, limit: int | None,
                num_fewshot: int | None = None) -> list[tuple[Any, Any, Gold]]:
  """Returns the requests of a task: its task in lm-evaluation-harness, an instance, and the gold.

  Args:
    name: name of the task.
    data: data directories; '' for the hub.
    limit: number of items, the first ones; None for all.
    num_fewshot: examples in a prompt; None for the task's own.

  Raises:
    UserError: a document lacks a field or a gold answer, or there are not as many examples.
  """
  # Says so where the library is missing, with which jinja2 comes.
  open_tasks(name, data, num_fewshot)
  import jinja2
  requests = []
  try:
    for task in load_tasks(name, data, num_fewshot).values():
      task.set_fewshot_seed(FEWSHOT_SEED)
      shots = shots_of(name, data, num_fewshot)
      # As the library does it: no examples in a task that says so itself.
      if task.config.num_fewshot != 0:
        task.set_config('num_fewshot', task.config.num_fewshot or 0 if shots is None else shots)
      _build_requests(task, name, limit)
      golds: dict[int, Gold] = {}
      for instance in task.instances:
        if instance.doc_id not in golds:
          golds[instance.doc_id] = find_gold(task, instance.doc)
        requests.append((task, instance, golds[instance.doc_id]))
  except jinja2.UndefinedError as error:
    raise UserError(f'task {name} has a document without a field that its prompt needs ({error}): '
                    'give documents with the fields that docs/benchmarks.md names') from error
  return requests


def _build_requests(task: Any, name: str, limit: int | None) -> None:
  """Builds a task's requests; raises UserError where it has fewer examples than are requested."""
  try:
    task.build_all_requests(limit=limit)
  except UserError:
    raise
  except (AssertionError, ValueError) as error:  # of the library's choice of examples
    raise UserError(f'task {name} cannot build prompts with {task.config.num_fewshot or 0} '
                    f'examples ({error}): lower --num_fewshot, or give more documents, with the '
                    'fields that docs/benchmarks.md names') from error


def shots_of(task: str, data: str, num_fewshot: int | None) -> int | None:
  """Returns the number of examples to ask lm-evaluation-harness for; None for the task's own."""
  if num_fewshot is not None or _is_ours(task, data):
    return num_fewshot
  return PAPER.get(task)


def shots_shown(task: str, data: str, num_fewshot: int | None) -> int:
  """Returns the number of examples in the prompts of a task, for tables."""
  # Our own files of these have none.
  if _is_ours(task, data) and task in (*CHAIN_OF.values(), 'agieval', 'agieval_math', 'humaneval'):
    return 0
  return PAPER.get(task, 0) if num_fewshot is None else num_fewshot
