"""Trains a coprocessor (or constant soft tokens) on the kv-cache of a frozen decoder."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jax.sharding import Mesh

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.data.loading import (
  check_known_vocabulary,
  check_vocabulary,
  open_batches,
  open_rows,
  prepare_data,
  validation_batches,
)
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import DESCRIPTION
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.diagnostics import make_diagnosis
from latent_deliberation.evaluation.perplexity import BASELINE, OWN, make_scorer, score_texts
from latent_deliberation.experiment import Experiment
from latent_deliberation.models import (
  build_deliberator,
  frozen_shapes,
  load_frozen,
  load_stored,
  open_frozen,
)
from latent_deliberation.paths import COPROCESSOR
from latent_deliberation.sharding import make_mesh, place_batch
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.run import Run, fit


def train_coprocessor(experiment: Experiment, decoder: Path, workdir: Path, data: Path) -> Params:
  """Trains what `experiment.deliberation.trainable` says, or goes on where it stopped.

  At the end it writes <workdir>/coprocessor, for `coprocessor_checkpoint.load`; one that is there
  already is left alone.

  Args:
    decoder: directory of the frozen decoder.
    workdir: of this run.
    data: directory of prepared data; prepared now if it is not.

  Returns: the trained parameters, float32.

  Raises:
    UserError: there is something else at <workdir>/coprocessor.
  """
  mesh = make_mesh(experiment.mesh)
  checkpoint = open_frozen(experiment, decoder)
  run = describe_training(experiment, workdir, mesh)
  run.check(checkpoint.fingerprint)
  target = workdir / COPROCESSOR
  if target.exists() and not (target / DESCRIPTION).exists():
    raise UserError(f'{target} is where the trained coprocessor will be written, but holds '
                          'something else: use another --workdir, or move it away')
  check_known_vocabulary(experiment.data, data, checkpoint)
  prepare_data(experiment.data, experiment.decoder.vocab_size, data)
  rows = open_rows(data, 'validation', length=experiment.data.length,
                   vocab_size=experiment.decoder.vocab_size)
  check_vocabulary(rows, checkpoint)
  frozen, fingerprint = load_frozen(experiment, checkpoint, mesh)
  deliberator = build_deliberator(experiment)
  batches = open_batches(experiment, data, run.section, mesh)
  evaluation = experiment.evaluation
  eval_batches = validation_batches(rows, evaluation.eval_batches, evaluation.batch_size, mesh,
                                    experiment.rules)
  is_rounded = experiment.computation.frozen_dtype == 'int8'
  params = fit(run, batches, augmentation(deliberator, experiment.computation.loss_chunk),
               {'validation': _validation(experiment, deliberator, frozen, eval_batches, mesh),
                'latents': _diagnosis(experiment, deliberator, frozen, eval_batches[0], mesh)},
               frozen=frozen, decoder=fingerprint,
               load_start=(lambda: load_stored(experiment, checkpoint, mesh)) if is_rounded
               else None)
  if not target.exists():
    coprocessor_checkpoint.save(target, coprocessor_checkpoint.CoprocessorCheckpoint(
        decoder_config=experiment.decoder, config=experiment.deliberation,
        decoder_fingerprint=fingerprint,
        vocabulary=rows.manifest.recipe.vocabulary_hash, steps=run.settings.loop.num_steps,
        params=params, frozen_dtype=experiment.computation.frozen_dtype))
  return params


def describe_training(experiment: Experiment, workdir: Path, mesh: Mesh) -> Run:
  """The run of `train_coprocessor` in `workdir`, to train, to check or to compile."""
  return Run('train', experiment, workdir, mesh,
             init=build_deliberator(experiment).coprocessor.init,
             frozen_shapes=frozen_shapes(experiment, mesh))


def _validation(experiment: Experiment, deliberator: Deliberator, frozen: Params, eval_batches: list,
                mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Mean loss on ahead tokens, and what latents and their content change about it."""
  config = deliberator.config
  scorer = make_scorer(
      deliberator, (BASELINE, OWN, 'shuffled'), num_traces=config.num_traces,
      num_ahead=config.num_ahead, loss_chunk=experiment.computation.loss_chunk, seed=0, mesh=mesh,
      rules=experiment.rules)

  def evaluate(params: Params) -> Mapping[str, float]:
    placed = (place_batch(batch, mesh, experiment.rules) for batch in eval_batches)
    scores = score_texts(scorer, params, frozen, placed)
    mean = {arm: score.total.sum() / score.count.sum() for arm, score in scores.items()}
    return {'loss': mean[OWN], 'gain': mean[BASELINE] - mean[OWN],
            'content': mean['shuffled'] - mean[OWN]}

  return evaluate


def _diagnosis(experiment: Experiment, deliberator: Deliberator, frozen: Params, eval_batches: Batch,
               mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Sizes and effective rank of the latents in one validation batch."""
  diagnose = make_diagnosis(deliberator, mesh, experiment.rules)
  return lambda params: diagnose(params, frozen, place_batch(eval_batches, mesh, experiment.rules))
