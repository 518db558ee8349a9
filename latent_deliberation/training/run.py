"""Which run a directory belongs to, and what may change when the run is resumed."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, TrainingConfig, defaults_of
from latent_deliberation.files import make_writable, write_json
from latent_deliberation.paths import CHECKPOINTS, RUN_FILE, with_current_names
from latent_deliberation.sharding import check_batch, check_own_rows, place_batch
from latent_deliberation.training.checkpointer import Batches, Checkpointer
from latent_deliberation.training.loop import train
from latent_deliberation.training.metrics import MetricsWriter
from latent_deliberation.training.optimizer import build_optimizer, build_schedule
from latent_deliberation.training.step import (
  LossFn,
  TrainState,
  TrainStep,
  abstract_state,
  make_train_step,
)

MISSING = '(nothing)'


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """What must stay the same for a run to be resumed.

  Attributes:
    job: name of the job, such as 'pretrain'.
    config: the whole configuration, as nested dicts of what JSON can hold.
    decoder: fingerprint of the frozen decoder; '' where there is none.
    data: fingerprint of the data.
    defaults: of the config, as nested dicts: what a key means for a run that is older than the key.
      A new key's default must therefore be what was done before there was the key.
  """
  job: str
  config: Mapping[str, Any]
  decoder: str
  data: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    try:
      self.to_json()
    except TypeError as error:
      raise UserError(f'the config of job {self.job!r} cannot be written as JSON ({error}): '
                       'use dicts, lists, strings, numbers, booleans and None.') from error

  def to_json(self) -> dict[str, Any]:
    """The identity as it reads back from a JSON file (tuples are lists, keys are strings)."""
    record = dataclasses.asdict(self)
    del record['defaults']  # of this code, and not of the run
    return json.loads(json.dumps(record))


def claim_workdir(workdir: Path, identity: RunIdentity, free: tuple[str, ...] = ()) -> None:
  """Makes `workdir` the directory of this run, or checks that it already is.

  Process 0 writes run.json, and all of them compare it. Other files, such as a vocabulary or
  data, may be there already.

  Args:
    workdir: a directory on a mounted file system; created if missing.
    identity: the run that wants it.
    free: dotted paths of the config, or of whole sections, that may differ from the earlier launch.

  Raises: UserError when the directory holds another run, or checkpoints that no run.json explains.
  """
  if ':/' in str(workdir):
    raise UserError(f'--workdir is {str(workdir)!r}, which is a URL; it must be a path: mount the '
                     'bucket (gcsfuse, for instance) and give the path under the mount.')
  path = workdir / RUN_FILE
  if not path.exists() and (workdir / CHECKPOINTS).exists():
    raise UserError(f'{workdir / CHECKPOINTS} exists, but {path} does not: these checkpoints are '
                     'of an unknown run. Restore the file, or use another --workdir.')
  barrier(f'{path} looked at')  # before process 0 goes on to make what is refused above
  run_on_process_zero(f'write {path}', lambda: _write_once(path, identity))
  try:
    saved = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is not JSON ({error}), so the run in {workdir} is unknown: restore '
                     'the file, or use another --workdir.') from error
  check_same_run(str(workdir), saved, identity, free)  # also by the others of a new run


def _write_once(path: Path, identity: RunIdentity) -> None:
  if not path.exists():
    write_json(path, identity.to_json())


def check_same_run(place: str, saved: Mapping[str, Any], identity: RunIdentity,
                   free: tuple[str, ...]) -> None:
  """Checks that `saved`, the identity found at `place`, is that of this run.

  Raises: UserError with each key that differs, its two values and the remedy.
  """
  there = dict(_leaves(with_current_names(saved)))
  here = dict(_leaves(identity.to_json()))
  defaults = _leaves({'config': json.loads(json.dumps(identity.defaults))})
  there = {key: value for key, value in defaults if key in here} | there
  prefixes = tuple(f'config.{path}.' for path in free)
  lines = [f'  {key}: {there.get(key, MISSING)!r} there, {here.get(key, MISSING)!r} now'
           for key in sorted(there | here)
           if there.get(key, MISSING) != here.get(key, MISSING)
           and not f'{key}.'.startswith(prefixes)]
  if lines:
    raise UserError('\n'.join([
        f'{place} belongs to another run:', *lines,
        'Use another --workdir, or go back to the values that are there.']))


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Leaves of nested dicts, with their dotted paths."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, tree


# A run may be resumed on other devices, with other cadences, and with its files elsewhere (the
# fingerprint of the data holds their contents); everything else is the run.
FREE = ('mesh', 'rules', 'evaluation', 'computation.attention', 'computation.replicate_frozen',
        'data.files', 'data.data_dir', 'data.vocabulary_path') + tuple(
    f'{section}.loop.{key}' for section in ('pretraining', 'training')
    for key in ('log_every', 'eval_every', 'save_every', 'keep'))


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run as its configuration describes it. It holds shapes and no weights.

  Attributes:
    job: 'pretrain', 'train', or a way to tune a decoder (see studies/tune.py).
    experiment: the whole configuration.
    workdir: claimed for this run; holds run.json, checkpoints/ and metrics.jsonl.
    mesh: devices that the run is sharded over.
    init: (key, frozen parameters) -> trainable parameters, boxed with logical axes.
    frozen_shapes: of the parameters that the loss reads and no step changes; {} where there are
      none.
  """
  job: str
  experiment: Experiment
  workdir: Path
  mesh: Mesh
  init: Callable[[Array, Params], PyTree]
  frozen_shapes: Params

  @property
  def section(self) -> str:
    """Name of the section of the experiment that this run follows."""
    return 'pretraining' if self.job == 'pretrain' else 'training'

  @property
  def settings(self) -> TrainingConfig:
    """That section."""
    return getattr(self.experiment, self.section)

  def identity(self, decoder: str, data: str) -> RunIdentity:
    """The identity of this run, for its directory.

    Settings that only the other job reads are left out.

    Args:
      decoder: fingerprint of the frozen decoder; '' where there is none.
      data: fingerprint of the batches.
    """
    config = dataclasses.asdict(self.experiment)
    unread = ('deliberation', 'training') if self.job == 'pretrain' else ('pretraining',)
    for section in unread:
      del config[section]
    return RunIdentity(job=self.job, config=config, decoder=decoder, data=data,
                       defaults=defaults_of(Experiment))

  @property
  def free(self) -> tuple[str, ...]:
    """Keys of the config, or whole sections, in which a resumption may differ."""
    return FREE + tuple(
        f'deliberation.{key}' for key in self.experiment.deliberation.without_effect)

  @functools.cached_property
  def boxed(self) -> PyTree:
    """Shapes of the trainable parameters, boxed with logical axes."""
    return jax.eval_shape(self.init, jax.random.key(self.experiment.seed), self.frozen_shapes)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    multipliers = {part: factor for part, factor in self.settings.multipliers.items()
                   if part in self.boxed}
    return build_optimizer(self.settings.optimizer, self.settings.loop.num_steps, multipliers)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes and shardings of the state."""
    return abstract_state(self.boxed, self.optimizer, self.mesh, self.experiment.rules)

  def create_state(self, start: Params) -> TrainState:
    """A fresh state, made on its shards.

    Args:
      start: frozen parameters that `init` copies from.
    """
    def create(key: Array, start: Params) -> TrainState:
      return TrainState.create(nn.unbox(self.init(key, start)), self.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(self.experiment.seed), start)

  def make_step(self, loss_fn: LossFn, frozen: Params) -> TrainStep:
    """The train step of this run.

    Args:
      frozen: parameters, or shapes with shardings for a step that is only compiled.
    """
    settings = self.settings
    return make_train_step(
        loss_fn, self.optimizer, build_schedule(settings.optimizer, settings.loop.num_steps),
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract), frozen=frozen,
        mesh=self.mesh, rules=self.experiment.rules, seed=self.experiment.seed,
        accumulation=settings.accumulation)

  def check_sizes(self) -> None:
    """Raises UserError where this run does not fit its mesh.

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
    except UserError as error:
      raise UserError(f'{self.section}: {error}') from error

  def check(self, decoder: str = '') -> None:
    """Raises what would stop this run later, as far as it shows without data and weights.

    Args:
      decoder: fingerprint of the frozen decoder; '' where it is not known yet.

    Raises:
      UserError: see `check_sizes`; or the directory holds another run.
      UserError: the directory cannot be written to.
    """
    self.check_sizes()
    make_writable(self.workdir)
    path = self.workdir / RUN_FILE
    if path.exists():
      with contextlib.suppress(json.JSONDecodeError, KeyError):  # `claim_workdir` reports these
        saved = json.loads(path.read_text())
        # Data and decoder may not exist yet. `claim_workdir` compares their fingerprints.
        identity = self.identity(decoder or saved['decoder'], saved['data'])
        check_same_run(str(self.workdir), saved, identity, self.free)


def check_divides(section: str, batch_size: int, accumulation: int, mesh: Mesh,
                  experiment: Experiment) -> None:
  """`check_batch`, with the section of the config named in the error."""
  try:
    check_batch(batch_size, accumulation, mesh, experiment.rules)
  except UserError as error:
    raise UserError(f'{section}: {error}') from error


def fit(run: Run, batches: Batches, loss_fn: LossFn,
        evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]], *,
        frozen: Params, decoder: str = '',
        load_start: Callable[[], Params] | None = None) -> Params:
  """Trains a run to its end, from the newest checkpoint of its directory if there is one.

  Args:
    run: what to train.
    batches: the training stream.
    loss_fn: see training/step.py.
    evaluators: name -> function of the trainable parameters, called every `eval_every` steps.
    frozen: parameters that the loss reads.
    decoder: fingerprint of the frozen decoder.
    load_start: loads the parameters that `init` of a fresh run copies from, where those in
      `frozen` are rounded to int8.

  Returns: the trained parameters, float32.
  """
  settings = run.settings
  claim_workdir(run.workdir, run.identity(decoder, batches.fingerprint), run.free)
  train_step = run.make_step(loss_fn, frozen)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep)) as saved,
        contextlib.closing(MetricsWriter(run.workdir)) as metrics):
    state = saved.restore(run.abstract, batches)
    if state is None:
      state = run.create_state(load_start() if load_start else frozen)
    logging.info('%s: at step %d of %d; the first step of a launch compiles', run.workdir,
                 state.step, settings.loop.num_steps)
    return train(
        state, train_step, batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, run.experiment.rules),
        checkpointer=saved, metrics=metrics, evaluators=evaluators).params
