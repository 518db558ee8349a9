"""Pretraining: trains a decoder on packed text and writes it to <workdir>/decoder."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Batch, Params, PyTree
from latent_deliberation.build import build_decoder
from latent_deliberation.data.loading import (
  open_batches,
  open_validation,
  prepare_data,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.model import weights
from latent_deliberation.paths import DECODER, kept_vocabulary
from latent_deliberation.sharding import make_mesh, place_batch
from latent_deliberation.training.objectives import language_modelling
from latent_deliberation.training.run import Run, fit
from latent_deliberation.training.run_identity import hold_workdir
from latent_deliberation.training.step import LossFn


def pretrain(experiment: Experiment, workdir: Path, prepared_dir: Path) -> Path:
  """Trains the decoder of an experiment from scratch, or resumes the run in `workdir`.

  Args:
    experiment: the whole configuration.
    workdir: work directory of the run.
    prepared_dir: directory of prepared data; missing data are prepared now.

  Returns: <workdir>/decoder, for `weights.load`.

  Raises:
    UserError: the experiment has a decoder already.
    UserError: config, data or directory do not fit; see `Run.check`, `prepare_data` and `fit`.
  """
  # Check everything that needs no data.
  if experiment.decoder_from:
    raise UserError(f'decoder_from = {experiment.decoder_from!r}: this decoder exists and needs no '
                    "pretraining. Train a coprocessor for it, or set decoder_from = ''")
  mesh = make_mesh(experiment.mesh)
  run = describe_pretraining(experiment, workdir, mesh)
  run.check()
  with hold_workdir(workdir):
    # Prepare and open the data.
    prepare_data(experiment.data, experiment.decoder.vocab_size, prepared_dir)
    rows, eval_batches = open_validation(experiment, prepared_dir, mesh,
                                         experiment.evaluation.eval_batches)
    batches = open_batches(experiment, prepared_dir, run.section, mesh)

    # Train, then write the decoder unless an earlier launch did.
    loss_fn = language_modelling(build_decoder(experiment), experiment.computation.loss_chunk)
    params = fit(run, batches, loss_fn,
                 {'validation': _validation(experiment, loss_fn, eval_batches, mesh)}, frozen={},
                 prepared_dir=prepared_dir)
    target = workdir / DECODER
    if not target.exists():
      tokenizer = kept_vocabulary(prepared_dir)
      weights.save(target, experiment.decoder, params, rows.manifest.recipe.vocabulary_hash,
                   tokenizer=tokenizer if tokenizer.is_file() else None)
    return target


def describe_pretraining(experiment: Experiment, workdir: Path, mesh: Mesh) -> Run:
  """Returns the run of `pretrain` in `workdir`."""
  decoder = build_decoder(experiment)

  def init(key: Array, frozen: Params) -> PyTree:
    del frozen
    return decoder.init(key, jnp.zeros((1, 1), jnp.int32))['params']

  return Run('pretrain', experiment, workdir, mesh, init=init, frozen_shapes={})


def _validation(experiment: Experiment, loss_fn: LossFn, eval_batches: list[Batch],
                mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Returns an evaluator of the mean next-token loss over the validation batches."""

  @jax.jit
  def sums(params: Params, batch: PyTree) -> tuple[Array, Array]:
    with nn.logical_axis_rules(tuple(experiment.rules.items())):
      return loss_fn(params, {}, batch, jax.random.split(jax.random.key(0), len(batch.tokens)))

  def evaluate(params: Params) -> Mapping[str, float]:
    with jax.set_mesh(mesh):
      scored = [sums(params, place_batch(batch, mesh, experiment.rules)) for batch in eval_batches]
    # A mean over targets, because batches may have different numbers of them.
    return {'loss': float(sum(total for total, _ in scored) / sum(count for _, count in scored))}

  return evaluate
