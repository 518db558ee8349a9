"""A profile of some steps of a run, for xprof: the key `profile` of a training."""

import contextlib
import re
from pathlib import Path

import jax
from absl import logging

from latent_deliberation.array_types import PyTree
from latent_deliberation.errors import UserError
from latent_deliberation.files import growing_files


def parse_range(text: str, num_steps: int) -> range:
  """Returns the steps of 'START:END', from START up to END - 1; none of ''.

  Raises:
    UserError: it has another form, or names steps that the run does not have.
  """
  if not text:
    return range(0)
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found or not 1 <= int(found[1]) < int(found[2]) <= num_steps + 1:
    raise UserError(
        f'profile = {text!r}: give START:END, such as 100:105 for steps 100 to 104. They must be '
        f'steps of the run, 1 to loop.num_steps = {num_steps}')
  return range(int(found[1]), int(found[2]))


class StepProfile:
  """Traces the steps of a range on process 0, and writes them where xprof finds them.

  A trace that cannot be written is a warning: no profile may end a training.

  Args:
    directory: directory for the profile; each trace gets a folder of its own there.
    steps: steps to trace. Those before the first step of this launch are left out.
  """

  def __init__(self, directory: Path, steps: range):
    self._directory, self._steps = directory, steps if jax.process_index() == 0 else range(0)
    self._is_tracing, self._place = False, contextlib.ExitStack()
    self._last = 0  # the last step that has ended

  def begin(self, step: int, state: PyTree) -> None:
    """Starts the trace if `step`, which comes next, belongs to it.

    Args:
      step: number of the step.
      state: results of the steps before it, which the trace must not show.
    """
    if step not in self._steps or self._is_tracing:
      return
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would hide our own scopes
    try:
      here = self._place.enter_context(growing_files(self._directory))
      jax.profiler.start_trace(str(here), profiler_options=options)
    except Exception as error:  # of whatever kind the profiler has
      self._give_up(error)
    else:
      self._is_tracing = True

  def end(self, step: int, state: PyTree) -> None:
    """Writes the trace after its last step, which has made `state`."""
    self._last = step
    if self._is_tracing and step == self._steps[-1]:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes a trace that has begun, also where the run ends in the midst of it."""
    if not self._is_tracing:
      return
    self._is_tracing = False
    try:
      with self._place:
        jax.profiler.stop_trace()
    except Exception as error:  # of whatever kind the profiler has
      self._give_up(error)
    else:
      logging.info('a profile of steps up to %d is in %s: open it with xprof --logdir=%s',
                   self._last, self._directory, self._directory)

  def _give_up(self, error: Exception) -> None:
    self._steps = range(0)
    logging.warning('no profile in %s: %s', self._directory, error)
    with contextlib.suppress(Exception):  # the profile is lost already
      self._place.close()
