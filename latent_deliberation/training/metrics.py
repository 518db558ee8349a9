"""Metrics of a run: metrics.jsonl and trackers.

docs/evaluation.md explains every logged number.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import jax
from absl import logging

from latent_deliberation.distributed import from_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.files import explain_failed_write, growing_files
from latent_deliberation.paths import METRICS_FILE, WANDB_ID

TRACKERS = ('tensorboard', 'wandb')
AUTO = 'auto'  # TensorBoard where tensorboardX is installed

# Units of logged numbers, by the last part of their names. A number that is not here has none.
UNITS = {'loss': 'nats/token', 'gain': 'nats/token', 'content': 'nats/token',
         'norm': 'x embeddings', 'moved': 'x embeddings', 'effective_rank': 'directions'}
_SIGNED = ('gain', 'content')  # above zero is good


def format_metric(name: str, value: float) -> str:
  """Returns a number with its name, sign and unit: 'validation/gain +0.0123 nats/token'."""
  kind = name.rpartition('/')[2]
  return f'{name} {value:{"+" if kind in _SIGNED else ""}.4f} {UNITS.get(kind, "")}'.rstrip()


def parse_trackers(text: str) -> tuple[str, ...]:
  """Returns the names of trackers in 'tensorboard,wandb'; '' and 'auto' name some, too.

  Raises:
    UserError: one of them is unknown.
  """
  if text == AUTO:
    return ('tensorboard',) if importlib.util.find_spec('tensorboardX') else ()
  names = tuple(filter(None, map(str.strip, text.split(','))))
  if not set(names) <= set(TRACKERS):
    raise UserError(f"trackers = {text!r}: give 'auto', or names of {TRACKERS} with commas between "
                    "them, or '' for none")
  return names


def check_trackers(text: str) -> None:
  """Checks trackers before long work; see `trackers.check_trackers`."""
  if names := parse_trackers(text):
    _trackers_module().check_trackers(names)


def _trackers_module() -> ModuleType:
  return importlib.import_module('latent_deliberation.training.trackers')  # only where one is used


class MetricsWriter:
  """Appends to <directory>/metrics.jsonl, and sends the same numbers to trackers.

  Only process 0 writes. Every line is flushed, so a crash can cut off no more than the last one.

  Args:
    directory: work directory of the run.
    trackers: names of trackers, as `parse_trackers` takes them.
    config: configuration of the run for the trackers, as nested dicts.

  Raises:
    UserError: a file cannot be written, or a tracker cannot begin.
  """

  def __init__(self, directory: Path, trackers: str = '',
               config: Mapping[str, Any] | None = None):
    self._directory, self._place = directory, contextlib.ExitStack()
    self._file: BinaryIO | None = None
    self._trackers: dict[str, Any] = {}
    if jax.process_index() != 0:
      return
    with explain_failed_write(directory):
      directory.mkdir(parents=True, exist_ok=True)
      # Opened to append and to read, since a crash may have cut off the last line.
      here = self._place.enter_context(growing_files(directory, METRICS_FILE, WANDB_ID))
      self._path = here / METRICS_FILE
      self._file = self._path.open('a+b')
      _end_torn_line(self._file)
    if names := parse_trackers(trackers):
      # The name of the run, where a tracker shows it among others.
      name = '/'.join(directory.absolute().parts[-2:])
      self._trackers = _trackers_module().open_trackers(names, here, name, config or {})

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds one line: the step, the wall-clock time in seconds since 1970, and the metrics."""
    line = json.dumps({'step': step, 'seconds': round(time.time(), 3), **metrics})
    if self._file is not None:
      with explain_failed_write(self._directory):
        self._file.write(line.encode() + b'\n')
        self._file.flush()
    self._tell_trackers(lambda tracker: tracker.write(step, metrics))

  def lines(self) -> list[dict[str, Any]]:
    """Returns the lines of all launches, as they were written; none but on process 0."""
    return [] if self._file is None else list(read_lines(self._path))

  def has_evaluation(self, step: int, names: Iterable[str]) -> bool:
    """Whether the file has values of all these evaluators at `step`; the same on every process."""
    found = False
    if self._file is not None:
      keys = {key.partition('/')[0] for row in read_metrics(self._path) if row['step'] == step
              for key in row}
      found = keys.issuperset(names)
    return from_process_zero(found)

  def close(self) -> None:
    """Ends the file and the trackers."""
    self._tell_trackers(lambda tracker: tracker.close())
    with explain_failed_write(self._directory), self._place:
      if self._file is not None:
        self._file.close()

  def _tell_trackers(self, tell: Callable[[Any], None]) -> None:
    for name, tracker in list(self._trackers.items()):
      try:
        tell(tracker)
      except Exception as error:  # a tracker may fail in any way, and must not end a training
        del self._trackers[name]
        logging.warning('the tracker %s failed and gets no more metrics (%s: %s); %s has all',
                        name, type(error).__name__, error, self._directory / METRICS_FILE)


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
  for number, line in enumerate(path.read_bytes().decode(errors='replace').splitlines(), start=1):
    try:
      row = json.loads(line)
      row['step'] + row['seconds']
    except (ValueError, TypeError, KeyError):
      logging.warning('%s: skipped line %d, which a crash cut off', path, number)
    else:
      yield row
