"""Values that the processes of a run share: those of process 0, or those of all of them.

lm-evaluation-harness is not the same on every host, so process 0 leads. The others follow it: they
get its requests, and take part in every computation.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

STOP = 'stop'  # the call that ends `follow`


def from_leader(value: Any) -> Any:
  """Returns the JSON value of process 0, on every process. The values of others are not used."""
  if jax.process_count() == 1:
    return value
  content = json.dumps(value).encode() if jax.process_index() == 0 else b''
  # The length first, since all processes must pass arrays of one shape.
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
  array = np.zeros(size, np.uint8)
  array[:len(content)] = np.frombuffer(content, np.uint8)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(array)).decode())


def of_all(value: Any) -> list[Any]:
  """Returns the JSON values of all processes, in their order, on every process."""
  if jax.process_count() == 1:
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(content), np.int32))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[:len(content)] = content
  gathered = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:size]).decode()) for row, size in zip(gathered, sizes, strict=True)]


def lead(call: str, *arguments: Any) -> None:
  """Tells the processes that `follow` which function to call, and with which JSON arguments."""
  if jax.process_count() > 1 and jax.process_index() == 0:
    from_leader([call, *arguments])


def follow(calls: Mapping[str, Callable[..., Any]]) -> None:
  """Makes the calls of process 0, until it says STOP. Process 0 itself returns at once."""
  if jax.process_index() == 0:
    return
  while (message := from_leader(None))[0] != STOP:
    calls[message[0]](*message[1:])
