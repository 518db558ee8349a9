"""Training: trains a coprocessor, or constant soft tokens, on a frozen decoder's kv-cache."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.build import (
  build_deliberator,
  check_frozen_memory,
  frozen_shapes,
  load_frozen,
  load_stored,
  open_frozen,
)
from latent_deliberation.data.loading import (
  check_known_vocabulary,
  check_rows_vocabulary,
  open_batches,
  open_validation,
  prepare_data,
)
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import Description, read_description
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.diagnostics import make_diagnosis
from latent_deliberation.evaluation.perplexity import FROZEN, OWN, SHUFFLED, make_scorer, sum_scores
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.paths import COPROCESSOR
from latent_deliberation.progress import announced, counted
from latent_deliberation.sharding import make_mesh, place_batch, shardings_of
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.run import Run, fit
from latent_deliberation.training.run_identity import hold_workdir
from latent_deliberation.training.step import TrainState

TIMED_STEPS = 2  # after one that compiles


def train_coprocessor(experiment: Experiment, decoder_dir: Path, workdir: Path,
                      prepared_dir: Path, loaded: tuple[Params, str] | None = None) -> Params:
  """Trains the coprocessor of an experiment, or resumes the run in `workdir`.

  At the end it writes <workdir>/coprocessor, for `coprocessor_checkpoint.load`. An existing one is
  left alone.

  Args:
    experiment: the whole configuration.
    decoder_dir: directory of the frozen decoder.
    workdir: work directory of the run.
    prepared_dir: directory of prepared data; missing data are prepared now.
    loaded: what `load_frozen` returned for this decoder and configuration; None loads it.

  Returns: the trained parameters, float32.

  Raises:
    UserError: config, decoder, data or directory do not fit; see `open_frozen`, `Run.check`,
      `prepare_data` and `fit`.
  """
  # Check everything that needs neither data nor weights.
  mesh = make_mesh(experiment.mesh)
  checkpoint = open_frozen(experiment.decoder, decoder_dir)
  if loaded is None:
    check_frozen_memory(experiment, checkpoint, mesh)
  run = describe_training(experiment, workdir, mesh)
  run.check(checkpoint.fingerprint)
  start = open_start(experiment)
  if start:
    start.check(checkpoint.fingerprint)
  check_known_vocabulary(experiment.data, prepared_dir, checkpoint)
  # Few runs score benchmarks, so what that needs is imported only for those.
  watch = None
  if experiment.evaluation.tasks:
    watch = importlib.import_module('latent_deliberation.evaluation.task_watch')
    watch.check(experiment.evaluation)

  with hold_workdir(workdir):
    # Prepare and open the data, and load the decoder onto the mesh.
    prepare_data(experiment.data, experiment.decoder.vocab_size, prepared_dir)
    rows, eval_batches = open_validation(experiment, prepared_dir, mesh,
                                         experiment.evaluation.eval_batches)
    check_rows_vocabulary(rows, checkpoint)
    samples = watch.read_samples(experiment, prepared_dir) if watch else {}
    frozen, decoder_fingerprint = loaded or load_frozen(experiment, checkpoint, mesh)
    if start:  # some formats have a fingerprint only once they are loaded
      start.check(decoder_fingerprint, rows.manifest.recipe.vocabulary_hash)
    deliberator = build_deliberator(experiment)
    batches = open_batches(experiment, prepared_dir, run.section, mesh)

    evaluators = {
        'validation': _validation(experiment, deliberator, frozen, eval_batches, mesh),
        'latents': _diagnosis(experiment, deliberator, frozen, eval_batches[0], mesh)}
    if watch is not None:
      evaluators['tasks'] = watch.make_evaluator(experiment, deliberator, frozen, samples, mesh)

    def create_state() -> TrainState:
      if start:
        return run.start_from(start.load(mesh, experiment.rules))
      # A new coprocessor copies the stored weights, not those rounded to int8.
      is_rounded = experiment.computation.frozen_dtype in INT8_DTYPES
      return run.create_state(
          load_stored(checkpoint, mesh, experiment.rules) if is_rounded else frozen)

    params = fit(run, batches, augmentation(deliberator, experiment.computation.loss_chunk),
                 evaluators, frozen=frozen, decoder_fingerprint=decoder_fingerprint,
                 create_state=create_state, prepared_dir=prepared_dir)
    target = workdir / COPROCESSOR
    if not target.exists():
      with announced(f'writing {target}'):
        coprocessor_checkpoint.save(target, coprocessor_checkpoint.CoprocessorCheckpoint(
            decoder_config=experiment.decoder, config=experiment.deliberation,
            decoder_fingerprint=decoder_fingerprint,
            vocabulary_hash=rows.manifest.recipe.vocabulary_hash,
            steps=run.settings.loop.num_steps + (start.description.steps if start else 0),
            params=params,
            frozen_dtype=experiment.computation.frozen_dtype))
    return params


def describe_training(experiment: Experiment, workdir: Path, mesh: Mesh) -> Run:
  """Returns the run of `train_coprocessor` in `workdir`, to train, to check or to compile.

  Raises:
    UserError: see `open_start`.
  """
  start = open_start(experiment)
  return Run('train', experiment, workdir, mesh,
             init=build_deliberator(experiment).coprocessor.init,
             frozen_shapes=frozen_shapes(experiment, mesh),
             start_fingerprint=start.fingerprint if start else '')


@dataclasses.dataclass(frozen=True)
class Start:
  """The trained coprocessor that a new one starts as.

  Attributes:
    directory: its checkpoint.
    description: what the checkpoint says of it.
    fingerprint: fingerprint of its parameters.
    place: `coprocessor_from`, for messages.
  """
  directory: Path
  description: Description
  fingerprint: str
  place: str

  def check(self, decoder_fingerprint: str = '', vocabulary_hash: str = '') -> None:
    """Raises UserError where it was trained on another decoder or vocabulary; '' is not known."""
    for what, trained, now in (
        ('decoder weights', self.description.decoder_fingerprint, decoder_fingerprint),
        ('vocabulary', self.description.vocabulary_hash, vocabulary_hash)):
      if now not in ('', trained):
        raise UserError(f'coprocessor_from = {self.place!r}: it was trained with {what} {trained}, '
                        f'and here are {now}: give a coprocessor of this decoder')

  def load(self, mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> Params:
    """Loads the parameters onto their shards. Raises UserError where they are others by now."""
    loaded = coprocessor_checkpoint.load(
        self.directory, lambda boxed: shardings_of(boxed, mesh, rules))
    if read_description(self.directory)[1] != self.fingerprint:
      raise UserError(f'coprocessor_from = {self.place!r}: it was replaced while this command '
                      'began: run the command again, in a new --workdir')
    return loaded.params


def open_start(experiment: Experiment) -> Start | None:
  """Returns the coprocessor that training starts from, without weights; None where it starts anew.

  Raises:
    UserError: there is none, it is damaged, or it has another config.
  """
  place = experiment.start
  if not place:
    return None
  try:
    # Places and lengths of the ahead tokens change no latent.
    directory = coprocessor_checkpoint.find_coprocessor(
        as_path(place), decoder_config=experiment.decoder, config=experiment.deliberation,
        ignoring=('num_ahead', 'anchor_tokens'))
    return Start(directory, *read_description(directory), place)
  except UserError as error:
    raise UserError(f'coprocessor_from = {place!r}: {error}') from error


def time_step(experiment: Experiment, run: Run, prepared_dir: Path, mesh: Mesh) -> float:
  """Returns the seconds of a training step, without compilation. Nothing is kept."""
  checkpoint = open_frozen(experiment.decoder, as_path(experiment.decoder_from))
  frozen, _ = load_frozen(experiment, checkpoint, mesh)
  batches = open_batches(experiment, prepared_dir, run.section, mesh)
  step = run.make_step(
      augmentation(build_deliberator(experiment), experiment.computation.loss_chunk), frozen)
  state, taken = run.create_state(frozen), []
  for number in counted(range(1 + TIMED_STEPS), 'measuring the speed'):
    batch = place_batch(batches(number), mesh, experiment.rules)
    begun = time.perf_counter()
    state, scalars = step(state, batch)
    jax.block_until_ready(scalars)
    taken.append(time.perf_counter() - begun)
  return float(np.median(taken[1:]))


def _validation(experiment: Experiment, deliberator: Deliberator, frozen: Params,
                eval_batches: list[Batch], mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Returns an evaluator of the loss on ahead tokens.

  'gain' is what the latents take off the frozen decoder's loss. 'content' is what they take off the
  loss with another text's latents.
  """
  config = deliberator.config
  # A fixed seed, so that every evaluation scores the same traces.
  scorer = make_scorer(
      deliberator, (FROZEN, OWN, SHUFFLED), num_traces=config.num_traces,
      num_ahead=config.num_ahead, loss_chunk=experiment.computation.loss_chunk, seed=0, mesh=mesh,
      rules=experiment.rules)

  def evaluate(params: Params) -> Mapping[str, float]:
    placed = (place_batch(batch, mesh, experiment.rules) for batch in eval_batches)
    totals, count = sum_scores(scorer, params, frozen, placed)
    # Means over all targets, the same ones for every arm. A few texts may reach no last position.
    mean = {arm: total.sum() / max(1, count.sum()) for arm, total in totals.items()}
    return {'loss': mean[OWN], 'gain': mean[FROZEN] - mean[OWN],
            'content': mean[SHUFFLED] - mean[OWN]}

  return evaluate


def _diagnosis(experiment: Experiment, deliberator: Deliberator, frozen: Params, batch: Batch,
               mesh: Mesh) -> Callable[[Params], Mapping[str, float]]:
  """Returns an evaluator of the sizes and the effective rank of latents in one batch."""
  diagnose = make_diagnosis(deliberator, mesh, experiment.rules)
  return lambda params: diagnose(params, frozen, place_batch(batch, mesh, experiment.rules))
