"""The training loop: it steps, logs, saves and evaluates, and stops on a signal or on NaN.

SIGTERM and SIGINT are requests that the loop reads between steps: it saves the finished step and
raises `Preempted`, which ends the process with code 143 or 130. So a scheduler can tell a run that
was stopped from one that is done.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import utils as orbax_utils

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.data.rows import Batches
from latent_deliberation.distributed import from_process_zero
from latent_deliberation.errors import (
  UserError,
  check_integer,
  check_number,
  check_types,
  problems_of,
  raise_problems,
)
from latent_deliberation.host_memory import return_memory
from latent_deliberation.progress import announced
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.metrics import MetricsWriter, format_metric
from latent_deliberation.training.profiling import StepProfile
from latent_deliberation.training.step import TrainState
from latent_deliberation.training.utilisation import (
  COMPILE,
  DATA,
  EVALUATION,
  SAVE,
  STEP,
  Pace,
  TimeLedger,
  measure_goodput,
  memory_gib,
  peak_flops,
)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Length and cadences of a run. The last step is always logged, saved and evaluated.

  Attributes:
    num_steps: number of updates of the run.
    log_every: number of steps from one logged step to the next.
    eval_every: number of steps from one evaluation to the next.
    save_every: number of steps from one checkpoint to the next.
    keep: number of newest checkpoints that are kept, besides those of keep_every.
    log_seconds: longest time without a line of the log, while steps are shorter than that.
    save_minutes: longest time without a checkpoint, whatever save_every says; 0 for no limit.
      All processes agree on it in advance, so a save may come late where steps become slower.
    keep_every: number of steps between checkpoints that are kept for good; 0 keeps none.
      Such a step is saved in any case.
  """
  num_steps: int
  log_every: int
  eval_every: int
  save_every: int
  keep: int
  log_seconds: int = 30
  save_minutes: float = 0.0
  keep_every: int = 0

  def __post_init__(self):
    check_types(self)
    counts = ('num_steps', 'log_every', 'eval_every', 'save_every', 'keep', 'log_seconds')
    raise_problems([
        *problems_of(check_number, 'save_minutes', self.save_minutes, 0),
        *problems_of(check_integer, 'keep_every', self.keep_every, 0),
        *(problem for name in counts
          for problem in problems_of(check_integer, name, getattr(self, name), 1))])


MOST_SKIPPED = 20  # updates in a row that were skipped as spikes; so many are no spike


class Preempted(SystemExit):
  """A signal stopped the run, which is saved. Uncaught, it ends the process with 128 + `number`."""

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.code = 128 + number


def train(state: TrainState,
          train_step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Array]]],
          batches: Batches,
          *,
          config: LoopConfig,
          place: Callable[[Batch], Any],
          checkpointer: Checkpointer | None,
          metrics: MetricsWriter,
          evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]],
          profile: StepProfile | None = None,
          step_flops: float = 0.0,
          begun: float | None = None) -> TrainState:
  """Trains from `state.step` to `config.num_steps`.

  Args:
    state: the state to start from; donated.
    train_step: one update; its scalars hold 'loss' and 'grad_norm', replicated on every process.
    batches: the stream, already at the batch of `state.step`.
    config: length and cadences.
    place: puts the global batch on the devices, given this process's rows.
    checkpointer: writer of checkpoints; None saves nothing.
    metrics: writer of the scalars at `log_every`, and of the evaluators' values as 'name/key'.
    evaluators: functions of the parameters, by name.
    profile: writer of a profile of some steps.
    step_flops: operations of a step on each device; 0 where they are not counted.
    begun: time.monotonic() when the launch began to work on the run; default is now.

  Returns: the state after the last step.

  Raises:
    Preempted: after SIGTERM or SIGINT, with the finished step saved.
    UserError: the loss or the gradient norm is not finite; such a state is never saved.
    UserError: the state is past the end of the run.
    UserError: a checkpoint or the metrics cannot be written.
  """
  start = int(state.step)
  if start > config.num_steps:
    raise UserError(f'the state is at step {start}, past num_steps = {config.num_steps}: '
                    'raise num_steps, or use another --workdir')
  ledger = TimeLedger(begun)
  logbook = _Logbook(config, metrics, checkpointer, ledger, step_flops)
  timed_saves = TimedSaves(60 * config.save_minutes, start)
  # Each step is saved before it is evaluated, so a stop in between may have lost an evaluation.
  evaluating = (start > 0 and _is_due(start, config.eval_every, config)
                and not metrics.has_evaluation(start, evaluators))
  ledger.begin(start)
  unseen = None  # scalars of the last step: read while the next one runs, so devices never wait

  with _StopRequests() as stop:
    if evaluating:
      logbook.evaluate(start, evaluators, state.params)
    for step in range(start, config.num_steps):
      # Dispatch the step, then read the scalars of the step before it.
      batch = place(batches(step))
      # Nobody waited for a batch that came while the devices were at work.
      ledger.book(DATA if unseen is None or _is_finished(unseen[1]) else STEP)
      if step == start:
        logbook.begin(step, batch)
      if profile is not None:
        profile.begin(step + 1, state)
      compiling = announced('compiling the first step') if step == start else None
      with (compiling or contextlib.nullcontext(),
            jax.profiler.StepTraceAnnotation('step', step_num=step + 1)):
        state, scalars = train_step(state, batch)
      if step == start:
        return_memory()  # what compiling has freed, before the step takes its own
      ledger.book(COMPILE if step == start else STEP)
      if unseen is not None:
        logbook.record(*unseen)
      done, unseen = step + 1, (step + 1, scalars)
      if profile is not None:
        profile.end(done, state)

      # Save and evaluate. Both need the scalars of this step first, since they may be NaN.
      stopping = stop.requested()
      saving = (timed_saves.is_due(done) or stopping or _is_due(done, config.save_every, config)
                or config.keep_every and done % config.keep_every == 0)
      evaluating = _is_due(done, config.eval_every, config)
      if saving or evaluating:
        logbook.record(*unseen)
        unseen = None
      if saving and checkpointer is not None:
        checkpointer.save(done, state, batches)
        timed_saves.note_save(done)
        logbook.note_save(done)
      if stopping:
        logbook.close(done)
        raise _preempted(stop, done, config, checkpointer)
      if evaluating:
        logbook.evaluate(done, evaluators, state.params)
    with announced('writing the last checkpoint'):
      logbook.close(config.num_steps)
    # A signal during the last evaluation must not be lost.
    if stop.requested():
      raise _preempted(stop, config.num_steps, config, checkpointer)
  return state


def _is_finished(scalars: Mapping[str, Array]) -> bool:
  """Whether the devices have computed the scalars of a step, and so the step."""
  return all(value.is_ready() for value in scalars.values() if isinstance(value, jax.Array))


def _is_due(step: int, every: int, config: LoopConfig) -> bool:
  return step % every == 0 or step == config.num_steps


def _preempted(stop: '_StopRequests', step: int, config: LoopConfig,
               checkpointer: Checkpointer | None) -> Preempted:
  saved = 'Nothing was saved.' if checkpointer is None else (
      f'Saved in {checkpointer.directory}: the same command resumes from there.')
  message = f'stopped by {stop.reason} at step {step}/{config.num_steps}. {saved}'
  logging.warning('%s', message)
  return Preempted(message, stop.number)


class _Logbook:
  """Reads the scalars of finished steps, logs them, measures speed, and stops the run on NaN."""

  def __init__(self, config: LoopConfig, metrics: MetricsWriter, checkpointer: Checkpointer | None,
               ledger: TimeLedger, step_flops: float):
    self._config, self._metrics, self._checkpointer = config, metrics, checkpointer
    self._ledger, self._step_flops = ledger, step_flops
    self._first: int | None = None
    self._pace: Pace | None = None
    self._last_line = time.monotonic()

  def begin(self, start: int, batch: Batch) -> None:
    """Takes the number of tokens of a step from the first global batch."""
    self._first = start + 1
    self._pace = Pace(self._config.num_steps, batch.tokens.size, self._step_flops,
                      peak_flops(jax.devices()[0].device_kind))
    self._last_line = time.monotonic()

  def record(self, step: int, scalars: Mapping[str, Array]) -> None:
    """Waits for the step, and logs it when due. Raises UserError where it is not finite.

    A step is due at `log_every`, and then its metrics are written, too. Slow steps also get a line
    of the log every `log_seconds`.
    """
    values = {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
    self._ledger.book(STEP)
    self._check(step, values)
    is_due = _is_due(step, self._config.log_every, self._config)
    if is_due or time.monotonic() - self._last_line >= self._config.log_seconds:
      memory = memory_gib()
      parts = (f'step {step}/{self._config.num_steps}', format_metric('loss', values['loss']),
               self._pace.describe(step), f'{memory:.3g} GiB', self._ledger.describe(),
               f'ETA {self._pace.eta(step)}')
      logging.info('%s', '  '.join(filter(None, parts)))
      self._last_line = time.monotonic()
      if is_due:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._metrics.write(step, {**finite, **self._pace.measure(step), 'memory_gib': memory,
                                   **self._ledger.take(step)})
        self._pace.start(step)
    # Measure from the end of the first step, which compiles.
    if step == self._first:
      self._pace.start(step)

  def _check(self, step: int, values: Mapping[str, float]) -> None:
    """Raises UserError where a step went wrong. Every process sees the same, and stops with it."""
    in_a_row = values.get('skipped_in_a_row', 0)
    if in_a_row:
      logging.warning('step %d: its update is skipped, since its loss or its gradient is far above '
                      'the average: loss %.4f, grad_norm %.4g; %d skipped so far', step,
                      values['loss'], values['grad_norm'], values['skipped_updates'])
    if in_a_row >= MOST_SKIPPED:
      raise UserError(
          f'{MOST_SKIPPED} updates in a row were skipped up to step {step}: this is no spike. '
          f'{self._describe_last_good()} Lower learning_rate or raise optimizer.skip_spikes, in '
          'another --workdir')
    for name in ('loss', 'grad_norm'):
      if not in_a_row and not math.isfinite(values[name]):
        raise UserError(
            f'{name} = {values[name]} at step {step}. {self._describe_last_good()} The same '
            'command would fail again: lower learning_rate or clip_norm, in another --workdir')

  def evaluate(self, step: int, evaluators: Mapping[str, Callable[[Params], Mapping[str, float]]],
               params: Params) -> None:
    """Runs the evaluators, and writes and logs their values."""
    with announced(f'evaluating at step {step}'):
      values = {f'{name}/{key}': float(value) for name, evaluator in evaluators.items()
                for key, value in evaluator(params).items()}
    self._ledger.book(EVALUATION)
    if values:
      return_memory()  # what compiling and scoring have freed
      self._metrics.write(step, values)
      logging.info('step %d/%d  %s', step, self._config.num_steps,
                   '  '.join(format_metric(name, value) for name, value in values.items()))
    self._last_line = time.monotonic()
    # An evaluation must not count as time of training.
    if self._pace is not None:
      self._pace.start(step)

  def note_save(self, step: int) -> None:
    """Books the time of a save, which must not count as time of training."""
    self._ledger.book(SAVE)
    if self._pace is not None:
      self._pace.start(step)

  def close(self, step: int) -> None:
    """Waits for the last checkpoint, and logs what the time of all launches went into.

    Raises:
      UserError: the checkpoint cannot be written.
    """
    if self._checkpointer is not None:
      self._checkpointer.wait()
      self._ledger.book(SAVE)
    # A launch without a step has nothing to tell.
    if self._first is None:
      return
    self._metrics.write(step, self._ledger.take(step))
    goodput = measure_goodput(self._metrics.lines())
    if goodput is not None:  # on process 0
      logging.info('%s', goodput.describe())

  def _describe_last_good(self) -> str:
    if self._checkpointer is None:
      return 'No checkpoints are kept.'
    self._checkpointer.wait()
    step = self._checkpointer.latest_step()
    if step is None:
      return f'There is no checkpoint in {self._checkpointer.directory} yet.'
    return f'The last good checkpoint is {self._checkpointer.directory / str(step)}.'


class TimedSaves:
  """Says when it is time to save, at the same step on every process.

  Processes that agree wait for their devices. So process 0 looks at its clock and says at which
  step to ask again: after half of the time that is left, or less. It waits for no more steps than
  came since the save, because the first of these are only dispatched when the clock is read.

  Args:
    seconds: longest time without a save; 0 for no limit.
    step: step at which the launch begins, which is saved already.
    clock: a clock in seconds that never jumps.
  """

  def __init__(self, seconds: float, step: int, clock: Callable[[], float] = time.monotonic):
    self._seconds, self._clock = seconds, clock
    self.note_save(step)

  def note_save(self, step: int) -> None:
    """Begins to wait anew after a save."""
    self._saved, self._saved_at = step, self._clock()
    self._ask_at = step + 1

  def is_due(self, step: int) -> bool:
    """Whether `step`, which every process has finished, should be saved."""
    if not self._seconds or step < self._ask_at:
      return False
    spent = self._clock() - self._saved_at
    steps_left = (self._seconds - spent) / max(spent, 1e-9) * (step - self._saved)
    most = step - self._saved
    # Process 0's number counts; 0 is to save now.
    wait = from_process_zero(0 if steps_left <= 0 else max(1, int(min(steps_left / 2, most))))
    self._ask_at = step + wait
    return wait == 0


# The runtime chooses the number after the highest that it was asked so far. Steps would not do: a
# signal before the first step of a resumed run would choose step 1, which never comes again.
_questions = itertools.count(1)  # over the life of the process


class _StopRequests:
  """Turns SIGTERM and SIGINT into a request that the loop reads between steps.

  A second SIGINT acts at once. With several processes, the runtime of jax.distributed catches
  SIGTERM and chooses one step at which all processes stop; SIGINT is passed on as SIGTERM. Python
  allows no handlers outside the main thread; signals then act as usual.
  """

  def __init__(self):
    self.number: int = signal.SIGTERM
    self._received = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> '_StopRequests':
    if threading.current_thread() is threading.main_thread():
      # With several processes the runtime handles SIGTERM, and `requested` asks it.
      alone = jax.process_count() == 1
      for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number in list(self._previous):
      self._restore(number)

  @property
  def reason(self) -> str:
    """The signal that this process received; 'preemption' if only another one did."""
    return signal.Signals(self.number).name if self._received else 'preemption'

  def requested(self) -> bool:
    """Whether the run should stop now. All processes ask equally often."""
    if jax.process_count() > 1:
      return orbax_utils.reached_preemption(next(_questions))
    return self._received

  def _receive(self, number: int, frame: FrameType | None) -> None:
    self._received, self.number = True, number
    again = '; a second Ctrl-C ends at once' if number == signal.SIGINT else ''
    # Written past the log, whose line this handler may interrupt.
    with contextlib.suppress(OSError):
      os.write(2, f'{self.reason}: stopping as soon as a step is saved{again}\n'.encode())
    # The next Ctrl-C then interrupts at once.
    if number == signal.SIGINT:
      self._restore(number)
      if jax.process_count() > 1:
        signal.raise_signal(signal.SIGTERM)

  def _restore(self, number: int) -> None:
    # None means that the handler was not set from Python.
    signal.signal(number, self._previous.pop(number) or signal.SIG_DFL)
