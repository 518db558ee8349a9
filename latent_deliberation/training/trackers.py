"""Trackers that show a run's metrics while it trains: TensorBoard, and Weights & Biases.

metrics.jsonl has every number in any case. So a tracker that fails is dropped with a warning.
"""

import importlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from latent_deliberation.errors import UserError
from latent_deliberation.files import write_whole
from latent_deliberation.paths import TENSORBOARD, WANDB_ID

_PROJECT = 'latent_deliberation'  # where WANDB_PROJECT names no other one
_START_SECONDS = 30  # to reach the server of wandb
# To send what is left, before a run writes its result. `wandb sync` sends the rest later.
_END = {'finish_timeout': 60, 'finish_timeout_raises': True}


class Tracker(Protocol):
  """A place that metrics are sent to."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Sends the metrics of a step."""

  def close(self) -> None:
    """Sends what is left."""


class TensorBoard:
  """Events for TensorBoard in <workdir>/tensorboard, by tensorboardX, which needs no TensorFlow."""

  def __init__(self, workdir: Path, name: str, config: Mapping[str, Any]):
    del name, config
    module = _import('tensorboardX', 'tensorboard')
    self._writer = module.SummaryWriter(str(workdir / TENSORBOARD))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """See Tracker."""
    for name, value in metrics.items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    """See Tracker."""
    self._writer.close()


class WandB:
  """A run of Weights & Biases, which a resumed training continues.

  Variables of wandb choose the rest: WANDB_MODE=offline needs no network, and WANDB_PROJECT,
  WANDB_ENTITY and WANDB_NAME say where the run appears.
  """

  def __init__(self, workdir: Path, name: str, config: Mapping[str, Any]):
    wandb = _import('wandb', 'wandb')
    # The name of the run in wandb, kept so that all launches are one run there.
    kept = workdir / WANDB_ID
    if not kept.is_file():
      write_whole(kept, secrets.token_hex(8).encode())
    # Older versions of wandb have no limit at the end.
    end = {key: value for key, value in _END.items() if key in wandb.Settings.model_fields}
    self._run = _reach(lambda: wandb.init(
        project=os.environ.get('WANDB_PROJECT', _PROJECT), id=kept.read_text(), resume='allow',
        name=os.environ.get('WANDB_NAME', name),
        dir=str(workdir), config=dict(config),
        settings=wandb.Settings(init_timeout=_START_SECONDS, console='off', quiet=True, **end)))
    # Our own step, since a resumed run goes back to its checkpoint, and steps of wandb only grow.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """See Tracker."""
    self._run.log({'step': step, **metrics})

  def close(self) -> None:
    """See Tracker."""
    self._run.finish()


_KINDS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    'tensorboard': TensorBoard, 'wandb': WandB}


def check_trackers(names: tuple[str, ...]) -> None:
  """Checks before long work that the trackers are installed, and that wandb knows its user.

  Raises:
    UserError: one is not installed, or wandb has no key or cannot reach its server.
  """
  if 'tensorboard' in names:
    _import('tensorboardX', 'tensorboard')
  if 'wandb' in names:
    wandb = _import('wandb', 'wandb')
    _reach(lambda: wandb.login(verify=True))


def open_trackers(names: tuple[str, ...], workdir: Path, run_name: str,
                  config: Mapping[str, Any]) -> dict[str, Tracker]:
  """Returns trackers by name.

  Args:
    names: names of trackers.
    workdir: work directory of the run, on this machine.
    run_name: name of the run where a tracker shows it among others.
    config: configuration of the run, as nested dicts.

  Raises:
    UserError: see `check_trackers`.
  """
  return {name: _KINDS[name](workdir, run_name, config) for name in names}


def _import(module: str, extra: str) -> ModuleType:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(f'trackers names {extra!r}, but {module} is not installed ({error}): '
                    f"pip install -e '.[{extra}]', or leave it out") from error


def _reach(begin: Callable[[], Any]) -> Any:
  """Returns begin(), and explains why wandb cannot begin a run."""
  begun = time.monotonic()
  try:
    return begin()
  except Exception as error:  # classes of its own, of its service, and of its settings
    raise UserError(
        f"trackers names 'wandb', which failed after {time.monotonic() - begun:.0f} s "
        f'({type(error).__name__}: {error}): log in with `wandb login`, or set WANDB_MODE=offline '
        'and send the run later with `wandb sync`, or leave it out') from error
