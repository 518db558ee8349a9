"""Safetensors in and out: one file, or several with an index, as in Hugging Face directories.

A reader gives each device only its own shards. A writer holds one file of tensors at a time.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError
from latent_deliberation.files import list_directory, new_file
from latent_deliberation.model.checkpoints.source import Stored, refuse_pickles
from latent_deliberation.progress import Progress

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
SUFFIX = '.safetensors'
# Names that transformers never takes for the weights of a model.
_NO_DECODER = {'consolidated.safetensors': "has the tensors under Mistral's own names",
               'adapter_model.safetensors': 'is an adapter without its decoder'}
FILE_BYTES = 4 << 30  # default limit of a file, and of what a host holds while it writes
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'F64': 'float64', 'I8': 'int8',
           'U8': 'uint8', 'I16': 'int16', 'I32': 'int32', 'I64': 'int64', 'BOOL': 'bool',
           'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'}


class SafetensorsSource:
  """A Source of safetensors files. Opening it reads only their headers.

  Args:
    directory: directory of the files.
    rename: function from all names in the files to their names in `tensors`; default as they are.

  Raises:
    UserError: there are no safetensors, a file is missing or damaged, or a tensor is there twice.
  """

  def __init__(self, directory: Path,
               rename: Callable[[Collection[str]], Mapping[str, str]] | None = None):
    self.directory = Path(directory)
    self.tensors: dict[str, Stored] = {}
    self._places: dict[str, tuple[Path, str]] = {}
    headers = {path: _header(path) for path in weight_files(self.directory)}
    renamed = rename(list(chain(*headers.values()))) if rename else {}
    duplicates = []
    # Two files, or two names after renaming, may hold the same tensor.
    for path, header in headers.items():
      for stored_name, stored in header.items():
        name = renamed.get(stored_name, stored_name)
        if name in self.tensors:
          file, other = self._places[name]
          duplicates.append(f'  {other} in {file.name}, {stored_name} in {path.name}')
        self.tensors[name], self._places[name] = stored, (path, stored_name)
    if duplicates:
      raise UserError('\n'.join([f'{directory} has tensors twice:', *duplicates,
                                 'Keep one of each: download or write the directory again.']))

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """See Source. A file is mapped only while a tensor is read, so memory holds no other."""
    path, stored_name = self._places[name]
    with safe_open(path, 'numpy') as file:
      stored = file.get_slice(stored_name)

      def read_shard(index: tuple[slice, ...]) -> Array:
        bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        return stored[tuple(slice(*pair) for pair in bounds)]

      return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read_shard))


def weight_files(directory: Path) -> list[Path]:
  """Returns the safetensors files of a checkpoint; raises as SafetensorsSource does."""
  index, single = directory / INDEX, directory / SINGLE
  # transformers takes the single file, too: an index beside it is usually left from another save.
  if single.is_file():
    if index.exists():
      logging.warning('%s is read, and the files of %s are not', single, INDEX)
    return [single]
  # Several files have an index, and all files in it must be there.
  if index.exists():
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
      raise UserError(f'{index} names files that {directory} does not have: {absent}. '
                      'Download them, or the whole directory again')
    return [directory / name for name in names]
  # A single file may have any name, but for those of other things than a whole decoder.
  others = [path for path in list_directory(directory) if path.suffix == SUFFIX]
  if not others:
    refuse_pickles(directory)
    raise UserError(f'{directory} holds neither {SINGLE} nor {INDEX}: give the directory of the '
                    'weights')
  if len(others) > 1:
    raise UserError(f'{directory} holds {[path.name for path in others]} but no {INDEX}, which '
                    'lists the files of a checkpoint: download it, too')
  if others[0].name in _NO_DECODER:
    raise UserError(f'{others[0]} {_NO_DECODER[others[0].name]}: give the directory of a decoder '
                    f'that has {SINGLE} or {INDEX}')
  return others


def _weight_map(index: Path) -> Mapping[str, str]:
  """Returns tensor name -> file name, from the index."""
  try:
    weight_map = json.loads(index.read_bytes())['weight_map']
    return {str(name): str(file) for name, file in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index} is damaged ({type(error).__name__}: {error}): download it '
                    'again') from error


def _header(path: Path) -> dict[str, Stored]:
  """Returns the names, shapes and dtypes of the tensors of a file."""
  try:
    with safe_open(path, 'numpy') as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      foreign = {name: part.get_dtype() for name, part in slices.items()
                 if part.get_dtype() not in _DTYPES}
      if foreign:
        raise UserError(f'{path} holds unknown dtypes {foreign}: convert it to bfloat16 or float32')
      return {name: Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
              for name, part in slices.items()}
  except SafetensorError as error:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is not a whole safetensors file '
                    f'({error}): it is truncated or damaged; download or write it '
                    'again') from error


def save_tensors(path: Path, tensors: Mapping[str, Array],
                 metadata: Mapping[str, str] | None = None) -> None:
  """Writes one safetensors file.

  Raises:
    OSError: the file cannot be written.
  """
  held = {name: np.asarray(value, order='C') for name, value in tensors.items()}
  try:
    save_file(held, path, metadata=metadata)
  except SafetensorError as error:  # its own class for a full disk
    raise OSError(error) from error
  path.chmod(0o644)  # safetensors makes it readable for its owner only


def write_tensors(directory: Path, stem: str, sizes: Mapping[str, int],
                  tensors: Iterable[tuple[str, np.ndarray]], file_bytes: int = FILE_BYTES) -> None:
  """Writes <stem>.safetensors, or files <stem>-00001-of-... and an index if one would be too large.

  Process 0 writes. Every process must call this if `tensors` gathers shards.

  Args:
    directory: directory of the files.
    stem: first part of the file names.
    sizes: name -> bytes of every tensor, in the order of `tensors`.
    tensors: names and values; each value is made when it is needed.
    file_bytes: largest size of a file; only a file of a single tensor may exceed it.
  """
  files = list(_split(sizes, file_bytes))
  progress = Progress('writing weights', 'tensors', len(sizes))
  tensors = iter(tensors)
  weight_map = {}
  for number, names in enumerate(files, start=1):
    part = '' if len(files) == 1 else f'-{number:05d}-of-{len(files):05d}'
    # Make the tensors of this file on every process. Process 0 writes them.
    held = dict(islice(tensors, len(names)))
    if jax.process_index() == 0:
      with new_file(directory / f'{stem}{part}.safetensors') as path:
        # transformers refuses a file without the name of a format.
        save_tensors(path, held, {'format': 'pt'})
    weight_map |= dict.fromkeys(held, f'{stem}{part}.safetensors')
    del held  # before the tensors of the next file are made
    progress.update(len(weight_map))
  if len(files) > 1 and jax.process_index() == 0:
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def gather(leaf: Array) -> np.ndarray:
  """Returns the whole of a sharded array, on every host."""
  if leaf.is_fully_addressable:
    return np.asarray(jnp.copy(leaf))  # of a copy: an array keeps its host copy while it lives
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _split(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Yields the names of each file, in order; no file grows past `limit` bytes."""
  names, size = [], 0
  for name, nbytes in sizes.items():
    if names and size + nbytes > limit:
      yield names
      names, size = [], 0
    names.append(name)
    size += nbytes
  yield names
