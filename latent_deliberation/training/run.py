"""A training run, and `fit`, which trains it from the newest checkpoint of its directory.

`Run` holds a run's shapes, optimizer and step. A finished run can be trained further, with a larger
num_steps. run_identity.py says what must stay the same.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import optax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.build import count_parameters
from latent_deliberation.data.rows import Batches
from latent_deliberation.deliberation.flops import training_flops
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError, problems_of, raise_problems
from latent_deliberation.experiment import Experiment, TrainingConfig, defaults_of
from latent_deliberation.files import make_writable, remove_tree, seal, write_json
from latent_deliberation.paths import (
  CHECKPOINTS,
  COPROCESSOR,
  DECODER,
  PROFILE,
  RUN_FILE,
)
from latent_deliberation.sharding import check_batch, check_own_rows, place_batch
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.loop import train
from latent_deliberation.training.metrics import MetricsWriter, check_trackers
from latent_deliberation.training.optimizer import build_optimizer, build_schedule
from latent_deliberation.training.profiling import StepProfile, parse_range
from latent_deliberation.training.run_identity import (
  CHANGEABLE,
  EARLIER_STEPS,
  RunIdentity,
  check_same_run,
  check_unclaimed,
  claim_workdir,
  read_record,
  section_of,
  steps_of,
)
from latent_deliberation.training.step import (
  LossFn,
  TrainState,
  TrainStep,
  abstract_state,
  make_train_step,
)

# Jobs that write a result into their work directory, with its name.
_RESULTS = {'pretrain': DECODER, 'train': COPROCESSOR}
# Jobs that train all weights of a decoder, as a copy; see studies/tune.py.
_ALL_WEIGHTS = ('joint', 'finetuned')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, as its configuration describes it. It holds shapes and no weights.

  Attributes:
    job: 'pretrain', 'train', or a way to tune a decoder (see studies/tune.py).
    experiment: the whole configuration.
    workdir: work directory of the run, with run.json, checkpoints/ and metrics.jsonl.
    mesh: devices that the run is sharded over.
    init: (key, frozen parameters) -> trainable parameters, boxed with logical axes.
    frozen_shapes: shapes of the parameters that `init` gets and no step changes; {} for none. The
      loss reads them, except in the jobs of `_ALL_WEIGHTS`, which train a copy.
    start_fingerprint: fingerprint of the coprocessor that a new run starts from; '' for none.
    begun: time.monotonic() at which this launch began to work on the run.
  """
  job: str
  experiment: Experiment
  workdir: Path
  mesh: Mesh
  init: Callable[[Array, Params], PyTree]
  frozen_shapes: Params
  start_fingerprint: str = ''
  begun: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def section(self) -> str:
    """Name of the experiment's section that this run follows."""
    return section_of(self.job)

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
                       defaults=defaults_of(Experiment), start_fingerprint=self.start_fingerprint)

  @property
  def changeable(self) -> tuple[str, ...]:
    """Keys or whole sections of the config that a resumed run may change."""
    return CHANGEABLE + tuple(
        f'deliberation.{key}' for key in self.experiment.deliberation.without_effect)

  def saved_steps(self) -> int:
    """Returns the num_steps of the run in `workdir`; 0 where there is none yet."""
    try:
      return steps_of(read_record(self.workdir), self.job)
    except FileNotFoundError:
      return 0

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
    return jax.jit(create, out_shardings=self._shardings)(
        jax.random.key(self.experiment.seed), start)

  def start_from(self, params: Params) -> TrainState:
    """Returns a new train state at step 0, on its shards, with these parameters."""
    create = functools.partial(TrainState.create, optimizer=self.optimizer)
    return jax.jit(create, out_shardings=self._shardings)(params)

  @property
  def _shardings(self) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

  @property
  def step_flops(self) -> float:
    """Operations of a step on each device, by the architecture."""
    experiment = self.experiment
    return self.settings.batch_size / self.mesh.size * training_flops(
        self.job, experiment.decoder, experiment.deliberation, experiment.data.length)

  def make_step(self, loss_fn: LossFn, frozen: Params) -> TrainStep:
    """Returns the train step of this run.

    Args:
      loss_fn: the loss; see training/step.py.
      frozen: frozen parameters, or their shapes with shardings for a step that is only compiled.
    """
    settings = self.settings
    return make_train_step(
        loss_fn, self.optimizer, build_schedule(settings.optimizer, settings.loop.num_steps),
        state_shardings=self._shardings, frozen=frozen, mesh=self.mesh,
        rules=self.experiment.rules, seed=self.experiment.seed, accumulation=settings.accumulation)

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
      UserError: the work directory holds another run, a finished model or a result of an unknown
        run, or cannot be written to.
      UserError: see `check_trackers`.
    """
    self.check_sizes()
    for name in (DECODER, COPROCESSOR):
      if (self.workdir / f'{name}.json').is_file():
        raise UserError(f'{self.workdir} holds a finished {name} and is no work directory: give '
                        f'the directory of its run, {self.workdir.parent}, or a new one')
    make_writable(self.workdir)
    run_on_process_zero('begin its trackers', lambda: check_trackers(self.settings.trackers))
    # Data and decoder may not exist yet. `claim_workdir` compares their fingerprints.
    name = _RESULTS.get(self.job, '')
    try:
      saved = read_record(self.workdir)
    except FileNotFoundError:
      check_unclaimed(self.workdir, name)
      return
    identity = self.identity(decoder_fingerprint or saved['decoder'], saved['data'])
    check_same_run(self.workdir, saved, identity, self.changeable)
    # A result that is there is not written again, so it must be one.
    result = self.workdir / name
    if name and result.exists() and not (result / f'{name}.json').exists():
      raise UserError(f'{result} holds something else, but the trained {name} will be written '
                      'there: use another --workdir, or move it away')


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
    if kept.exists() and _is_copy(result, kept, f'{name}.json'):
      remove_tree(result)  # a store copies, and this process was killed before it removed the rest
    elif kept.exists():
      raise UserError(f'{kept} exists already, but {result} of {earlier} steps will be kept there: '
                      'move it away')
    else:
      result.rename(kept)
    logging.info('%s of %d steps is kept as %s', result, earlier, kept)
  saved = read_record(run.workdir)
  saved['config'][run.section]['loop']['num_steps'] = steps
  write_json(path, seal(saved | {EARLIER_STEPS: [*saved.get(EARLIER_STEPS, []), earlier]}))
  before, after = (build_schedule(run.settings.optimizer, length)(earlier)
                   for length in (earlier, steps))
  logging.info('%s: trained further, to %d steps instead of %d. The learning rate is that of a run '
               'of %d steps: %.3g at step %d, where it was %.3g', run.workdir, steps, earlier,
               steps, after, earlier, before)


def _is_copy(one: Path, other: Path, name: str) -> bool:
  """Whether two directories have the same description, which holds a fingerprint of weights."""
  return (one / name).read_bytes() == (other / name).read_bytes()


def fit(run: Run, batches: Batches, loss_fn: LossFn,
        evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]], *,
        frozen: Params, decoder_fingerprint: str = '',
        create_state: Callable[[], TrainState] | None = None,
        prepared_dir: Path | None = None) -> Params:
  """Trains a run to its end, starting at the newest checkpoint of its directory if there is one.

  Args:
    run: the run.
    batches: the training stream.
    loss_fn: the loss; see training/step.py.
    evaluators: functions of the trainable parameters by name, called every `eval_every` steps.
    frozen: parameters that the loss reads.
    decoder_fingerprint: fingerprint of the frozen decoder; '' where there is none.
    create_state: creates the train state of a new run; default is `run.create_state(frozen)`.
    prepared_dir: directory of prepared data, to note in run.json; None notes nothing.

  Returns: the trained parameters, float32.

  Raises:
    UserError: the directory holds another run; or see training/loop.train.
  """
  settings = run.settings
  # The directory must be this run's before its checkpoints are read.
  claim_workdir(run.workdir, run.identity(decoder_fingerprint, batches.fingerprint),
                run.changeable, prepared_dir)
  run_on_process_zero(f'lengthen the run in {run.workdir}', lambda: lengthen(run))
  train_step = run.make_step(loss_fn, frozen)
  profiled = parse_range(settings.profile, settings.loop.num_steps)
  with (contextlib.closing(Checkpointer(run.workdir / CHECKPOINTS, settings.loop.keep,
                                        settings.loop.keep_every)) as saved,
        contextlib.closing(MetricsWriter(run.workdir, settings.trackers,
                                         dataclasses.asdict(run.experiment))) as metrics,
        contextlib.closing(StepProfile(run.workdir / PROFILE, profiled)) as profile):
    # Resume the newest checkpoint, or create a state on its shards.
    state = saved.restore(run.abstract, batches)
    if state is None:
      state = create_state() if create_state else run.create_state(frozen)
    log_sizes(run, batches)
    finished = int(state.step) == settings.loop.num_steps
    if profiled and profiled[-1] <= int(state.step):
      logging.warning('%s.profile = %r is before step %d, at which this launch resumes: nothing is '
                      'profiled', run.section, settings.profile, state.step)
    logging.info('%s: at step %d of %d; %s', run.workdir, state.step, settings.loop.num_steps,
                 f'it is finished, and a larger {run.section}.loop.num_steps trains it further'
                 if finished else 'the first step of a launch compiles')
    return train(
        state, train_step, batches, config=settings.loop,
        place=lambda batch: place_batch(batch, run.mesh, run.experiment.rules),
        checkpointer=saved, metrics=metrics, evaluators=evaluators, profile=profile,
        step_flops=run.step_flops, begun=run.begun).params


def log_sizes(run: Run, batches: Batches) -> None:
  """Logs how many parameters a run trains, and on how much text."""
  trained = count_parameters(run.boxed)
  frozen = 0 if run.job in _ALL_WEIGHTS else count_parameters(run.frozen_shapes)
  share = (f'{100 * trained / (trained + frozen):.3g}% of {trained + frozen:,}; the others are '
           'frozen' if frozen else 'all there are')
  logging.info('%s: %s parameters train, %s', run.workdir, f'{trained:,}', share)
  steps, batch_size = run.settings.loop.num_steps, run.settings.batch_size
  read, length = steps * batch_size, run.experiment.data.length
  epochs = ('from an endless stream' if batches.num_rows is None else
            f'{read / batches.num_rows:.3g} epochs of {batches.num_rows:,} rows')
  logging.info('%s: %s steps of %s rows of %s tokens: %s tokens in all, %s', run.workdir,
               f'{steps:,}', f'{batch_size:,}', f'{length:,}', f'{read * length:,}', epochs)
