"""Outcomes of a task in several arms: nats and probability of the gold answer, and right or wrong.

They come from the samples that lm-evaluation-harness logs, and are kept as JSON.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.errors import UserError

METRICS = ('acc', 'exact_match', 'pass_at_1', 'f1', 'em')  # of which the first found is `correct`
WRITTEN = 'generate_until'  # output type of lm-evaluation-harness's tasks whose answers are written


@dataclasses.dataclass
class ArmOutcomes:
  """Outcomes of one arm; lists have a value for each item.

  Attributes:
    nats: negative log-likelihood of the gold answer; empty where it was not scored, as for a chain
      of thought.
    p: probability of the gold answer: among the choices where there are any.
    correct: 1.0 or 0.0; between them for F1.
    norm: as `correct`, with likelihoods divided by the length of the choices; or empty.
    cost: mean 'tokens' and 'flops' of an item.
    texts: what the arm wrote; empty where answers are chosen.
  """
  nats: list[float]
  p: list[float]
  correct: list[float]
  norm: list[float] = dataclasses.field(default_factory=list)
  cost: dict[str, float] = dataclasses.field(default_factory=dict)
  texts: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class TaskOutcomes:
  """Outcomes of a task.

  Attributes:
    task: name of the task.
    metric: name of the metric that `correct` has.
    shots: number of examples in a prompt.
    items: names of the items.
    chance: expected accuracy of a guess.
    majority: accuracy of always giving the most frequent gold answer, or choice; None where the
      gold choice has the same place in every item, which says nothing of the task.
    arms: outcomes of each arm, 'frozen' first if it was scored.
    truncated, merged, short: numbers of requests that lost tokens at the left, those of a chain
      of thought included, or whose answer merges with its context; and of contexts without room
      for latents.
    seconds: wall-clock time of the command that finished the task.
    commit: commit of the source tree of that command; '' where it is not known.
  """
  task: str
  metric: str
  shots: int
  items: list[str]
  chance: float
  majority: float | None
  arms: dict[str, ArmOutcomes]
  truncated: int = 0
  merged: int = 0
  short: int = 0
  seconds: float = 0.0
  commit: str = ''

  def to_json(self) -> dict[str, Any]:
    """Returns the outcomes as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'TaskOutcomes':
    """Undoes `to_json`. Raises TypeError where a key is missing or unknown."""
    return cls(**{**values, 'arms': {name: ArmOutcomes(**arm)
                                     for name, arm in values['arms'].items()}})


@dataclasses.dataclass(frozen=True)
class Gold:
  """The gold answer of an item.

  Attributes:
    text: the answer, or the context of the right choice where contexts differ.
    judged: what a written answer must be: `text` without a solution before it, for instance.
    choices: number of choices; 0 where the answer is written.
    index: index of the gold choice; None where the answer is written.
  """
  text: str
  judged: str = ''
  choices: int = 0
  index: int | None = None


def find_gold(task: Any, doc: Mapping[str, Any]) -> Gold:
  """Returns the gold answer of a document of a lm-evaluation-harness task.

  Raises:
    UserError: it has none.
  """
  name = task.task_name
  if task.OUTPUT_TYPE == 'multiple_choice':
    choices = task.doc_to_choice(doc)
    # Where contexts differ, their number takes the place of the text.
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, list):
      gold = gold[0] if gold else None
    if isinstance(gold, str):
      gold = choices.index(gold) if gold in choices else None
    if gold is None or not 0 <= gold < len(choices):
      raise UserError(f'task {name} has a document whose gold answer is none of its choices: '
                      f'{str(doc):.200}. Give a split with answers')
    return Gold(choices[gold], choices=len(choices), index=gold)
  field = (task.config.metadata or {}).get('gold')
  target = task.doc_to_target(doc)
  if isinstance(target, list):
    target = target[0] if target else ''
  text = str(doc[field] if field else target)
  if not text.strip():
    raise UserError(f'task {name} has a document without a gold answer: {str(doc):.200}. Give a '
                    'split with answers')
  judged = str(target)
  for metric in task.config.metric_list or ():
    for ignored in metric.get('regexes_to_ignore') or ():
      judged = re.sub(ignored, '', judged)
  return Gold(text, judged.strip())


def gold_continuation(task: Any, gold: Gold) -> str:
  """Returns the gold answer of a written task as it continues a prompt."""
  return f'{task.config.target_delimiter}{gold.text}'


def outcomes_of(task: Any, samples: Sequence[Mapping[str, Any]],
                gold_nats: Sequence[float] = ()) -> tuple[ArmOutcomes, str]:
  """Returns the outcomes of an arm on the samples of a task, and the name of its metric.

  Args:
    task: the task of lm-evaluation-harness.
    samples: its samples for one arm, in the order of the documents.
    gold_nats: nats of the gold answers, where answers are written.
  """
  nats, p, correct, norm, texts, metric = [], [], [], [], [], ''
  for number, sample in enumerate(samples):
    metric = next((name for name in METRICS if name in sample), '')
    if not metric:
      raise UserError(f'task {task.task_name} has none of the metrics {METRICS}: its accuracy is '
                      'not known here')
    correct.append(float(sample[metric]))
    if task.OUTPUT_TYPE == WRITTEN:
      texts.append(str(sample['resps'][0][0]))
      if len(gold_nats):
        nats.append(float(gold_nats[number]))
        p.append(float(np.exp(-gold_nats[number])))
      continue
    scores = np.array([answers[0][0] for answers in sample['resps']], np.float64)
    if task.OUTPUT_TYPE == 'multiple_choice':
      gold = find_gold(task, sample['doc'])
      scores = scores[:gold.choices]  # further ones are of choices without their context
      nats.append(float(-scores[gold.index]))
      p.append(float(np.exp(scores[gold.index] - np.logaddexp.reduce(scores))))
    else:
      nats.append(float(-scores[0]))
      p.append(float(np.exp(scores[0])))
    if 'acc_norm' in sample:
      norm.append(float(sample['acc_norm']))
  return ArmOutcomes(nats, p, correct, norm, texts=texts), metric


def guesses(golds: Sequence[Gold]) -> tuple[float, float | None]:
  """Returns the accuracy of chance, and that of always giving the most frequent answer.

  The second one is None where the gold choice always has the same place.
  """
  chance = float(np.mean([1 / gold.choices if gold.choices else 0.0 for gold in golds]))
  counts = collections.Counter(gold.judged if gold.index is None else gold.index for gold in golds)
  if golds[0].index is not None and len(counts) == 1:
    return chance, None
  return chance, counts.most_common(1)[0][1] / len(golds)
