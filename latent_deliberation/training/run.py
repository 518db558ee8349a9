"""A training run: its identity, the run itself, and `fit`, which trains it.

`RunIdentity` is what must stay the same when a run is resumed. `claim_workdir` keeps it in run.json
and compares it. `Run` holds a run's shapes, optimizer and step. `fit` trains a run from the newest
checkpoint of its directory. A finished run can be trained further, with a larger num_steps.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.build import count_parameters
from latent_deliberation.data.rows import Batches
from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import UserError, differences, problems_of, raise_problems
from latent_deliberation.experiment import Experiment, TrainingConfig, defaults_of
from latent_deliberation.files import lock_for_all, make_writable, write_json
from latent_deliberation.paths import (
  CHECKPOINTS,
  COPROCESSOR,
  DECODER,
  RUN_FILE,
  RUN_LOCK,
  with_current_names,
)
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


def hold_workdir(workdir: Path) -> contextlib.AbstractContextManager[None]:
  """Holds the lock of a work directory, so that no other launch works in it.

  Every process enters. A run of several hosts is one launch.
  """
  return lock_for_all(workdir / RUN_LOCK, f'works in {workdir}')


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
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}), so the run in {workdir} is unknown: restore '
                    'the file, or use another --workdir') from error
  check_same_run(workdir, saved, identity, changeable)  # a new run too: processes must agree


def check_same_run(workdir: Path, saved: Mapping[str, Any], identity: RunIdentity,
                   changeable: tuple[str, ...]) -> None:
  """Compares `saved`, the content of the run.json in `workdir`, with the identity of this run.

  The number of steps may be larger now: see `lengthen`.

  Raises:
    UserError: a key differs; lists each such key with its two values.
  """
  saved = {key: value for key, value in saved.items() if key != EARLIER_STEPS}
  # The run may have been shorter.
  grows = _steps_of(saved, identity.job) < _steps_of(identity.record, identity.job)
  length = (f'{_section_of(identity.job)}.loop.num_steps',) if grows else ()
  lines = _differences(saved, identity.record, identity.defaults, (*changeable, *length))
  if lines:
    raise UserError('\n'.join([
        f'{workdir} belongs to another run:', *lines,
        'Use another --workdir, or set the saved values again. num_steps may only grow.']))


def check_same_settings(path: Path, settings: Any, changeable: tuple[str, ...]) -> dict[str, Any]:
  """Compares the 'config' of a report with the settings that would replace it.

  Args:
    path: the report, a JSON file.
    settings: an experiment or a study.
    changeable: dotted paths of settings that do not change a report.

  Returns: the content of the report.

  Raises:
    UserError: a setting differs; lists each with its two values. Or the file is damaged.
  """
  try:
    report = json.loads(path.read_bytes())
    saved = {'config': report['config']}
  except (ValueError, KeyError) as error:
    raise UserError(f'{path} is no report ({error!r}): move it away, or add --overwrite') from error
  current = json.loads(json.dumps({'config': dataclasses.asdict(settings)}, default=str))
  lines = _differences(saved, current, defaults_of(type(settings)), changeable)
  if lines:
    raise UserError('\n'.join([
        f'{path} is of other settings:', *lines,
        'Use another --workdir, set the saved values again, or add --overwrite.']))
  return report


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any],
                 defaults: Mapping[str, Any], changeable: tuple[str, ...]) -> list[str]:
  """Returns a line for each leaf of two records that differs, but for those that may change.

  Args:
    saved, current: the records; their 'config' is the configuration.
    defaults: defaults of the config, which a saved one had where it lacks a key.
    changeable: dotted paths of config keys or sections that may change.
  """
  saved, current = dict(_leaves(with_current_names(saved))), dict(_leaves(current))
  defaults = _leaves({'config': json.loads(json.dumps(defaults))})
  saved = {key: value for key, value in defaults if key in current} | saved
  prefixes = tuple(f'config.{path}.' for path in changeable)
  saved, current = ({key: value for key, value in leaves.items()
                     if not f'{key}.'.startswith(prefixes)} for leaves in (saved, current))
  return differences(saved, current)


def _steps_of(record: Mapping[str, Any], job: str) -> int:
  """Returns the num_steps of a job in the content of its run.json; 0 where it has none."""
  return record['config'].get(_section_of(job), {}).get('loop', {}).get('num_steps', 0)


def _section_of(job: str) -> str:
  """Returns the section of the experiment that a job follows."""
  return 'pretraining' if job == 'pretrain' else 'training'


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts with their dotted paths."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, tree


EARLIER_STEPS = 'earlier_num_steps'  # key of run.json, not part of the identity
# Jobs that write a result into their work directory, with its name.
_RESULTS = {'pretrain': DECODER, 'train': COPROCESSOR}

# Settings that change no result but by rounding: devices, cadences, and the places of files, since
# the fingerprint of the data covers their contents.
WITHOUT_EFFECT = (
    'mesh', 'rules', 'computation.activations', 'computation.attention',
    'computation.replicate_frozen',
    'data.files', 'data.data_dir', 'data.vocabulary_path', 'decoder_from') + tuple(
    f'{section}.loop.{key}' for section in ('pretraining', 'training')
    for key in ('log_every', 'log_seconds', 'eval_every', 'save_every', 'keep'))
# A run may be resumed with others of these. Every other key is part of its identity.
CHANGEABLE = (*WITHOUT_EFFECT, 'evaluation')


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
    return _section_of(self.job)

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
    # An 'auto' of the dtype must not stand for another one when the run is resumed elsewhere.
    platform = self.mesh.devices.flat[0].platform
    config['computation']['dtype'] = self.experiment.computation.on(platform).dtype
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

  def saved_steps(self) -> int:
    """Returns the num_steps of the run in `workdir`; 0 where there is none yet."""
    try:
      return _steps_of(json.loads((self.workdir / RUN_FILE).read_bytes()), self.job)
    except (FileNotFoundError, ValueError, KeyError):
      return 0  # a new run, or a damaged file that `claim_workdir` reports

  @property
  def goes_further(self) -> bool:
    """Whether the run in `workdir` was shorter than this one."""
    return 0 < self.saved_steps() < self.settings.loop.num_steps

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
      UserError: the work directory holds another run or a finished model, or cannot be written to.
    """
    self.check_sizes()
    for name in (DECODER, COPROCESSOR):
      if (self.workdir / f'{name}.json').is_file():
        raise UserError(f'{self.workdir} holds a finished {name} and is no work directory: give '
                        f'the directory of its run, {self.workdir.parent}, or a new one')
    make_writable(self.workdir)
    # Data and decoder may not exist yet. `claim_workdir` compares their fingerprints.
    try:
      saved = json.loads((self.workdir / RUN_FILE).read_bytes())
      identity = self.identity(decoder_fingerprint or saved['decoder'], saved['data'])
    except (FileNotFoundError, ValueError, KeyError):
      return  # a new run, or a damaged file that `claim_workdir` reports
    check_same_run(self.workdir, saved, identity, self.changeable)


def check_no_later_run(pretraining: Run, others: Iterable[Path]) -> None:
  """Refuses to train a decoder further that other runs were trained on.

  Args:
    pretraining: the run of the decoder.
    others: work directories of runs that train on it.

  Raises:
    UserError: the decoder would be trained further, and one of the others has begun.
  """
  begun = [str(workdir) for workdir in others if (workdir / RUN_FILE).exists()]
  if pretraining.goes_further and begun:
    raise UserError(
        f'config.pretraining.loop.num_steps: {pretraining.saved_steps()} saved, '
        f'{pretraining.settings.loop.num_steps} now, but {begun[0]} was trained on the decoder of '
        f'{pretraining.saved_steps()} steps: use another --workdir, or set the saved value again')


def lengthen(run: Run) -> None:
  """Makes the run in the work directory as long as `run`, if it was shorter.

  Its result is kept as NAME_STEPS, so that the result of all steps gets the name. The learning rate
  continues as in a run that was planned with this length: it belongs to the number of steps.

  Raises:
    UserError: the name of the earlier result is taken.
  """
  path, earlier, steps = run.workdir / RUN_FILE, run.saved_steps(), run.settings.loop.num_steps
  if not run.goes_further:
    return
  # First the result, then the note: a launch that is killed in between starts again from here.
  name = _RESULTS.get(run.job, '')
  result, kept = run.workdir / name, run.workdir / f'{name}_{earlier}'
  if name and result.exists():
    if kept.exists():
      raise UserError(f'{kept} exists already, but {result} of {earlier} steps will be kept there: '
                      'move it away')
    result.rename(kept)
    logging.info('%s of %d steps is kept as %s', result, earlier, kept)
  saved = json.loads(path.read_bytes())
  saved['config'][run.section]['loop']['num_steps'] = steps
  write_json(path, saved | {EARLIER_STEPS: [*saved.get(EARLIER_STEPS, []), earlier]})
  before, after = (build_schedule(run.settings.optimizer, length)(earlier)
                   for length in (earlier, steps))
  logging.info('%s: trained further, to %d steps instead of %d. The learning rate is that of a run '
               'of %d steps: %.3g at step %d, where it was %.3g', run.workdir, steps, earlier,
               steps, after, earlier, before)


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
  run_on_process_zero(f'lengthen the run in {run.workdir}', lambda: lengthen(run))
  train_step = run.make_step(loss_fn, frozen)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep)) as saved,
        contextlib.closing(MetricsWriter(run.workdir)) as metrics):
    # Resume the newest checkpoint, or create a state on its shards.
    state = saved.restore(run.abstract, batches)
    if state is None:
      state = run.create_state(load_start() if load_start else frozen)
    log_sizes(run, batches)
    finished = int(state.step) == settings.loop.num_steps
    logging.info('%s: at step %d of %d; %s', run.workdir, state.step, settings.loop.num_steps,
                 f'it is finished, and a larger {run.section}.loop.num_steps trains it further'
                 if finished else 'the first step of a launch compiles')
    return train(
        state, train_step, batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, run.experiment.rules),
        checkpointer=saved, metrics=metrics, evaluators=evaluators).params


def log_sizes(run: Run, batches: Batches) -> None:
  """Logs how many parameters a run trains, and on how much text."""
  trained, frozen = count_parameters(run.boxed), count_parameters(run.frozen_shapes)
  share = (f'{100 * trained / (trained + frozen):.3g}% of {trained + frozen:,}; the others are '
           'frozen' if frozen else 'all there are')
  logging.info('%s: %s parameters train, %s', run.workdir, f'{trained:,}', share)
  steps, batch_size = run.settings.loop.num_steps, run.settings.batch_size
  read, length = steps * batch_size, run.experiment.data.length
  epochs = ('from an endless stream' if batches.num_rows is None else
            f'{read / batches.num_rows:.3g} epochs of {batches.num_rows:,} rows')
  logging.info('%s: %s steps of %s rows of %s tokens: %s tokens in all, %s', run.workdir,
               f'{steps:,}', f'{batch_size:,}', f'{length:,}', f'{read * length:,}', epochs)
