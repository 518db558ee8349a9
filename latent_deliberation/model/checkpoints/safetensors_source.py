"""Hugging Face directories of safetensors: one file, or several with an index."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from latent_deliberation.array_types import Array
from latent_deliberation.model.checkpoints.source import Stored, refuse_pickles

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'F64': 'float64', 'I8': 'int8',
           'U8': 'uint8', 'I16': 'int16', 'I32': 'int32', 'I64': 'int64', 'BOOL': 'bool',
           'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'}


class SafetensorsSource:
  """A Source. Opening it reads headers only.

  Args:
    rename: from the names in the files to those of `tensors`.

  Raises:
    FileNotFoundError: no safetensors, or files that the index names are absent.
    ValueError: a file is damaged, a tensor is there twice, or there are pickled weights only.
  """

  def __init__(self, directory: Path, rename: Callable[[str], str]):
    self.directory = Path(directory)
    self.tensors: dict[str, Stored] = {}
    self._places: dict[str, tuple[Path, str]] = {}
    duplicates = []
    for path in weight_files(self.directory):
      for stored_name, stored in _header(path).items():
        name = rename(stored_name)
        if name in self.tensors:
          file, other = self._places[name]
          duplicates.append(f'  {other} in {file.name}, {stored_name} in {path.name}')
        self.tensors[name], self._places[name] = stored, (path, stored_name)
    if duplicates:
      raise ValueError('\n'.join([f'{directory} has tensors twice:', *duplicates,
                                  'Keep one of each: download or write the directory again.']))

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """See Source. Files are mapped only while a tensor is read, so that memory holds no others."""
    path, stored_name = self._places[name]
    with safe_open(path, 'numpy') as file:
      stored = file.get_slice(stored_name)

      def read_shard(index: tuple[slice, ...]) -> Array:
        bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        return stored[tuple(slice(*pair) for pair in bounds)]

      return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read_shard))


def weight_files(directory: Path) -> list[Path]:
  """The safetensors files that make up a checkpoint; see SafetensorsSource for what is raised."""
  index = directory / INDEX
  if index.exists():
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
      raise FileNotFoundError(f'{index} names files that {directory} does not have: {absent}. '
                              'Download them, or the whole directory again')
    return [directory / name for name in names]
  if (directory / SINGLE).is_file():
    return [directory / SINGLE]
  others = sorted(directory.glob('*.safetensors'))
  if not others:
    refuse_pickles(directory)
    raise FileNotFoundError(f'{directory} holds neither {SINGLE} nor {INDEX}: give the directory '
                            'that has the weights')
  if len(others) > 1:
    raise FileNotFoundError(f'{directory} holds {[path.name for path in others]} but no {INDEX}, '
                            'which says what belongs together: download it too')
  return others


def _weight_map(index: Path) -> Mapping[str, str]:
  """Tensor name -> file name, as the index says."""
  try:
    weight_map = json.loads(index.read_text())['weight_map']
    return {str(name): str(file) for name, file in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{index} is damaged ({type(error).__name__}: {error}): download it '
                     'again') from error


def _header(path: Path) -> dict[str, Stored]:
  """Names, shapes and dtypes of what a file holds."""
  try:
    with safe_open(path, 'numpy') as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      foreign = {name: part.get_dtype() for name, part in slices.items()
                 if part.get_dtype() not in _DTYPES}
      if foreign:
        raise ValueError(f'{path} holds dtypes that we do not read: {foreign}')
      return {name: Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
              for name, part in slices.items()}
  except SafetensorError as error:
    raise ValueError(f'{path} ({path.stat().st_size} bytes) is not a whole safetensors file '
                     f'({error}): it is truncated or damaged; download or write it '
                     'again') from error
