"""Speed of an experiment's train step on the device at hand, by the way attention is computed."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import linen as nn

from latent_deliberation.array_types import Array, Batch, Params, PyTree
from latent_deliberation.benchmarks.baseline import seconds_of
from latent_deliberation.benchmarks.dense_mask import check_dense, dense_mask
from latent_deliberation.benchmarks.step_speed import random_batch, ratios_of_turns
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import write_json
from latent_deliberation.models import build_decoder, build_deliberator
from latent_deliberation.provenance import git_commit
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.step import LossFn


def benchmark(experiment: Experiment, num_texts: int, with_dense: bool, output: Path,
              repeats: int) -> dict[str, Any]:
  """Forward and backward of random texts by fused and plain attention, and by one dense mask.

  Loss and norm of the gradient are written beside the seconds: they must agree to rounding.

  Args:
    experiment: sizes, latents and computation (dtypes, remat, loss_chunk); its mesh is unused.
    with_dense: it keeps what all layers make, whatever remat says: for few layers.
    output: JSON to write.
    repeats: turns.

  Raises:
    UserError: the frozen weights are int8, or the dense mask has no such model or coprocessor.
  """
  if experiment.computation.frozen_dtype == 'int8':
    raise UserError("computation.frozen_dtype = 'int8': this benchmark makes float32 or "
                     "bfloat16 weights; set --config.computation.frozen_dtype=bfloat16")
  if with_dense:
    check_dense(experiment.decoder, experiment.deliberation)
  key = jax.random.key(0)
  decoder, coprocessor = build_decoder(experiment), build_deliberator(experiment).coprocessor
  frozen = jax.jit(lambda: _cast(
      nn.unbox(decoder.init(key, jnp.zeros((1, 1), int)))['params'],
      experiment.computation.frozen_dtype))()
  params = nn.unbox(jax.jit(coprocessor.init)(key, frozen))
  batch = random_batch(num_texts, experiment.data.length, experiment.decoder.vocab_size)
  arguments = params, frozen, batch, jax.random.split(key, num_texts)
  programs, measured = {}, {}
  for way, loss in _losses(experiment, with_dense).items():
    logging.info('%s: compiling', way)
    step = jax.jit(_loss_and_norm(loss)).lower(*arguments).compile()
    value, norm = step(*arguments)
    measured[way] = {'loss': float(value), 'gradient_norm': float(norm),
                     'temporary_bytes': step.memory_analysis().temp_size_in_bytes}
    logging.info('%s: %s', way, measured[way])
    programs[way] = lambda step=step: seconds_of(lambda: jax.block_until_ready(step(*arguments)))
  result = {**ratios_of_turns(programs, repeats), 'measured': measured, 'texts': num_texts,
            'repeats': repeats, 'device': jax.devices()[0].device_kind, 'jax': jax.__version__,
            'git_commit': git_commit(), 'experiment': dataclasses.asdict(experiment)}
  write_json(output, result)
  return result


def _losses(experiment: Experiment, with_dense: bool) -> dict[str, LossFn]:
  """The same loss in each way; 'ours' is the fused one."""
  computation = experiment.computation

  def ours(attention: str) -> LossFn:
    how = dataclasses.replace(computation, attention=attention)
    return augmentation(build_deliberator(dataclasses.replace(experiment, computation=how)),
                        computation.loss_chunk)

  losses = {'ours': ours('fused'), 'plain': ours('plain')}
  if with_dense:
    dense = dense_mask(build_deliberator(experiment), computation.loss_chunk)
    losses['dense mask'] = lambda params, *rest: dense(_cast(params, computation.dtype), *rest)
  return losses


def _loss_and_norm(loss: LossFn):
  """A step's work without the optimiser; the norm keeps all gradients from being left out."""

  def step(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple[Array, Array]:
    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, keys)
    return total / count, optax.global_norm(gradient)

  return step


def _cast(tree: PyTree, dtype: str) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
