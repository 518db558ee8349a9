"""The data of an experiment: prepared on a machine with seqio, read on any machine.

`prepare_data` makes them. `open_batches` gives training batches, `open_validation` those of an
evaluation. The checks compare the vocabulary of the data with the decoder.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch
from latent_deliberation.data.data_config import (
  BYTE_VOCABULARY_SIZE,
  DataConfig,
  open_sentencepiece,
)
from latent_deliberation.data.rows import (
  MANIFEST_FILE,
  Batches,
  PackedRows,
  PermutedBatches,
  permutation,
)
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path, at_hand, lock, make_writable
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.paths import DATA_LOCK, ROWS, kept_vocabulary
from latent_deliberation.sharding import rows_of_process

VALIDATION_ORDER = 0  # seed of the order of validation rows, the same for every experiment
# Text of which two vocabularies hardly give the same ids: words, digits, spaces and other scripts.
SAMPLE = 'The brown fox wrote 1234567 lines:\n\n  def jump(over): return over  # Привет, 世界\n'


def prepare_data(config: DataConfig, vocab_size: int, prepared_dir: Path) -> None:
  """Makes vocabulary and packed rows in `prepared_dir`, or checks those that are there.

  Without seqio, existing rows are used unchecked. Process 0 works, the others wait.

  Args:
    config: text, vocabulary and rows.
    vocab_size: number of embeddings of the decoder, which bounds the vocabulary.
    prepared_dir: directory of prepared data.

  Raises:
    UserError: there are no rows, and seqio is not installed; or the directory is that of rows.
    UserError: see `check_pieces`, and `prepare` in packing.py.
  """
  check_pieces(config, vocab_size)
  _refuse_rows(prepared_dir)
  # A training machine may lack seqio, and then needs rows that were copied to it.
  if importlib.util.find_spec('seqio') is None:
    if not (prepared_dir / ROWS).is_dir():
      raise UserError(
          f'{prepared_dir / ROWS} does not exist, and seqio is not installed to make it: prepare '
          'the data on another machine and copy the directory here')
  else:
    run_on_process_zero(f'prepare the data in {prepared_dir}',
                        lambda: _prepare(config, prepared_dir))


def _prepare(config: DataConfig, prepared_dir: Path) -> None:
  # Imported by name: it needs TensorFlow, which a machine that only trains need not have.
  prepare = importlib.import_module('latent_deliberation.data.packing').prepare
  needed = ('train', 'validation') if config.mode == 'packed' else ('validation',)
  if all((prepared_dir / ROWS / split).is_dir() for split in needed):
    prepare(config, prepared_dir)  # only compares; the directory may be read-only
    return
  make_writable(prepared_dir)
  # Another launch may prepare the same data. This one then uses what that one made.
  with lock(prepared_dir / DATA_LOCK, f'prepares the data in {prepared_dir}', wait=True):
    prepare(config, prepared_dir)


def _refuse_rows(prepared_dir: Path) -> None:
  """Raises UserError for the folder of the rows in prepared data, or of one split."""
  parent = prepared_dir.absolute().parent
  if (prepared_dir / MANIFEST_FILE).is_file():
    raise UserError(f'{prepared_dir} holds the rows of one split: give the prepared data, '
                    f'{parent.parent}')
  if any((prepared_dir / split / MANIFEST_FILE).is_file() for split in ('train', 'validation')):
    raise UserError(f'{prepared_dir} holds the rows of prepared data: give the whole, {parent}')


def check_pieces(data: DataConfig, vocab_size: int) -> None:
  """Compares the size of the vocabulary with the decoder, before any long work.

  A mixture's vocabulary is not known yet. A missing file is reported when it is opened.

  Raises:
    UserError: there are more pieces than embeddings, or the tokenizer cannot be read.
  """
  path = as_path(data.vocabulary_path)
  if data.source == 'mixture' or data.vocabulary_path and not path.is_file():
    return
  # A vocabulary that is trained later has data.vocabulary_size pieces.
  if data.vocabulary == 'byte':
    origin, pieces = 'the byte vocabulary', BYTE_VOCABULARY_SIZE
  elif data.vocabulary_path:
    origin, pieces = str(path), _open(path)[0]
  else:
    origin, pieces = 'data.vocabulary_size', data.vocabulary_size
  if pieces > vocab_size:
    raise UserError(
        f'{origin}: {pieces} pieces, but decoder.vocab_size, the number of embeddings, is '
        f'{vocab_size}: use the vocabulary that the decoder was trained with, or another decoder')
  # A decoder may have some more embeddings than pieces, for padding, but hardly twice as many.
  if data.vocabulary_path and pieces < vocab_size // 2:
    logging.warning('%s has %d pieces, the decoder %d embeddings: check that the decoder was '
                    'trained with this tokenizer', origin, pieces, vocab_size)


def _open(path: Path) -> tuple[int, Callable[[str], list[int]]]:
  """Returns the number of pieces of a vocabulary file, and the function that encodes a text."""
  path = at_hand(path, 'tokenizer*.json')
  if path.suffix == '.json':
    module = importlib.import_module('latent_deliberation.data.tokenizer_json')
    tokenizer = module.TokenizerJson(path)
    return tokenizer.size, tokenizer.encode
  model, _ = open_sentencepiece(path)
  return model.vocab_size(), model.encode


def check_known_vocabulary(data: DataConfig, prepared_dir: Path,
                           checkpoint: Checkpoint) -> None:
  """Checks the vocabulary of the data of a decoder that does not name its own, before any work.

  A tokenizer that the decoder has beside it must give the same ids. Two files may do so, such as
  the tokenizer.model and the tokenizer.json of one model.

  Raises:
    UserError: a new vocabulary would be trained, or the data have that of another model.
  """
  # `check_rows_vocabulary` compares a vocabulary that the decoder names.
  if checkpoint.vocabulary_hash or data.source == 'mixture' or data.vocabulary == 'byte':
    return
  kept = kept_vocabulary(prepared_dir)
  if kept.exists() or data.vocabulary_path:
    _compare_vocabularies(kept if kept.exists() else as_path(data.vocabulary_path), checkpoint)
    return
  raise UserError(
      f'{checkpoint.directory} does not name the vocabulary that it was trained with, and cannot '
      'use a new one. Give its tokenizer: set data.vocabulary_path, or give the directory as in '
      '--config=configs/gemma2_2b.py:DIRECTORY, which takes the tokenizer there')


def _compare_vocabularies(used: Path, checkpoint: Checkpoint) -> None:
  """Raises UserError if a vocabulary file gives other ids than the decoder's own tokenizer."""
  try:
    own = checkpoint.tokenizer
    if own is None or not used.is_file():
      return
    is_same = _open(used)[1](SAMPLE) == _open(own)[1](SAMPLE)
  except UserError:  # one of the two cannot be read here, and is reported where it is needed
    return
  if not is_same:
    raise UserError(
        f'{used} gives other ids than {own}, the tokenizer of the decoder: prepare the text with '
        'that of the decoder (data.vocabulary_path), in another directory')


def open_rows(prepared_dir: Path, split: str, *, length: int, vocab_size: int) -> PackedRows:
  """Opens the packed rows of a split.

  Args:
    prepared_dir: directory of prepared data.
    split: 'train' or 'validation'.
    length: T, tokens that a row must have.
    vocab_size: number of embeddings of the decoder.

  Raises:
    UserError: there are no rows, or the directory is that of rows.
    UserError: rows have another length, or more ids than the decoder has embeddings.
  """
  _refuse_rows(prepared_dir)
  rows = PackedRows(prepared_dir / ROWS / split)
  if rows.vocabulary_size > vocab_size:
    raise UserError(
        f'the rows in {prepared_dir} have a vocabulary of {rows.vocabulary_size} pieces, the '
        f'decoder has {vocab_size} embeddings: set decoder.vocab_size to at least '
        f'{rows.vocabulary_size}, or use the vocabulary that the decoder was trained with')
  if rows.length != length:
    raise UserError(f'the rows in {prepared_dir} have {rows.length} tokens, data.length is '
                    f'{length}: prepare the data in another directory')
  return rows


def check_rows_vocabulary(rows: PackedRows, checkpoint: Checkpoint) -> None:
  """Raises UserError if the rows were made with another vocabulary than the decoder's."""
  found = rows.manifest.recipe.vocabulary_hash
  if checkpoint.vocabulary_hash and found != checkpoint.vocabulary_hash:
    raise UserError(
        f'the rows were made with the vocabulary {found}, the decoder was trained with '
        f'{checkpoint.vocabulary_hash}: prepare the text with the vocabulary.model of the decoder '
        '(data.vocabulary_path), in another directory')


def open_batches(experiment: Experiment, prepared_dir: Path, section: str, mesh: Mesh) -> Batches:
  """Returns endless training batches of this process, packed or online as data.mode says.

  Args:
    experiment: the whole configuration.
    prepared_dir: directory of prepared data.
    section: 'pretraining' or 'training': section with the batch size and the range of rows. The two
      have different orders, so that a coprocessor does not begin with the rows that its decoder
      began with.
    mesh: mesh that determines which rows of a batch this process reads.
  """
  settings = getattr(experiment, section)
  # Even seeds order pretraining, odd seeds training.
  seed = 2 * experiment.seed + ('pretraining', 'training').index(section)
  if experiment.data.mode == 'online':
    # Imported only for streams, since it needs TensorFlow.
    online = importlib.import_module('latent_deliberation.data.online')
    return online.OnlineBatches(
        experiment.data, prepared_dir, settings.batch_size, seed, jax.process_index(),
        jax.process_count())
  rows = open_rows(prepared_dir, 'train', length=experiment.data.length,
                   vocab_size=experiment.decoder.vocab_size)
  return PermutedBatches(rows, settings.batch_size, seed,
                         rows_of_process(settings.batch_size, mesh, experiment.rules),
                         settings.row_range_percent)


def open_validation(experiment: Experiment, prepared_dir: Path, mesh: Mesh,
                    num_batches: int) -> tuple[PackedRows, list[Batch]]:
  """Returns the validation rows, and this process's rows of their first batches.

  Args:
    experiment: the whole configuration, with `evaluation.batch_size`.
    prepared_dir: directory of prepared data.
    mesh: mesh that determines which rows of a batch this process reads.
    num_batches: number of batches.

  Raises:
    UserError: see `open_rows` and `validation_batches`.
  """
  rows = open_rows(prepared_dir, 'validation', length=experiment.data.length,
                   vocab_size=experiment.decoder.vocab_size)
  return rows, validation_batches(rows, num_batches, experiment.evaluation.batch_size, mesh,
                                  experiment.rules)


def validation_batches(rows: PackedRows, num_batches: int, batch_size: int, mesh: Mesh,
                       rules: Mapping[str, Sequence[str]]) -> list[Batch]:
  """Returns this process's rows of the first validation batches, the same at every call.

  Rows are in a fixed random order, so neighbours are usually of different documents.

  Raises:
    UserError: there are too few rows.
  """
  if num_batches * batch_size > len(rows):
    raise UserError(
        f'{num_batches} validation batches of evaluation.batch_size = {batch_size} need '
        f'{num_batches * batch_size} rows, {rows.directory} has {len(rows)}: lower '
        'evaluation.num_texts or evaluation.eval_batches, or hold out more text '
        '(data.validation_percent)')
  batches = PermutedBatches(rows, batch_size, VALIDATION_ORDER,
                            rows_of_process(batch_size, mesh, rules))
  return [batches(index) for index in range(num_batches)]


def validation_texts(rows: PackedRows, num_rows: int, rows_per_text: int) -> np.ndarray:
  """Returns the number of the text of each of the first validation rows, int [num_rows].

  Args:
    rows_per_text: consecutive packed rows that count as one text.
  """
  return permutation(VALIDATION_ORDER, 0, len(rows))[:num_rows] // rows_per_text
