"""Packed rows on disk, their batches, and the order of those; no TensorFlow or seqio here.

A split is a folder with manifest.json and files tokens-00000.npy, ..., each [rows, T]. The files
are plain .npy: a memory map reads any row at once and needs only numpy. Segments and positions
follow from the tokens that begin, end and fill a row; see `Framing`. checksums.npy has the CRC-32
of each row, which is compared when the row is read. Folders of earlier code have none.

Row k of a training run is permutation(seed, k // N)[k % N]. The order is a formula, so a resumed
run reads no saved position, and the number of processes does not matter.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latent_deliberation.array_types import Batch
from latent_deliberation.data.data_config import PAD_ID
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path, at_hand, seal, unseal

# Version 1 stored segments in files of their own, segments-00000.npy. It is read, not written.
# Version 2 is for a framing of the usual kind, version 3 for any other.
FORMAT_VERSIONS = (1, 2, 3)
MANIFEST_FILE = 'manifest.json'
CHECKSUMS_FILE = 'checksums.npy'
MAPPED_FILES = 256  # of a kind, at the same time


@dataclasses.dataclass(frozen=True)
class Framing:
  """Ids that begin a document, end it, and fill what is left of a row.

  Usually the three differ, and id 0 fills rows. Qwen, Llama and Mistral give id 0 to a token, so
  there BOS fills rows: no document is BOS alone, so the first BOS that nothing follows begins the
  padding. In Qwen one id both begins and ends a document, so every second one in a row ends it.

  Attributes:
    bos_id, eos_id: ids that begin and end a document.
    pad_id: PAD_ID, or else `bos_id`.
  """
  bos_id: int
  eos_id: int
  pad_id: int = PAD_ID

  @property
  def is_usual(self) -> bool:
    """Whether the three ids differ."""
    return len({self.bos_id, self.eos_id, self.pad_id}) == 3

  def segments(self, tokens: np.ndarray) -> np.ndarray:
    """Returns the segment of each token of rows, int32 [B, T]: 1, 2, ..., and 0 on padding."""
    begins = tokens == self.bos_id
    if self.bos_id == self.eos_id:
      begins &= np.cumsum(begins, axis=1) % 2 == 1
    padding = tokens == self.pad_id
    if self.pad_id == self.bos_id:
      followed = np.zeros_like(begins)
      followed[:, :-1] = tokens[:, 1:] != self.bos_id
      padding = np.logical_or.accumulate(begins & ~followed, axis=1)
    return np.where(padding, 0, np.cumsum(begins, axis=1)).astype(np.int32)


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
    eos_id, pad_id: see Framing; None before version 3, where padding is id 0 and no id both begins
      and ends a document.
  """
  recipe: Recipe
  rows: int
  tokens: int
  documents: int
  text_bytes: int
  rows_per_file: int
  content_hash: str
  bos_id: int | None
  format_version: int = 2
  eos_id: int | None = None
  pad_id: int | None = None

  @property
  def framing(self) -> Framing | None:
    """Ids that tell the segments of a row; None in version 1."""
    if self.format_version == 1:
      return None
    if self.format_version == 2:
      return Framing(self.bos_id, eos_id=-1)  # it is not the BOS
    return Framing(self.bos_id, self.eos_id, self.pad_id)

  @property
  def fingerprint(self) -> str:
    """Hash of the rows and what they were made from, the same in all versions of the layout."""
    version_1 = dataclasses.replace(self, format_version=1)
    return hashlib.sha256(version_1.to_json()).hexdigest()

  def to_json(self) -> bytes:
    """Returns the fields as JSON, byte for byte as their version was written."""
    fields = dataclasses.asdict(self)
    for name in _LATER_FIELDS[self.format_version]:
      del fields[name]
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b'\n'

  def seal(self) -> bytes:
    """Returns the content of manifest.json, with a checksum of it."""
    return json.dumps(seal(json.loads(self.to_json())), indent=2, sort_keys=True).encode() + b'\n'

  @classmethod
  def from_json(cls, content: bytes, origin: Path) -> 'Manifest':
    """Reads what `seal` wrote. Raises UserError, naming `origin`, for anything else."""
    try:
      fields = unseal(content, origin)
      version = fields['format_version']
      if version in FORMAT_VERSIONS:
        missing = dict.fromkeys(_LATER_FIELDS[version])
        return cls(**(fields | missing | {'recipe': Recipe(**fields['recipe'])}))
    except UserError:
      raise
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f'{origin} is not a manifest of packed rows ({error!r}): pack the data '
                      'again into an empty folder') from error
    raise UserError(f'{origin} has format version {version}, this code reads '
                    f'{FORMAT_VERSIONS}: pack the data again into an empty folder')


# Fields of a Manifest that a version lacks.
_LATER_FIELDS = {1: ('bos_id', 'eos_id', 'pad_id'), 2: ('eos_id', 'pad_id'), 3: ()}


def smallest_dtype(largest: int) -> np.dtype:
  """Returns the dtype of a file whose values are 0 to `largest`: uint16 if they fit, else int32."""
  return np.dtype(np.uint16 if largest < 2**16 else np.int32)


def checksums_of(rows: np.ndarray) -> np.ndarray:
  """Returns the CRC-32 of each row [n, T] as it is stored, uint32 [n]."""
  return np.array([zlib.crc32(row) for row in np.ascontiguousarray(rows)], np.uint32)


def fingerprint_of(identity: dict[str, Any]) -> str:
  """Returns the sha256 of the values that tell one sequence of batches from another."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


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
    self._framing = self.manifest.framing
    if self._framing is None:
      self._segments = self._open_files('segments', self.length)
    self._checksums = self._open_checksums()

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
    self._check(tokens, indices)
    if self._framing is None:
      segments = self._gather(self._segments, indices)
    else:
      segments = self._framing.segments(tokens)
    return Batch(tokens=tokens, segments=segments, positions=positions_in_segments(segments))

  def _open_files(self, kind: str, largest: int) -> Callable[[int], np.ndarray]:
    """Checks all files of a kind, and returns what maps the one of a number."""
    step, dtype = self.manifest.rows_per_file, smallest_dtype(largest)

    # The system allows a process few open files, and C4 has thousands.
    @functools.lru_cache(MAPPED_FILES)
    def mapped(number: int) -> np.ndarray:
      shape = min(step, len(self) - number * step), self.length
      return _open_file(self.directory / f'{kind}-{number:05d}.npy', shape, dtype)

    for number in range(-(-len(self) // step)):
      mapped(number)
    return mapped

  def _open_checksums(self) -> np.ndarray | None:
    """Returns the CRC-32 of each row, uint32 [N]; None where none were written."""
    if not (self.directory / CHECKSUMS_FILE).exists():
      return None
    checksums = _open_file(self.directory / CHECKSUMS_FILE, (len(self),), np.dtype(np.uint32))
    return np.array(checksums)

  def _check(self, tokens: np.ndarray, indices: np.ndarray) -> None:
    """Raises UserError for rows that are not those which were packed."""
    if self._checksums is None:
      return
    found = checksums_of(tokens.astype(smallest_dtype(self.vocabulary_size - 1)))
    damaged = indices[found != self._checksums[indices]]
    if damaged.size:
      raise UserError(
          f'{self.directory}: {damaged.size} rows, the first of them {damaged[0]}, are not as they '
          f'were packed: their file, or {CHECKSUMS_FILE}, is damaged. Copy the folder again, or '
          'delete it and pack again')

  def _gather(self, mapped: Callable[[int], np.ndarray], indices: np.ndarray) -> np.ndarray:
    gathered = np.empty((len(indices), self.length), np.int32)
    # One read for each file that holds some of the rows.
    numbers, places = np.divmod(indices, self.manifest.rows_per_file)
    for number in np.unique(numbers):
      chosen = numbers == number
      gathered[chosen] = mapped(int(number))[places[chosen]]
    return gathered


def _open_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Maps a file, and checks that it is whole and has the shape that the manifest gives."""
  try:
    # A memory map: rows are read when they are taken.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except FileNotFoundError:
    raise UserError(f'{path} is missing, but {MANIFEST_FILE} lists it: copy the folder again, or '
                    'delete it and pack the data again') from None
  except Exception as error:  # numpy evaluates the header, and damage there raises almost any class
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or not an .npy file '
                    f'({error}): copy the folder again, or delete it and pack again') from error
  if array.shape != shape or array.dtype != dtype:
    raise UserError(f'{path} has {array.dtype} {list(array.shape)}, {MANIFEST_FILE} promises '
                    f'{dtype} {list(shape)}: the file is of another packing. Copy the folder '
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
