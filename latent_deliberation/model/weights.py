"""A decoder on disk: its sizes and fingerprint in decoder.json, its weights beside it."""

import dataclasses
import json
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import linen as nn

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.model.config import TransformerConfig
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.fingerprint import fingerprint

_DESCRIPTION, _WEIGHTS, _FORMAT = 'decoder.json', 'weights', 1


@dataclasses.dataclass(frozen=True)
class Description:
  """What decoder.json says.

  Attributes:
    config: sizes.
    fingerprint: of the weights.
    vocabulary: hash of the vocabulary of the training text; '' where it is not known.
  """
  config: TransformerConfig
  fingerprint: str
  vocabulary: str


def boxed_shapes(config: TransformerConfig) -> PyTree:
  """Shapes of a decoder's parameters, boxed with their logical axes; nothing is allocated."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)['params']


def save(directory: Path, config: TransformerConfig, params: Params, vocabulary: str = '') -> str:
  """Writes a decoder, whole or not at all, and returns its fingerprint.

  Args:
    vocabulary: hash of the vocabulary that it was trained with.

  Raises:
    FileExistsError: `directory` exists already; nothing is overwritten.
  """
  directory = Path(directory).absolute()
  if directory.exists():
    raise FileExistsError(f'{directory} exists already: a decoder is not written over anything')
  partial = directory.with_name(directory.name + '.partial')
  if jax.process_index() == 0:
    shutil.rmtree(partial, ignore_errors=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(partial / _WEIGHTS, params)
  digest = fingerprint(params)
  if jax.process_index() == 0:
    description = {'format': _FORMAT, 'fingerprint': digest, 'vocabulary': vocabulary,
                   'config': dataclasses.asdict(config)}
    (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + '\n')
    os.replace(partial, directory)
  return digest


def describe(directory: Path) -> Description:
  """What is known of a decoder without reading its weights.

  Raises:
    FileNotFoundError: there is no decoder in `directory`.
    ValueError: decoder.json is damaged.
  """
  description = Path(directory).absolute() / _DESCRIPTION
  if not description.is_file():
    raise FileNotFoundError(
        f'{directory} holds no {_DESCRIPTION}: pass the decoder/ folder that launch/pretrain.py '
        'wrote')
  try:
    stored = json.loads(description.read_text())
    if stored['format'] != _FORMAT:
      raise ValueError(f'format {stored["format"]}, expected {_FORMAT}')
    return Description(TransformerConfig(**stored['config']), stored['fingerprint'],
                       stored['vocabulary'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{description} is damaged or of another format ({error}); write the decoder '
                     'again') from error


def load(directory: Path, shardings: Callable[[PyTree], PyTree] | None = None,
         dtype: str | None = None) -> tuple[TransformerConfig, Params, str]:
  """A decoder's sizes, its parameters and its fingerprint.

  Args:
    directory: written by `save`.
    shardings: maps boxed shapes to shardings, onto which the weights are read directly; default
      is the first device.
    dtype: what to keep the weights in; default as stored.

  Raises:
    FileNotFoundError: there is no decoder in `directory`.
    ValueError: the weights are not those that decoder.json describes.
  """
  directory = Path(directory).absolute()
  described = describe(directory)
  config, expected = described.config, described.fingerprint
  boxed = boxed_shapes(config)
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: device, nn.unbox(boxed))
  else:
    placed = shardings(boxed)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      kept = dict(checkpointer.metadata(directory / _WEIGHTS).item_metadata)
      target = jax.tree_util.tree_map_with_path(_as_kept, nn.unbox(boxed), placed, kept)
      params = checkpointer.restore(directory / _WEIGHTS, target)
  except Exception as error:  # orbax raises many kinds for files that are cut short or missing
    short = textwrap.shorten(str(error), 200)
    raise ValueError(f'the weights in {directory / _WEIGHTS} cannot be read ({short}); they are '
                     'truncated or foreign: write the decoder again') from error
  actual = fingerprint(params)
  if actual != expected:
    raise ValueError(f'{directory}: the weights have fingerprint {actual}, {_DESCRIPTION} says '
                     f'{expected}: one of the two was replaced; write the decoder again')
  if dtype is not None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  return config, params, actual


def _as_kept(path: Any, leaf: Any, placed: jax.sharding.Sharding, kept: Any) -> Any:
  """What to restore a leaf as: in the dtype that it was saved in."""
  if kept.shape != leaf.shape:
    raise ValueError(f'{jax.tree_util.keystr(path)} has shape {kept.shape} there, '
                     f'{leaf.shape} by {_DESCRIPTION}')
  return jax.ShapeDtypeStruct(leaf.shape, kept.dtype, sharding=placed)
