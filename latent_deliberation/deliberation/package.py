"""A trained coprocessor on disk: safetensors, and coprocessor.json, which says what it is.

  package.save('runs/coprocessor/coprocessor', Package(...))
  trained = package.load('runs/coprocessor/coprocessor')
  package.check_decoder(trained, fingerprint(decoder_params))
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.deliberation.config import DeliberationConfig
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.files import whole_directory
from latent_deliberation.model.checkpoints.safetensors_source import SafetensorsSource
from latent_deliberation.model.checkpoints.safetensors_writer import (
  FILE_BYTES,
  gather,
  write_tensors,
)
from latent_deliberation.model.checkpoints.source import on_first_device, shape_differences
from latent_deliberation.model.config import TransformerConfig
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.fingerprint import fingerprint
from latent_deliberation.progress import Progress

DESCRIPTION, _STEM, _FORMAT = 'coprocessor.json', 'coprocessor', 1
_REMEDY = ('Copy the package again, or remove it and run launch/train.py once more, which writes '
           'it anew from its checkpoint')


@dataclasses.dataclass(frozen=True)
class Description:
  """What a trained coprocessor is, without its weights.

  Attributes:
    model: architecture of its decoder.
    config: how its latents are made, and what was trained.
    decoder: fingerprint of its decoder's weights, as they are stored.
    vocabulary: hash of the vocabulary of the text that it was trained on.
    steps: updates that it was trained for.
    frozen_dtype: what its decoder's weights were kept in meanwhile; '' in packages that do not say.
  """
  model: TransformerConfig
  config: DeliberationConfig
  decoder: str
  vocabulary: str
  steps: int
  frozen_dtype: str = dataclasses.field(default='', kw_only=True)


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
    content = {
        'format': _FORMAT, 'fingerprint': fingerprint(package.params), 'decoder': package.decoder,
        'vocabulary': package.vocabulary, 'steps': package.steps,
        'frozen_dtype': package.frozen_dtype,
        'config': dataclasses.asdict(package.config), 'model': dataclasses.asdict(package.model)}
    if jax.process_index() == 0:
      (partial / DESCRIPTION).write_text(json.dumps(content, indent=2) + '\n')


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
  description, expected = _read_description(directory)
  boxed = _boxed_shapes(description)
  source = _open_weights(directory, boxed)
  placed = (shardings or on_first_device)(boxed)
  params = _read(source, traverse_util.flatten_dict(placed, sep='/'))
  actual = fingerprint(params)
  if actual != expected:
    raise ValueError(f'{directory}: the parameters have fingerprint {actual}, {DESCRIPTION} says '
                     f'{expected}: one of the two was replaced or damaged. {_REMEDY}')
  if dtype is not None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return Package(**vars(description), params=params)


def describe(directory: str | Path) -> Description:
  """Reads coprocessor.json alone; see `load` for what is raised."""
  return _read_description(Path(directory))[0]


def check_decoder(description: Description, decoder: str) -> None:
  """Raises ValueError unless `decoder` is the fingerprint of the decoder it was trained on."""
  if decoder != description.decoder:
    raise ValueError(
        f'the coprocessor was trained on a decoder with fingerprint {description.decoder}, this '
        f'one has {decoder}: give the decoder that it was trained on, or train one for this')


def compare_frozen_dtype(description: Description, dtype: str) -> None:
  """Logs a warning where frozen weights are int8 now and were not in training, or the reverse.

  Args:
    dtype: what the decoder's weights are kept in now.
  """
  trained = description.frozen_dtype
  if trained and (trained == 'int8') != (dtype == 'int8'):
    logging.warning(
        'the coprocessor was trained beside frozen weights in %s, and reads those of %s now: it '
        'works, on slightly other hidden states; train one beside %s for exact results', trained,
        dtype, dtype)


def _read_description(directory: Path) -> tuple[Description, str]:
  """What coprocessor.json says, and the fingerprint of the parameters."""
  path = directory / DESCRIPTION
  if not path.is_file():
    raise FileNotFoundError(f'{directory} holds no trained coprocessor: {DESCRIPTION}, which '
                            'launch/train.py writes to <workdir>/coprocessor, is not there')
  try:
    stored = json.loads(path.read_text())
    if stored['format'] != _FORMAT:
      raise ValueError(f'format {stored["format"]!r}, expected {_FORMAT}')
    description = Description(
        TransformerConfig(**stored['model']), DeliberationConfig(**stored['config']),
        stored['decoder'], stored['vocabulary'], stored['steps'],
        frozen_dtype=stored.get('frozen_dtype', ''))  # which earlier packages lack
    return description, stored['fingerprint']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged or of another format ({type(error).__name__}: {error}). '
                     f'{_REMEDY}') from error


def _open_weights(directory: Path, boxed: PyTree) -> SafetensorsSource:
  """The tensors, which are named by the paths of the parameters; checked against their shapes."""
  if not any(directory.glob('*.safetensors')):
    raise FileNotFoundError(f'{directory} has {DESCRIPTION}, but {_STEM}.safetensors is not there. '
                            f'{_REMEDY}')
  source = SafetensorsSource(directory, lambda name: name)
  there = {name: stored.shape for name, stored in source.tensors.items()}
  lines = shape_differences(there, _shapes(boxed))
  if lines:
    raise ValueError('\n'.join([
        f'{directory} does not hold the coprocessor that its {DESCRIPTION} describes:', *lines,
        f'{_REMEDY}.']))
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
