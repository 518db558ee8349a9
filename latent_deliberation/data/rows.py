"""Packed rows on disk, and batches of them by permutation; needs neither TensorFlow nor seqio.

A split is a folder with manifest.json and pairs of files tokens-00000.npy, segments-00000.npy, each
[rows, T]. Plain .npy, since a memory map gives any row at once, needs no library but numpy, and is
read where TensorFlow is not installed. Row k of training is permutation(seed, k // N)[k % N]: the
order is a formula, so resuming reads nothing and does not depend on the number of hosts.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from latent_deliberation.array_types import Batch
from latent_deliberation.errors import UserError
from latent_deliberation.files import write_whole

FORMAT_VERSION = 1
MANIFEST_FILE = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that decides the contents of packed rows.

  Attributes:
    task: name of the seqio task or mixture.
    split: 'train' or 'validation'.
    source_fingerprint: of the documents; for local files a hash of their names and contents.
    vocabulary_hash: see vocabularies.py.
    vocabulary_size: V; every token is below it.
    length: T, tokens of a row.
    seed: of the order of documents.
    max_tokens: where packing stopped; 0 for the end of the split.
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
  """What a folder of packed rows holds.

  Attributes:
    recipe: what it was made from.
    rows: N.
    tokens: tokens in them, padding not counted.
    documents: documents in them.
    text_bytes: UTF-8 bytes of text that the tokens stand for.
    rows_per_file: rows of every file but the last.
    content_hash: sha256 of the rows, file by file, tokens before segments.
    format_version: of this layout.
  """
  recipe: Recipe
  rows: int
  tokens: int
  documents: int
  text_bytes: int
  rows_per_file: int
  content_hash: str
  format_version: int = FORMAT_VERSION

  def to_json(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode() + b'\n'

  @classmethod
  def from_json(cls, content: bytes, origin: Path) -> 'Manifest':
    """Reads what to_json wrote. Raises UserError, naming `origin`, for anything else."""
    try:
      fields = json.loads(content)
      version = fields['format_version']
      if version == FORMAT_VERSION:
        return cls(**(fields | {'recipe': Recipe(**fields['recipe'])}))
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f'{origin} is not a manifest of packed rows ({error!r}): pack the data '
                       'again into an empty folder') from error
    raise UserError(f'{origin} has format version {version}, this code reads {FORMAT_VERSION}: '
                     'pack the data again into an empty folder')


def row_dtypes(recipe: Recipe) -> dict[str, np.dtype]:
  """The type of each kind of file: uint16 where every value fits, else int32."""
  limits = {'tokens': recipe.vocabulary_size - 1, 'segments': recipe.length}
  return {kind: np.dtype(np.uint16 if limit < 2**16 else np.int32)
          for kind, limit in limits.items()}


def fingerprint_of(identity: dict[str, str | int]) -> str:
  """sha256 of what tells one sequence of batches from another."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def state_to_json(identity: dict[str, str | int], step: int) -> bytes:
  """The state of a sequence of batches, as `check_state` reads it."""
  state = {'step': step, 'fingerprint': fingerprint_of(identity), **identity}
  return json.dumps(state, indent=2, sort_keys=True).encode() + b'\n'


def check_state(path: Path, identity: dict[str, str | int], step: int) -> None:
  """Raises unless `path` holds the state of this step of this sequence; names what differs."""
  if not path.is_file():
    raise UserError(f'no data state for step {step} at {path}: resume from a step that was '
                            'saved, or start anew in an empty work directory')
  try:
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is not a data state ({error}): resume from another step') from error
  expected = json.loads(state_to_json(identity, step))
  different = [f'{key}: saved {saved.get(key)!r}, now {value!r}'
               for key, value in expected.items() if saved.get(key) != value]
  if different:
    raise UserError(f'{path} is of another sequence of batches ({"; ".join(different)}): resume '
                     'with the settings that were saved, or start anew in an empty work directory')


ALL_ROWS = (0, 100)  # percent, from and to


def check_row_range(row_range_percent: Sequence[int]) -> tuple[int, int]:
  """A row_range_percent of rows in percent, from and to. Raises UserError where it is none."""
  given = tuple(row_range_percent) if isinstance(row_range_percent, Sequence) else ()
  if not (len(given) == 2 and all(type(percent) is int for percent in given)
          and 0 <= given[0] < given[1] <= 100):
    raise UserError(f'row_range_percent = {row_range_percent!r}: two whole numbers are needed, from and to, between 0 '
                     'and 100, as in (0, 50)')
  return given


class PackedRows:
  """One split of packed rows, opened for reading at random.

  Attributes:
    directory: of the split.
    manifest: see Manifest.
    fingerprint: sha256 of the manifest; names the contents, since that holds their hash.

  Raises:
    UserError: no manifest, or a file is missing.
    UserError: a file is truncated, or is not the one that the manifest speaks of.
  """

  def __init__(self, directory: Path):
    self.directory = Path(directory)
    path = self.directory / MANIFEST_FILE
    if not path.is_file():
      raise UserError(f'no packed rows in {directory}: {MANIFEST_FILE} is missing. Pack '
                              'the data first, or name the folder of one split (.../train)')
    self.manifest = Manifest.from_json(path.read_bytes(), path)
    self.fingerprint = hashlib.sha256(self.manifest.to_json()).hexdigest()
    self._files = {
        kind: [_open_file(path.parent / f'{kind}-{first // self.manifest.rows_per_file:05d}.npy',
                          min(self.manifest.rows_per_file, len(self) - first), self.length, dtype)
               for first in range(0, len(self), self.manifest.rows_per_file)]
        for kind, dtype in row_dtypes(self.manifest.recipe).items()}

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
    """The rows of these numbers as numpy int32 [B, T]. Raises IndexError outside 0 .. N - 1."""
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(f'rows {indices.min()} to {indices.max()} asked for, there are {len(self)}')
    segments = self._gather('segments', indices)
    return Batch(tokens=self._gather('tokens', indices), segments=segments,
                 positions=positions_in_segments(segments))

  def _gather(self, kind: str, indices: np.ndarray) -> np.ndarray:
    gathered = np.empty((len(indices), self.length), np.int32)
    numbers, places = np.divmod(indices, self.manifest.rows_per_file)
    for number in np.unique(numbers):
      chosen = numbers == number
      gathered[chosen] = self._files[kind][number][places[chosen]]
    return gathered


def _open_file(path: Path, rows: int, length: int, dtype: np.dtype) -> np.ndarray:
  """Maps a file and checks that it is whole and has the shape that the manifest promises."""
  try:
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except FileNotFoundError:
    raise UserError(f'{path} is missing, though {MANIFEST_FILE} counts on it: copy the '
                            'folder again, or delete it and pack the data again') from None
  except (ValueError, OSError, EOFError) as error:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or not an .npy file '
                     f'({error}): copy the folder again, or delete it and pack again') from error
  if array.shape != (rows, length) or array.dtype != dtype:
    raise UserError(f'{path} has {array.dtype} {list(array.shape)}, {MANIFEST_FILE} promises '
                     f'{dtype} {[rows, length]}: a file of another packing. Copy the folder again, '
                     'or delete it and pack again')
  return array


def positions_in_segments(segments: np.ndarray) -> np.ndarray:
  """Index of every token in its run of equal segment ids, int32 [B, T]; 0 on padding."""
  index = np.arange(segments.shape[1], dtype=np.int32)
  starts = np.diff(segments, axis=1, prepend=-1) != 0
  first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  return np.where(segments > 0, index - first, 0).astype(np.int32)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  """The order of `size` rows in an epoch, int64 [size]."""
  # RandomState, since numpy promises that its stream never changes; Generator's may.
  order = np.random.RandomState([seed, epoch]).permutation(size).astype(np.int64)
  order.setflags(write=False)  # the cache hands out the same array again
  return order


class PermutedBatches:
  """An endless sequence of global batches, or of some rows of each.

  The global batch of a step is fixed before hosts take their rows of it: the same step gives the
  same global batch on any number of hosts. Every epoch holds each row once; a batch may span
  epochs.

  Args:
    rows: N rows.
    batch_size: B, rows of a global batch; may exceed N.
    seed: of the order, 0 to 2**32 - 1.
    mine: places in the global batch that this host reads, int [n]; default is all of them.
    row_range_percent: percent of the rows, from and to, in the order in which they were packed.

  Attributes:
    fingerprint: of rows, batch size, seed and row_range_percent, and not of `mine`.

  Raises:
    UserError: the batch is empty, or there are no rows; see also `check_row_range`.
  """

  def __init__(self, rows: PackedRows, batch_size: int, seed: int, mine: np.ndarray | None = None,
               row_range_percent: tuple[int, int] = ALL_ROWS):
    if batch_size < 1:
      raise UserError(f'batch_size = {batch_size}: at least 1 is needed')
    self._mine = np.arange(batch_size) if mine is None else mine
    first, last = (len(rows) * percent // 100 for percent in check_row_range(row_range_percent))
    if first == last:
      raise UserError(f'{row_range_percent[0]} to {row_range_percent[1]} percent of {len(rows)} packed rows are none: '
                       'there is nothing to make batches of; pack more text, or widen the row_range_percent')
    self._rows, self._batch_size, self._seed = rows, batch_size, seed
    self._first, self._size = first, last - first
    self._identity = {'rows': rows.fingerprint, 'batch_size': batch_size, 'seed': seed}
    if self._size < len(rows):
      self._identity['portion'] = list(row_range_percent)  # its name on disk
    self.fingerprint = fingerprint_of(self._identity)

  def __call__(self, step: int) -> Batch:
    """This host's rows of the global batch of a step, numpy int32 [n, T]."""
    numbers = step * self._batch_size + self._mine
    epochs, places = np.divmod(numbers, self._size)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      indices[chosen] = permutation(self._seed, int(epoch), self._size)[places[chosen]]
    return self._rows.take(self._first + indices)

  def save(self, directory: Path, step: int) -> None:
    """Writes the state with which `step` comes next: on process 0, since it is the same on all."""
    if jax.process_index() == 0:
      write_whole(_state_file(directory, step), state_to_json(self._identity, step))

  def restore(self, directory: Path, step: int) -> None:
    """Checks that `save` was called for this step and for this very sequence.

    Raises:
      UserError: nothing was saved for the step.
      UserError: other rows, seed, batch size or row_range_percent; names both.
    """
    check_state(_state_file(directory, step), self._identity, step)


def _state_file(directory: Path, step: int) -> Path:
  return Path(directory) / f'batches-{step}.json'
