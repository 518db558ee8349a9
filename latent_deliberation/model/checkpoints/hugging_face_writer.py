"""Writes a decoder as a Hugging Face directory, bit for bit."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from latent_deliberation.array_types import Array, Params
from latent_deliberation.model.checkpoints.hugging_face import find_layout
from latent_deliberation.model.checkpoints.hugging_face_config import CONFIG, write_config
from latent_deliberation.model.checkpoints.layout import LAYERED, Layout, parameter_axes
from latent_deliberation.model.checkpoints.safetensors_source import INDEX, SINGLE
from latent_deliberation.model.config import TransformerConfig
from latent_deliberation.progress import Progress

FILE_BYTES = 4 << 30  # most that one file holds; also what a host holds while it writes


def write(directory: Path, config: TransformerConfig, params: Params,
          file_bytes: int = FILE_BYTES) -> None:
  """Writes config.json and safetensors into an empty directory, values as they are.

  Process 0 writes; every process must call this, since shards are gathered.
  """
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  content = write_config(config, dtypes.pop() if len(dtypes) == 1 else 'float32')
  layout = find_layout(config)
  files = list(_split(_shapes(layout, config, params), file_bytes))
  progress = Progress('writing weights', 'tensors', sum(map(len, files)))
  tensors = _tensors(layout, config, params)
  weight_map, done = {}, 0
  for number, names in enumerate(files, start=1):
    name = SINGLE if len(files) == 1 else f'model-{number:05d}-of-{len(files):05d}.safetensors'
    held = dict(next(tensors) for _ in names)
    if jax.process_index() == 0:
      save_file(held, directory / name, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(held, name)
    done += len(held)
    progress.update(done)
  if jax.process_index() == 0:
    if len(files) > 1:
      size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
      index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
      (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + '\n')


def _shapes(layout: Layout, config: TransformerConfig, params: Params) -> Mapping[str, int]:
  """Bytes of every tensor, in the order in which `_tensors` gives them."""
  flat = traverse_util.flatten_dict(params, sep='/')
  sizes = {}
  for path, entry in layout.items():
    layers = config.num_layers if path.startswith(LAYERED) else 1
    for layer in range(layers):
      sizes[entry.name.format(layer)] = flat[path].nbytes // layers
  return sizes


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


def _tensors(layout: Layout, config: TransformerConfig,
             params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor on the host, one at a time."""
  flat, axes = traverse_util.flatten_dict(params, sep='/'), parameter_axes(config)
  for path, entry in layout.items():
    layered = path.startswith(LAYERED)
    for layer in range(config.num_layers if layered else 1):
      piece = _gather(flat[path][layer] if layered else flat[path])
      yield entry.name.format(layer), np.ascontiguousarray(
          rearrange(piece, f'{axes[path]} -> {entry.axes}'))


def _gather(leaf: Array) -> np.ndarray:
  """All of a sharded array on every host."""
  if leaf.is_fully_addressable:
    return np.asarray(leaf)
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
