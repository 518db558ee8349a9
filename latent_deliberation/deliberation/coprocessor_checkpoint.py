"""What a trained coprocessor is: coprocessor.json, which stands beside its weights."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from absl import logging
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import whole_directory
from latent_deliberation.model.checkpoints.safetensors_io import (
  FILE_BYTES,
  SafetensorsSource,
  gather,
  write_tensors,
)
from latent_deliberation.model.checkpoints.source import on_first_device, shape_differences
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.fingerprint import fingerprint
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.progress import Progress
from latent_deliberation.sharding import shardings_of

DESCRIPTION, _FORMAT = 'coprocessor.json', 1
REMEDY = ('Copy the package again, or remove it and run launch/train.py once more, which writes '
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


def write_description(directory: Path, description: Description, fingerprint: str) -> None:
  """Writes coprocessor.json.

  Args:
    fingerprint: of the parameters beside it.
  """
  content = {
      'format': _FORMAT, 'fingerprint': fingerprint, 'decoder': description.decoder,
      'vocabulary': description.vocabulary, 'steps': description.steps,
      'frozen_dtype': description.frozen_dtype,
      'config': dataclasses.asdict(description.config),
      'model': dataclasses.asdict(description.model)}
  (directory / DESCRIPTION).write_text(json.dumps(content, indent=2) + '\n')


def read_description(directory: Path) -> tuple[Description, str]:
  """What coprocessor.json says, and the fingerprint of the parameters beside it.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
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
                     f'{REMEDY}') from error


def describe(directory: str | Path) -> Description:
  """What coprocessor.json says alone; see `read_description` for what is raised."""
  return read_description(Path(directory))[0]


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


PACKAGE = 'coprocessor'  # in the work directory of a run


def locate_package(directory: Path) -> Path:
  """The package that `directory` is, or that the run in it wrote.

  Raises:
    FileNotFoundError: there is none.
  """
  for place in (directory, directory / PACKAGE):
    if (place / DESCRIPTION).is_file():
      return place
  raise FileNotFoundError(
      f'{directory} holds no trained coprocessor: name a directory in which launch/train.py has '
      f'ended (where it was stopped, the same command goes on), or the {PACKAGE}/ that it wrote')


def find_coprocessor(experiment: Experiment, directory: Path, vocabulary: str) -> Path:
  """The package that `directory` is, or that the run in it wrote; its weights are not read.

  Args:
    vocabulary: hash of the vocabulary of the text that it is to read.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is of another config or vocabulary, or damaged.
  """
  found = locate_package(directory)
  description = describe(found)
  _check_config(experiment, description, found)
  if description.vocabulary != vocabulary:
    raise ValueError(
        f'the coprocessor in {found} was trained on text with the vocabulary '
        f'{description.vocabulary}, these rows were made with {vocabulary}: prepare the text with '
        'the vocabulary of the training (data.vocabulary_path), in another directory')
  return found


def load_coprocessor(experiment: Experiment, directory: Path, decoder: str, mesh: Mesh) -> Params:
  """The parameters of a package, on their shards.

  A warning says where the frozen weights are int8 now and were not in training, or the reverse.

  Args:
    decoder: fingerprint of the decoder that it is to work with.

  Raises:
    ValueError: it was trained on another decoder, or is damaged.
  """
  description = describe(directory)
  try:
    check_decoder(description, decoder)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from error
  compare_frozen_dtype(description, experiment.computation.frozen_dtype)
  loaded = load(directory, lambda boxed: shardings_of(boxed, mesh, experiment.rules))
  return loaded.params


def _check_config(experiment: Experiment, description: Description, directory: Path) -> None:
  lines, steps = [], experiment.training.loop.num_steps
  if description.steps != steps:  # or a baseline might have been trained for longer
    lines = [f'  config.training.loop.num_steps: {description.steps} there, {steps} now']
  unread = experiment.deliberation.without_effect
  for section, there, here in (('decoder', description.model, experiment.decoder),
                               ('deliberation', description.config, experiment.deliberation)):
    there, here = dataclasses.asdict(there), dataclasses.asdict(here)
    lines += [f'  config.{section}.{key}: {there[key]!r} there, {here[key]!r} now'
              for key in there if there[key] != here[key] and key not in unread]
  if lines:
    raise ValueError('\n'.join([
        f'the coprocessor in {directory} is another one:', *lines,
        'Use the config that it was trained with, or name the coprocessor that the config means.']))
