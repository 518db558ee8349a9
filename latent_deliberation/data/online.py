"""Batches straight from a seqio stream, for corpora that are too large to pack first.

Each process takes its share of the documents before packing, as seqio does. Global batches
therefore depend on the number of processes, and a resumed run must have the same number. On another
mesh a run reads the same texts at other places of the batch. Packed rows have neither limit: prefer
them where the disk has room.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.array_types import Batch
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.host_tensorflow import seqio, tf
from latent_deliberation.data.packing import check_segments, fill_rows
from latent_deliberation.data.rows import Framing, fingerprint_of, positions_in_segments
from latent_deliberation.data.tasks import Documents
from latent_deliberation.data.vocabularies import framing_of
from latent_deliberation.errors import UserError, differences
from latent_deliberation.files import (
  as_path,
  at_hand,
  begin_directory,
  finish_directory,
  growing_files,
  partial_of,
  write_whole,
)

GROUP_DOCUMENTS = 128  # packed together; only the last row of a group has much padding
SHUFFLED_ROWS = 512  # enough to separate the rows of one document; most of a saved state is these


class OnlineBatches:
  """This process's shares of an endless stream of packed batches of the training split.

  Args:
    config: source, vocabulary and length of the rows.
    prepared_dir: directory of the vocabulary; with several processes `prepare` must run first.
    batch_size: B, rows of a global batch.
    seed: seed of the order of documents, 0 to 2**31 - 2.
    process_index: number of this process.
    process_count: number of processes.

  Attributes:
    fingerprint: hash of everything that determines the stream, except for the processes.
    num_rows: None, since the stream has no epochs.

  Raises:
    UserError: processes cannot have equal shares of a batch; see also `Documents.open`.
  """

  num_rows = None

  def __init__(self, config: DataConfig, prepared_dir: Path, batch_size: int, seed: int,
               process_index: int = 0, process_count: int = 1):
    share = _share(batch_size, process_index, process_count)
    documents = Documents.open(config, as_path(prepared_dir))
    recipe = documents.recipe(config, 'train')
    # A restored tf.data iterator checks nothing. With another batch size it hangs or ends, and it
    # ignores another seed. So everything that determines the stream is compared first.
    self._identity = {
        'task': recipe.task, 'source_fingerprint': recipe.source_fingerprint,
        'vocabulary_hash': recipe.vocabulary_hash, 'length': recipe.length,
        'batch_size': batch_size, 'seed': seed,
        'tensorflow': tf.__version__, 'seqio': seqio.__version__}
    self.fingerprint = fingerprint_of(self._identity)
    # Not in the fingerprint: `restore` compares the number of processes and names both.
    self._identity |= {'process_count': process_count, 'process_index': process_index}
    shard = seqio.ShardInfo(process_index, process_count) if process_count > 1 else None
    self._framing = framing_of(documents.vocabulary)
    rows = pack_stream(documents.stream('train', seed, shard, repeat=True), config.length,
                       self._framing, seed)
    self._iterator = iter(rows.batch(share, drop_remainder=True).prefetch(2))
    self._next_step = 0

  def __call__(self, step: int) -> Batch:
    """Returns the next batch, numpy int32 [B / process_count, T].

    Raises:
      ValueError: `step` is not the one after the last.
      UserError: the stream has no document.
      UserError: a document holds an id that means padding, or BOS after its beginning.
    """
    if step != self._next_step:
      raise ValueError(f'step = {step}, but the stream is at {self._next_step} and only goes '
                       'forward: restore a saved state')
    try:
      # The stream raises TensorFlow's errors for documents that `_frame` refuses.
      tokens, intended = (part.numpy() for part in next(self._iterator))
    except StopIteration:
      raise UserError(f"{self._identity['task']} has no document in split 'train': give "
                      'more documents, or change validation_percent') from None
    except tf.errors.InvalidArgumentError as error:
      raise UserError(error.message) from error
    # The model reads segments from BOS, which must give what packing meant.
    check_segments(tokens, intended, self._framing, self._identity['task'])
    self._next_step += 1
    segments = self._framing.segments(tokens)
    return Batch(tokens=tokens, segments=segments, positions=positions_in_segments(segments))

  def save(self, directory: Path, step: int) -> None:
    """Writes this process's state, after which `step` comes next, completely or not at all.

    Raises:
      ValueError: the stream is at another step.
      UserError: `directory` holds this step of another stream.
    """
    if step != self._next_step:
      raise ValueError(f'step = {step} cannot be saved, the stream is at {self._next_step}')
    # The folder gets its name when it is complete.
    final = _state_directory(directory, step, self._identity['process_index'])
    if final.exists():
      _check_state(final / 'state.json', self._identity, step)
      return
    partial = partial_of(final)
    begin_directory(partial)
    with growing_files(partial) as here:  # TensorFlow writes files
      tf.train.Checkpoint(iterator=self._iterator).write(str(here / 'iterator'))
    write_whole(partial / 'state.json', _state_to_json(self._identity, step))
    finish_directory(partial, final)

  def restore(self, directory: Path, step: int) -> None:
    """Goes to the saved state after which `step` comes next.

    Raises:
      UserError: no state was saved for the step and this process.
      UserError: the state is of another stream; the message names what differs.
    """
    # This process may have no state because there were fewer. The state of process 0 says so.
    _check_state(_state_directory(directory, step, 0) / 'state.json',
                self._identity | {'process_index': 0}, step)
    final = _state_directory(directory, step, self._identity['process_index'])
    _check_state(final / 'state.json', self._identity, step)
    # TensorFlow takes this path for a pattern, so it gets a name without brackets and the like.
    with tempfile.TemporaryDirectory() as place:
      alias = Path(place, 'state')
      alias.symlink_to(at_hand(final).absolute())
      tf.train.Checkpoint(iterator=self._iterator).read(str(alias / 'iterator')).assert_consumed()
    self._next_step = step


def _state_directory(directory: Path, step: int, process_index: int) -> Path:
  return directory / f'stream-{step}-host-{process_index}'


def _state_to_json(identity: dict[str, Any], step: int) -> bytes:
  """Returns the content of state.json, which `_check_state` reads."""
  state = {'step': step, 'fingerprint': fingerprint_of(identity), **identity}
  return json.dumps(state, indent=2, sort_keys=True).encode() + b'\n'


def _check_state(path: Path, identity: dict[str, Any], step: int) -> None:
  """Raises UserError unless `path` is the state of this step of this stream."""
  if not path.is_file():
    raise UserError(f'no data state for step {step} at {path}: copy the folder again, or remove '
                    f'the checkpoint of step {step} to resume from the one before it')
  try:
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is not a data state ({error}): copy the folder again, or remove the '
                    f'checkpoint of step {step} to resume from the one before it') from error
  expected = json.loads(_state_to_json(identity, step))
  # Keys that only the saved state has are ignored.
  lines = differences({key: saved[key] for key in expected if key in saved}, expected)
  if lines:
    raise UserError('\n'.join([
        f'{path} is of another stream:', *lines,
        'Resume with the saved settings, or start in an empty work directory.']))


def _share(batch_size: int, process_index: int, process_count: int) -> int:
  """Returns the number of rows of a global batch that each process reads."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'batch_size = {batch_size} cannot be divided among {process_count} processes: '
                    f'choose a multiple of {process_count}')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index = {process_index}: it must be 0 to {process_count - 1}')
  return batch_size // process_count


def pack_stream(documents: tf.data.Dataset, length: int, framing: Framing,
                seed: int) -> tf.data.Dataset:
  """Returns rows (tokens, segments), int32 [T] each, of documents, int32 [n] with BOS and EOS.

  `fill_rows` fills them, a group of documents at a time: seqio's own packing leaves a quarter of a
  row empty on web text. They are shuffled, since a long document fills rows in succession.
  """
  def fill(tokens: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The group comes as one array of tokens, with the ends of all documents but the last.
    rows = fill_rows(np.split(tokens, ends), length, framing)
    tokens, segments = zip(*rows, strict=True)
    return np.stack(tokens), np.stack(segments)

  def pack(group: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor]:
    # Stateless, because tf.data does not checkpoint iterators with stateful functions.
    rows = tf.numpy_function(fill, [group.values, group.row_limits()[:-1]], [tf.int32, tf.int32],
                             stateful=False)
    return tuple(tf.ensure_shape(part, (None, length)) for part in rows)

  rows = documents.ragged_batch(GROUP_DOCUMENTS).map(pack, num_parallel_calls=2).unbatch()
  return rows.shuffle(SHUFFLED_ROWS, seed=seed)
