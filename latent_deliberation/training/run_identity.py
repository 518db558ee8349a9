"""The identity of a run: what must stay the same when it is resumed.

`claim_workdir` keeps a run's identity in run.json and compares it. `hold_workdir` keeps a second
launch out of the directory.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.distributed import barrier, run_on_process_zero
from latent_deliberation.errors import UserError, differences
from latent_deliberation.experiment import defaults_of
from latent_deliberation.files import (
  STORES,
  as_path,
  is_here,
  lock_for_all,
  seal,
  unseal,
  write_json,
)
from latent_deliberation.paths import CHECKPOINTS, ROWS, RUN_FILE, RUN_LOCK, with_current_names

# Keys of run.json that are not part of the identity.
EARLIER_STEPS = 'earlier_num_steps'
PREPARED_DATA = 'prepared_data'  # directory of prepared data, relative to the run where it can be
# Settings that change no result but by rounding: devices, memory, cadences, and the places of
# files, since fingerprints cover their contents. Weights are stacked by layer with
# any `scan`, so no checkpoint depends on these.
WITHOUT_EFFECT = (
    'mesh', 'rules', *(f'computation.{key}' for key in (
        'activations', 'attention', 'replicate_frozen', 'remat', 'scan', 'loss_chunk')),
    'data.files', 'data.data_dir', 'data.vocabulary_path', 'decoder_from',
    'coprocessor_from') + tuple(
    f'{section}.{key}' for section in ('pretraining', 'training')
    for key in ('accumulation', 'profile', 'trackers', *(f'loop.{name}' for name in (
        'log_every', 'log_seconds', 'eval_every', 'save_every', 'save_minutes', 'keep',
        'keep_every'))))
# A run may be resumed with others of these. Every other key is part of its identity.
CHANGEABLE = (*WITHOUT_EFFECT, 'evaluation')


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
    start_fingerprint: fingerprint of the coprocessor that the run starts from; '' for none.
  """
  job: str
  config: Mapping[str, Any]
  decoder_fingerprint: str
  data_fingerprint: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  start_fingerprint: str = ''

  @functools.cached_property
  def record(self) -> dict[str, Any]:
    """The content of run.json, as it reads back: tuples are lists, keys are strings.

    Raises:
      UserError: the config holds something that JSON cannot.
    """
    # Runs that start anew have no 'start', as those that were saved before the key existed.
    start = {'start': self.start_fingerprint} if self.start_fingerprint else {}
    try:
      return json.loads(json.dumps({
          'job': self.job, 'config': self.config, 'decoder': self.decoder_fingerprint,
          'data': self.data_fingerprint, **start}))
    except TypeError as error:
      raise UserError(f'the config of job {self.job!r} cannot be written as JSON ({error}): '
                      'use dicts, lists, strings, numbers, booleans and None') from error


def hold_workdir(workdir: Path) -> contextlib.AbstractContextManager[None]:
  """Holds the lock of a work directory, so that no other launch works in it.

  Every process enters. A run of several hosts is one launch.
  """
  return lock_for_all(workdir / RUN_LOCK, f'works in {workdir}')


def claim_workdir(workdir: Path, identity: RunIdentity, changeable: tuple[str, ...] = (),
                  prepared_dir: Path | None = None) -> None:
  """Makes `workdir` the directory of this run, or checks that it already is.

  Process 0 writes run.json, and every process compares it. The directory may hold other files,
  such as a vocabulary or data.

  Args:
    workdir: directory that all processes see; created if missing.
    identity: identity of the run.
    changeable: dotted paths of config keys or sections that a resumed run may change.
    prepared_dir: directory of prepared data, which run.json notes for `find_data`.

  Raises:
    UserError: the directory holds another run, or checkpoints without a run.json.
  """
  path, record = workdir / RUN_FILE, identity.record
  if not path.exists():
    check_unclaimed(workdir)
  barrier(f'{path} looked at')  # every process looks before process 0 makes the directory

  def write_once() -> None:
    if not path.exists():
      write_json(path, seal(record))

  run_on_process_zero(f'write {path}', write_once)
  # A new run is compared too: processes must agree.
  saved = read_record(workdir)
  check_same_run(workdir, saved, identity, changeable)
  if prepared_dir is None:
    return

  def note_data() -> None:
    noted = saved | {PREPARED_DATA: note_of(prepared_dir, workdir)}
    if noted != saved:
      write_json(path, seal(noted))

  # Every process comes here, also one that has read the note of process 0 already.
  run_on_process_zero(f'note the data in {path}', note_data)


def note_of(prepared_dir: Path, workdir: Path) -> str:
  """Returns the prepared data's directory relative to a work directory, so that both may move.

  It is absolute where one is on this machine and the other is not, or they are in two buckets.
  """
  prepared_dir, workdir = prepared_dir.absolute(), workdir.absolute()
  if _bucket(prepared_dir) != _bucket(workdir):
    return str(prepared_dir)
  return os.path.relpath(str(prepared_dir), str(workdir))


def _bucket(path: Path) -> str:
  """Returns the address of a path's bucket, such as gs://bucket; '' on this machine."""
  return '' if is_here(path) else '/'.join(str(path).split('/')[:3])


def noted_data(workdir: Path) -> Path | None:
  """Returns the directory of prepared data that a run read last; None in a run of earlier code.

  Raises: as `read_record` does.
  """
  noted = read_record(workdir).get(PREPARED_DATA)
  if noted is None:
    return None
  return place_of(noted, workdir)


def place_of(noted: str, workdir: Path) -> Path:
  """Returns the directory that a note of `note_of` means."""
  if noted.startswith(STORES):
    return as_path(noted)
  place = os.path.normpath(os.path.join(str(workdir), noted))
  # The two slashes of an address are one after normpath.
  return as_path(place if is_here(workdir) else place.replace(':/', '://', 1))


def find_data(workdir: Path, given: str = '') -> Path:
  """Returns the directory of prepared data for a training in `workdir`.

  It is the given one, or that of the run which is resumed, or `workdir` itself.

  Raises:
    UserError: the run is resumed, and its data are not where they were; or see `read_record`.
  """
  if given:
    return as_path(given)
  try:
    prepared_dir = noted_data(workdir) or workdir
  except FileNotFoundError:
    return workdir
  if not (prepared_dir / ROWS).is_dir():
    raise UserError(f"--data = '': {workdir} holds a run, and there are no {ROWS}/ of it in "
                    f'{prepared_dir}: give the directory of its prepared data')
  return prepared_dir


def check_unclaimed(workdir: Path, result: str = '') -> None:
  """Checks that a work directory without a run.json holds nothing that a run writes.

  Args:
    workdir: the work directory.
    result: name of the result of the run that may come, such as 'decoder'; '' for none.

  Raises:
    UserError: it holds checkpoints, or such a result.
  """
  for place in (workdir / CHECKPOINTS, *([workdir / result] if result else [])):
    if place.exists():
      raise UserError(f'{place} exists, but {workdir / RUN_FILE} does not, so {place} is of an '
                      f'unknown run: restore {RUN_FILE}, move {place} away, or use another '
                      '--workdir')


def read_record(workdir: Path) -> dict[str, Any]:
  """Returns the content of the run.json in a work directory, in the form of `RunIdentity.record`.

  Raises:
    FileNotFoundError: there is none.
    UserError: it is damaged, or of a job that is no single training, such as a study.
  """
  path = workdir / RUN_FILE
  try:
    record = unseal(path.read_bytes(), path)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}), so the run in {workdir} is unknown: restore '
                    'the file, or use another --workdir') from error
  named = record if isinstance(record, dict) else {}
  if not {'job', 'config', 'decoder', 'data'} <= named.keys() or not isinstance(
      named['config'], dict):
    job = f'of the job {named["job"]!r}' if 'job' in named else 'of something else'
    raise UserError(f'{path} is {job} and no record of a single training: use another '
                    '--workdir')
  return record


def check_same_run(workdir: Path, saved: Mapping[str, Any], identity: RunIdentity,
                   changeable: tuple[str, ...]) -> None:
  """Compares `saved`, the content of the run.json in `workdir`, with the identity of this run.

  The number of steps may be larger now: see `lengthen`.

  Raises:
    UserError: a key differs; lists each such key with its two values.
  """
  saved = {key: value for key, value in saved.items() if key not in (EARLIER_STEPS, PREPARED_DATA)}
  # The run may have been shorter.
  grows = steps_of(saved, identity.job) < steps_of(identity.record, identity.job)
  length = (f'{section_of(identity.job)}.loop.num_steps',) if grows else ()
  lines = _differences(saved, identity.record, identity.defaults, (*changeable, *length))
  # Two hashes would tell nobody anything.
  said = {'data': '  data: other rows than those of the run',
          'start': '  config.coprocessor_from: another coprocessor than the run started from'}
  lines = [said.get(line.strip().partition(':')[0], line) for line in lines]
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
        'Use another --workdir, or set the saved values again. --overwrite replaces the report, '
        'and trains on where num_steps has grown.']))
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


def steps_of(record: Mapping[str, Any], job: str) -> int:
  """Returns the num_steps of a job in the content of its run.json; 0 where it has none."""
  return record['config'].get(section_of(job), {}).get('loop', {}).get('num_steps', 0)


def section_of(job: str) -> str:
  """Returns the section of the experiment that a job follows."""
  return 'pretraining' if job == 'pretrain' else 'training'


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the leaves of nested dicts with their dotted paths."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, tree
