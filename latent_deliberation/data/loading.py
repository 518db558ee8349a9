"""Data of an experiment: prepared where seqio is installed, read anywhere."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from absl import logging
from sentencepiece import SentencePieceProcessor

from latent_deliberation.data.data_config import ROWS_FOLDER, VOCABULARY_FILE
from latent_deliberation.data.rows import PackedRows, PermutedBatches, permutation
from latent_deliberation.distributed import first_does
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.inference.tokenizer import ByteTokenizer
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.sharding import make_mesh, rows_of_process
from latent_deliberation.training.checkpointer import Batches

VALIDATION_ORDER = 0  # seed of the order of validation rows, the same for every experiment


def prepare_data(experiment: Experiment, directory: Path) -> None:
  """Makes vocabulary and packed rows in `directory`, or checks those that are there.

  Without seqio, rows that are there are taken as they are. Process 0 works, the others wait.
  """
  check_pieces(experiment)
  if importlib.util.find_spec('seqio') is None:
    if not (directory / ROWS_FOLDER).is_dir():
      raise FileNotFoundError(
          f'{directory / ROWS_FOLDER} does not exist, and seqio, which would make it, is not '
          'installed: prepare the data on another machine and copy the directory here')
  else:
    first_does(f'prepare the data in {directory}', lambda: _prepare(experiment, directory))


def _prepare(experiment: Experiment, directory: Path) -> None:
  from latent_deliberation.data.packing import prepare  # imports TensorFlow, which not all have
  if not (directory / ROWS_FOLDER).is_dir():  # those that are there may be read-only
    make_writable(directory)
  prepare(experiment.data, directory)


def check_pieces(experiment: Experiment) -> None:
  """Compares the vocabulary that the data will have with the decoder, as far as it is known now.

  Raises:
    ValueError: there are more pieces than embeddings, or the tokenizer cannot be read.
  """
  data, room = experiment.data, experiment.decoder.vocab_size
  path = Path(data.vocabulary_path).expanduser()
  if data.source == 'mixture' or data.vocabulary_path and not path.is_file():
    return  # one that is missing is spoken of where it is needed
  if data.vocabulary == 'byte':
    origin, pieces = 'the byte vocabulary', ByteTokenizer.size
  elif data.vocabulary_path:
    origin, pieces = str(path), _count_pieces(path)
  else:
    origin, pieces = 'data.vocabulary_size', data.vocabulary_size
  if pieces > room:
    raise ValueError(
        f'{origin}: {pieces} pieces, but decoder.vocab_size, the number of embeddings, is {room}: '
        'take the vocabulary that the decoder was trained with, or another decoder')
  if data.vocabulary_path and pieces < room // 2:
    logging.warning('%s has %d pieces, the decoder %d embeddings: is it the tokenizer that the '
                    'decoder was trained with?', origin, pieces, room)


def _count_pieces(path: Path) -> int:
  try:
    return SentencePieceProcessor(model_file=str(path)).vocab_size()
  except RuntimeError as error:
    raise ValueError(f'{path} is not a SentencePiece model: give another data.vocabulary_path'
                     ) from error


def check_known_vocabulary(experiment: Experiment, directory: Path, decoder: Checkpoint) -> None:
  """Raises ValueError where a vocabulary would be made for a decoder that has one already."""
  data = experiment.data
  if (decoder.vocabulary or data.source == 'mixture' or data.vocabulary == 'byte'
      or data.vocabulary_path or (directory / VOCABULARY_FILE).exists()):
    return
  raise ValueError(
      f'{decoder.directory} does not say with which vocabulary it was trained, and a new one means '
      'nothing to it: give its tokenizer (data.vocabulary_path, or the directory as in '
      '--config=configs/gemma2_2b.py:DIRECTORY, which takes the tokenizer.model there)')


def open_rows(experiment: Experiment, directory: Path, split: str) -> PackedRows:
  """Packed rows of a split, checked against the decoder and the trunk length."""
  rows = PackedRows(directory / ROWS_FOLDER / split)
  if rows.vocabulary_size > experiment.decoder.vocab_size:
    raise ValueError(
        f'the rows in {directory} have a vocabulary of {rows.vocabulary_size} pieces, the decoder '
        f'has {experiment.decoder.vocab_size} embeddings: set decoder.vocab_size to at least '
        f'{rows.vocabulary_size}, or use the vocabulary that the decoder was trained with')
  if rows.length != experiment.data.length:
    raise ValueError(f'the rows in {directory} have {rows.length} tokens, data.length is '
                     f'{experiment.data.length}: prepare the data in another directory')
  return rows


def check_vocabulary(rows: PackedRows, decoder: Checkpoint) -> None:
  """Raises ValueError where the rows' ids mean other pieces than those the decoder learnt."""
  there = rows.manifest.recipe.vocabulary_hash
  if decoder.vocabulary and there != decoder.vocabulary:
    raise ValueError(
        f'the rows were made with the vocabulary {there}, the decoder was trained with '
        f'{decoder.vocabulary}: prepare the text with the vocabulary.model of the decoder '
        '(data.vocabulary_path), in another directory')


def open_stream(experiment: Experiment, directory: Path, section: str) -> Batches:
  """Endless training batches of this process, packed or online as the experiment says.

  Args:
    section: 'pretraining' or 'training', whose batch size and portion it has. The two have
      different orders: a coprocessor is not to begin with the very rows that its decoder has begun
      with.
  """
  settings = getattr(experiment, section)
  seed = 2 * experiment.seed + ('pretraining', 'training').index(section)
  if experiment.data.mode == 'online':
    from latent_deliberation.data.online import OnlineBatches  # imports TensorFlow
    return OnlineBatches(experiment.data, directory, settings.batch_size, seed,
                         jax.process_index(), jax.process_count())
  return PermutedBatches(open_rows(experiment, directory, 'train'), settings.batch_size, seed,
                         _own_rows(experiment, settings.batch_size), settings.portion)


def _own_rows(experiment: Experiment, batch_size: int) -> np.ndarray:
  """Places in a global batch that this process reads."""
  return rows_of_process(batch_size, make_mesh(experiment.mesh), experiment.rules)


def validation_batches(experiment: Experiment, directory: Path, num_batches: int) -> list:
  """This process's rows of the same validation batches at every call.

  Neighbours are of different documents as a rule.
  """
  size = experiment.evaluation.batch_size
  rows = open_rows(experiment, directory, 'validation')
  if num_batches * size > len(rows):
    raise ValueError(
        f'{num_batches} validation batches of evaluation.batch_size = {size} need '
        f'{num_batches * size} rows, {directory} has {len(rows)}: lower evaluation.num_texts or '
        'watch_batches, or hold out more text (data.validation_percent)')
  stream = PermutedBatches(rows, size, VALIDATION_ORDER, _own_rows(experiment, size))
  return [stream(index) for index in range(num_batches)]


def validation_texts(experiment: Experiment, directory: Path, num_batches: int) -> np.ndarray:
  """The text that each row of `validation_batches` belongs to, int [rows]; see `rows_per_text`."""
  rows = open_rows(experiment, directory, 'validation')
  order = permutation(VALIDATION_ORDER, 0, len(rows))
  return (order[:num_batches * experiment.evaluation.batch_size]
          // experiment.evaluation.rows_per_text)
