"""What pretraining and coprocessor training share: a directory, a state, a step and the loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.jobs.experiment import Experiment, TrainingConfig
from latent_deliberation.sharding import check_batch, place_batch
from latent_deliberation.training.checkpoint import Batches, Checkpointer
from latent_deliberation.training.identity import CHECKPOINTS, RunIdentity, claim
from latent_deliberation.training.loop import train
from latent_deliberation.training.metrics import MetricsWriter
from latent_deliberation.training.optimizer import build_optimizer, build_schedule
from latent_deliberation.training.state import TrainState
from latent_deliberation.training.step import LossFn, abstract_state, make_train_step

# A run may be resumed on other devices and with other cadences; everything else is the run.
FREE = ('mesh', 'rules', 'evaluation') + tuple(
    f'{section}.loop.{key}' for section in ('pretraining', 'training')
    for key in ('log_every', 'eval_every', 'save_every', 'keep'))


def identify(job: str, experiment: Experiment, data: str, decoder: str = '') -> RunIdentity:
  """The identity of a job's run, for its directory and its checkpoints.

  A job is not another one because of settings that only the other job reads.
  """
  config = dataclasses.asdict(experiment)
  unread = {'pretrain': ('deliberation', 'training'), 'train': ('pretraining',)}[job]
  for section in unread:
    del config[section]
  return RunIdentity(job=job, config=config, decoder=decoder, data=data)


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, described: what `fit` trains and `restore_trained` reads back.

  Attributes:
    experiment, settings: the whole, and the section of it that this run follows.
    workdir: claimed for this run; holds run.json, checkpoints/ and metrics.jsonl.
    identity: see `identify`.
    batches: the training stream.
    init: (key, frozen) -> trainable parameters boxed with logical axes.
    frozen: parameters that the loss reads and nothing changes.
    mesh: to run on.
  """
  experiment: Experiment
  settings: TrainingConfig
  workdir: Path
  identity: RunIdentity
  batches: Batches
  init: Callable[[Array, Params], PyTree]
  frozen: Params
  mesh: Mesh

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return build_optimizer(self.settings.optimizer, self.settings.loop.num_steps,
                           self.settings.multipliers)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes and shardings of the state."""
    boxed = jax.eval_shape(self.init, jax.random.key(self.experiment.seed), self.frozen)
    return abstract_state(boxed, self.optimizer, self.mesh, self.experiment.rules)

  def create_state(self) -> TrainState:
    """A fresh state, made on its shards."""
    def create(key: Array, frozen: Params) -> TrainState:
      return TrainState.create(nn.unbox(self.init(key, frozen)), self.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    return jax.jit(create, out_shardings=shardings)(
        jax.random.key(self.experiment.seed), self.frozen)


def fit(run: Run, loss_fn: LossFn,
        evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]]) -> Params:
  """Trains, or goes on where the directory's newest checkpoint stands.

  Returns: the trained parameters, float32.
  """
  settings, rules = run.settings, run.experiment.rules
  check_batch(settings.batch_size, settings.accumulation, run.mesh, rules)
  train_step = make_train_step(
      loss_fn, run.optimizer, build_schedule(settings.optimizer, settings.loop.num_steps),
      state_shardings=jax.tree.map(lambda leaf: leaf.sharding, run.abstract), frozen=run.frozen,
      mesh=run.mesh, rules=rules, seed=run.experiment.seed, accumulation=settings.accumulation)
  claim(run.workdir, run.identity, FREE)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep)) as saved,
        contextlib.closing(MetricsWriter(run.workdir)) as metrics):
    state = saved.restore(run.abstract, run.batches, run.identity, FREE) or run.create_state()
    return train(
        state, train_step, run.batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, rules), checkpointer=saved,
        identity=run.identity, metrics=metrics, evaluators=evaluators).params


def restore_trained(run: Run) -> Params:
  """The parameters of the newest checkpoint of a run.

  Raises:
    FileNotFoundError: there is none.
    ValueError: the directory holds another run.
  """
  directory = run.workdir / CHECKPOINTS
  if directory.is_dir():
    with contextlib.closing(Checkpointer(directory, run.settings.loop.keep)) as saved:
      state = saved.restore(run.abstract, run.batches, run.identity, FREE)
    if state is not None:
      return state.params
  raise FileNotFoundError(f'{directory} holds no checkpoint: name a directory in which '
                          'launch/train.py has trained')
