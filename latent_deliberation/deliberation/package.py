"""A trained coprocessor on disk: safetensors, and coprocessor.json, which says what it is.

  package.save('runs/coprocessor/coprocessor', Package(...))
  trained = package.load('runs/coprocessor/coprocessor')
  description.check_decoder(trained, fingerprint(decoder_params))
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.description import (
  DESCRIPTION,
  REMEDY,
  Description,
  read_description,
  write_description,
)
from latent_deliberation.files import whole_directory
from latent_deliberation.model.checkpoints.safetensors_source import SafetensorsSource
from latent_deliberation.model.checkpoints.safetensors_writer import (
  FILE_BYTES,
  gather,
  write_tensors,
)
from latent_deliberation.model.checkpoints.source import on_first_device, shape_differences
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.fingerprint import fingerprint
from latent_deliberation.progress import Progress

_STEM = 'coprocessor'


@dataclasses.dataclass(frozen=True)
class Package(Description):
  """A trained coprocessor. Attributes: params: what `Coprocessor(model, config)` takes."""
  params: Params


def save(directory: str | Path, package: Package, file_bytes: int = FILE_BYTES) -> None:
  """Writes a package, whole or not at all, every bit as it is.

  Every process must call this, since shards are gathered, a parameter at a time.

  Args:
    file_bytes: limit of a file; several, and an index of them, are written where one is not enough.

  Raises:
    FileExistsError: `directory` exists already; nothing is overwritten.
    ValueError: the parameters are not those of the configs.
  """
  flat = traverse_util.flatten_dict(package.params, sep='/')
  given = {path: leaf.shape for path, leaf in flat.items()}
  lines = shape_differences(given, _shapes(_boxed_shapes(package)))
  if lines:
    raise ValueError('\n'.join([
        'these parameters are not those of the coprocessor that `config` and `model` describe:',
        *lines, 'Give the configs that it was trained with.']))
  with whole_directory(Path(directory)) as partial:
    write_tensors(partial, _STEM, {path: leaf.nbytes for path, leaf in flat.items()},
                  ((path, gather(leaf)) for path, leaf in flat.items()), file_bytes)
    digest = fingerprint(package.params)  # of all processes together
    if jax.process_index() == 0:
      write_description(partial, package, digest)


def load(directory: str | Path, shardings: Callable[[PyTree], PyTree] | None = None,
         dtype: DTypeLike | None = None) -> Package:
  """Reads a package.

  Args:
    shardings: maps boxed shapes to shardings, onto which parameters are read directly, so that a
      host holds its share alone; default is the first device.
    dtype: what to keep the parameters in; default as stored.

  Raises:
    FileNotFoundError: there is none, or a file of it is absent.
    ValueError: it is damaged, or its parameters are not those that it describes.
  """
  directory = Path(directory)
  description, expected = read_description(directory)
  boxed = _boxed_shapes(description)
  source = _open_weights(directory, boxed)
  placed = (shardings or on_first_device)(boxed)
  params = _read(source, traverse_util.flatten_dict(placed, sep='/'))
  actual = fingerprint(params)
  if actual != expected:
    raise ValueError(f'{directory}: the parameters have fingerprint {actual}, {DESCRIPTION} says '
                     f'{expected}: one of the two was replaced or damaged. {REMEDY}')
  if dtype is not None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return Package(**vars(description), params=params)


def _open_weights(directory: Path, boxed: PyTree) -> SafetensorsSource:
  """The tensors, which are named by the paths of the parameters; checked against their shapes."""
  if not any(directory.glob('*.safetensors')):
    raise FileNotFoundError(f'{directory} has {DESCRIPTION}, but {_STEM}.safetensors is not there. '
                            f'{REMEDY}')
  source = SafetensorsSource(directory, lambda name: name)
  there = {name: stored.shape for name, stored in source.tensors.items()}
  lines = shape_differences(there, _shapes(boxed))
  if lines:
    raise ValueError('\n'.join([
        f'{directory} does not hold the coprocessor that its {DESCRIPTION} describes:', *lines,
        f'{REMEDY}.']))
  return source


def _read(source: SafetensorsSource, shardings: Mapping[str, Sharding]) -> Params:
  """The parameters as stored, each on its sharding."""
  progress = Progress('reading the coprocessor', 'parameters', len(shardings))
  flat = {}
  for path, sharding in shardings.items():
    flat[path] = source.read(path, source.tensors[path].shape, sharding)
    progress.update(len(flat))
  return traverse_util.unflatten_dict(flat, sep='/')


def _boxed_shapes(description: Description) -> PyTree:
  """Shapes of the parameters, boxed with their logical axes; nothing is allocated."""
  coprocessor = Coprocessor(description.model, description.config)
  return jax.eval_shape(coprocessor.init, jax.random.key(0),
                        nn.unbox(boxed_shapes(description.model)))


def _shapes(boxed: PyTree) -> dict[str, tuple[int, ...]]:
  return {path: leaf.shape
          for path, leaf in traverse_util.flatten_dict(nn.unbox(boxed), sep='/').items()}
