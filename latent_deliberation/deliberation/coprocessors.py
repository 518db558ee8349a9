"""Trained coprocessors on disk: found, checked against an experiment, and loaded onto its mesh."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from latent_deliberation.array_types import Params
from latent_deliberation.deliberation import package
from latent_deliberation.deliberation.description import (
  DESCRIPTION,
  Description,
  check_decoder,
  compare_frozen_dtype,
  describe,
)
from latent_deliberation.experiment import Experiment
from latent_deliberation.sharding import shardings_of

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
  loaded = package.load(directory, lambda boxed: shardings_of(boxed, mesh, experiment.rules))
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
