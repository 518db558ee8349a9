"""Writes named arrays as safetensors: one file, or several with an index."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from latent_deliberation.array_types import Array
from latent_deliberation.model.checkpoints.safetensors_source import INDEX
from latent_deliberation.progress import Progress

FILE_BYTES = 4 << 30  # most that one file holds; also what a host holds while it writes


def write_tensors(directory: Path, stem: str, sizes: Mapping[str, int],
                  tensors: Iterable[tuple[str, np.ndarray]], file_bytes: int = FILE_BYTES) -> None:
  """Writes <stem>.safetensors, or <stem>-00001-of-... and an index where that would grow too large.

  Process 0 writes; every process must call this where making the tensors gathers shards.

  Args:
    sizes: name -> bytes of every tensor, in the order in which they come.
    tensors: names and values, one at a time.
    file_bytes: limit of a file; only a single tensor may exceed it.
  """
  files = list(_split(sizes, file_bytes))
  progress = Progress('writing weights', 'tensors', len(sizes))
  tensors = iter(tensors)
  weight_map = {}
  for number, names in enumerate(files, start=1):
    part = '' if len(files) == 1 else f'-{number:05d}-of-{len(files):05d}'
    held = {name: np.asarray(value, order='C') for name, value in islice(tensors, len(names))}
    if jax.process_index() == 0:
      path = directory / f'{stem}{part}.safetensors'
      # transformers reads no file that does not name a format.
      save_file(held, path, metadata={'format': 'pt'})
      path.chmod(0o644)  # safetensors lets the owner alone read it
    weight_map |= dict.fromkeys(held, f'{stem}{part}.safetensors')
    del held  # before the next file's are made
    progress.update(len(weight_map))
  if len(files) > 1 and jax.process_index() == 0:
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def gather(leaf: Array) -> np.ndarray:
  """All of a sharded array on every host."""
  if leaf.is_fully_addressable:
    return np.asarray(jnp.copy(leaf))  # an array keeps its host copy for as long as it lives
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _split(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Names in order, cut where a file would grow past `limit` bytes."""
  names, size = [], 0
  for name, nbytes in sizes.items():
    if names and size + nbytes > limit:
      yield names
      names, size = [], 0
    names.append(name)
    size += nbytes
  yield names
