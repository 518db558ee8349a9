"""The state of a sequence of batches, which another sequence refuses."""

import hashlib
import json
from pathlib import Path


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
