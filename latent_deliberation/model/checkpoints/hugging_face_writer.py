"""Writes a decoder as a Hugging Face directory, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

from latent_deliberation.array_types import Params
from latent_deliberation.model.checkpoints.hugging_face import find_layout
from latent_deliberation.model.checkpoints.hugging_face_config import CONFIG, write_config
from latent_deliberation.model.checkpoints.layout import LAYERED, Layout, parameter_axes
from latent_deliberation.model.checkpoints.safetensors_writer import (
  FILE_BYTES,
  gather,
  write_tensors,
)
from latent_deliberation.model.transformer_config import TransformerConfig


def write(directory: Path, config: TransformerConfig, params: Params,
          file_bytes: int = FILE_BYTES) -> None:
  """Writes config.json and safetensors into an empty directory, values as they are.

  Process 0 writes; every process must call this, since shards are gathered.
  """
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  content = write_config(config, dtypes.pop() if len(dtypes) == 1 else 'float32')
  layout = find_layout(config)
  write_tensors(directory, 'model', _sizes(layout, config, params),
                _tensors(layout, config, params), file_bytes)
  if jax.process_index() == 0:
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + '\n')


def _sizes(layout: Layout, config: TransformerConfig, params: Params) -> dict[str, int]:
  """Bytes of every tensor, in the order in which `_tensors` gives them."""
  flat = traverse_util.flatten_dict(params, sep='/')
  sizes = {}
  for path, entry in layout.items():
    layers = config.num_layers if path.startswith(LAYERED) else 1
    for layer in range(layers):
      sizes[entry.name.format(layer)] = flat[path].nbytes // layers
  return sizes


def _tensors(layout: Layout, config: TransformerConfig,
             params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor on the host, one at a time."""
  flat, axes = traverse_util.flatten_dict(params, sep='/'), parameter_axes(config)
  for path, entry in layout.items():
    layered = path.startswith(LAYERED)
    for layer in range(config.num_layers if layered else 1):
      piece = gather(flat[path][layer] if layered else flat[path])
      yield entry.name.format(layer), rearrange(piece, f'{axes[path]} -> {entry.axes}')
