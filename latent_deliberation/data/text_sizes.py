"""Sizes that follow from the text: a small text gets sizes that fit it.

A config is written for much text. `fit_to_text` chooses what must be known before the text is
packed: its vocabulary, and how much of it is held out. `fit_to_rows` chooses the rest from the
number of packed rows. Both leave alone what the user gave, and what fits. The choices are kept in
run.json, so that the same command chooses the same again.
"""

import dataclasses
import functools
import importlib
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.data.corpus import TextCorpus, open_corpus
from latent_deliberation.data.data_config import BYTE_VOCABULARY_SIZE, DataConfig
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, as_config, bind
from latent_deliberation.files import seal, unseal, write_json
from latent_deliberation.paths import ROWS, RUN_FILE
from latent_deliberation.progress import announced

HELD_OUT_ROWS = 32  # rows to hold out, if a larger percentage can
PERCENTAGES = (20, 30)  # of the documents to hold out, in place of a smaller one
BYTES_PER_PIECE = 64  # of training text, for each piece of a vocabulary
SMALLEST_VOCABULARY = 300  # a smaller one gains little over bytes
SMALL_TEXT = 1 << 20  # bytes; a vocabulary may not fit less text
FEWEST_TEXTS = 20  # that an interval is over
PASSES = 4  # over the training text, at most; by more, a decoder learns it by heart
BATCHES_PER_PASS = 8  # at least; few large batches are few steps
SMALLEST_BATCH = 4
VALIDATIONS = 4  # during a shortened training, at least; one is no curve

Choices = dict[str, Any]  # value by dotted path of the key
# Names that earlier code gave a job of several runs, by its name now.
OLD_JOBS = {'expert': ('quickstart',)}


def fit_to_text(experiment: Experiment, given: Set[str]) -> Choices:
  """Chooses the vocabulary and the percentage that is held out, for files of the user.

  Args:
    experiment: the configuration.
    given: dotted paths of the keys that the user gave, which are left alone.

  Raises:
    UserError: see `open_corpus`.
  """
  data = experiment.data
  if data.source != 'text':
    return {}
  corpus = open_corpus(data)
  choices: Choices = {}
  if 'data.validation_percent' not in given:
    percent, corpus = _hold_out_enough(data, corpus)
    choices['data.validation_percent'] = percent
  # A decoder that exists has its vocabulary.
  trained = not (experiment.decoder_from or data.vocabulary_path or data.vocabulary == 'byte')
  if trained and not given & {'data.vocabulary', 'data.vocabulary_size'}:
    pieces = _fit_vocabulary(data, corpus)
    choices |= ({'data.vocabulary_size': pieces} if pieces else {'data.vocabulary': 'byte'})
    if 'decoder.vocab_size' not in given and pieces != data.vocabulary_size:
      choices['decoder.vocab_size'] = pieces or BYTE_VOCABULARY_SIZE
  return _changes(experiment, choices, f'{corpus.size.sum() / 1e3:,.0f} kB of text in '
                  f'{len(corpus.size)} documents')


def _hold_out_enough(data: DataConfig, corpus: TextCorpus) -> tuple[int, TextCorpus]:
  """Returns the least percentage that holds out enough rows, or else the largest one."""
  # Roughly: large vocabularies have longer pieces.
  token_bytes = 1 if data.vocabulary == 'byte' else 4 if data.vocabulary_path else 2
  percent = data.validation_percent
  for larger in PERCENTAGES:
    held_out = corpus.size[corpus.held_out].sum()
    if held_out >= HELD_OUT_ROWS * data.length * token_bytes:
      break
    if larger > percent:
      percent = larger
      corpus = open_corpus(dataclasses.replace(data, validation_percent=percent))
  return percent, corpus


def _fit_vocabulary(data: DataConfig, corpus: TextCorpus) -> int:
  """Returns the number of pieces for the training text, or 0 where bytes serve as well."""
  numbers = corpus.numbers('train')
  text_bytes = int(corpus.size[numbers].sum())
  if text_bytes >= SMALL_TEXT:
    return data.vocabulary_size
  pieces = min(data.vocabulary_size, text_bytes // BYTES_PER_PIECE)
  # Only training shows how many pieces a text has; a repetitive one has few.
  with (announced(f'choosing a vocabulary for {text_bytes / 1e3:,.0f} kB of text'),
        tempfile.TemporaryDirectory() as directory):
    vocabularies = importlib.import_module('latent_deliberation.data.vocabularies')  # TensorFlow
    while pieces >= SMALLEST_VOCABULARY:
      try:
        vocabularies.train_sentencepiece(
            map(corpus.read, numbers), Path(directory, 'vocabulary.model'), pieces)
        return pieces
      except UserError:
        pieces //= 2
  return 0


def fit_to_rows(experiment: Experiment, given: Set[str], prepared_dir: Path,
                shards: int = 1) -> Choices:
  """Chooses sizes of evaluation and training for the packed rows of the user's files.

  Args:
    experiment: the configuration, with the choices of `fit_to_text`.
    given: dotted paths of the keys that the user gave, which are left alone.
    prepared_dir: directory of prepared data.
    shards: number of shards that a batch divides into.

  Raises:
    UserError: rows are damaged.
  """
  if experiment.data.source != 'text':
    return {}
  held_out = len(PackedRows(prepared_dir / ROWS / 'validation'))
  choices = _fit_evaluation(experiment, given, held_out, shards)
  trained = 0
  if experiment.data.mode == 'packed':
    trained = len(PackedRows(prepared_dir / ROWS / 'train'))
    # A decoder that exists is not pretrained.
    for section in ('training',) if experiment.decoder_from else ('pretraining', 'training'):
      choices |= _fit_training(experiment, given, section, trained, shards)
  return _changes(experiment, choices, f'{trained} rows to train on, {held_out} held out')


def fit_evaluation(experiment: Experiment, given: Set[str], prepared_dir: Path,
                   shards: int) -> Choices:
  """Chooses the sizes of evaluation alone, as `fit_to_rows` does; no training row is needed."""
  held_out = len(PackedRows(prepared_dir / ROWS / 'validation'))
  return _changes(experiment, _fit_evaluation(experiment, given, held_out, shards),
                  f'{held_out} rows held out')


def _fit_evaluation(experiment: Experiment, given: Set[str], rows: int, shards: int) -> Choices:
  config = experiment.evaluation
  values = {key: getattr(config, key)
            for key in ('batch_size', 'num_texts', 'eval_batches', 'rows_per_text')}

  def choose(key: str, value: int) -> None:
    if f'evaluation.{key}' not in given:
      values[key] = value

  # A number of texts that was given must stay a multiple of the batch.
  if 'evaluation.num_texts' not in given:
    # Rows that fill no batch are left out: less than a quarter of them.
    choose('batch_size', _halve(values['batch_size'], rows // 4, max(2, shards)))
  batches = rows // values['batch_size']
  if batches:
    choose('num_texts', min(values['num_texts'], batches * values['batch_size']))
    choose('eval_batches', min(values['eval_batches'], batches))
  choose('rows_per_text',
         min(values['rows_per_text'], max(1, values['num_texts'] // FEWEST_TEXTS)))
  return {f'evaluation.{key}': value for key, value in values.items()}


def _fit_training(experiment: Experiment, given: Set[str], section: str, rows: int,
                  shards: int) -> Choices:
  settings = getattr(experiment, section)
  low, high = settings.row_range_percent
  rows = max(1, rows * (high - low) // 100)
  batch_size, steps = settings.batch_size, settings.loop.num_steps
  warmup, eval_every = settings.optimizer.warmup_steps, settings.loop.eval_every
  if f'{section}.batch_size' not in given:
    batch_size = _halve(batch_size, rows // BATCHES_PER_PASS,
                        max(SMALLEST_BATCH, shards * settings.accumulation))
  if f'{section}.loop.num_steps' not in given:
    steps = min(steps, max(1, PASSES * rows // batch_size))
  if steps < settings.loop.num_steps:
    if f'{section}.optimizer.warmup_steps' not in given:
      warmup = min(warmup, steps // 10)
    if f'{section}.loop.eval_every' not in given:
      eval_every = min(eval_every, max(1, steps // VALIDATIONS))
  return {f'{section}.batch_size': batch_size, f'{section}.loop.num_steps': steps,
          f'{section}.loop.eval_every': eval_every, f'{section}.optimizer.warmup_steps': warmup}


def _halve(size: int, limit: int, least: int) -> int:
  """Returns a size that was halved until it is at most `limit`, but stays a multiple of `least`."""
  while size > limit and size % 2 == 0 and size // 2 >= least and size // 2 % least == 0:
    size //= 2
  return size


def _changes(experiment: Experiment, choices: Choices, origin: str) -> Choices:
  """Returns the choices that differ from the experiment, and logs them."""
  changes = {}
  for key, value in choices.items():
    old = _value_of(experiment, key)
    if value != old:
      changes[key] = value
      logging.info('%s = %r in place of %r, for %s', key, value, old, origin)
  if changes:
    logging.log_first_n(logging.INFO, 'give a key, such as --config.%s=..., to choose it yourself',
                        1, next(iter(changes)))
  return changes


def _value_of(experiment: Experiment, key: str) -> Any:
  return functools.reduce(getattr, key.split('.'), experiment)


def with_choices(experiment: Experiment, choices: Mapping[str, Any]) -> Experiment:
  """Returns the experiment with other values of these keys."""
  config = as_config(experiment)
  config.update_from_flattened_dict(dict(choices))
  return bind(config)


def write_choices(workdir: Path, job: str, config: Mapping[str, Any], choices: Choices) -> None:
  """Writes the run.json of a job of several runs: its config, and what was chosen for its text."""
  run_on_process_zero(f'write {workdir / RUN_FILE}', lambda: write_json(
      workdir / RUN_FILE, seal({'job': job, 'config': config, 'chosen': choices})))


def read_choices(workdir: Path, job: str, experiment: Experiment,
                 given: Set[str]) -> Choices | None:
  """Returns what an earlier launch of the job chose in `workdir`; None if there was none.

  Those of these keys that are given now have the experiment's value. So a value that was given once
  stays, also when the next launch does not repeat it.

  Raises:
    UserError: run.json is damaged, or of another job.
  """
  path = workdir / RUN_FILE
  try:
    content = unseal(path.read_bytes(), path)
    chosen, saved_job = content['chosen'], content['job']
  except FileNotFoundError:
    return None
  except UserError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or of another job ({error!r}): restore the file, or use '
                    'another --workdir') from error
  if saved_job not in (job, *OLD_JOBS.get(job, ())):
    raise UserError(f'{workdir} belongs to the job {saved_job!r}, and this is {job!r}: use another '
                    '--workdir')
  return {key: _value_of(experiment, key) if key in given else value
          for key, value in chosen.items()}
