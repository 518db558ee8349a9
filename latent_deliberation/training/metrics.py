"""Metrics of a run: metrics.jsonl and trackers.

docs/evaluation.md explains every logged number.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
from absl import logging

from latent_deliberation.distributed import from_process_zero
from latent_deliberation.files import explain_failed_write
from latent_deliberation.paths import METRICS_FILE, TENSORBOARD

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
    self._directory = directory
    self._file: BinaryIO | None = None
    self._events: Any = None
    if jax.process_index() != 0:
      return
    with explain_failed_write(directory):
      directory.mkdir(parents=True, exist_ok=True)
      # Opened to append and to read, since a crash may have cut off the last line.
      self._file = open(directory / METRICS_FILE, 'a+b')
      _end_torn_line(self._file)
      if SummaryWriter is not None:
        self._events = SummaryWriter(str(directory / TENSORBOARD))

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

  def lines(self) -> list[dict[str, Any]]:
    """Returns the lines of all launches, as they were written; none but on process 0."""
    return [] if self._file is None else list(read_lines(self._directory / METRICS_FILE))

  def has_evaluation(self, step: int, names: Iterable[str]) -> bool:
    """Whether the file has values of all these evaluators at `step`; the same on every process."""
    found = False
    if self._file is not None:
      path = self._directory / METRICS_FILE
      keys = {key.partition('/')[0] for row in read_metrics(path) if row['step'] == step
              for key in row}
      found = keys.issuperset(names)
    return from_process_zero(found)

  def close(self) -> None:
    with explain_failed_write(self._directory):
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
  for row in read_lines(path):
    steps.setdefault(row['step'], {}).update(row)
  return [steps[step] for step in sorted(steps)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of a metrics.jsonl as they were written, without those that are damaged."""
  for number, line in enumerate(path.read_text(errors='replace').splitlines(), start=1):
    try:
      row = json.loads(line)
      row['step'] + row['seconds']
    except (ValueError, TypeError, KeyError):
      logging.warning('%s: skipped line %d, which a crash cut off', path, number)
    else:
      yield row
