"""Trains the decoder itself, as a control: the same budget, spent without a coprocessor."""

import dataclasses
from pathlib import Path

import jax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.build import build_decoder, build_deliberator, count_parameters
from latent_deliberation.data.loading import open_batches
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.layers import adapt
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.training.objectives import (
  joint_training,
  language_modelling,
  lora_training,
)
from latent_deliberation.training.run import Run, fit
from latent_deliberation.training.run_identity import hold_workdir
from latent_deliberation.training.step import LossFn

# 'joint': all weights and constant soft tokens, by the coprocessor's loss.
# 'finetuned': all weights, by next-token loss.
# 'lora': low-rank adapters alone, by next-token loss.
TUNINGS = ('joint', 'finetuned', 'lora')


@dataclasses.dataclass(frozen=True)
class Tuned:
  """A tuned decoder.

  Attributes:
    decoder_params: weights of the tuned decoder.
    soft_tokens: weights of the constant soft tokens that were trained with it; may be empty.
    trained: number of trained parameters.
  """
  decoder_params: Params
  soft_tokens: Params
  trained: int


def tune_decoder(experiment: Experiment, method: str, decoder_params: Params,
                 decoder_fingerprint: str, workdir: Path, prepared_dir: Path,
                 mesh: Mesh) -> Tuned:
  """Trains as `experiment.training` says, or resumes the run in `workdir`.

  Args:
    experiment: settings of the run. `deliberation.trainable` must be 'constant' for the method
      'joint', and 'lora' for the method 'lora'.
    method: one of TUNINGS.
    decoder_params: weights to start from; they are not changed.
    decoder_fingerprint: fingerprint of these weights.
    workdir: work directory of the run.
    prepared_dir: directory of prepared data.
    mesh: devices to train on.

  Raises:
    UserError: the experiment does not fit the method, or `workdir` belongs to another run.
  """
  run = describe_tuning(experiment, method, workdir, mesh)
  run.check(decoder_fingerprint)
  batches = open_batches(experiment, prepared_dir, run.section, mesh)
  with hold_workdir(workdir):
    params = fit(run, batches, _loss(experiment, method),
                 {}, frozen=decoder_params, decoder_fingerprint=decoder_fingerprint)
  trained = count_parameters(params)
  if method == 'joint':
    return Tuned(params['decoder'], params['latents'], trained)
  if method == 'lora':
    # Adapters are in the tree of weights, so the result is scored like any decoder.
    low_rank = build_deliberator(experiment).coprocessor.transformer.lora
    adapted = adapt(decoder_params['transformer'], params, low_rank)
    params = {**decoder_params, 'transformer': adapted}
  return Tuned(params, {}, trained)


def describe_tuning(experiment: Experiment, method: str, workdir: Path, mesh: Mesh) -> Run:
  """Returns the run of `tune_decoder` in `workdir`, to train or to check.

  Raises:
    UserError: the experiment does not fit the method.
  """
  needed = {'joint': 'constant', 'lora': 'lora'}
  if method in needed and experiment.deliberation.trainable != needed[method]:
    raise UserError(f'deliberation.trainable = {experiment.deliberation.trainable!r}: set it to '
                    f'{needed[method]!r}, which {method!r} tuning needs')
  if method == 'lora' and experiment.deliberation.num_layers:
    raise UserError(f'deliberation.num_layers = {experiment.deliberation.num_layers}: {method!r} '
                    'tuning puts adapters on all layers of the decoder. Set 0.')
  if experiment.computation.frozen_dtype in INT8_DTYPES:
    raise UserError(f'computation.frozen_dtype = {experiment.computation.frozen_dtype!r}: '
                    f"{method!r} tuning trains the decoder's weights, which int8 rounds. Set "
                    "'float32' or 'bfloat16', or leave such arms out.")
  coprocessor = build_deliberator(experiment).coprocessor

  # The trainable parameters of each method.
  def init(key: Array, decoder_params: Params) -> PyTree:
    # The decoder's own weights, with the logical axes of new ones.
    boxed = jax.tree.map(lambda box, weight: box.replace_boxed(weight),
                         boxed_shapes(experiment.decoder), decoder_params,
                         is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {'joint': lambda: {'decoder': boxed, 'latents': coprocessor.init(key, decoder_params)},
            'finetuned': lambda: boxed,
            'lora': lambda: coprocessor.init(key, decoder_params)['lora']}[method]()

  return Run(method, experiment, workdir, mesh, init=init,
             frozen_shapes=nn.unbox(boxed_shapes(experiment.decoder)))


def _loss(experiment: Experiment, method: str) -> LossFn:
  chunk, deliberator = experiment.computation.loss_chunk, build_deliberator(experiment)
  if method == 'joint':
    return joint_training(deliberator, chunk)
  if method == 'lora':
    return lora_training(deliberator.decoder, deliberator.coprocessor.transformer.lora, chunk)
  return language_modelling(build_decoder(experiment), chunk)
