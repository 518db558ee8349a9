"""Batches straight from a seqio stream, for corpora that are too large to pack first.

Hosts take their shares of the documents before packing, as seqio does it, so global batches depend
on the number of hosts, and a resumed run must have the same number. On another mesh it reads the
same texts in other places of the batch. Packed rows are free of both: prefer them where there is
disk for them.
"""

import shutil
from pathlib import Path

import numpy as np

from latent_deliberation.array_types import Batch
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.host_tensorflow import seqio, tf
from latent_deliberation.data.packing import fill_rows
from latent_deliberation.data.rows import (
  check_state,
  fingerprint_of,
  positions_in_segments,
  state_to_json,
)
from latent_deliberation.data.tasks import Documents
from latent_deliberation.errors import UserError
from latent_deliberation.files import write_whole

GROUP_DOCUMENTS = 128  # filled together; only the last row of a group has padding to speak of
SHUFFLED_ROWS = 512  # enough to part the rows of one document; they make up most of a saved state


class OnlineBatches:
  """This host's shares of an endless stream of packed batches from the training split.

  Args:
    config: of the documents; its length is T.
    workdir: holds the vocabulary, or will hold it; on several hosts `prepare` must come first.
    batch_size: B, rows of a global batch.
    seed: of the order of documents, 0 to 2**31 - 2.
    process_index: this host.
    process_count: number of hosts.

  Attributes:
    fingerprint: of everything that shapes the stream but the hosts.

  Raises:
    UserError: hosts cannot have equal shares of a batch; or see `Documents.open`.
    UserError: see `Documents.open`.
  """

  def __init__(self, config: DataConfig, workdir: Path, batch_size: int, seed: int,
               process_index: int = 0, process_count: int = 1):
    share = _share(batch_size, process_index, process_count)
    documents = Documents.open(config, Path(workdir))
    recipe = documents.recipe(config, 'train')
    # A restored tf.data iterator trusts the pipeline blindly: with another batch size it hangs or
    # ends, another seed it ignores. So all that shapes the stream is compared before.
    self._identity = {
        'task': recipe.task, 'source_fingerprint': recipe.source_fingerprint,
        'vocabulary_hash': recipe.vocabulary_hash, 'length': recipe.length,
        'batch_size': batch_size, 'seed': seed,
        'tensorflow': tf.__version__, 'seqio': seqio.__version__}
    self.fingerprint = fingerprint_of(self._identity)
    # Apart from the fingerprint, so that another number of hosts is named when it is refused.
    self._identity |= {'process_count': process_count, 'process_index': process_index}
    shard = seqio.ShardInfo(process_index, process_count) if process_count > 1 else None
    rows = pack_stream(documents.stream('train', seed, shard, repeat=True), config.length,
                       documents.vocabulary.bos_id, seed)
    self._iterator = iter(rows.batch(share, drop_remainder=True).prefetch(2))
    self._next_step = 0

  def __call__(self, step: int) -> Batch:
    """The next batch, numpy int32 [B / process_count, T].

    Raises:
      UserError: `step` is not the one after the last; or a document holds the padding id.
      UserError: the stream has no document.
    """
    if step != self._next_step:
      raise UserError(f'step {step} asked for, but the stream stands at {self._next_step} and '
                       'goes forward only: restore a saved state, or use packed rows')
    try:
      tokens, segments = (part.numpy() for part in next(self._iterator))
    except StopIteration:
      raise UserError(f"{self._identity['task']} has no document in split 'train'") from None
    except tf.errors.InvalidArgumentError as error:
      raise UserError(error.message) from error
    self._next_step += 1
    return Batch(tokens=tokens, segments=segments, positions=positions_in_segments(segments))

  def save(self, directory: Path, step: int) -> None:
    """Writes this host's state, with which `step` comes next, whole or not at all.

    Raises:
      UserError: the stream stands at another step; or the same step of another stream is there.
    """
    if step != self._next_step:
      raise UserError(f'step {step} cannot be saved, the stream stands at {self._next_step}: save '
                       'before the next batch is asked for')
    final = _state_directory(directory, step, self._identity['process_index'])
    if final.exists():
      check_state(final / 'state.json', self._identity, step)
      return
    partial = final.with_name(f'.{final.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tf.train.Checkpoint(iterator=self._iterator).write(str(partial / 'iterator'))
    write_whole(partial / 'state.json', state_to_json(self._identity, step))
    partial.rename(final)

  def restore(self, directory: Path, step: int) -> None:
    """Goes to where `save` was called, so that `step` comes next.

    Raises:
      UserError: nothing was saved for the step and this host.
      UserError: the state is of another stream; names what differs.
    """
    # The first host's tells how many there were: the own state may be missing for that reason.
    check_state(_state_directory(directory, step, 0) / 'state.json',
                self._identity | {'process_index': 0}, step)
    final = _state_directory(directory, step, self._identity['process_index'])
    check_state(final / 'state.json', self._identity, step)
    tf.train.Checkpoint(iterator=self._iterator).read(str(final / 'iterator')).assert_consumed()
    self._next_step = step


def _state_directory(directory: Path, step: int, process_index: int) -> Path:
  return Path(directory) / f'stream-{step}-host-{process_index}'


def _share(batch_size: int, process_index: int, process_count: int) -> int:
  """Rows of a global batch that each host reads."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'batch_size = {batch_size} cannot be divided among {process_count} hosts: '
                     f'choose a multiple of {process_count}')
  if not 0 <= process_index < process_count:
    raise UserError(f'process_index = {process_index}: there are {process_count} hosts, from 0 on')
  return batch_size // process_count


def pack_stream(documents: tf.data.Dataset, length: int, bos_id: int, seed: int) -> tf.data.Dataset:
  """Rows (tokens, segments), int32 [T] each, from documents, int32 [n] each with BOS and EOS.

  Filled as packed rows are (seqio's own packing leaves a quarter of a row empty on web text), some
  documents at a time, and mixed, since the parts of a long document come one after the other.
  """
  def fill(tokens: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = fill_rows(np.split(tokens, ends), length, bos_id)
    tokens, segments = zip(*rows, strict=True)
    return np.stack(tokens), np.stack(segments)

  def pack(group: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor]:
    # Called stateless, or tf.data would refuse to checkpoint the iterator.
    rows = tf.numpy_function(fill, [group.values, group.row_limits()[:-1]], [tf.int32, tf.int32],
                             stateful=False)
    return tuple(tf.ensure_shape(part, (None, length)) for part in rows)

  rows = documents.ragged_batch(GROUP_DOCUMENTS).map(pack, num_parallel_calls=2).unbatch()
  return rows.shuffle(SHUFFLED_ROWS, seed=seed)
