"""Do experts help beside retrieval? Questions with known answers, with and without both.

The table is {no retrieval, retrieved} x {no expert, expert, another question's latents}. Latents of
retrieved text are made at two ends: that of the passage, which can be stored, and that of the
question. Every way scores the same answers, so differences are paired.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import save_figure
from latent_deliberation.evaluation.task_files import find_file, read_documents
from latent_deliberation.experts.attach import Experts, Mix
from latent_deliberation.experts.passages import Passage
from latent_deliberation.experts.retrieval import Library, format_question
from latent_deliberation.experts.trial import draw_intervals, format_interval, interval_of
from latent_deliberation.files import read_lines, write_json, write_whole
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.progress import Progress
from latent_deliberation.tables import markdown_table

SPLITS = {'pubmed_qa': 'labeled', 'sciq': 'validation'}  # the file of each data set
ARMS = {  # name -> retrieval, expert, and where latents are made
    'none': 'no retrieval, no expert',
    'expert': 'no retrieval, expert',
    'other': "no retrieval, another question's latents",
    'retrieved': 'retrieved, no expert',
    'retrieved, expert': 'retrieved, expert after the passage',
    'retrieved, other': "retrieved, another passage's latents",
    'retrieved, expert at the question': 'retrieved, expert after the question',
    'retrieved, other at the question': "retrieved, another question's latents"}
# What each comparison subtracts: nats saved by the first over the second.
COMPARISONS = {
    'retrieval alone': ('retrieved', 'none'),
    'the expert alone': ('expert', 'none'),
    "the expert over another question's latents": ('expert', 'other'),
    'both over retrieval alone': ('retrieved, expert', 'retrieved'),
    "both, over another passage's latents": ('retrieved, expert', 'retrieved, other'),
    'both at the question over retrieval alone': (
        'retrieved, expert at the question', 'retrieved'),
    "both at the question, over another's latents": (
        'retrieved, expert at the question', 'retrieved, other at the question')}


@dataclasses.dataclass(frozen=True)
class Question:
  """A question with answers to choose from.

  Attributes:
    name: name of the data and number of the question.
    text: the question.
    answers: the answers to choose from.
    right: number of the right one.
    context: text that holds the answer; '' where the data have none.
  """
  name: str
  text: str
  answers: tuple[str, ...]
  right: int
  context: str


def read_questions(directory: Path, data: str, count: int) -> list[Question]:
  """Returns all questions of PubMedQA or SciQ, those to ask first, in a fixed random order.

  Args:
    directory: folder with a folder pubmed_qa or sciq, as docs/retrieval.md describes them.
    data: 'pubmed_qa' or 'sciq'.
    count: number of questions to ask; 0 for all. Questions of SciQ without a context are never
      asked.

  Raises:
    UserError: there is no such file, or a document of it is of another form.
  """
  read: Callable[[Mapping[str, Any]], tuple] = _read_pubmed if data == 'pubmed_qa' else _read_sciq
  found = []
  for number, doc in enumerate(read_documents(find_file(str(directory), data, SPLITS[data])), 1):
    try:
      # A plain dict, since a Doc would name the page of another command for a missing field.
      found.append(Question(f'{data}/{number}', *read(dict(doc))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f'{doc.where} is no question of {data} ({type(error).__name__}: {error}): '
                      'give documents as docs/retrieval.md has them, or leave the set out '
                      '(--sets)') from error
  found = [question for question in found if question.context]
  order = np.random.default_rng(0).permutation(len(found))
  return [found[number] for number in order][:count or None]


def _read_pubmed(values: Mapping[str, Any]) -> tuple:
  answers = ('yes', 'no', 'maybe')
  return (values['QUESTION'], answers, answers.index(values['final_decision']),
          ' '.join(values['CONTEXTS']))


def _read_sciq(values: Mapping[str, Any]) -> tuple:
  answers = [values['correct_answer'], *(values[f'distractor{number}'] for number in (1, 2, 3))]
  return values['question'], tuple(answers), 0, values['support'].strip()


def passages_of(questions: Sequence[Question], tokenizer: Tokenizer, size: int) -> list[Passage]:
  """Returns the contexts of questions, cut to `size` tokens, under the names of the questions."""
  return [Passage(question.context, question.name,
                  tuple(tokenizer.encode(question.context)[:size])) for question in questions]


def long_enough(questions: Sequence[Question], tokenizer: Tokenizer, fewest: int,
                size: int) -> list[Question]:
  """Returns the questions that have `fewest` tokens for latents, alone and in their passages.

  Args:
    size: largest number of tokens of a passage; see `passages_of`.
  """
  return [question for question in questions if min(
      size, len(tokenizer.encode(format_question(question.text, False))),
      len(tokenizer.encode(question.context))) >= fewest]


def check_askable(questions: Sequence[Question], passages: Sequence[Passage], tokenizer: Tokenizer,
                  length: int) -> None:
  """Checks that there are questions, and that any passage, question and answer fit a cache.

  Args:
    length: room in the cache, in tokens.

  Raises:
    UserError: there are fewer than 2, since each is another's control; or they do not fit.
  """
  check_integer('questions', len(questions), 2)
  asked = max(len(tokenizer.encode_more(format_question(question.text, True)))
              + max(len(tokenizer.encode_more(f' {answer}')) for answer in question.answers)
              for question in questions)
  passage = max(len(passage.ids) for passage in passages)
  if passage + asked > length:
    raise UserError(
        f'a passage of {passage} tokens and a question with its answer, {asked}, do not fit into '
        f'--length={length}: give --length={passage + asked}, or a smaller --passage')


class RetrievalTrial:
  """Scores the answers of questions in every way."""

  def __init__(self, experts: Experts, tokenizer: Tokenizer, library: Library, mix: Mix):
    """Prepares a trial of one mix of experts on the passages of a library."""
    self._experts, self._tokenizer, self._library, self._mix = experts, tokenizer, library, mix
    self._other: tuple[str, dict[str, Array]] = '', {}

  def ask(self, question: Question, other: Question) -> dict[str, Any]:
    """Returns log-probabilities of each answer by arm, seconds by part, and the passage found.

    Args:
      other: the question whose latents are the control.
    """
    others = self._other[1] if self._other[0] == other.name else self._outputs(other)[0]
    outputs, (alone, plain, follows), passage, seconds = self._outputs(question)
    self._other = question.name, outputs
    experts, ids = self._experts, self._tokenizer.encode_more(format_question(question.text, True))

    def read(state: State, outputs: Array) -> State:
      return experts.engine.attach(state, experts.read_latents(state, outputs))

    states = {'none': alone, 'expert': read(alone, outputs['question']),
              'other': read(alone, others['question'])}
    retrieved = {
        'retrieved': follows,
        'retrieved, expert at the question': read(follows, outputs['follows']),
        'retrieved, other at the question': read(follows, others['follows'])}
    # Latents after the passage come before the question is read.
    begun = time.perf_counter()
    latents = self._library.latents(passage, plain, self._mix)
    seconds['latents after the passage'] = _since(begun, latents.logits)
    for name, state in (('retrieved, expert', experts.engine.attach(plain, latents)),
                        ('retrieved, other', read(plain, others['passage']))):
      retrieved[name] = experts.engine.read_on(state, [ids])
    return {'name': question.name, 'right': question.right, 'passage': passage.source,
            'found': passage.source == question.name, 'seconds': seconds,
            'answers': {**self._score(states, question), **self._score(retrieved, question)}}

  def _outputs(self, question: Question) -> tuple[
      dict[str, Array], tuple[State, State, State], Passage, dict[str, float]]:
    """Returns what the experts add at each place, the states there, the passage and seconds."""
    engine, encode = self._experts.engine, self._tokenizer
    (passage, _), = self._library.search(question.text) or [(self._library.passages[0], 0.0)]
    seconds, begun = {}, time.perf_counter()
    alone = engine.read([encode.encode(format_question(question.text, False))])
    seconds['read the question alone'] = _since(begun, alone.logits)
    self._library.state(passage)  # writes it on first use
    begun = time.perf_counter()
    plain = self._library.state(passage)
    seconds['take the passage from disk'] = _since(begun, plain.logits)
    begun = time.perf_counter()
    follows = engine.read_on(plain, [encode.encode_more(format_question(question.text, True))])
    seconds['read the question after it'] = _since(begun, follows.logits)
    outputs = {}
    for name, state in (('question', alone), ('follows', follows), ('passage', plain)):
      begun = time.perf_counter()
      outputs[name] = self._experts.outputs(state, [self._mix])
      seconds[f'pass of the expert, {name}'] = _since(begun, outputs[name])
    begun = time.perf_counter()
    jax.block_until_ready(engine.read([passage.ids]).logits)
    seconds['read the passage anew'] = time.perf_counter() - begun
    return outputs, (alone, plain, follows), passage, seconds

  def _score(self, states: Mapping[str, State], question: Question) -> dict[str, list[float]]:
    """Returns the log-probability of each answer after each of these states."""
    # States of one text have as many slots written, so they can be one batch.
    together = jax.tree.map(
        lambda *leaves: leaves[0] if leaves[0].ndim == 0 else jnp.concatenate(leaves),
        *states.values())
    found = {name: [] for name in states}
    for answer in question.answers:
      ids = self._tokenizer.encode_more(f' {answer}')
      scores = self._experts.engine.score_on(together, [ids] * len(states))
      for name, logprobs in zip(states, scores, strict=True):
        found[name].append(float(logprobs.sum(dtype=np.float64)))
    return found


def _since(begun: float, value: Array) -> float:
  jax.block_until_ready(value)
  return time.perf_counter() - begun


def run_trial(trial: RetrievalTrial, questions: Sequence[Question], path: Path,
              identity: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Asks all questions, and returns their records. What an earlier run asked is read from `path`.

  Args:
    path: file with a line of JSON for each question, which grows.
    identity: what the records depend on; a file of another identity is refused.

  Raises:
    UserError: the file belongs to another trial.
  """
  records = _read_records(path, identity)
  known = {record['name'] for record in records}
  waiting = [number for number, question in enumerate(questions) if question.name not in known]
  progress = Progress('asking', 'questions', len(questions), len(records))
  with path.open('a') as file:
    if not file.tell():
      file.write(json.dumps(identity) + '\n')
    for number in waiting:
      # The control of the first question is the last one.
      records.append(trial.ask(questions[number], questions[number - 1]))
      file.write(json.dumps(records[-1]) + '\n')
      file.flush()
      progress.update(len(records))
  return records


def _read_records(path: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
  lines = read_lines(path) if path.is_file() else []
  if lines and lines[0] != json.loads(json.dumps(identity)):
    raise UserError(f'{path} holds the questions of another trial: {json.dumps(lines[0]):.300}. '
                    'Remove it, or give another --output')
  return lines[1:]


# --- The table ---


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns nats and accuracy of each arm, paired differences, and medians of seconds."""
  names = np.array([record['name'] for record in records])
  right = np.array([record['right'] for record in records])
  nats, correct = {}, {}
  for arm in ARMS:
    scores = [record['answers'][arm] for record in records]
    nats[arm] = np.array([-row[at] for row, at in zip(scores, right, strict=True)])
    correct[arm] = np.array([np.argmax(row) for row in scores]) == right
  counts = np.bincount(right)
  return {
      'questions': len(records), 'found': float(np.mean([each['found'] for each in records])),
      'chance': float(np.mean([1 / len(each['answers']['none']) for each in records])),
      'most_common': float(counts.max() / len(right)) if len(counts) > 1 else None,
      'arms': {arm: {'nats': interval_of(nats[arm], names),
                     'accuracy': interval_of(correct[arm].astype(float), names)} for arm in ARMS},
      'saved': {title: interval_of(nats[baseline] - nats[arm], names)
                for title, (arm, baseline) in COMPARISONS.items()},
      'more_correct': {
          title: interval_of(correct[arm].astype(float) - correct[baseline], names)
          for title, (arm, baseline) in COMPARISONS.items()},
      # The first questions compile.
      'seconds': {part: float(np.median([each['seconds'][part] for each in records]))
                  for part in records[0]['seconds']}}


def format_results(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the tables of all sets of questions as a page of GitHub Markdown."""
  return '\n'.join(format_summary(data, result) for data, result in results.items())


def format_summary(data: str, result: Mapping[str, Any]) -> str:
  """Returns the tables of one set of questions as GitHub Markdown, with what they say."""
  arms = [[ARMS[arm], format_interval(found['nats']), _percent(found['accuracy'])]
          for arm, found in result['arms'].items()]
  compared = [[title, format_interval(result['saved'][title]),
               _percent(result['more_correct'][title])] for title in COMPARISONS]
  seconds = [[part, f'{value:.3f}'] for part, value in result['seconds'].items()]
  guess = '' if result['most_common'] is None else (
      f', the most common answer {100 * result["most_common"]:.1f}%')
  return '\n\n'.join([
      f'# {data}: {result["questions"]:,} questions',
      f'Retrieval found the passage of the question for {100 * result["found"]:.1f}%. Chance is '
      f'{100 * result["chance"]:.1f}%{guess}.', *verdicts(result),
      markdown_table(['way', 'nats of the answer', 'correct, %'], arms),
      markdown_table(['nats saved by', 'nats', 'correct, %'], compared),
      'Above zero is better. In brackets: 95% intervals, bootstrap over questions, paired.',
      markdown_table(['part', 'median seconds'], seconds)]) + '\n'


def verdicts(result: Mapping[str, Any]) -> Iterator[str]:
  """Yields in words whether experts add to retrieval, as far as the intervals say."""
  saved = result['saved']
  for title, ways in (('both over retrieval alone', 'With latents after the passage'),
                      ('both at the question over retrieval alone',
                       'With latents after the question')):
    low, high = saved[title]['ci95'] or (-np.inf, np.inf)
    if high < 0:
      yield f'**{ways}, retrieval alone is better.**'
    elif low > 0:
      yield f'{ways}, retrieval and the expert are better than retrieval alone.'
    else:
      yield f'{ways}, no difference to retrieval alone is shown.'
  if saved['retrieval alone']['mean'] > saved['the expert alone']['mean']:
    yield 'Of the two alone, retrieval saves more than the expert.'
  else:
    yield 'Of the two alone, the expert saves more than retrieval.'


def _percent(found: Mapping[str, Any]) -> str:
  low, high = found['ci95'] or (None, None)
  interval = '' if low is None else f' [{100 * low:.1f}, {100 * high:.1f}]'
  return f'{100 * found["mean"]:.1f}{interval}'


def write_summary(output: Path, results: Mapping[str, Mapping[str, Any]],
                  identity: Mapping[str, Any]) -> str:
  """Writes JSON, its tables as .md and its picture as .png; returns the tables."""
  write_json(output, {**identity, 'results': results})
  page = format_results(results)
  write_whole(output.with_suffix('.md'), page.encode())
  figure = Figure(figsize=(5 + 3.5 * len(results), 3.8), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
  for axes, (data, result) in zip(panels, results.items(), strict=True):
    draw_intervals(axes, result['saved'])
    axes.set_title(f'{data}, {result["questions"]:,} questions', fontsize=10)
    axes.set_xlabel('nats of the answer saved (above 0 is better)')
  save_figure(figure, output.with_suffix('.png'))
  logging.info('written: %s, and .md and .png beside it', output)
  return page


def hash_of(questions: Sequence[Question]) -> str:
  """Returns a hash of questions, 16 hexadecimal digits."""
  text = json.dumps([dataclasses.asdict(question) for question in questions])
  return hashlib.sha256(text.encode()).hexdigest()[:16]
