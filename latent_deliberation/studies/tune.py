"""Trains the decoder itself, as a control: what would the same budget buy without a coprocessor?"""

import dataclasses
from pathlib import Path

import jax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.data.loading import open_batches
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.layers import merge
from latent_deliberation.models import build_decoder, build_deliberator, count_parameters
from latent_deliberation.training.objectives import (
  joint_training,
  language_modelling,
  lora_training,
)
from latent_deliberation.training.run import Run, fit
from latent_deliberation.training.step import LossFn

# 'joint': with constant soft tokens, by the coprocessor's loss; 'finetuned': by next-token loss;
# 'lora': the same, by low-rank adapters alone.
TUNINGS = ('joint', 'finetuned', 'lora')


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Attributes:
    decoder: parameters of the tuned decoder.
    latents: of the constant soft tokens that it was tuned with; empty where there are none.
    trained: number of parameters that learnt.
  """
  decoder: Params
  latents: Params
  trained: int


def tune_decoder(experiment: Experiment, how: str, decoder: Params, decoder_fingerprint: str, workdir: Path,
                 data: Path, mesh: Mesh) -> Tuned:
  """Trains as `experiment.training` says, or goes on where `workdir` stands.

  Args:
    how: one of TUNINGS; 'joint' needs deliberation.trainable = 'constant', 'lora' 'lora'.
    decoder: parameters to start from; they are left alone.
    decoder_fingerprint: their fingerprint.
    workdir: of this run.
    data: directory of prepared data.

  Raises:
    UserError: `deliberation.trainable` is not what this way of tuning needs.
  """
  run = describe_tuning(experiment, how, workdir, mesh)
  run.check(decoder_fingerprint)
  params = fit(run, open_batches(experiment, data, run.section, mesh), _loss(experiment, how), {},
               frozen=decoder, decoder=decoder_fingerprint)
  trained = count_parameters(params)
  if how == 'joint':
    return Tuned(params['decoder'], params['latents'], trained)
  if how == 'lora':
    low_rank = build_deliberator(experiment).coprocessor.transformer.lora
    params = {**decoder, 'transformer': merge(decoder['transformer'], params, low_rank)}
  return Tuned(params, {}, trained)


def describe_tuning(experiment: Experiment, how: str, workdir: Path, mesh: Mesh) -> Run:
  """The run of `tune_decoder` in `workdir`; raises as that does."""
  needed = {'joint': 'constant', 'lora': 'lora'}
  if how in needed and experiment.deliberation.trainable != needed[how]:
    raise UserError(f'{how!r} tuning needs deliberation.trainable = {needed[how]!r}, this is '
                     f'{experiment.deliberation.trainable!r}')
  if how == 'lora' and experiment.deliberation.num_layers:
    raise UserError("'lora' tuning puts adapters on all layers of the decoder, and "
                     f'deliberation.num_layers = {experiment.deliberation.num_layers}: set 0')
  if experiment.computation.frozen_dtype == 'int8':
    raise UserError(f"{how!r} tuning learns the decoder's weights, which computation.frozen_dtype "
                     "= 'int8' rounds: use 'float32' or 'bfloat16', or leave such arms out")
  coprocessor = build_deliberator(experiment).coprocessor

  def init(key: Array, decoder: Params) -> PyTree:
    boxed = jax.tree.map(lambda box, weight: box.replace_boxed(weight),
                         boxed_shapes(experiment.decoder), decoder,
                         is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {'joint': lambda: {'decoder': boxed, 'latents': coprocessor.init(key, decoder)},
            'finetuned': lambda: boxed,
            'lora': lambda: coprocessor.init(key, decoder)['lora']}[how]()

  return Run(how, experiment, workdir, mesh, init=init,
             frozen_shapes=nn.unbox(boxed_shapes(experiment.decoder)))


def _loss(experiment: Experiment, how: str) -> LossFn:
  chunk, deliberator = experiment.computation.loss_chunk, build_deliberator(experiment)
  if how == 'joint':
    return joint_training(deliberator, chunk)
  if how == 'lora':
    return lora_training(deliberator.decoder, deliberator.coprocessor.transformer.lora, chunk)
  return language_modelling(build_decoder(experiment), chunk)
