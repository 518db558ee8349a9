"""Builds the modules of an experiment, and loads the weights of its frozen decoder."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.data.data_config import BYTE_VOCABULARY_HASH
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.errors import UnknownSizesError
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder, boxed_shapes, fingerprint
from latent_deliberation.model.products import INT8_DTYPES, LARGEST_INPUTS, Quantised, quantise
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.progress import announced
from latent_deliberation.sharding import shardings_of

CALIBRATION = (4, 128)  # texts and tokens that show how large activations are


def with_decoder(experiment: Experiment, decoder: str = '',
                 given: Collection[str] = ()) -> Experiment:
  """Returns the experiment with the architecture and the vocabulary of a decoder that exists.

  Args:
    experiment: the configuration. It keeps a vocabulary_path of its own, but for one that was saved
      with another decoder or is not on this machine, where the decoder has a tokenizer.
    decoder: directory, GGUF file or name of the decoder; default is `experiment.decoder_from`. The
      experiment is returned as it is if both are empty.
    given: dotted paths of the keys that the user gave, which are kept. `open_frozen` compares those
      of the architecture.

  Raises:
    UserError: there is no such decoder, or it is damaged.
  """
  decoder = decoder or experiment.decoder_from
  if not decoder:
    return experiment
  try:
    checkpoint = weights.open_checkpoint(decoder)
  except UnknownSizesError:
    checkpoint = weights.open_checkpoint(decoder, experiment.decoder)
  kept = {key: getattr(experiment.decoder, key) for section, _, key in
          (path.partition('.') for path in given) if section == 'decoder'}
  data = experiment.data
  # A run.json keeps the path that its decoder gave. It is not that of another decoder.
  is_stale = 'data.vocabulary_path' not in given and experiment.decoder_from and (
      os.path.abspath(decoder) != os.path.abspath(experiment.decoder_from)
      or not as_path(data.vocabulary_path).is_file())
  is_kept = data.vocabulary_path and not is_stale
  if not (data.source == 'mixture' or is_kept or 'data.vocabulary' in given):
    if checkpoint.vocabulary_hash == BYTE_VOCABULARY_HASH:
      data = dataclasses.replace(data, vocabulary='byte', vocabulary_path='')
    elif checkpoint.tokenizer:
      data = dataclasses.replace(data, vocabulary='sentencepiece',
                                 vocabulary_path=str(checkpoint.tokenizer))
  return dataclasses.replace(
      experiment, decoder=dataclasses.replace(checkpoint.config, **kept), data=data,
      decoder_from=decoder)


def build_decoder(experiment: Experiment) -> Decoder:
  """Returns the decoder, without weights."""
  return Decoder(experiment.decoder, **_options(experiment))


def build_deliberator(experiment: Experiment) -> Deliberator:
  """Returns the decoder and its coprocessor, without weights."""
  coprocessor = Coprocessor(experiment.decoder, experiment.deliberation, **_options(experiment))
  return Deliberator(build_decoder(experiment), coprocessor)


def _options(experiment: Experiment) -> dict[str, Any]:
  """The options of a module's computation on the devices of this process."""
  computation = experiment.computation.on(jax.default_backend())
  options = {name: getattr(computation, name)
             for name in ('dtype', 'activations', 'remat', 'scan', 'attention')}
  # Only activations of another dtype than the products' need a conversion.
  if computation.activations == computation.dtype:
    options['activations'] = None
  return options


def open_frozen(decoder_config: TransformerConfig, decoder_dir: Path) -> weights.Checkpoint:
  """Opens the frozen decoder, in any format, and checks it before its weights are read.

  Args:
    decoder_config: architecture that the decoder must have.
    decoder_dir: directory of the decoder.

  Raises:
    UserError: the decoder has another architecture, or is damaged.
  """
  checkpoint = weights.open_checkpoint(decoder_dir, decoder_config)
  checkpoint.check()
  return checkpoint


def load_frozen(experiment: Experiment, checkpoint: weights.Checkpoint,
                mesh: Mesh) -> tuple[Params, str]:
  """Loads the frozen decoder onto its shards. Returns its weights, and their stored fingerprint."""
  dtype = experiment.computation.frozen_dtype
  place, read_dtype = _reading(experiment, checkpoint, mesh)
  stored = checkpoint.load(place, read_dtype)
  if dtype in INT8_DTYPES:
    # Quantise on the mesh, from the weights as stored.
    decoder_fingerprint = checkpoint.fingerprint or fingerprint(stored)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, frozen_shapes(experiment, mesh))
    rounded = jax.jit(functools.partial(_quantise, experiment.decoder, dtype),
                      out_shardings=shardings)(stored)
    return rounded, decoder_fingerprint
  if read_dtype is not None:
    return stored, checkpoint.fingerprint
  with announced("hashing the decoder's weights"):
    decoder_fingerprint = fingerprint(stored)
  leaves, tree = jax.tree.flatten(stored)
  del stored
  for number, leaf in enumerate(leaves):  # one at a time, to hold only one leaf in both dtypes
    leaves[number] = leaf.astype(dtype)
  return jax.tree.unflatten(tree, leaves), decoder_fingerprint


def check_frozen_memory(experiment: Experiment, checkpoint: weights.Checkpoint,
                        mesh: Mesh) -> None:
  """Raises UserError if free memory cannot hold the weights that `load_frozen` will read."""
  checkpoint.check_memory(*_reading(experiment, checkpoint, mesh))


def _reading(experiment: Experiment, checkpoint: weights.Checkpoint,
             mesh: Mesh) -> tuple[Callable[[PyTree], PyTree], str | None]:
  """Returns the shardings and the dtype in which the frozen weights are read; None as stored."""
  dtype = experiment.computation.frozen_dtype
  if dtype in INT8_DTYPES:
    return lambda boxed: shardings_of(boxed, mesh, experiment.rules), None
  # With a stored fingerprint, weights can be rounded while they are read. A foreign checkpoint has
  # none, and to make one needs the weights as stored.
  return (lambda boxed: _frozen_shardings(boxed, experiment, mesh),
          dtype if checkpoint.fingerprint else None)


def _quantise(config: TransformerConfig, dtype: str, stored: Params) -> Params:
  """Returns the weights of a decoder in one of INT8_DTYPES."""
  if dtype == 'int8':
    return quantise(stored)
  # Which channels of the activations are large hardly depends on the text, so random tokens do.
  tokens = jax.random.randint(jax.random.key(0), CALIBRATION, 0, config.vocab_size)
  _, found = Decoder(config).apply({'params': stored}, tokens, method='prefill',
                                   mutable=[LARGEST_INPUTS])
  return quantise(stored, rounds_inputs=True, largest=found[LARGEST_INPUTS])


def load_stored(checkpoint: weights.Checkpoint, mesh: Mesh,
                rules: Mapping[str, Sequence[str]]) -> Params:
  """Loads the frozen decoder's weights as stored, onto the shards of trainable parameters."""
  return checkpoint.load(lambda boxed: shardings_of(boxed, mesh, rules))


def frozen_shapes(experiment: Experiment, mesh: Mesh) -> Params:
  """Returns shapes, dtypes and shardings of the weights that `load_frozen` loads.

  In an int8 decoder the norms count as float32, since their stored dtype is not known here.
  """
  boxed, dtype = boxed_shapes(experiment.decoder), experiment.computation.frozen_dtype
  if dtype in INT8_DTYPES:
    boxed = jax.eval_shape(functools.partial(quantise, rounds_inputs=dtype == 'w8a8'), boxed)
    dtype = None
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype,
                                                  sharding=sharding),
      nn.unbox(boxed), _frozen_shardings(boxed, experiment, mesh))


def _frozen_shardings(boxed: PyTree, experiment: Experiment, mesh: Mesh) -> PyTree:
  rules = experiment.rules
  if experiment.computation.replicate_frozen:
    # Without 'fsdp', every device of it holds the weights whole.
    rules = {name: tuple(axis for axis in axes if axis != 'fsdp') for name, axes in rules.items()}
  return shardings_of(boxed, mesh, rules)


def count_parameters(params: Params) -> int:
  """Returns the number of scalars in a tree of arrays, boxed or not, without int8's scales."""
  leaves = jax.tree.leaves(nn.unbox(params), is_leaf=lambda leaf: isinstance(leaf, Quantised))
  return sum(leaf.size for leaf in leaves)
