"""The modules that an experiment describes, and the weights that it has on disk."""

from pathlib import Path

import jax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.experiment import Experiment
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder, boxed_shapes, fingerprint
from latent_deliberation.model.layers import Quantised, quantise
from latent_deliberation.sharding import shardings_of


def build_decoder(experiment: Experiment) -> Decoder:
  """The decoder, without weights."""
  how = experiment.computation.on(jax.default_backend())
  return Decoder(experiment.decoder, dtype=how.dtype, remat=how.remat, scan=how.scan,
                 attention=how.attention)


def build_deliberator(experiment: Experiment) -> Deliberator:
  """The decoder and its coprocessor, without weights."""
  how = experiment.computation.on(jax.default_backend())
  coprocessor = Coprocessor(experiment.decoder, experiment.deliberation, dtype=how.dtype,
                            remat=how.remat, scan=how.scan, attention=how.attention)
  return Deliberator(build_decoder(experiment), coprocessor)


def open_frozen(experiment: Experiment, directory: Path) -> weights.Checkpoint:
  """The frozen decoder on disk, in any format, checked before its weights are read.

  Raises:
    UserError: the decoder in `directory` is of another architecture than the experiment's, or
      damaged.
  """
  checkpoint = weights.open_checkpoint(directory, experiment.decoder)
  checkpoint.check()
  return checkpoint


def load_frozen(experiment: Experiment, checkpoint: weights.Checkpoint,
                mesh: Mesh) -> tuple[Params, str]:
  """The weights of the frozen decoder, on their shards, and their fingerprint as stored."""
  dtype = experiment.computation.frozen_dtype
  if dtype == 'int8':
    stored = load_stored(experiment, checkpoint, mesh)
    decoder_fingerprint = checkpoint.fingerprint or fingerprint(stored)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, frozen_shapes(experiment, mesh))
    return jax.jit(quantise, out_shardings=shardings)(stored), decoder_fingerprint
  place = lambda boxed: _frozen_shardings(boxed, experiment, mesh)  # noqa: E731
  if checkpoint.fingerprint:
    return checkpoint.load(place, dtype), checkpoint.fingerprint
  stored = checkpoint.load(place)
  decoder_fingerprint = fingerprint(stored)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), stored), decoder_fingerprint


def load_stored(experiment: Experiment, checkpoint: weights.Checkpoint, mesh: Mesh) -> Params:
  """The weights of the frozen decoder as they are on disk, in the shards of what learns."""
  return checkpoint.load(lambda boxed: shardings_of(boxed, mesh, experiment.rules))


def frozen_shapes(experiment: Experiment, mesh: Mesh) -> Params:
  """Shapes, dtypes and shardings of what `load_frozen` gives, without any weights.

  Beside int8 the norms count as float32, since how they are stored is not known here.
  """
  boxed, dtype = boxed_shapes(experiment.decoder), experiment.computation.frozen_dtype
  if dtype == 'int8':
    boxed, dtype = jax.eval_shape(quantise, boxed), None
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype,
                                                  sharding=sharding),
      nn.unbox(boxed), _frozen_shardings(boxed, experiment, mesh))


def _frozen_shardings(boxed: PyTree, experiment: Experiment, mesh: Mesh) -> PyTree:
  rules = experiment.rules
  if experiment.computation.replicate_frozen:
    rules = {name: tuple(axis for axis in axes if axis != 'fsdp') for name, axes in rules.items()}
  return shardings_of(boxed, mesh, rules)


def count_parameters(params: Params) -> int:
  """Number of scalars in a tree of arrays, boxed or not; scales of int8 do not count."""
  leaves = jax.tree.leaves(nn.unbox(params), is_leaf=lambda leaf: isinstance(leaf, Quantised))
  return sum(leaf.size for leaf in leaves)
