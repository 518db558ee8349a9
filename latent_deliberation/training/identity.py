"""Which run a directory belongs to, and what may change when the run is resumed."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.distributed import first_does, wait_for_all
from latent_deliberation.files import write_json

RUN_FILE = 'run.json'
CHECKPOINTS = 'checkpoints'
MISSING = '(nothing)'


@dataclasses.dataclass(frozen=True)
class RunIdentity:
  """What must stay the same for a run to be resumed.

  Attributes:
    job: name of the job, such as 'pretrain'.
    config: the whole configuration, as nested dicts of what JSON can hold.
    decoder: fingerprint of the frozen decoder; '' where there is none.
    data: fingerprint of the data.
    defaults: of the config, as nested dicts: what a key means for a run that is older than the key.
      A new key's default must therefore be what was done before there was the key.
  """
  job: str
  config: Mapping[str, Any]
  decoder: str
  data: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    try:
      self.to_json()
    except TypeError as error:
      raise ValueError(f'the config of job {self.job!r} cannot be written as JSON ({error}): '
                       'use dicts, lists, strings, numbers, booleans and None.') from error

  def to_json(self) -> dict[str, Any]:
    """The identity as it reads back from a JSON file (tuples are lists, keys are strings)."""
    record = dataclasses.asdict(self)
    del record['defaults']  # of this code, and not of the run
    return json.loads(json.dumps(record))


def claim(workdir: Path, identity: RunIdentity, free: tuple[str, ...] = ()) -> None:
  """Makes `workdir` the directory of this run, or checks that it already is.

  Process 0 writes run.json, and all of them compare it. Other files, such as a vocabulary or
  data, may be there already.

  Args:
    workdir: a directory on a mounted file system; created if missing.
    identity: the run that wants it.
    free: dotted paths of the config, or of whole sections, that may differ from the earlier launch.

  Raises: ValueError when the directory holds another run, or checkpoints that no run.json explains.
  """
  if ':/' in str(workdir):
    raise ValueError(f'--workdir is {str(workdir)!r}, which is a URL; it must be a path: mount the '
                     'bucket (gcsfuse, for instance) and give the path under the mount.')
  path = workdir / RUN_FILE
  if not path.exists() and (workdir / CHECKPOINTS).exists():
    raise ValueError(f'{workdir / CHECKPOINTS} exists, but {path} does not: these checkpoints are '
                     'of an unknown run. Restore the file, or use another --workdir.')
  wait_for_all(f'{path} looked at')  # before process 0 goes on to make what is refused above
  first_does(f'write {path}', lambda: _write_once(path, identity))
  try:
    saved = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}), so the run in {workdir} is unknown: restore '
                     'the file, or use another --workdir.') from error
  check_same_run(str(workdir), saved, identity, free)  # also by the others of a new run


def _write_once(path: Path, identity: RunIdentity) -> None:
  if not path.exists():
    write_json(path, identity.to_json())


def check_same_run(place: str, saved: Mapping[str, Any], identity: RunIdentity,
                   free: tuple[str, ...]) -> None:
  """Checks that `saved`, the identity found at `place`, is that of this run.

  Raises: ValueError with each key that differs, its two values and the remedy.
  """
  there, here = dict(_leaves(saved)), dict(_leaves(identity.to_json()))
  defaults = _leaves({'config': json.loads(json.dumps(identity.defaults))})
  there = {key: value for key, value in defaults if key in here} | there
  prefixes = tuple(f'config.{path}.' for path in free)
  lines = [f'  {key}: {there.get(key, MISSING)!r} there, {here.get(key, MISSING)!r} now'
           for key in sorted(there | here)
           if there.get(key, MISSING) != here.get(key, MISSING)
           and not f'{key}.'.startswith(prefixes)]
  if lines:
    raise ValueError('\n'.join([
        f'{place} belongs to another run:', *lines,
        'Use another --workdir, or go back to the values that are there.']))


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Leaves of nested dicts, with their dotted paths."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, tree
