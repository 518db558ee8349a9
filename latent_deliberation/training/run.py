"""A training run: its identity, the run itself, and `fit`, which trains it.

`RunIdentity` is what must stay the same when a run is resumed. `claim_workdir` keeps it in run.json
and compares it. `Run` holds a run's shapes, optimizer and step. `fit` trains a run from the newest
checkpoint of its directory.
"""

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
from latent_deliberation.data.rows import Batches
from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import UserError, differences, problems_of, raise_problems
from latent_deliberation.experiment import Experiment, TrainingConfig, defaults_of
from latent_deliberation.files import make_writable, write_json
from latent_deliberation.paths import CHECKPOINTS, RUN_FILE, with_current_names
from latent_deliberation.sharding import check_batch, check_own_rows, place_batch
from latent_deliberation.training.checkpointer import Checkpointer
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


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """Everything that must stay the same for a run to be resumed.

  Attributes:
    job: name of the job, such as 'pretrain'.
    config: the whole configuration, as nested dicts of JSON values.
    decoder_fingerprint: fingerprint of the frozen decoder; '' where there is none.
    data_fingerprint: fingerprint of the data.
    defaults: defaults of the config, as nested dicts. A saved run that lacks a key had its default.
      So the default of a new key must mean what the code did before the key existed.
  """
  job: str
  config: Mapping[str, Any]
  decoder_fingerprint: str
  data_fingerprint: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def record(self) -> dict[str, Any]:
    """The content of run.json, as it reads back: tuples are lists, keys are strings.

    Raises:
      UserError: the config holds something that JSON cannot.
    """
    try:
      return json.loads(json.dumps({
          'job': self.job, 'config': self.config, 'decoder': self.decoder_fingerprint,
          'data': self.data_fingerprint}))
    except TypeError as error:
      raise UserError(f'the config of job {self.job!r} cannot be written as JSON ({error}): '
                      'use dicts, lists, strings, numbers, booleans and None') from error


def claim_workdir(workdir: Path, identity: RunIdentity,
                  changeable: tuple[str, ...] = ()) -> None:
  """Makes `workdir` the directory of this run, or checks that it already is.

  Process 0 writes run.json, and every process compares it. The directory may hold other files,
  such as a vocabulary or data.

  Args:
    workdir: directory on a mounted file system; created if missing.
    identity: identity of the run.
    changeable: dotted paths of config keys or sections that a resumed run may change.

  Raises:
    UserError: the directory holds another run, or checkpoints without a run.json.
  """
  path, record = workdir / RUN_FILE, identity.record
  if not path.exists() and (workdir / CHECKPOINTS).exists():
    raise UserError(f'{workdir / CHECKPOINTS} exists, but {path} does not: the checkpoints are of '
                    'an unknown run. Restore the file, or use another --workdir')
  barrier(f'{path} looked at')  # every process looks before process 0 makes the directory

  def write_once() -> None:
    if not path.exists():
      write_json(path, record)

  run_on_process_zero(f'write {path}', write_once)
  try:
    saved = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is not JSON ({error}), so the run in {workdir} is unknown: restore '
                    'the file, or use another --workdir') from error
  check_same_run(workdir, saved, identity, changeable)  # a new run too: processes must agree


def check_same_run(workdir: Path, saved: Mapping[str, Any], identity: RunIdentity,
                   changeable: tuple[str, ...]) -> None:
  """Compares `saved`, the content of the run.json in `workdir`, with the identity of this run.

  Raises:
    UserError: a key differs; lists each such key with its two values.
  """
  # Flatten both. A key that an old run lacks had its default.
  saved, current = dict(_leaves(with_current_names(saved))), dict(_leaves(identity.record))
  defaults = _leaves({'config': json.loads(json.dumps(identity.defaults))})
  saved = {key: value for key, value in defaults if key in current} | saved
  # Compare all keys but those that a resumed run may change.
  prefixes = tuple(f'config.{path}.' for path in changeable)
  saved, current = ({key: value for key, value in leaves.items()
                     if not f'{key}.'.startswith(prefixes)} for leaves in (saved, current))
  lines = differences(saved, current)
  if lines:
    raise UserError('\n'.join([
        f'{workdir} belongs to another run:', *lines,
        'Use another --workdir, or set the saved values again.']))


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts with their dotted paths."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, tree


# A run may be resumed on other devices, with other cadences, and with its files moved, since the
# fingerprint of the data covers their contents. Every other key is part of its identity.
CHANGEABLE = (
    'mesh', 'rules', 'evaluation', 'computation.attention', 'computation.replicate_frozen',
    'data.files', 'data.data_dir', 'data.vocabulary_path', 'decoder_from') + tuple(
    f'{section}.loop.{key}' for section in ('pretraining', 'training')
    for key in ('log_every', 'eval_every', 'save_every', 'keep'))


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, as its configuration describes it. It holds shapes and no weights.

  Attributes:
    job: 'pretrain', 'train', or a way to tune a decoder (see studies/tune.py).
    experiment: the whole configuration.
    workdir: work directory of the run, with run.json, checkpoints/ and metrics.jsonl.
    mesh: devices that the run is sharded over.
    init: (key, frozen parameters) -> trainable parameters, boxed with logical axes.
    frozen_shapes: shapes of the parameters that the loss reads and no step changes; {} for none.
  """
  job: str
  experiment: Experiment
  workdir: Path
  mesh: Mesh
  init: Callable[[Array, Params], PyTree]
  frozen_shapes: Params

  @property
  def section(self) -> str:
    """Name of the experiment's section that this run follows."""
    return 'pretraining' if self.job == 'pretrain' else 'training'

  @property
  def settings(self) -> TrainingConfig:
    """That section."""
    return getattr(self.experiment, self.section)

  def identity(self, decoder_fingerprint: str, data_fingerprint: str) -> RunIdentity:
    """Returns the identity of this run, without the settings that only another job reads.

    Args:
      decoder_fingerprint: fingerprint of the frozen decoder; '' where there is none.
      data_fingerprint: fingerprint of the batches.
    """
    # A change of settings that only the other job reads must not stop a resume.
    config = dataclasses.asdict(self.experiment)
    unread = ('deliberation', 'training') if self.job == 'pretrain' else ('pretraining',)
    for section in unread:
      del config[section]
    return RunIdentity(self.job, config, decoder_fingerprint, data_fingerprint,
                       defaults=defaults_of(Experiment))

  @property
  def changeable(self) -> tuple[str, ...]:
    """Keys or whole sections of the config that a resumed run may change."""
    return CHANGEABLE + tuple(
        f'deliberation.{key}' for key in self.experiment.deliberation.without_effect)

  @functools.cached_property
  def boxed(self) -> PyTree:
    """Shapes of the trainable parameters, boxed with logical axes."""
    return jax.eval_shape(self.init, jax.random.key(self.experiment.seed), self.frozen_shapes)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer, with the multipliers of the parameters that exist."""
    multipliers = {part: factor for part, factor in self.settings.multipliers.items()
                   if part in self.boxed}
    return build_optimizer(self.settings.optimizer, self.settings.loop.num_steps, multipliers)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """Shapes and shardings of the train state."""
    return abstract_state(self.boxed, self.optimizer, self.mesh, self.experiment.rules)

  def create_state(self, start: Params) -> TrainState:
    """Returns a new train state at step 0, created on its shards.

    Args:
      start: frozen parameters that `init` copies from.
    """
    def create(key: Array, start: Params) -> TrainState:
      return TrainState.create(nn.unbox(self.init(key, start)), self.optimizer)
    # Created inside jit, so no device holds more than its shards.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(self.experiment.seed), start)

  def make_step(self, loss_fn: LossFn, frozen: Params) -> TrainStep:
    """Returns the train step of this run.

    Args:
      loss_fn: the loss; see training/step.py.
      frozen: frozen parameters, or their shapes with shardings for a step that is only compiled.
    """
    settings = self.settings
    return make_train_step(
        loss_fn, self.optimizer, build_schedule(settings.optimizer, settings.loop.num_steps),
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract), frozen=frozen,
        mesh=self.mesh, rules=self.experiment.rules, seed=self.experiment.seed,
        accumulation=settings.accumulation)

  def check_sizes(self) -> None:
    """Checks that this run fits its mesh.

    Raises:
      UserError: batches or parameters do not divide over the mesh, two processes would need the
        same texts of a stream, or the warm-up is longer than the run; a line for each.
    """
    experiment = self.experiment
    problems = [
        *problems_of(lambda: check_batch(
            self.settings.batch_size, self.settings.accumulation, self.mesh, experiment.rules,
            self.section)),
        *problems_of(lambda: check_batch(
            experiment.evaluation.batch_size, 1, self.mesh, experiment.rules, 'evaluation'))]
    if experiment.data.mode == 'online':
      problems += problems_of(lambda: check_own_rows(self.mesh, experiment.rules))
    # Building optimizer and shardings checks them. Their errors lack the section's name.
    problems += [f'{self.section}: {problem}' for problem in problems_of(lambda: self.abstract)]
    raise_problems(problems)

  def check(self, decoder_fingerprint: str = '') -> None:
    """Checks, before long work, everything that needs neither data nor weights.

    Args:
      decoder_fingerprint: fingerprint of the frozen decoder; '' where it is not known yet.

    Raises:
      UserError: see `check_sizes`.
      UserError: the work directory holds another run, or cannot be written to.
    """
    self.check_sizes()
    make_writable(self.workdir)
    # Data and decoder may not exist yet. `claim_workdir` compares their fingerprints.
    try:
      saved = json.loads((self.workdir / RUN_FILE).read_text())
      identity = self.identity(decoder_fingerprint or saved['decoder'], saved['data'])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
      return  # a new run, or a damaged file that `claim_workdir` reports
    check_same_run(self.workdir, saved, identity, self.changeable)


def fit(run: Run, batches: Batches, loss_fn: LossFn,
        evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]], *,
        frozen: Params, decoder_fingerprint: str = '',
        load_start: Callable[[], Params] | None = None) -> Params:
  """Trains a run to its end, starting at the newest checkpoint of its directory if there is one.

  Args:
    run: the run.
    batches: the training stream.
    loss_fn: the loss; see training/step.py.
    evaluators: functions of the trainable parameters by name, called every `eval_every` steps.
    frozen: parameters that the loss reads.
    decoder_fingerprint: fingerprint of the frozen decoder; '' where there is none.
    load_start: loads the parameters that `init` of a new run copies from. It is needed where
      `frozen` is rounded to int8; default is `frozen`.

  Returns: the trained parameters, float32.

  Raises:
    UserError: the directory holds another run; or see training/loop.train.
  """
  settings = run.settings
  # The directory must be this run's before its checkpoints are read.
  claim_workdir(run.workdir, run.identity(decoder_fingerprint, batches.fingerprint),
                run.changeable)
  train_step = run.make_step(loss_fn, frozen)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep)) as saved,
        contextlib.closing(MetricsWriter(run.workdir)) as metrics):
    # Resume the newest checkpoint, or create a state on its shards.
    state = saved.restore(run.abstract, batches)
    if state is None:
      state = run.create_state(load_start() if load_start else frozen)
    logging.info('%s: at step %d of %d; the first step of a launch compiles', run.workdir,
                 state.step, settings.loop.num_steps)
    return train(
        state, train_step, batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, run.experiment.rules),
        checkpointer=saved, metrics=metrics, evaluators=evaluators).params
