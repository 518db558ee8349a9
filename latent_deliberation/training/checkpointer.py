"""Checkpoints of what learns and of the data's position: whole, asynchronous, of one run only."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint as ocp

from latent_deliberation.array_types import Batch
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.training.step import TrainState


class Batches(Protocol):
  """An endless, restorable stream: the batch of step s is the input of update s + 1.

  Attributes: fingerprint: identifies the rows and their order.
  """
  fingerprint: str

  def __call__(self, step: int) -> Batch:
    """This process's rows of the global batch for `step` = 0, 1, ..., as numpy arrays."""

  def save(self, directory: Path, step: int) -> None:
    """Writes into `directory` all that the batch of `step` needs.

    Every process calls this with the same directory, which exists and was empty.
    """

  def restore(self, directory: Path, step: int) -> None:
    """Makes `step` the next batch; raises ValueError when `directory` does not fit this stream."""


class Checkpointer:
  """The checkpoints of one run: <directory>/<step> from orbax, <directory>/data/<step> beside it.

  A checkpoint is there as a whole or not at all: orbax renames it into place when every process has
  written all its files, and the data's position is written before that.
  """

  def __init__(self, directory: Path, keep: int):
    """Opens or creates `directory`, which keeps the newest `keep` checkpoints."""
    if keep < 1:
      raise UserError(f'keep is {keep}; it must be 1 or more, or nothing could be resumed.')
    self.directory = directory.absolute()
    self._saving: int | None = None
    self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True))

  def latest_step(self) -> int | None:
    """The newest checkpoint, counting one that is still being written; None when there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, batches: Batches) -> None:
    """Starts writing a checkpoint. `state` may be donated as soon as this returns.

    Raises:
      UserError: there is a checkpoint of this step, or of a later one, already.
      UserError: this save, or the one before it, could not be written.
    """
    self.wait()
    latest = self.latest_step()
    if latest is not None and latest >= step:
      raise UserError(f'cannot save step {step}: {self.directory} has one of step {latest}. '
                       'Restore that one first, or use another --workdir.')
    self._saving = step
    with self._failure_named():
      self._save_data(step, batches)
      about = {'state': _describe(state)}
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))

  def wait(self) -> None:
    """Returns when the checkpoint being written is whole. Raises: RuntimeError if it cannot be."""
    with self._failure_named():
      self._manager.wait_until_finished()
    self._saving = None
    self._prune_data()

  def close(self) -> None:
    """Waits, then frees the threads. Raises: RuntimeError as `wait` does."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def restore(self, abstract_state: TrainState, batches: Batches) -> TrainState | None:
    """The state of the newest checkpoint, with `batches` set to its position; None without any.

    run.json beside the checkpoints says which run they are of.

    Args:
      abstract_state: a jax.ShapeDtypeStruct for each leaf, with the sharding it shall have.
      batches: the stream to set to the next batch.

    Raises: UserError when the checkpoint has other leaves, is of other data or is damaged.
    """
    step = self.latest_step()
    if step is None:
      return None
    place = f'the checkpoint {self.directory / str(step)}'
    if not (self.directory / str(step) / 'about').is_dir():
      raise UserError(f"{place} was not written by this project (it has no 'about'): use another "
                       '--workdir.')
    with self._damage_explained(step):
      leaves = self._manager.restore(
          step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']['state']
    _check_same_leaves(place, leaves, _describe(abstract_state))
    with self._damage_explained(step):
      state = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))['state']
    batches.restore(self._data_directory(step), step)
    return state

  def _data_directory(self, step: int) -> Path:
    return self.directory / 'data' / str(step)

  def _save_data(self, step: int, batches: Batches) -> None:
    directory = self._data_directory(step)

    def make_empty() -> None:
      shutil.rmtree(directory, ignore_errors=True)  # left by a save that never became whole
      directory.mkdir(parents=True)

    run_on_process_zero(f'make {directory}', make_empty)
    batches.save(directory, step)

  def _prune_data(self) -> None:
    """Removes the data's positions at steps whose checkpoint is gone."""
    # Later steps stay: another process may already be writing the next one.
    latest = self.latest_step()
    if jax.process_index() == 0 and latest is not None:
      for folder in self.directory.glob('data/*'):
        if int(folder.name) < latest and not (self.directory / folder.name).exists():
          shutil.rmtree(folder, ignore_errors=True)

  @contextlib.contextmanager
  def _failure_named(self) -> Iterator[None]:
    """Turns an error of the save in progress into one that says what is lost and what is not."""
    try:
      yield
    except Exception as error:
      step, self._saving = self._saving, None
      self._manager.reload()  # forgets the failed step, and lists again those it was to replace
      raise UserError(
          f'the checkpoint of step {step} could not be written to {self.directory}: {error}\n'
          f'{self._describe_whole_steps()} Make it writable or free some space: the same command '
          'then goes on from the newest of them.') from error

  @contextlib.contextmanager
  def _damage_explained(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      folder = self.directory / str(step)
      raise UserError(
          f'the checkpoint {folder} cannot be read ({type(error).__name__}: {error}).\n'
          f'{self._describe_whole_steps(before=step)} If its files are damaged, remove {folder}: '
          'the same command then goes on from the newest that is left.') from error

  def _describe_whole_steps(self, before: float = float('inf')) -> str:
    steps = [step for step in self._manager.all_steps() if step < before]
    return f'Other checkpoints there: {", ".join(map(str, sorted(steps))) or "none"}.'


def _describe(state: TrainState) -> dict[str, str]:
  """Path of each leaf -> its dtype and shape, such as 'float32[2, 8]'."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): f'{leaf.dtype}{list(leaf.shape)}'
          for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _check_same_leaves(place: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
  absent = '(nothing)'
  lines = [f'  {path}: {there.get(path, absent)} there, {here.get(path, absent)} now'
           for path in sorted(there | here) if there.get(path) != here.get(path)]
  if lines:
    raise UserError('\n'.join([
        f'{place} holds another model or optimizer:', *lines[:20],
        f'{len(lines)} leaves differ. Use another --workdir, or the code that wrote it.']))
