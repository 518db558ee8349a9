"""Data of an experiment: prepared where seqio is installed, read anywhere."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from sentencepiece import SentencePieceProcessor

from latent_deliberation.data.rows import PackedRows, PermutedBatches, permutation
from latent_deliberation.jobs.directories import make_writable
from latent_deliberation.jobs.experiment import Experiment
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.training.checkpoint import Batches

ROWS = 'rows'
VALIDATION_ORDER = 0  # seed of the order of validation rows, the same for every experiment


def prepare_data(experiment: Experiment, directory: Path) -> None:
  """Makes vocabulary and packed rows in `directory`, or checks those that are there.

  Without seqio, rows that are there are taken as they are. Process 0 works, the others wait.
  """
  _check_pieces(experiment)
  if importlib.util.find_spec('seqio') is None:
    if not (directory / ROWS).is_dir():
      raise FileNotFoundError(
          f'{directory / ROWS} does not exist, and seqio, which would make it, is not installed: '
          'prepare the data on another machine and copy the directory here')
  elif jax.process_index() == 0:
    if not (directory / ROWS).is_dir():  # those that are there may be read-only
      make_writable(directory)
    from latent_deliberation.data.packing import prepare  # imports TensorFlow, which not all have
    prepare(experiment.data, directory)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('data prepared')


def _check_pieces(experiment: Experiment) -> None:
  """Raises ValueError where the tokenizer that is given has more pieces than the decoder."""
  path = Path(experiment.data.vocabulary_path).expanduser()
  if experiment.data.vocabulary != 'sentencepiece' or not path.is_file():
    return  # one that is missing is spoken of where it is needed
  try:
    pieces = SentencePieceProcessor(model_file=str(path)).vocab_size()
  except RuntimeError as error:
    raise ValueError(f'{path} is not a SentencePiece model: give another data.vocabulary_path'
                     ) from error
  if pieces > experiment.decoder.vocab_size:
    raise ValueError(
        f'{path} has {pieces} pieces, the decoder has {experiment.decoder.vocab_size} embeddings: '
        'give the tokenizer that the decoder was trained with (data.vocabulary_path)')


def open_rows(experiment: Experiment, directory: Path, split: str) -> PackedRows:
  """Packed rows of a split, checked against the decoder and the trunk length."""
  rows = PackedRows(directory / ROWS / split)
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
    section: 'pretraining' or 'training', whose batch size it has. The two have different orders:
      a coprocessor is not to begin with the very rows that its decoder has begun with.
  """
  batch_size = getattr(experiment, section).batch_size
  seed = 2 * experiment.seed + ('pretraining', 'training').index(section)
  place = {'process_index': jax.process_index(), 'process_count': jax.process_count()}
  if experiment.data.mode == 'online':
    from latent_deliberation.data.online import OnlineBatches  # imports TensorFlow
    return OnlineBatches(experiment.data, directory, batch_size, seed, **place)
  return PermutedBatches(open_rows(experiment, directory, 'train'), batch_size, seed, **place)


def validation_batches(experiment: Experiment, directory: Path, num_batches: int) -> list:
  """The same validation batches at every call, neighbours in different documents as a rule."""
  size = experiment.evaluation.batch_size
  rows = open_rows(experiment, directory, 'validation')
  if num_batches * size > len(rows):
    raise ValueError(
        f'{num_batches} validation batches of evaluation.batch_size = {size} need '
        f'{num_batches * size} rows, {directory} has {len(rows)}: lower evaluation.num_texts or '
        'watch_batches, or hold out more text (data.validation_percent)')
  stream = PermutedBatches(rows, size, VALIDATION_ORDER, jax.process_index(), jax.process_count())
  return [stream(index) for index in range(num_batches)]


def validation_texts(experiment: Experiment, directory: Path, num_batches: int) -> np.ndarray:
  """The text that each row of `validation_batches` belongs to, int [rows]; see `rows_per_text`."""
  rows = open_rows(experiment, directory, 'validation')
  order = permutation(VALIDATION_ORDER, 0, len(rows))
  return (order[:num_batches * experiment.evaluation.batch_size]
          // experiment.evaluation.rows_per_text)
