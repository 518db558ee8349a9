"""Metrics of a run: metrics.jsonl, TensorBoard events, and a progress line with an ETA.

docs/evaluation.md explains every logged number.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
from absl import logging

from latent_deliberation.distributed import from_process_zero
from latent_deliberation.files import explain_failed_write, growing_files
from latent_deliberation.paths import METRICS_FILE, TENSORBOARD
from latent_deliberation.progress import format_duration

# Not clu.metric_writers: it imports TensorFlow, which training machines need not have.
try:
  from tensorboardX import SummaryWriter
except ImportError:
  SummaryWriter = None


# Units of logged numbers, by the last part of their names. A number that is not here has none.
UNITS = {'loss': 'nats/token', 'gain': 'nats/token', 'content': 'nats/token',
         'norm': 'x embeddings', 'moved': 'x embeddings', 'effective_rank': 'directions'}
_SIGNED = ('gain', 'content')  # above zero is good


def format_metric(name: str, value: float) -> str:
  """Returns a number with its name, sign and unit: 'validation/gain +0.0123 nats/token'."""
  kind = name.rpartition('/')[2]
  return f'{name} {value:{"+" if kind in _SIGNED else ""}.4f} {UNITS.get(kind, "")}'.rstrip()


class MetricsWriter:
  """Appends to <directory>/metrics.jsonl, and to <directory>/tensorboard with tensorboardX.

  Only process 0 writes. Every line is flushed, so a crash can cut off no more than the last one.
  Raises UserError where a file cannot be written.
  """

  def __init__(self, directory: Path):
    self._directory, self._place = directory, contextlib.ExitStack()
    self._file: BinaryIO | None = None
    self._events: Any = None
    if jax.process_index() != 0:
      return
    with explain_failed_write(directory):
      directory.mkdir(parents=True, exist_ok=True)
      # Opened to append and to read, since a crash may have cut off the last line.
      here = self._place.enter_context(growing_files(directory, METRICS_FILE))
      self._path = here / METRICS_FILE
      self._file = self._path.open('a+b')
      _end_torn_line(self._file)
      if SummaryWriter is not None:
        self._events = SummaryWriter(str(here / TENSORBOARD))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds one line: the step, the wall-clock time in seconds since 1970, and the metrics."""
    line = json.dumps({'step': step, 'seconds': round(time.time(), 3), **metrics})
    with explain_failed_write(self._directory):
      if self._file is not None:
        self._file.write(line.encode() + b'\n')
        self._file.flush()
      if self._events is not None:
        for name, value in metrics.items():
          self._events.add_scalar(name, value, step)
        self._events.flush()

  def has_evaluation(self, step: int, names: Iterable[str]) -> bool:
    """Whether the file has values of all these evaluators at `step`; the same on every process."""
    found = False
    if self._file is not None:
      keys = {key.partition('/')[0] for row in read_metrics(self._path) if row['step'] == step
              for key in row}
      found = keys.issuperset(names)
    return from_process_zero(found)

  def close(self) -> None:
    with explain_failed_write(self._directory), self._place:
      for output in (self._file, self._events):
        if output is not None:
          output.close()


def _end_torn_line(file: BinaryIO) -> None:
  # The next line must not continue one that a crash cut off.
  if file.seek(0, os.SEEK_END) > 0:
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b'\n':
      file.write(b'\n')


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Returns one dict for each step of a metrics.jsonl, in the order of steps.

  Lines of the same step are joined. Where a resumed run wrote a step again, the later values win.
  A line that a crash cut off is skipped with a warning.
  """
  steps: dict[int, dict[str, Any]] = {}
  for number, line in enumerate(path.read_text().splitlines(), start=1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      logging.warning('%s: skipped line %d, which a crash cut off', path, number)
      continue
    steps.setdefault(row['step'], {}).update(row)
  return [steps[step] for step in sorted(steps)]


class Pace:
  """Measures speed and predicts the end of a run.

  Tokens per second cover the current window, which begins at the last `start`. The ETA uses the
  mean time of a step since the first `start`, including pauses. Call `start` after the first step,
  to leave out compilation, and after every pause.
  """

  def __init__(self, num_steps: int, tokens_per_step: int,
               clock: Callable[[], float] = time.perf_counter):
    self._num_steps, self._tokens_per_step, self._clock = num_steps, tokens_per_step, clock
    self._first: tuple[int, float] | None = None
    self._window: tuple[int, float] | None = None

  def start(self, step: int) -> None:
    """Begins a window at `step`, the number of finished steps."""
    self._window = (step, self._clock())
    self._first = self._first or self._window

  def tokens_per_second(self, step: int) -> float | None:
    """Returns the speed since the window began; None before anything was measured."""
    return self._tokens_per_step / mean if (mean := self._mean(self._window, step)) else None

  def line(self, step: int, metrics: Mapping[str, float]) -> str:
    """Returns 'step 120/1000  loss 3.2101 nats/token  5,210 tokens/s  ETA 3m12s'."""
    speed, mean = self.tokens_per_second(step), self._mean(self._first, step)
    tokens = '-' if speed is None else f'{speed:,.0f}'
    eta = '-' if mean is None else format_duration(mean * (self._num_steps - step))
    loss = format_metric('loss', metrics['loss'])
    return f'step {step}/{self._num_steps}  {loss}  {tokens} tokens/s  ETA {eta}'

  def _mean(self, since: tuple[int, float] | None, step: int) -> float | None:
    """Seconds per step since `since`; None when no step was measured."""
    if since is None or step == since[0]:
      return None
    return (self._clock() - since[1]) / (step - since[0])
