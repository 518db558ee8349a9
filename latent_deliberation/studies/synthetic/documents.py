"""The table of synthetic tasks, and their documents by number; no TensorFlow here.

A new task is a class as `Task` in question.py describes it, and a line in TASKS.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.addition import Addition
from latent_deliberation.studies.synthetic.arithmetic import Arithmetic
from latent_deliberation.studies.synthetic.graphs import Graphs
from latent_deliberation.studies.synthetic.pointer_chasing import PointerChasing
from latent_deliberation.studies.synthetic.question import Task
from latent_deliberation.studies.synthetic.state_tracking import StateTracking
from latent_deliberation.studies.synthetic.word_problems import WordProblems

TASKS = {'pointer_chasing': PointerChasing, 'state_tracking': StateTracking, 'graphs': Graphs,
         'arithmetic': Arithmetic, 'addition': Addition, 'word_problems': WordProblems}
# Names that key the random streams of tasks, for tasks that have been renamed. Another key would
# draw other documents.
STREAMS = {'pointer_chasing': 'hops', 'state_tracking': 'groups', 'addition': 'carries',
           'word_problems': 'written'}
VERSION = 3  # of the generators; raise it when the same options begin to give other documents


@dataclasses.dataclass(frozen=True)
class SyntheticCorpus:
  """Documents that are generated when they are read, in any order, the same on every process.

  Attributes:
    name: name of the task, a key of TASKS.
    task: task that asks the questions.
    seed: seed of all documents.
    documents: number of documents, both splits together.
    questions: number of questions in a document.
    validation_percent: percentage of the documents that is for validation, spread evenly.
    text_key: key of the text in the examples that seqio reads.
  """
  name: str
  task: Task
  seed: int
  documents: int
  questions: int
  validation_percent: int
  text_key: str = 'text'

  def numbers(self, split: str) -> np.ndarray:
    """Returns the numbers of the documents of 'train' or 'validation', int64.

    A larger number of documents leaves the split of the first ones as it is.
    """
    numbers = np.arange(self.documents)
    return numbers[self._held_out(numbers) == (split == 'validation')]

  def read(self, number: int) -> str:
    """Returns the text of one document."""
    return self.task.document(self.random(number), self.questions, bool(self._held_out(number)))

  def describe(self) -> str:
    """Returns a line about the documents, for the log."""
    held_out = len(self.numbers('validation'))
    return f'{self.documents} documents, {held_out} documents held out'

  def random(self, number: int) -> np.random.Generator:
    """Returns the generator of one document, a function of task name, seed and number."""
    # The number is the third of the counter's four words, so that streams never overlap.
    counter = np.array([0, 0, number, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=self._key, counter=counter))

  def _held_out(self, numbers: np.ndarray | int) -> np.ndarray | bool:
    # With any percentage, document 0 is for validation and document 1 for training.
    return numbers * self.validation_percent % 100 < self.validation_percent

  @functools.cached_property
  def _key(self) -> np.ndarray:
    identity = json.dumps([STREAMS.get(self.name, self.name), self.seed]).encode()
    return np.frombuffer(hashlib.sha256(identity).digest()[:16], '<u8').astype(np.uint64)

  @property
  def fingerprint(self) -> str:
    """Hash of everything that determines the documents."""
    options = {field.name: getattr(self.task, field.name)
               for field in dataclasses.fields(self.task) if field.metadata.get('text', True)}
    known = [VERSION, STREAMS.get(self.name, self.name), options, self.seed, self.documents,
             self.questions, *filter(None, [self.task.contents])]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def open_synthetic(config: DataConfig) -> SyntheticCorpus:
  """Opens the documents of a 'synthetic' configuration.

  Raises:
    UserError: a file that the task reads is missing or wrong; see also `build`.
  """
  task = build(config.name, config.options)
  _ = task.contents  # reads the files of the task, so that a bad file is named before long work
  return SyntheticCorpus(config.name, task, config.seed,
                         config.documents, config.questions, config.validation_percent,
                         config.text_key)


def build(name: str, options: Mapping[str, Any]) -> Task:
  """Builds a task from some of its options. The others keep their defaults.

  Raises:
    UserError: there is no such task or option, or a value is not allowed.
  """
  if name not in TASKS:
    raise UserError(f'no synthetic task {name!r}: choose one of {tuple(TASKS)}')
  # A misspelt option must not fall back to its default.
  known = [field.name for field in dataclasses.fields(TASKS[name])]
  for option in options:
    if option not in known:
      near = difflib.get_close_matches(str(option), known, n=1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise UserError(f'{name} has no option {option!r}: {hint}known options: {known}')
  try:
    return TASKS[name](**options)
  except UserError as error:
    raise UserError(f'{name}: {error}') from error
