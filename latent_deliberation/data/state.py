"""What every sequence of batches shares: slices of hosts, and a state that is refused elsewhere."""

import hashlib
import json
from pathlib import Path


def host_slice(batch_size: int, process_index: int, process_count: int) -> slice:
  """Rows of a global batch that belong to a host. Raises ValueError when they cannot be equal."""
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(f'batch_size = {batch_size} cannot be divided among {process_count} hosts: '
                     f'choose a multiple of {process_count}')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index = {process_index}: there are {process_count} hosts, from 0 on')
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)


def fingerprint_of(identity: dict[str, str | int]) -> str:
  """sha256 of what tells one sequence of batches from another."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def state_to_json(identity: dict[str, str | int], step: int) -> bytes:
  """The state of a sequence of batches, as `check_state` reads it."""
  state = {'step': step, 'fingerprint': fingerprint_of(identity), **identity}
  return json.dumps(state, indent=2, sort_keys=True).encode() + b'\n'


def check_state(path: Path, identity: dict[str, str | int], step: int) -> None:
  """Raises unless `path` holds the state of this step of this sequence; names what differs."""
  if not path.is_file():
    raise FileNotFoundError(f'no data state for step {step} at {path}: resume from a step that was '
                            'saved, or start anew in an empty work directory')
  try:
    saved = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not a data state ({error}): resume from another step') from error
  expected = json.loads(state_to_json(identity, step))
  different = [f'{key}: saved {saved.get(key)!r}, now {value!r}'
               for key, value in expected.items() if saved.get(key) != value]
  if different:
    raise ValueError(f'{path} is of another sequence of batches ({"; ".join(different)}): resume '
                     'with the settings that were saved, or start anew in an empty work directory')
