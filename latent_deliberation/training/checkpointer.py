"""Checkpoints of the train state and the data's position, written whole and in the background."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from latent_deliberation.data.rows import Batches
from latent_deliberation.distributed import run_on_process_zero
from latent_deliberation.errors import UserError, differences
from latent_deliberation.files import is_here, orbax_options, path_for_orbax, remove_tree
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import DATA_STATES, STEP_METADATA
from latent_deliberation.training.step import TrainState

_STEP_TIMES = ('init_timestamp_nsecs', 'commit_timestamp_nsecs')  # integers in that file
FINGERPRINT = 'fingerprint'  # key of a checkpoint's 'about': that of its state

# What orbax raises where files cannot be written: tensorstore knows no OSError.
ORBAX_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpointer:
  """The checkpoints of one run.

  orbax writes <directory>/<step>; the data's position is in <directory>/data/<step>. A checkpoint
  exists as a whole or not at all: the data's position is written first. When every process has
  written all its files, orbax renames the rest into place, or in a store marks it as committed.
  """

  def __init__(self, directory: Path, keep: int, keep_every: int = 0):
    """Opens or creates `directory`.

    Args:
      directory: directory of the checkpoints.
      keep: number of the newest checkpoints that are kept.
      keep_every: steps that are multiples of it are kept for good; 0 for none.

    Raises:
      UserError: the checkpoints cannot be listed, since a file of orbax is damaged.
      UserError: see `StorePath.clear_unfinished`.
    """
    if keep < 1:  # LoopConfig refuses it with the name of its key
      raise ValueError(f'keep = {keep}: it must be 1 or more')
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    self.directory = directory.absolute()
    self._saving: int | None = None
    renames = is_here(self.directory)
    if not renames:
      run_on_process_zero(f'clear {directory}', directory.clear_unfinished)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # Where it does not rename, orbax takes every other directory for an unfinished step.
        cleanup_tmp_directories=renames, **orbax_options(directory))
    try:
      self._manager = ocp.CheckpointManager(path_for_orbax(directory), options=options)
    except (ValueError, TypeError, KeyError) as error:  # orbax reads a file of each step
      damaged = [path.parent for path in directory.glob(f'*/{STEP_METADATA}')
                 if not _is_readable(path)]
      if not damaged:
        raise
      raise UserError(
          f'the checkpoint {damaged[0]} cannot be read: its {STEP_METADATA} is damaged ({error}). '
          f'Move {damaged[0]} away. The same command then resumes from the newest checkpoint that '
          'is left.') from error

  def latest_step(self) -> int | None:
    """Returns the newest step, including one that is still being written; None without any."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, batches: Batches) -> None:
    """Starts writing a checkpoint. `state` may be donated as soon as this returns.

    Raises:
      UserError: a checkpoint of this step or a later step exists.
      UserError: this checkpoint or the one before it cannot be written.
    """
    # One save at a time. This also raises the error of the one before.
    self.wait()
    latest = self.latest_step()
    if latest is not None and latest >= step:
      raise UserError(f'cannot save step {step}: {self.directory} has a checkpoint of step '
                      f'{latest}. Restore that one first, or use another --workdir')
    self._saving = step
    # The position of the data comes first, so every whole checkpoint has one.
    with self._explain_failed_save(OSError):
      self._save_data(step, batches)
    with self._explain_failed_save(*ORBAX_ERRORS):
      about = {'state': _describe(state), FINGERPRINT: fingerprint(vars(state))}
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))

  def wait(self) -> None:
    """Waits until the checkpoint in progress is whole. Raises UserError if it cannot be written."""
    with self._explain_failed_save(*ORBAX_ERRORS):
      self._manager.wait_until_finished()
    self._saving = None
    self._prune_data()

  def close(self) -> None:
    """Waits, then frees the threads. Raises as `wait` does."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def restore(self, abstract_state: TrainState, batches: Batches) -> TrainState | None:
    """Returns the state of the newest checkpoint, and sets `batches` to its position.

    Returns None where there is no checkpoint. `claim_workdir` has already checked, by run.json,
    that the checkpoints are of this run.

    Args:
      abstract_state: a jax.ShapeDtypeStruct with a sharding for each leaf.
      batches: the stream to set to the next batch.

    Raises:
      UserError: the checkpoint has other leaves, is of other data or is damaged.
    """
    step = self.latest_step()
    if step is None:
      return None
    place = f'the checkpoint {self.directory / str(step)}'
    if not (self.directory / str(step) / 'about').is_dir():
      raise UserError(
          f"{place} was copied in part, or written by another project (it has no 'about').\n"
          f'{self._describe_whole_steps(before=step)} Copy it again, or remove '
          f'{self.directory / str(step)}. The same command then resumes from the newest checkpoint '
          'that is left.')
    # Compare names and shapes first, since orbax's own errors would not name all that differ.
    with self._explain_damage(step):
      about = self._manager.restore(
          step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    _check_same_leaves(place, about['state'], _describe(abstract_state))
    with self._explain_damage(step):
      state = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))['state']
      # Files may be damaged in a way that is read without an error. Older checkpoints do not say.
      saved, found = about.get(FINGERPRINT), fingerprint(vars(state))
      if saved not in (None, found):
        raise ValueError(f'its state has fingerprint {found}, but {saved} was saved')
    # Last, so the stream moves only if the state could be read.
    batches.restore(self._data_directory(step), step)
    return state

  def _data_directory(self, step: int) -> Path:
    return self.directory / DATA_STATES / str(step)

  def _save_data(self, step: int, batches: Batches) -> None:
    directory = self._data_directory(step)

    def make_empty() -> None:
      remove_tree(directory)  # left by an unfinished save
      directory.mkdir(parents=True)

    run_on_process_zero(f'make {directory}', make_empty)
    batches.save(directory, step)

  def _prune_data(self) -> None:
    """Removes the data's positions at steps whose checkpoint is gone."""
    # Keep later steps, since another process may already write the next one.
    latest = self.latest_step()
    if jax.process_index() == 0 and latest is not None:
      for folder in self.directory.glob(f'{DATA_STATES}/*'):
        # Anything else, such as a .DS_Store, is not ours to remove.
        if (folder.name.isdecimal() and int(folder.name) < latest
            and not (self.directory / folder.name).exists()):
          remove_tree(folder)

  @contextlib.contextmanager
  def _explain_failed_save(self, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of the save in progress into a UserError that lists the whole checkpoints."""
    try:
      yield
    except kinds as error:
      step, self._saving = self._saving, None
      self._manager.reload()  # forgets the failed step, and lists again what it was to replace
      # orbax looks at the clock on the wall, so a jump of that looks like a slow directory.
      remedy = ('The directory is slow, or the clock was set.' if isinstance(error, TimeoutError)
                else 'Make the directory writable or free some space.')
      raise UserError(
          f'the checkpoint of step {step} could not be written to {self.directory}: '
          f'{str(error).partition(" [tensorstore_spec")[0]}\n'
          f'{self._describe_whole_steps()} {remedy} The same command then resumes from the newest '
          'checkpoint.') from error

  @contextlib.contextmanager
  def _explain_damage(self, step: int) -> Iterator[None]:
    """Turns an error of reading a checkpoint into a UserError that lists the earlier ones."""
    try:
      yield
    except Exception as error:  # orbax and its storage raise almost any class on damaged files
      folder = self.directory / str(step)
      raise UserError(
          f'the checkpoint {folder} cannot be read ({type(error).__name__}: {error}).\n'
          f'{self._describe_whole_steps(before=step)} If its files are damaged, remove {folder}. '
          'The same command then resumes from the newest checkpoint that is left.') from error

  def _describe_whole_steps(self, before: float = float('inf')) -> str:
    steps = [step for step in self._manager.all_steps() if step < before]
    return f'Other checkpoints: {", ".join(map(str, sorted(steps))) or "none"}.'


def _is_readable(metadata: Path) -> bool:
  """Whether orbax's description of a step says when it was written."""
  try:
    content = json.loads(metadata.read_bytes())
    return all(type(content[name]) is int for name in _STEP_TIMES)
  except (ValueError, TypeError, KeyError):
    return False


def _describe(state: TrainState) -> dict[str, str]:
  """Returns the dtype and shape of each leaf by its path, such as 'float32[2, 8]'."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): f'{leaf.dtype}{list(leaf.shape)}'
          for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _check_same_leaves(place: str, saved: Mapping[str, str], current: Mapping[str, str]) -> None:
  # Every leaf that only one of the two has, or whose shape or dtype differs.
  lines = differences(saved, current)
  if lines:
    raise UserError('\n'.join([
        f'{place} holds another model or optimizer:', *lines[:20],
        f'{len(lines)} leaves differ. Use another --workdir, or the code that wrote it.']))
