"""Speed of an experiment's train step on this device, with fused, plain and dense attention."""

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
from latent_deliberation.benchmarks.dense_mask import check_dense, check_weights, dense_mask
from latent_deliberation.benchmarks.step_speed import random_batch, ratios_of_turns
from latent_deliberation.build import build_decoder, build_deliberator
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import write_json
from latent_deliberation.provenance import git_commit
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.step import LossFn


def benchmark(experiment: Experiment, num_texts: int, with_dense: bool, output: Path,
              repeats: int) -> dict[str, Any]:
  """Times forward and backward passes on random texts with each kind of attention.

  The loss and the norm of the gradient are written too. They must agree to rounding.

  Args:
    experiment: sizes, latents and computation (dtypes, remat, loss_chunk); its mesh is not used.
    num_texts: number of texts in the batch.
    with_dense: whether to time the dense mask, too; its scores are large, so give it few layers.
    output: JSON file to write.
    repeats: number of turns.

  Returns: the content of `output`.

  Raises:
    UserError: the frozen weights are int8, or the dense mask is not written for this experiment.
  """
  check_weights(experiment.computation.frozen_dtype, 'this benchmark')
  if with_dense:
    check_dense(experiment.decoder, experiment.deliberation)

  # Random weights and texts, the same for every program.
  key = jax.random.key(0)
  decoder, coprocessor = build_decoder(experiment), build_deliberator(experiment).coprocessor
  frozen = jax.jit(lambda: _cast(
      nn.unbox(decoder.init(key, jnp.zeros((1, 1), int)))['params'],
      experiment.computation.frozen_dtype))()
  params = nn.unbox(jax.jit(coprocessor.init)(key, frozen))
  batch = random_batch(num_texts, experiment.data.length, experiment.decoder.vocab_size)
  arguments = params, frozen, batch, jax.random.split(key, num_texts)

  # Each program runs once for its numbers, and is then timed in turns.
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
  """Returns the same loss with each kind of attention; 'ours' is the fused one."""
  computation = experiment.computation.on(jax.default_backend())

  def with_attention(attention: str) -> LossFn:
    changed = dataclasses.replace(
        experiment, computation=dataclasses.replace(computation, attention=attention))
    return augmentation(build_deliberator(changed), computation.loss_chunk)

  losses = {'ours': with_attention('fused'), 'plain': with_attention('plain')}
  if with_dense:
    dense = dense_mask(build_deliberator(experiment), computation.loss_chunk)
    losses['dense mask'] = lambda params, *others: dense(_cast(params, computation.dtype), *others)
  return losses


def _loss_and_norm(loss: LossFn):
  """Returns a train step without the optimizer.

  It returns the norm of the gradient. Otherwise the compiler could drop a part of the gradient.
  """

  def step(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple[Array, Array]:
    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, keys)
    return total / count, optax.global_norm(gradient)

  return step


def _cast(tree: PyTree, dtype: str) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
