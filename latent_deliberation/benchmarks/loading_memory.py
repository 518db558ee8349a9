"""Memory and time to load a decoder of a published size."""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import safe_open

from latent_deliberation.files import is_here, write_json
from latent_deliberation.host_memory import peak_memory_bytes
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints.hugging_face import find_layout
from latent_deliberation.model.checkpoints.hugging_face_config import CONFIG, write_config
from latent_deliberation.model.checkpoints.layout import stored_shapes
from latent_deliberation.model.checkpoints.safetensors_io import weight_files, write_tensors
from latent_deliberation.model.transformer_config import TransformerConfig, find_preset
from latent_deliberation.provenance import git_commit


def benchmark(preset: str, output: Path) -> dict[str, Any]:
  """Writes random weights in Hugging Face's format, in bfloat16, and measures loading them.

  The time to compare with is that of the safetensors library, which reads every tensor once and
  keeps none.

  Args:
    preset: name of a published size.
    output: JSON file to write; the weights are written to its directory, and removed.

  Returns: the content of `output`.
  """
  config = find_preset(preset)
  beside = output.absolute().parent if is_here(output) else None
  with tempfile.TemporaryDirectory(prefix='weights-', dir=beside) as place:
    logging.info('writing random weights of %s', preset)
    _run_apart(write_synthetic, Path(place), config)
    logging.info('reading them')
    alone = _run_apart(_read, place)
    measured = _run_apart(_load, place)
  result = {
      'preset': preset, 'format': 'huggingface', 'dtype': 'bfloat16', **measured,
      'peak_over_weights': measured['peak_bytes'] / measured['weight_bytes'],
      'seconds_of_safetensors_alone': alone,
      'seconds_over_safetensors_alone': measured['seconds'] / alone,
      'devices': f'{jax.device_count()} {jax.default_backend()}', 'git_commit': git_commit()}
  write_json(output, result)
  return result


def _run_apart(function: Callable, *arguments: Any) -> Any:
  """Returns the result of a function in a new process, whose peak of memory is its own."""
  with multiprocessing.get_context('spawn').Pool(1) as process:
    return process.apply(function, arguments)


def write_synthetic(directory: Path, config: TransformerConfig) -> None:
  """Writes small random weights, in as many files as a published checkpoint has."""
  shapes = stored_shapes(find_layout(config), config)
  random = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(jnp.bfloat16)

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in shapes.items():
      yield name, np.resize(random, shape)

  sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
  write_tensors(directory, 'model', sizes, tensors())
  (directory / CONFIG).write_text(json.dumps(write_config(config, 'bfloat16')))


def _load(directory: str) -> dict[str, Any]:
  """Loads a decoder as a user does, and returns seconds and bytes."""
  jnp.zeros(1).block_until_ready()
  before, begun = peak_memory_bytes(), time.perf_counter()
  _, params = weights.load(directory)
  jax.block_until_ready(params)
  return {'seconds': time.perf_counter() - begun, 'peak_bytes': peak_memory_bytes(),
          'peak_bytes_before': before,
          'weight_bytes': sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def _read(directory: str) -> float:
  """Returns the seconds in which the safetensors library reads every tensor."""
  begun = time.perf_counter()
  for path in weight_files(Path(directory)):
    with safe_open(path, 'numpy') as file:
      for name in file.keys():
        file.get_tensor(name)
  return time.perf_counter() - begun
