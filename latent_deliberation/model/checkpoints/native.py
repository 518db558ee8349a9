"""The native format: decoder.json with architecture and fingerprint, next to orbax weights."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Sharding

from latent_deliberation.array_types import Params
from latent_deliberation.errors import UserError
from latent_deliberation.files import is_here, orbax_options, path_for_orbax, seal, unseal
from latent_deliberation.model.checkpoints.layout import LAYERED, axis_sizes, parameter_axes
from latent_deliberation.model.checkpoints.source import OrbaxSource
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.model.transformer_config import TransformerConfig

DESCRIPTION, WEIGHTS, _FORMAT = 'decoder.json', 'weights', 1  # file, directory, version


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of decoder.json.

  Attributes:
    config: architecture.
    fingerprint: fingerprint of the weights.
    vocabulary_hash: hash of the vocabulary of the training text; '' if unknown.
  """
  config: TransformerConfig
  fingerprint: str
  vocabulary_hash: str


def describe(directory: Path) -> Description:
  """Reads decoder.json. UserError: it is damaged or of another version."""
  path = directory / DESCRIPTION
  try:
    stored = unseal(path.read_bytes(), path)
    if stored['format'] != _FORMAT:
      raise UserError(f'format {stored["format"]}, expected {_FORMAT}')
    return Description(TransformerConfig(**stored['config']), stored['fingerprint'],
                       stored['vocabulary'])
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, UserError) as error:
    raise UserError(f'{path} is damaged or of another format ({error}): write the decoder '
                    'again') from error


def open_weights(directory: Path) -> OrbaxSource:
  """Returns the tensors, named by the paths of our parameters. UserError: damaged metadata."""
  return OrbaxSource(directory / WEIGHTS, lambda name: name)


def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Returns path -> shape of every parameter, layers stacked."""
  sizes = axis_sizes(config)
  return {path: (config.num_layers,) * path.startswith(LAYERED)
                + tuple(sizes[letter] for letter in axes.split())
          for path, axes in parameter_axes(config).items()}


def read(source: OrbaxSource, description: Description,
         shardings: Mapping[str, Sharding]) -> Params:
  """Returns the parameters as stored, each on its sharding.

  Raises:
    UserError: the fingerprint of the weights differs from that in decoder.json.
  """
  wanted = {path: (shape, shardings[path]) for path, shape in shapes(description.config).items()}
  # A disk is read one array at a time, for memory's sake; a store answers too slowly for that.
  flat = ({path: source.read(path, *place) for path, place in wanted.items()}
          if is_here(source.directory) else source.read_several(wanted))
  params = traverse_util.unflatten_dict(flat, sep='/')
  actual = fingerprint(params)
  if actual != description.fingerprint:
    raise UserError(
        f'{source.directory}: the weights have fingerprint {actual}, {DESCRIPTION} says '
        f'{description.fingerprint}: one of the two was replaced, so write the decoder again')
  return params


def write(directory: Path, config: TransformerConfig, params: Params,
          vocabulary_hash: str) -> str:
  """Writes a decoder into an empty directory and returns its fingerprint."""
  with ocp.StandardCheckpointer(**orbax_options(directory)) as checkpointer:
    checkpointer.save(path_for_orbax(directory) / WEIGHTS, params)
  decoder_fingerprint = fingerprint(params)
  if jax.process_index() == 0:
    description = {'format': _FORMAT, 'fingerprint': decoder_fingerprint,
                   'vocabulary': vocabulary_hash,
                   'config': dataclasses.asdict(config)}
    (directory / DESCRIPTION).write_text(json.dumps(seal(description), indent=2) + '\n')
  return decoder_fingerprint
