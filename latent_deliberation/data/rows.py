"""Packed rows on disk, their batches, and the order of those; no TensorFlow or seqio here.

A split is a folder with manifest.json and files tokens-00000.npy, ..., each [rows, T]. The files
are plain .npy: a memory map reads any row at once and needs only numpy. Every document of a row
begins with BOS and padding is id 0, so segments and positions follow from the tokens.

Row k of a training run is permutation(seed, k // N)[k % N]. The order is a formula, so a resumed
run reads no saved position, and the number of processes does not matter.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latent_deliberation.array_types import Batch
from latent_deliberation.data.data_config import PAD_ID
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path, at_hand

# Version 1 stored segments in files of their own, segments-00000.npy. It is read, not written.
FORMAT_VERSION = 2
MANIFEST_FILE = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that determines the contents of packed rows.

  Attributes:
    task: name of the seqio task or mixture.
    split: 'train' or 'validation'.
    source_fingerprint: hash of the documents; for local files, of their names and contents.
    vocabulary_hash: hash of the vocabulary; see `vocabulary_hash` in vocabularies.py.
    vocabulary_size: V; every token is below it.
    length: T, tokens of a row.
    seed: seed of the order of documents.
    max_tokens: limit at which packing stops; 0 packs the whole split.
  """
  task: str
  split: str
  source_fingerprint: str
  vocabulary_hash: str
  vocabulary_size: int
  length: int
  seed: int
  max_tokens: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Description of a folder of packed rows.

  Attributes:
    recipe: what the rows were made from.
    rows: N, number of rows.
    tokens: number of tokens, without padding.
    documents: number of documents.
    text_bytes: UTF-8 bytes of text that the tokens stand for.
    rows_per_file: rows of every file but the last.
    content_hash: sha256 of the rows, file by file, tokens before segments.
    bos_id: id that begins every segment; None in version 1, where files hold the segments.
    format_version: version of this layout.
  """
  recipe: Recipe
  rows: int
  tokens: int
  documents: int
  text_bytes: int
  rows_per_file: int
  content_hash: str
  bos_id: int | None
  format_version: int = FORMAT_VERSION

  @property
  def fingerprint(self) -> str:
    """Hash of the rows and what they were made from, the same in both versions of the layout."""
    version_1 = dataclasses.replace(self, bos_id=None, format_version=1)
    return hashlib.sha256(version_1.to_json()).hexdigest()

  def to_json(self) -> bytes:
    """Returns the content of manifest.json; for version 1, byte for byte as it was written."""
    fields = dataclasses.asdict(self)
    if self.format_version == 1:
      del fields['bos_id']
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b'\n'

  @classmethod
  def from_json(cls, content: bytes, origin: Path) -> 'Manifest':
    """Reads what `to_json` wrote. Raises UserError, naming `origin`, for anything else."""
    try:
      fields = json.loads(content)
      version = fields['format_version']
      if version in (1, FORMAT_VERSION):
        # Version 1 has no BOS id, since its files hold the segments.
        missing = {'bos_id': None} if version == 1 else {}
        return cls(**(fields | missing | {'recipe': Recipe(**fields['recipe'])}))
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f'{origin} is not a manifest of packed rows ({error!r}): pack the data '
                      'again into an empty folder') from error
    raise UserError(f'{origin} has format version {version}, this code reads 1 and '
                    f'{FORMAT_VERSION}: pack the data again into an empty folder')


def smallest_dtype(largest: int) -> np.dtype:
  """Returns the dtype of a file whose values are 0 to `largest`: uint16 if they fit, else int32."""
  return np.dtype(np.uint16 if largest < 2**16 else np.int32)


def fingerprint_of(identity: dict[str, Any]) -> str:
  """Returns the sha256 of the values that tell one sequence of batches from another."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def segments_from_bos(tokens: np.ndarray, bos_id: int) -> np.ndarray:
  """Returns the segment of each token, int32 [B, T]: the number of BOS up to it, 0 on padding."""
  return np.where(tokens == PAD_ID, 0, np.cumsum(tokens == bos_id, axis=1)).astype(np.int32)


def positions_in_segments(segments: np.ndarray) -> np.ndarray:
  """Returns the index of each token in its run of equal segments, int32 [B, T]; 0 on padding."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.diff(segments, axis=1, prepend=-1) != 0
  # The running maximum carries the index of each start to the tokens after it.
  first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  return np.where(segments > 0, index - first, 0).astype(np.int32)


def read_manifest(directory: Path) -> Manifest:
  """Returns the manifest of a folder of rows. Raises UserError if it is missing or damaged."""
  path = directory / MANIFEST_FILE
  if not path.is_file():
    raise UserError(f'no packed rows in {directory}: {MANIFEST_FILE} is missing. If the folder '
                    'was copied in part, copy it again; otherwise pack the data first')
  return Manifest.from_json(path.read_bytes(), path)


class PackedRows:
  """One split of packed rows, opened for reading any row.

  Attributes:
    directory: folder of the split.
    manifest: its Manifest.
    fingerprint: that of the manifest, which holds a hash of the contents.

  Raises:
    UserError: the manifest or a file is missing.
    UserError: a file is truncated, or is not the one that the manifest describes.
  """

  def __init__(self, directory: Path):
    self.manifest = read_manifest(as_path(directory))
    self.directory = at_hand(as_path(directory))
    self.fingerprint = self.manifest.fingerprint
    self._tokens = self._open_files('tokens', self.vocabulary_size - 1)
    # Version 1 stores segments. Later versions compute them in `take`.
    if self.manifest.bos_id is None:
      self._segments = self._open_files('segments', self.length)

  def __len__(self) -> int:
    return self.manifest.rows

  @property
  def length(self) -> int:
    """T, tokens of a row."""
    return self.manifest.recipe.length

  @property
  def vocabulary_size(self) -> int:
    """V."""
    return self.manifest.recipe.vocabulary_size

  def take(self, indices: np.ndarray) -> Batch:
    """Returns the rows of these numbers, numpy int32 [B, T]; IndexError outside of 0 .. N - 1."""
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(f'rows {indices.min()} to {indices.max()}: there are {len(self)}')
    tokens = self._gather(self._tokens, indices)
    if self.manifest.bos_id is None:
      segments = self._gather(self._segments, indices)
    else:
      segments = segments_from_bos(tokens, self.manifest.bos_id)
    return Batch(tokens=tokens, segments=segments, positions=positions_in_segments(segments))

  def _open_files(self, kind: str, largest: int) -> list[np.ndarray]:
    step, dtype = self.manifest.rows_per_file, smallest_dtype(largest)
    return [_open_file(self.directory / f'{kind}-{first // step:05d}.npy',
                       min(step, len(self) - first), self.length, dtype)
            for first in range(0, len(self), step)]

  def _gather(self, files: Sequence[np.ndarray], indices: np.ndarray) -> np.ndarray:
    gathered = np.empty((len(indices), self.length), np.int32)
    # One read for each file that holds some of the rows.
    numbers, places = np.divmod(indices, self.manifest.rows_per_file)
    for number in np.unique(numbers):
      chosen = numbers == number
      gathered[chosen] = files[number][places[chosen]]
    return gathered


def _open_file(path: Path, rows: int, length: int, dtype: np.dtype) -> np.ndarray:
  """Maps a file, and checks that it is whole and has the shape that the manifest gives."""
  try:
    # A memory map: rows are read when they are taken.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except FileNotFoundError:
    raise UserError(f'{path} is missing, but {MANIFEST_FILE} lists it: copy the folder again, or '
                    'delete it and pack the data again') from None
  except (ValueError, OSError, EOFError) as error:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or not an .npy file '
                    f'({error}): copy the folder again, or delete it and pack again') from error
  if array.shape != (rows, length) or array.dtype != dtype:
    raise UserError(f'{path} has {array.dtype} {list(array.shape)}, {MANIFEST_FILE} promises '
                    f'{dtype} {[rows, length]}: the file is of another packing. Copy the folder '
                    'again, or delete it and pack again')
  return array


ALL_ROWS = (0, 100)  # percent, from and to


def check_row_range(row_range_percent: Sequence[int]) -> tuple[int, int]:
  """Returns a range of rows in percent, from and to. Raises UserError if it is none."""
  given = tuple(row_range_percent) if isinstance(row_range_percent, Sequence) else ()
  if not (len(given) == 2 and all(type(percent) is int for percent in given)
          and 0 <= given[0] < given[1] <= 100):
    raise UserError(f'row_range_percent = {row_range_percent!r}: two whole numbers are needed, '
                    'from and to, between 0 and 100, as in (0, 50)')
  return given


class Batches(Protocol):
  """An endless stream that can be restored. The batch of step s is the input of update s + 1.

  Attributes:
    fingerprint: identifies the rows and their order.
    num_rows: rows of an epoch; None where the stream has no epochs.
  """
  fingerprint: str
  num_rows: int | None

  def __call__(self, step: int) -> Batch:
    """Returns this process's rows of the global batch for `step` = 0, 1, ..., as numpy arrays."""

  def save(self, directory: Path, step: int) -> None:
    """Writes into `directory` everything that the batch of `step` needs.

    Every process calls this with the same directory, which exists and was empty.
    """

  def restore(self, directory: Path, step: int) -> None:
    """Makes `step` the next batch. Raises UserError when `directory` is of another stream."""


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  """Returns the order of `size` rows in an epoch, int64 [size]."""
  # numpy promises that RandomState's stream never changes. Generator's may.
  order = np.random.RandomState([seed, epoch]).permutation(size).astype(np.int64)
  order.setflags(write=False)  # the cache returns the same array again
  return order


class PermutedBatches:
  """An endless sequence of global batches, or of some rows of each.

  The global batch of a step is fixed before processes take their rows of it. A step therefore
  gives the same global batch on any number of processes. Every epoch holds each row once. A batch
  may span epochs.

  Args:
    rows: N packed rows.
    batch_size: B, rows of a global batch; may exceed N.
    seed: seed of the order, 0 to 2**32 - 1.
    own_rows: places in the global batch that this process reads, int [n]; all by default.
    row_range_percent: range of the rows to use, in percent, from and to, in the order of packing.

  Attributes:
    fingerprint: hash of rows, batch size, seed and range; the same on every process.
    num_rows: number of rows in the range.

  Raises:
    UserError: the batch is empty, or the range holds no row; see also `check_row_range`.
  """

  def __init__(self, rows: PackedRows, batch_size: int, seed: int,
               own_rows: np.ndarray | None = None,
               row_range_percent: tuple[int, int] = ALL_ROWS):
    if batch_size < 1:
      raise UserError(f'batch_size = {batch_size}: it must be at least 1')
    low, high = check_row_range(row_range_percent)
    # Both ends are rounded down, so ranges that meet in percent share no row.
    first, last = len(rows) * low // 100, len(rows) * high // 100
    if first == last:
      raise UserError(f'row_range_percent = {(low, high)} of {len(rows)} packed rows holds no row: '
                      'pack more text, or widen the range')
    self._rows, self._batch_size, self._seed = rows, batch_size, seed
    self._own_rows = np.arange(batch_size) if own_rows is None else own_rows
    self._first, self.num_rows = first, last - first
    identity = {'rows': rows.fingerprint, 'batch_size': batch_size, 'seed': seed}
    if self.num_rows < len(rows):
      identity['portion'] = [low, high]  # its name in the fingerprints of finished runs
    self.fingerprint = fingerprint_of(identity)

  def __call__(self, step: int) -> Batch:
    """Returns this process's rows of the global batch of a step, numpy int32 [n, T]."""
    # Rows are numbered through all epochs: row k is place k % N of epoch k // N.
    numbers = step * self._batch_size + self._own_rows
    epochs, places = np.divmod(numbers, self.num_rows)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      indices[chosen] = permutation(self._seed, int(epoch), self.num_rows)[places[chosen]]
    return self._rows.take(self._first + indices)

  def save(self, directory: Path, step: int) -> None:
    """Writes nothing: the position is the step, and run.json holds the fingerprint."""

  def restore(self, directory: Path, step: int) -> None:
    """Reads nothing: see `save`. A run with other batches is refused when run.json is compared."""
