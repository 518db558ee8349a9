"""The checkpoint of a trained coprocessor: its parameters as safetensors, and coprocessor.json.

coprocessor.json describes the coprocessor and holds two fingerprints: one of its parameters, and
one of its decoder's weights. A coprocessor is refused for any other decoder.

`save` and `load` write and read a checkpoint. `locate_coprocessor` finds the checkpoint of a run.
`find_coprocessor` also compares it with a config. `load_coprocessor` loads it onto a mesh.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
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
from latent_deliberation.errors import UserError, differences
from latent_deliberation.files import (
  as_path,
  at_hand,
  explain_failed_write,
  find_inside,
  seal,
  unseal,
  whole_directory,
)
from latent_deliberation.model.checkpoints.safetensors_io import (
  FILE_BYTES,
  SafetensorsSource,
  gather,
  write_tensors,
)
from latent_deliberation.model.checkpoints.source import on_first_device, shape_differences
from latent_deliberation.model.decoder import boxed_shapes, fingerprint
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import COPROCESSOR, with_current_names
from latent_deliberation.progress import Progress
from latent_deliberation.sharding import shardings_of

DESCRIPTION, _FORMAT = 'coprocessor.json', 1
_STEM = 'coprocessor'  # of the safetensors files
ONLY_IN_TRAINING = ('num_traces', 'initialisation', 'max_delay')  # of DeliberationConfig
REMEDY = ('Copy the coprocessor again, or remove it and run launch/train.py once more, which '
          'writes it again from the checkpoint of its run')


@dataclasses.dataclass(frozen=True)
class Description:
  """A trained coprocessor, described without its parameters.

  Attributes:
    decoder_config: architecture of its decoder.
    config: how its latents are made, and what was trained.
    decoder_fingerprint: fingerprint of its decoder's weights as stored.
    vocabulary_hash: hash of the vocabulary of the training text.
    steps: number of updates that it was trained for.
    frozen_dtype: dtype of the decoder's weights during training; '' where it is not known.
  """
  decoder_config: TransformerConfig
  config: DeliberationConfig
  decoder_fingerprint: str
  vocabulary_hash: str
  steps: int
  frozen_dtype: str = dataclasses.field(default='', kw_only=True)


@dataclasses.dataclass(frozen=True)
class CoprocessorCheckpoint(Description):
  """A trained coprocessor.

  Attributes:
    params: parameters of `Coprocessor(decoder_config, config)`.
  """
  params: Params


def write_description(directory: Path, description: Description, params_fingerprint: str) -> None:
  """Writes coprocessor.json.

  Args:
    directory: an existing directory.
    description: the coprocessor.
    params_fingerprint: fingerprint of its parameters.
  """
  content = {
      'format': _FORMAT, 'fingerprint': params_fingerprint,
      'decoder': description.decoder_fingerprint,
      'vocabulary': description.vocabulary_hash, 'steps': description.steps,
      'frozen_dtype': description.frozen_dtype,
      'config': dataclasses.asdict(description.config),
      'model': dataclasses.asdict(description.decoder_config)}
  (directory / DESCRIPTION).write_text(json.dumps(seal(content), indent=2) + '\n')


def read_description(directory: Path) -> tuple[Description, str]:
  """Reads coprocessor.json: the description, and the fingerprint of the parameters.

  Raises:
    UserError: `directory` has no coprocessor.json, or a damaged one.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise UserError(f'{directory} holds no trained coprocessor: {DESCRIPTION} is missing. '
                    'Name the <workdir>/coprocessor that launch/train.py wrote')
  try:
    stored = unseal(path.read_bytes(), path)
    if stored['format'] != _FORMAT:
      raise UserError(f'format {stored["format"]!r}, expected {_FORMAT}')
    # Saved names of keys and values may be old ones.
    description = Description(
        TransformerConfig(**stored['model']),
        DeliberationConfig(**with_current_names(stored['config'])),
        stored['decoder'], stored['vocabulary'], stored['steps'],
        frozen_dtype=stored.get('frozen_dtype', ''))  # absent in early checkpoints
    return description, stored['fingerprint']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or of another format ({type(error).__name__}: {error}). '
                    f'{REMEDY}') from error


def describe(directory: str | Path) -> Description:
  """Reads only the description. Raises as `read_description` does."""
  return read_description(as_path(directory))[0]


def check_decoder(description: Description, decoder_fingerprint: str) -> None:
  """Raises UserError unless the coprocessor was trained on the decoder with this fingerprint."""
  if decoder_fingerprint != description.decoder_fingerprint:
    raise UserError(
        'the coprocessor was trained on the decoder with fingerprint '
        f'{description.decoder_fingerprint}, this decoder has {decoder_fingerprint}: give that '
        'decoder, or train a coprocessor on this one')


def compare_frozen_dtype(description: Description, dtype: str) -> None:
  """Logs a warning where the decoder's weights are int8 now and were not in training, or reversed.

  It also warns where only one of the two rounds activations.

  Args:
    description: the coprocessor.
    dtype: dtype of the decoder's weights now.
  """
  trained = description.frozen_dtype
  if trained != dtype and trained and {trained, dtype} & set(INT8_DTYPES):
    logging.warning(
        'the coprocessor was trained on frozen weights in %s and now reads weights in %s: it '
        'works, but hidden states differ slightly; train it on weights in %s for exact results',
        trained, dtype, dtype)


def save(directory: str | Path, checkpoint: CoprocessorCheckpoint,
         file_bytes: int = FILE_BYTES) -> None:
  """Writes a checkpoint whole or not at all, bit for bit.

  Every process must call this, since shards are gathered, one parameter at a time.

  Args:
    directory: directory to create.
    checkpoint: the coprocessor.
    file_bytes: limit of a file's size; above it, several files and an index are written.

  Raises:
    UserError: `directory` exists already, or cannot be written.
    ValueError: the parameters are not those that the configs describe.
  """
  # The parameters must be those that `load` will expect.
  flat = traverse_util.flatten_dict(checkpoint.params, sep='/')
  given = {path: leaf.shape for path, leaf in flat.items()}
  lines = shape_differences(given, _shapes(_boxed_shapes(checkpoint)))
  if lines:
    raise ValueError('\n'.join([
        'the parameters are not those that `config` and `decoder_config` describe:', *lines]))
  directory = as_path(directory)
  with whole_directory(directory) as partial, explain_failed_write(directory):
    write_tensors(partial, _STEM, {path: leaf.nbytes for path, leaf in flat.items()},
                  ((path, gather(leaf)) for path, leaf in flat.items()), file_bytes)
    params_fingerprint = fingerprint(checkpoint.params)  # every process takes part
    if jax.process_index() == 0:
      write_description(partial, checkpoint, params_fingerprint)


def load(directory: str | Path, shardings: Callable[[PyTree], PyTree] | None = None,
         dtype: DTypeLike | None = None) -> CoprocessorCheckpoint:
  """Reads a checkpoint.

  Args:
    directory: directory of the checkpoint.
    shardings: function from boxed shapes to shardings. Parameters are read directly onto these, so
      each host holds only its own share. Default is the first device.
    dtype: dtype to keep the parameters in; default as stored.

  Raises:
    UserError: there is no checkpoint, or one of its files is missing.
    UserError: it is damaged, or its parameters are not those that it describes.
  """
  directory = as_path(directory)
  description, expected = read_description(directory)
  directory = at_hand(directory)
  boxed = _boxed_shapes(description)
  source = _open_weights(directory, boxed)
  placed = (shardings or on_first_device)(boxed)
  params = _read(source, traverse_util.flatten_dict(placed, sep='/'))
  # The fingerprint covers every bit as stored, so it comes before any conversion.
  actual = fingerprint(params)
  if actual != expected:
    raise UserError(f'{directory}: the parameters have fingerprint {actual}, but {DESCRIPTION} '
                    f'says {expected}: one of the two was replaced or damaged. {REMEDY}')
  if dtype is not None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return CoprocessorCheckpoint(**vars(description), params=params)


def _open_weights(directory: Path, boxed: PyTree) -> SafetensorsSource:
  """Opens the tensors, named by parameter paths, and checks names and shapes."""
  if not any(directory.glob('*.safetensors')):
    raise UserError(f'{directory} has {DESCRIPTION}, but {_STEM}.safetensors is missing. '
                    f'{REMEDY}')
  source = SafetensorsSource(directory)
  # Compare with the shapes that the description means.
  stored = {name: tensor.shape for name, tensor in source.tensors.items()}
  lines = shape_differences(stored, _shapes(boxed))
  if lines:
    raise UserError('\n'.join([
        f'{directory} does not hold the coprocessor that its {DESCRIPTION} describes:', *lines,
        f'{REMEDY}.']))
  return source


def _read(source: SafetensorsSource, shardings: Mapping[str, Sharding]) -> Params:
  """Reads the parameters as stored, each onto its sharding."""
  progress = Progress('reading the coprocessor', 'parameters', len(shardings))
  flat = {}
  for path, sharding in shardings.items():
    flat[path] = source.read(path, source.tensors[path].shape, sharding)
    progress.update(len(flat))
  return traverse_util.unflatten_dict(flat, sep='/')


def _boxed_shapes(description: Description) -> PyTree:
  """Shapes of the parameters, boxed with their logical axes. Allocates nothing."""
  coprocessor = Coprocessor(description.decoder_config, description.config)
  return jax.eval_shape(coprocessor.init, jax.random.key(0),
                        nn.unbox(boxed_shapes(description.decoder_config)))


def _shapes(boxed: PyTree) -> dict[str, tuple[int, ...]]:
  return {path: leaf.shape
          for path, leaf in traverse_util.flatten_dict(nn.unbox(boxed), sep='/').items()}


def locate_coprocessor(directory: Path) -> Path:
  """Returns the checkpoint at `directory`, of the run in `directory`, or the only one inside.

  Raises:
    UserError: there is none, or there are several.
  """
  directory = as_path(os.path.expanduser(directory))
  for place in (directory, directory / COPROCESSOR):
    if (place / DESCRIPTION).is_file():
      return place
  inner = (find_inside(directory, lambda folder: (folder / DESCRIPTION).is_file())
           if directory.is_dir() else [])
  if len(inner) == 1:
    logging.info('%s holds a coprocessor in %s', directory, inner[0])
    return inner[0]
  if inner:
    raise UserError(f'{directory} holds no trained coprocessor itself, but {len(inner)} in its '
                    f'folders: give one of {", ".join(map(str, inner))}')
  raise UserError(
      f'{directory} holds no trained coprocessor: name the work directory of a finished '
      f'launch/train.py, or its {COPROCESSOR}/. The same command resumes a run that was stopped')


def find_coprocessor(directory: Path, *, decoder_config: TransformerConfig,
                     config: DeliberationConfig, vocabulary_hash: str = '',
                     ignoring: Collection[str] = ()) -> Path:
  """Locates a trained coprocessor and checks that it is the expected one. Reads no parameters.

  Choices that only training reads are not compared.

  Args:
    directory: the checkpoint, or the work directory of the run that wrote it.
    decoder_config: expected architecture of its decoder.
    config: expected config of its latents.
    vocabulary_hash: hash of the vocabulary of the text that it will read; '' where it is not known.
    ignoring: more keys of `config` that are not compared.

  Raises:
    UserError: there is no checkpoint, or a damaged one.
    UserError: the coprocessor has another config or vocabulary.
  """
  found = locate_coprocessor(directory)
  description = describe(found)
  lines = []
  # Both configs, key by key, but for keys that these choices do not use.
  for section, saved, current in (('decoder', description.decoder_config, decoder_config),
                                  ('deliberation', description.config, config)):
    saved, current = ({key: value for key, value in dataclasses.asdict(values).items()
                       if key not in (*config.without_effect, *ONLY_IN_TRAINING, *ignoring)}
                      for values in (saved, current))
    lines += differences(saved, current, f'config.{section}.')
  if lines:
    raise UserError('\n'.join([
        f'the coprocessor in {found} has another config:', *lines,
        'Use the config that it was trained with, or name the coprocessor of this config.']))
  if vocabulary_hash not in ('', description.vocabulary_hash):
    raise UserError(
        f'the coprocessor in {found} was trained with vocabulary {description.vocabulary_hash}, '
        f'but these rows have vocabulary {vocabulary_hash}: prepare the text in another '
        'directory, with data.vocabulary_path set to the vocabulary of the training')
  return found


def load_coprocessor(directory: Path, *, decoder_fingerprint: str, frozen_dtype: str, mesh: Mesh,
                     rules: Mapping[str, Sequence[str]]) -> Params:
  """Loads the parameters of a trained coprocessor onto their shards.

  Logs a warning where the decoder is int8 now and was not in training, or the reverse.

  Args:
    directory: directory of the checkpoint.
    decoder_fingerprint: fingerprint of the decoder that it will work with.
    frozen_dtype: dtype of that decoder's weights.
    mesh: devices to load onto.
    rules: mesh axes of each logical axis.

  Raises:
    UserError: the coprocessor was trained on another decoder, or is damaged.
  """
  description = describe(directory)
  try:
    check_decoder(description, decoder_fingerprint)
  except UserError as error:
    raise UserError(f'{directory}: {error}') from error
  compare_frozen_dtype(description, frozen_dtype)
  return load(directory, lambda boxed: shardings_of(boxed, mesh, rules)).params
