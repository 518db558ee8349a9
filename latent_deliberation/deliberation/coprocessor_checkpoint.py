"""A trained coprocessor on disk: weights as safetensors, and coprocessor.json, which says what it is.

Its decoder is named by a fingerprint of the decoder's weights, so a wrong pair is always refused.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
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
from latent_deliberation.errors import UserError
from latent_deliberation.files import whole_directory
from latent_deliberation.model.checkpoints.safetensors_io import (
  FILE_BYTES,
  SafetensorsSource,
  gather,
  write_tensors,
)
from latent_deliberation.model.checkpoints.source import on_first_device, shape_differences
from latent_deliberation.model.decoder import boxed_shapes, fingerprint
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import COPROCESSOR, with_current_names
from latent_deliberation.progress import Progress
from latent_deliberation.sharding import shardings_of

DESCRIPTION, _FORMAT = 'coprocessor.json', 1
REMEDY = ('Copy the package again, or remove it and run launch/train.py once more, which writes '
          'it anew from its checkpoint')


@dataclasses.dataclass(frozen=True)
class Description:
  """What a trained coprocessor is, without its weights.

  Attributes:
    decoder_config: architecture of its decoder.
    config: how its latents are made, and what was trained.
    decoder_fingerprint: of its decoder's weights, as they are stored.
    vocabulary: hash of the vocabulary of the text that it was trained on.
    steps: updates that it was trained for.
    frozen_dtype: what its decoder's weights were kept in meanwhile; '' in packages that do not say.
  """
  decoder_config: TransformerConfig
  config: DeliberationConfig
  decoder_fingerprint: str
  vocabulary: str
  steps: int
  frozen_dtype: str = dataclasses.field(default='', kw_only=True)


def write_description(directory: Path, description: Description, fingerprint: str) -> None:
  """Writes coprocessor.json.

  Args:
    fingerprint: of the parameters beside it.
  """
  content = {
      'format': _FORMAT, 'fingerprint': fingerprint, 'decoder': description.decoder_fingerprint,
      'vocabulary': description.vocabulary, 'steps': description.steps,
      'frozen_dtype': description.frozen_dtype,
      'config': dataclasses.asdict(description.config),
      'model': dataclasses.asdict(description.decoder_config)}
  (directory / DESCRIPTION).write_text(json.dumps(content, indent=2) + '\n')


def read_description(directory: Path) -> tuple[Description, str]:
  """What coprocessor.json says, and the fingerprint of the parameters beside it.

  Raises:
    UserError: there is none.
    UserError: it is damaged.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise UserError(f'{directory} holds no trained coprocessor: {DESCRIPTION}, which '
                            'launch/train.py writes to <workdir>/coprocessor, is not there')
  try:
    stored = json.loads(path.read_text())
    if stored['format'] != _FORMAT:
      raise UserError(f'format {stored["format"]!r}, expected {_FORMAT}')
    description = Description(
        TransformerConfig(**stored['model']),
        DeliberationConfig(**with_current_names(stored['config'])),
        stored['decoder'], stored['vocabulary'], stored['steps'],
        frozen_dtype=stored.get('frozen_dtype', ''))  # which earlier packages lack
    return description, stored['fingerprint']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or of another format ({type(error).__name__}: {error}). '
                     f'{REMEDY}') from error


def describe(directory: str | Path) -> Description:
  """What coprocessor.json says alone; see `read_description` for what is raised."""
  return read_description(Path(directory))[0]


def check_decoder(description: Description, decoder_fingerprint: str) -> None:
  """Raises UserError unless this is the fingerprint of the decoder that it was trained on."""
  if decoder_fingerprint != description.decoder_fingerprint:
    raise UserError(
        'the coprocessor was trained on a decoder with fingerprint '
        f'{description.decoder_fingerprint}, this one has {decoder_fingerprint}: give the decoder that it was trained on, or train one for this')


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
class CoprocessorCheckpoint(Description):
  """A trained coprocessor. Attributes: params: what `Coprocessor(model, config)` takes."""
  params: Params


def save(directory: str | Path, package: CoprocessorCheckpoint,
         file_bytes: int = FILE_BYTES) -> None:
  """Writes a package, whole or not at all, every bit as it is.

  Every process must call this, since shards are gathered, a parameter at a time.

  Args:
    file_bytes: limit of a file; several, and an index of them, are written where one is not enough.

  Raises:
    UserError: `directory` exists already; nothing is overwritten.
    UserError: the parameters are not those of the configs.
  """
  flat = traverse_util.flatten_dict(package.params, sep='/')
  given = {path: leaf.shape for path, leaf in flat.items()}
  lines = shape_differences(given, _shapes(_boxed_shapes(package)))
  if lines:
    raise UserError('\n'.join([
        'these parameters are not those of the coprocessor that `config` and `decoder_config` describe:',
        *lines, 'Give the configs that it was trained with.']))
  with whole_directory(Path(directory)) as partial:
    write_tensors(partial, _STEM, {path: leaf.nbytes for path, leaf in flat.items()},
                  ((path, gather(leaf)) for path, leaf in flat.items()), file_bytes)
    params_fingerprint = fingerprint(package.params)  # every process takes part
    if jax.process_index() == 0:
      write_description(partial, package, params_fingerprint)


def load(directory: str | Path, shardings: Callable[[PyTree], PyTree] | None = None,
         dtype: DTypeLike | None = None) -> CoprocessorCheckpoint:
  """Reads a package.

  Args:
    shardings: maps boxed shapes to shardings, onto which parameters are read directly, so that a
      host holds its share alone; default is the first device.
    dtype: what to keep the parameters in; default as stored.

  Raises:
    UserError: there is none, or a file of it is absent.
    UserError: it is damaged, or its parameters are not those that it describes.
  """
  directory = Path(directory)
  description, expected = read_description(directory)
  boxed = _boxed_shapes(description)
  source = _open_weights(directory, boxed)
  placed = (shardings or on_first_device)(boxed)
  params = _read(source, traverse_util.flatten_dict(placed, sep='/'))
  actual = fingerprint(params)
  if actual != expected:
    raise UserError(f'{directory}: the parameters have fingerprint {actual}, {DESCRIPTION} says '
                     f'{expected}: one of the two was replaced or damaged. {REMEDY}')
  if dtype is not None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return CoprocessorCheckpoint(**vars(description), params=params)


def _open_weights(directory: Path, boxed: PyTree) -> SafetensorsSource:
  """The tensors, which are named by the paths of the parameters; checked against their shapes."""
  if not any(directory.glob('*.safetensors')):
    raise UserError(f'{directory} has {DESCRIPTION}, but {_STEM}.safetensors is not there. '
                            f'{REMEDY}')
  source = SafetensorsSource(directory, lambda name: name)
  there = {name: stored.shape for name, stored in source.tensors.items()}
  lines = shape_differences(there, _shapes(boxed))
  if lines:
    raise UserError('\n'.join([
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
  coprocessor = Coprocessor(description.decoder_config, description.config)
  return jax.eval_shape(coprocessor.init, jax.random.key(0),
                        nn.unbox(boxed_shapes(description.decoder_config)))


def _shapes(boxed: PyTree) -> dict[str, tuple[int, ...]]:
  return {path: leaf.shape
          for path, leaf in traverse_util.flatten_dict(nn.unbox(boxed), sep='/').items()}


def locate_coprocessor(directory: Path) -> Path:
  """The checkpoint that `directory` is, or that the run in it wrote.

  Raises:
    UserError: there is none.
  """
  for place in (directory, directory / COPROCESSOR):
    if (place / DESCRIPTION).is_file():
      return place
  raise UserError(
      f'{directory} holds no trained coprocessor: name a directory in which launch/train.py has '
      f'ended (where it was stopped, the same command goes on), or the {COPROCESSOR}/ that it wrote')


def find_coprocessor(directory: Path, *, decoder_config: TransformerConfig,
                     config: DeliberationConfig, steps: int, vocabulary: str) -> Path:
  """Locates a trained coprocessor and checks that it is the expected one; reads no weights.

  Args:
    directory: the checkpoint, or the work directory of the run that wrote it.
    decoder_config, config, steps: what it should have been trained with.
    vocabulary: hash of the vocabulary of the text that it is to read.

  Raises:
    UserError: there is none.
    UserError: it is of another config or vocabulary, or damaged.
  """
  found = locate_coprocessor(directory)
  description = describe(found)
  lines = []
  if description.steps != steps:  # a control might have been trained for longer
    lines = [f'  config.training.loop.num_steps: {description.steps} there, {steps} now']
  for section, there, here in (('decoder', description.decoder_config, decoder_config),
                               ('deliberation', description.config, config)):
    there, here = dataclasses.asdict(there), dataclasses.asdict(here)
    lines += [f'  config.{section}.{key}: {there[key]!r} there, {here[key]!r} now'
              for key in there
              if there[key] != here[key] and key not in config.without_effect]
  if lines:
    raise UserError('\n'.join([
        f'the coprocessor in {found} is another one:', *lines,
        'Use the config that it was trained with, or name the coprocessor that the config means.']))
  if description.vocabulary != vocabulary:
    raise UserError(
        f'the coprocessor in {found} was trained on text with the vocabulary '
        f'{description.vocabulary}, these rows were made with {vocabulary}: prepare the text with '
        'the vocabulary of the training (data.vocabulary_path), in another directory')
  return found


def load_coprocessor(directory: Path, *, decoder_fingerprint: str, frozen_dtype: str, mesh: Mesh,
                     rules: Mapping[str, Sequence[str]]) -> Params:
  """The parameters of a trained coprocessor, on their shards.

  A warning says where the frozen weights are int8 now and were not in training, or the reverse.

  Args:
    decoder_fingerprint: of the decoder that it is to work with.
    frozen_dtype: what that decoder's weights are kept in.
    mesh, rules: where the parameters go.

  Raises:
    UserError: it was trained on another decoder, or is damaged.
  """
  description = describe(directory)
  try:
    check_decoder(description, decoder_fingerprint)
  except UserError as error:
    raise UserError(f'{directory}: {error}') from error
  compare_frozen_dtype(description, frozen_dtype)
  return load(directory, lambda boxed: shardings_of(boxed, mesh, rules)).params
