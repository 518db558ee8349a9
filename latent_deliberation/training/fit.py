"""What pretraining and coprocessor training share: a directory, a state, a step and the loop."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.binding import defaults_of
from latent_deliberation.directories import make_writable
from latent_deliberation.experiment import Experiment, TrainingConfig
from latent_deliberation.sharding import check_batch, check_own_rows, place_batch
from latent_deliberation.training.checkpointer import Batches, Checkpointer
from latent_deliberation.training.identity import (
  CHECKPOINTS,
  RUN_FILE,
  RunIdentity,
  check_same_run,
  claim,
)
from latent_deliberation.training.loop import train
from latent_deliberation.training.metrics import MetricsWriter
from latent_deliberation.training.optimizer import build_optimizer, build_schedule
from latent_deliberation.training.state import TrainState
from latent_deliberation.training.step import (
  LossFn,
  TrainStep,
  abstract_state,
  make_train_step,
)

# A run may be resumed on other devices, with other cadences, and with its files elsewhere (the
# fingerprint of the data holds their contents); everything else is the run.
FREE = ('mesh', 'rules', 'evaluation', 'computation.attention', 'computation.replicate_frozen',
        'data.files', 'data.data_dir', 'data.vocabulary_path') + tuple(
    f'{section}.loop.{key}' for section in ('pretraining', 'training')
    for key in ('log_every', 'eval_every', 'save_every', 'keep'))


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, described before there are data.

  Attributes:
    job: 'pretrain', 'train', or a way to tune a decoder (see studies/tune.py).
    experiment: the whole configuration.
    workdir: claimed for this run; holds run.json, checkpoints/ and metrics.jsonl.
    init: (key, frozen) -> trainable parameters boxed with logical axes.
    frozen: parameters that the loss reads and nothing changes; their shapes suffice to `check`.
    decoder: fingerprint of the frozen decoder; '' where there is none.
    mesh: to run on.
    load_start: loads what `init` of a fresh run gets in the place of `frozen`, if that is rounded
      to int8.
  """
  job: str
  experiment: Experiment
  workdir: Path
  init: Callable[[Array, Params], PyTree]
  frozen: Params
  decoder: str
  mesh: Mesh
  load_start: Callable[[], Params] | None = None

  @property
  def section(self) -> str:
    """Name of the section of the experiment that this run follows."""
    return 'pretraining' if self.job == 'pretrain' else 'training'

  @property
  def settings(self) -> TrainingConfig:
    """That section."""
    return getattr(self.experiment, self.section)

  def identity(self, data: str) -> RunIdentity:
    """The identity on data of this fingerprint, for the directory and its checkpoints.

    A run is not another one because of settings that only the other job reads.
    """
    config = dataclasses.asdict(self.experiment)
    unread = ('deliberation', 'training') if self.job == 'pretrain' else ('pretraining',)
    for section in unread:
      del config[section]
    return RunIdentity(job=self.job, config=config, decoder=self.decoder, data=data,
                       defaults=defaults_of(Experiment))

  @property
  def free(self) -> tuple[str, ...]:
    """Keys of the config, or whole sections, in which a resumption may differ."""
    return FREE + tuple(
        f'deliberation.{key}' for key in self.experiment.deliberation.without_effect)

  @functools.cached_property
  def boxed(self) -> PyTree:
    """Shapes of the trainable parameters, boxed with logical axes."""
    return jax.eval_shape(self.init, jax.random.key(self.experiment.seed), self.frozen)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    multipliers = {part: factor for part, factor in self.settings.multipliers.items()
                   if part in self.boxed}
    return build_optimizer(self.settings.optimizer, self.settings.loop.num_steps, multipliers)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes and shardings of the state."""
    return abstract_state(self.boxed, self.optimizer, self.mesh, self.experiment.rules)

  def create_state(self) -> TrainState:
    """A fresh state, made on its shards."""
    def create(key: Array, frozen: Params) -> TrainState:
      return TrainState.create(nn.unbox(self.init(key, frozen)), self.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    return jax.jit(create, out_shardings=shardings)(
        jax.random.key(self.experiment.seed),
        self.load_start() if self.load_start else self.frozen)

  def make_step(self, loss_fn: LossFn) -> TrainStep:
    """The train step of this run."""
    settings = self.settings
    return make_train_step(
        loss_fn, self.optimizer, build_schedule(settings.optimizer, settings.loop.num_steps),
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
        frozen=self.frozen, mesh=self.mesh, rules=self.experiment.rules,
        seed=self.experiment.seed, accumulation=settings.accumulation)

  def check_sizes(self) -> None:
    """Raises ValueError where this run does not fit its mesh.

    Batches or sizes do not divide over it, it asks two processes for the same texts of a stream, or
    the warm-up is longer than the run.
    """
    experiment = self.experiment
    check_divides(self.section, self.settings.batch_size, self.settings.accumulation, self.mesh,
                  experiment)
    check_divides('evaluation', experiment.evaluation.batch_size, 1, self.mesh, experiment)
    if experiment.data.mode == 'online':
      check_own_rows(self.mesh, experiment.rules)
    try:
      _ = self.abstract
    except ValueError as error:
      raise ValueError(f'{self.section}: {error}') from error

  def check(self) -> None:
    """Raises what would stop this run later, as far as it shows without data and without weights.

    Raises:
      ValueError: see `check_sizes`; or the directory holds another run.
      OSError: the directory cannot be written to.
    """
    self.check_sizes()
    make_writable(self.workdir)
    path = self.workdir / RUN_FILE
    if path.exists():
      with contextlib.suppress(json.JSONDecodeError, KeyError):  # which `claim` will speak of
        saved = json.loads(path.read_text())
        # Data, or a quickstart's decoder, may not be there yet; `claim` compares them, too.
        identity = dataclasses.replace(
            self.identity(saved['data']), decoder=self.decoder or saved['decoder'])
        check_same_run(str(self.workdir), saved, identity, self.free)


def check_divides(section: str, batch_size: int, accumulation: int, mesh: Mesh,
                  experiment: Experiment) -> None:
  """`check_batch`, with the section of the config named in the error."""
  try:
    check_batch(batch_size, accumulation, mesh, experiment.rules)
  except ValueError as error:
    raise ValueError(f'{section}: {error}') from error


def fit(run: Run, batches: Batches, loss_fn: LossFn,
        evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]]) -> Params:
  """Trains, or goes on where the directory's newest checkpoint stands.

  Returns: the trained parameters, float32.
  """
  settings = run.settings
  identity = run.identity(batches.fingerprint)
  claim(run.workdir, identity, run.free)
  train_step = run.make_step(loss_fn)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep)) as saved,
        contextlib.closing(MetricsWriter(run.workdir)) as metrics):
    state = saved.restore(run.abstract, batches, identity, run.free) or run.create_state()
    logging.info('%s: at step %d of %d; the first step of a launch compiles', run.workdir,
                 state.step, settings.loop.num_steps)
    return train(
        state, train_step, batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, run.experiment.rules), checkpointer=saved,
        identity=identity, metrics=metrics, evaluators=evaluators).params
