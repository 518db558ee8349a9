"""What the task files in tasks/ need of Python: their documents, and results beyond a metric.

`load` reads the files of a task into the form of lm-evaluation-harness. The task files name it and
the functions below it, so loading a task also registers our model; see harness.py.
"""

import collections
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.evaluation import harness
from latent_deliberation.evaluation.code_execution import check_isolation, run_program
from latent_deliberation.evaluation.task_files import Doc, check_gold, find_file, read_documents

__all__ = ['harness', 'load']


def load(*, folder: str, files: Mapping[str, str], data: str = '', prepare: str = '',
         fields: Sequence[str] = (), shots: int | None = None, hub: Mapping[str, str] | None = None,
         **metadata: Any) -> Mapping[str, Any]:
  """Returns the splits of a task, as `custom_dataset` of a task file.

  Args:
    folder: folder of the task in the data directory.
    files: name of the file of each split, without its ending.
    data: the data directory, or several with the system's separator of paths between.
    prepare: name of a function of PREPARED, which makes the documents of the task.
    fields: fields that the templates of the task need. A template would read a missing one as text.
    shots: number of examples in a prompt, where `prepare` puts them there.
    hub: path, and name if it has one, of the documents on the hub, for a task that has them from
      there without a data directory.
    metadata: further values that lm-evaluation-harness passes on; not used.

  Raises:
    MissingError: there is no data directory, or a file is missing; or nothing can be downloaded.
    UserError: a file is damaged; a document lacks a field or a gold answer; or none is of this
      task.
  """
  del metadata
  if not data and not hub:
    raise MissingError(f'task data of {folder}: no data directory is given. Give --data=DIRECTORY, '
                       'or --metadata data=DIRECTORY to lm_eval')
  raw = {split: read_documents(find_file(data, folder, name)) if data else _download(hub, name)
         for split, name in files.items()}
  for doc in itertools.chain.from_iterable(raw.values()):
    for field in fields:
      _ = doc[field]
  if prepare:
    raw = PREPARED[prepare](raw, shots)
  for split, docs in raw.items():
    if not docs:
      name = files.get(split, next(iter(files.values())))
      raise UserError(f'{find_file(data, folder, name) if data else hub} holds no document of the '
                      f'task {prepare}: give others, or leave it out')
  # An import of the harness's own library, which is slow.
  from datasets import Dataset
  return {split: Dataset.from_list(docs) for split, docs in raw.items()}


def _download(hub: Mapping[str, str], name: str) -> list[Doc]:
  """Returns the documents of a split on the hub, or of all of them where none has this name."""
  import datasets
  try:
    splits = datasets.load_dataset(**hub)
  except (OSError, ValueError, RuntimeError) as error:
    raise MissingError(f'{hub["path"]} cannot be downloaded from the hub ({error}): give '
                       '--data=DIRECTORY, or leave the task out') from error
  return [Doc(row, f'document {number} of {hub["path"]}/{split}')
          for split in ([name] if name in splits else splits)
          for number, row in enumerate(splits[split])]


# --- Documents that need more than a template ---

Prepared = Callable[[dict[str, list[Doc]], int | None], dict[str, list[Doc]]]
LETTERS = 'ABCDEFGHIJ'


def _choices(gold: str, allowed: Callable[[Doc], Sequence[Any]] | None = None) -> Prepared:
  """Documents as they are, with a gold answer under `gold`, one of those that are allowed.

  A template would read a text that is no number as 0.
  """

  def prepare(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
    for split, docs in splits.items():
      check_gold(docs, gold, split)
      for doc in docs if allowed else ():
        if doc[gold] not in (given := list(allowed(doc))):
          raise UserError(f'{doc.where} has {gold} = {doc[gold]!r}: give one of {given}')
    return splits

  return prepare


def _labels(doc: Doc) -> Sequence[Any]:
  """Returns the labels of a document's choices."""
  choices = doc['choices']
  return choices.get('label') or () if isinstance(choices, Mapping) else ()


def _numbers(doc: Doc) -> list[int | str]:
  """Returns the numbers of a document's choices, which may be texts."""
  numbers = range(len(doc['choices']))
  return [*numbers, *map(str, numbers)]


def _letter(doc: Doc, field: str, choices: Sequence[Any]) -> str:
  """Returns the letter of the gold choice, which is given as a letter or as a number.

  Raises:
    UserError: it is none of the choices.
  """
  letters, given = LETTERS[:len(choices)], doc[field]
  if isinstance(given, int) and 0 <= given < len(letters):
    return letters[given]
  if given not in list(letters):
    raise UserError(f'{doc.where} has {field} = {given!r}: give the letter of one of its '
                    f'{len(letters)} choices, or its number, from 0')
  return given


def _mmlu(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Questions with lettered choices, after examples of the same subject."""
  shots = 5 if shots is None else shots

  def show(doc: Doc) -> str:
    listed = '\n'.join(f'{letter}. {choice}' for letter, choice in zip(
        LETTERS, doc['choices'], strict=False))
    return f'{doc["question"].strip()}\n{listed}\nAnswer:'

  examples: dict[str, list[Doc]] = collections.defaultdict(list)
  for doc in splits.get('dev', ()):
    examples[doc['subject']].append(doc)
  for split, given in splits.items():
    check_gold(given, 'answer', split)
  docs = []
  for doc in splits['test']:
    subject = doc['subject'].replace('_', ' ')
    given = [f'{show(each)} {_letter(each, "answer", each["choices"])}'
             for each in examples[doc['subject']][:shots]]
    if len(given) < shots:
      raise UserError(f'mmlu has {len(given)} examples for {doc["subject"]}, and {shots} are '
                      'requested: lower --num_fewshot')
    header = f'The following are multiple choice questions (with answers) about {subject}.'
    docs.append({'subject': doc['subject'], 'query': '\n\n'.join([header, *given, show(doc)]),
                 'choices': list(LETTERS[:len(doc['choices'])]),
                 'gold': LETTERS.index(_letter(doc, 'answer', doc['choices']))})
  return {'test': docs}


def _agieval(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Questions with lettered choices, of those tasks that have choices."""
  _no_shots('agieval', shots)
  docs = []
  for doc in splits['test']:
    if doc.get('options'):
      letters = LETTERS[:len(doc['options'])]
      check_gold([doc], 'label', f'test ({doc["task"]})')
      passage = f'{doc["passage"]}\n\n' if doc.get('passage') else ''
      docs.append({
          'task': doc['task'],
          'query': f'{passage}Q: {doc["question"]} Answer Choices: {" ".join(doc["options"])}\n'
                   f'A: Among A through {letters[-1]}, the answer is',
          'choices': list(letters), 'gold': letters.index(_letter(doc, 'label', doc['options']))})
  return {'test': docs}


def _agieval_math(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """The questions of AGIEval without choices."""
  _no_shots('agieval_math', shots)
  docs = [{'problem': doc['question'], 'answer': doc['answer']} for doc in splits['test']
          if not doc.get('options')]
  check_gold(docs, 'answer', 'test')
  return {'test': docs}


def _no_shots(task: str, shots: int | None) -> None:
  if shots:
    raise UserError(f'{task} has no examples for its prompts: leave --num_fewshot out')


def _math(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Problems with their worked solutions. The first ones are the examples, and not questions."""
  shots = 4 if shots is None else shots
  docs = [{'problem': doc['context'], 'solution': doc['chain_of_thought'],
           'answer': doc['answer']} for doc in splits['test']]
  check_gold(docs, 'answer', 'test')
  if len(docs) <= shots:
    raise UserError(f'math has {len(docs)} problems, and {shots} of them are examples: lower '
                    '--num_fewshot')
  given = ''.join(f'Problem:\n{doc["problem"]}\n\nSolution: {doc["solution"]} '
                  f'Final Answer: The final answer is ${doc["answer"]}$.\n\n'
                  for doc in docs[:shots])
  return {'test': [{**doc, 'query': f'{given}Problem:\n{doc["problem"]}\n\nSolution:'}
                   for doc in docs[shots:]]}


def _bbh(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Questions after three examples with their reasoning; all 27 tasks in one."""
  shots = 3 if shots is None else shots
  check_gold(splits['test'], 'target', 'test')
  examples = {}
  for doc in splits['cot_prompts']:
    # A line that asks not to be trained on, then what the task is, then the examples.
    _, _, text = doc['prompt'].rpartition('-----\n')
    header, *given = text.strip().split('\n\nQ: ')
    if len(given) < shots:
      raise UserError(f'bbh has {len(given)} examples for {doc["task"]}, and {shots} are '
                      'requested: lower --num_fewshot')
    examples[doc['task']] = '\n\nQ: '.join([header, *given[:shots]])
  docs = []
  for doc in splits['test']:
    if doc['task'] not in examples:
      raise UserError(f'bbh: cot_prompts has no examples for {doc["task"]}: add them')
    docs.append({'task': doc['task'], 'target': doc['target'],
                 'query': f'{examples[doc["task"]]}\n\nQ: {doc["input"]}\n'
                          "A: Let's think step by step.\n"})
  return {'test': docs}


def _drop(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Passages with questions. Every list of spans in `answers` is one right answer."""
  return {split: [{'passage': doc['passage'], 'question': doc['question'],
                   'answers': _drop_answers(doc, split)} for doc in docs]
          for split, docs in splits.items()}


def _drop_answers(doc: Doc, split: str) -> list[list[str]]:
  """Returns the right answers of a question of DROP, a list of spans each."""
  remedy = 'give answers, a list of lists of spans; or answer and validated_answers'
  try:
    if 'answers' not in doc and 'validated_answers' in doc:
      from lm_eval.tasks.drop import utils
      answers = utils.get_answers(doc)
    elif 'answers' not in doc and 'answers_spans' in doc:
      if split != 'train':  # where each question has one annotator
        raise UserError(f'{doc.where} has answers_spans, where it is lost which annotator gave '
                        f'which span: {remedy}')
      answers = [doc['answers_spans']['spans']]
    else:
      answers = [spans if isinstance(spans, list) else [spans] for spans in doc['answers']]
    answers = [[str(span) for span in spans] for spans in answers]
  except (KeyError, TypeError, IndexError) as error:
    raise UserError(f'{doc.where} has answers in a form that is not known: {remedy}') from error
  answers = [spans for spans in answers if spans and spans[0].strip()]
  if not answers:
    raise UserError(f'{doc.where} has no gold answer: {remedy}')
  return answers


def _mbpp(splits: dict[str, list[Doc]], shots: int | None) -> dict[str, list[Doc]]:
  """Tasks 11 to 510, after tasks 2, 3 and 4 as examples."""
  shots = 3 if shots is None else shots
  by_id = {doc['task_id']: doc for doc in splits['all']}
  if any(number not in by_id for number in range(2, 2 + shots)) or shots > 9:
    raise UserError(f'mbpp has no {shots} examples among tasks 2 to 10: lower --num_fewshot')

  def show(doc: Doc) -> str:
    tests = '\n'.join(doc['test_list'])
    return ('You are an expert Python programmer, and here is your task: '
            f'{doc["text"]} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n')

  given = ''.join(f'{show(by_id[number])}{_lines(by_id[number]["code"])}\n[DONE]\n\n'
                  for number in range(2, 2 + shots))
  return {'test': [
      {'query': given + show(doc), 'code': _lines(doc['code']) + '\n[DONE]',
       'checks': '\n'.join([doc.get('test_setup_code', ''), *doc['test_list']])}
      for number, doc in sorted(by_id.items()) if 11 <= number <= 510]}


def _lines(code: str) -> str:
  return code.replace('\r\n', '\n').rstrip()


PREPARED: Mapping[str, Prepared] = {
    'mmlu': _mmlu, 'agieval': _agieval, 'agieval_math': _agieval_math, 'math': _math, 'bbh': _bbh,
    'drop': _drop, 'mbpp': _mbpp,
    'answer': _choices('answer'), 'answerKey': _choices('answerKey', _labels),
    'label': _choices('label'), 'gold': _choices('gold', _numbers), 'aliases': _choices('aliases'),
    'correct_answer': _choices('correct_answer'),
    'yes_or_no': _choices('answer', lambda doc: (False, True))}


# --- Results that need more than a metric ---

# Once, however many programs there are. lm_eval's own command makes no check before.
_check_isolation = functools.cache(check_isolation)


def score_math(doc: Doc, results: Sequence[str]) -> dict[str, float]:
  """Returns whether the last boxed answer, or what follows 'answer is', equals the gold one."""
  from lm_eval.tasks.hendrycks_math import utils
  text = results[0]
  boxed, found = utils.last_boxed_only_string(text), None
  if boxed is not None:
    # Other forms of a box, which a model may well write, fail the library's assertions.
    with contextlib.suppress(AssertionError):
      found = utils.remove_boxed(boxed)
  if found is None:
    said = re.findall(r'answer is:?\s*(.+)', text)
    found = said[-1].strip().rstrip('.').strip('$ ') if said else text.strip()
  return {'exact_match': float(utils.is_equiv(found, doc['answer']))}


def score_reasoning(doc: Doc, results: Sequence[str]) -> dict[str, float]:
  """Returns whether what follows the first 'the answer is' is the target."""
  said = re.search(r'the answer is (.*)', results[0])
  found = (said[1] if said else results[0]).strip().rstrip('.')
  return {'exact_match': float(found == doc['target'].strip().rstrip('.'))}


def score_humaneval(doc: Doc, results: Sequence[str]) -> dict[str, float]:
  """Returns whether the completed function passes its tests.

  Raises:
    UserError: this machine cannot run a program in isolation.
  """
  _check_isolation()
  program = f'{doc["prompt"]}{results[0]}\n{doc["test"]}\ncheck({doc["entry_point"]})\n'
  return {'pass_at_1': float(run_program(program).passed)}


def score_mbpp(doc: Doc, results: Sequence[str]) -> dict[str, float]:
  """Returns whether the written program passes its tests; see `score_humaneval`."""
  _check_isolation()
  return {'pass_at_1': float(run_program(f'{results[0]}\n{doc["checks"]}\n').passed)}
