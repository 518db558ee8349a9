"""The kernels of each kind of machine, and which of them are for the one at hand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from latent_deliberation.array_types import Array, PyTree
from latent_deliberation.model.kernels import gpu_attention, tpu_attention
from latent_deliberation.model.kernels.tiles import Tiles
from latent_deliberation.model.kernels.tiling import Blocks, Layout

# Of a token of one head, that a GPU's shared memory has room for; see gpu_attention.py.
GPU_ROW_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Kernels:
  """What is particular to a kind of machine.

  Attributes:
    platform: jax's name of what a program is lowered for.
    layout: Layout.aligned or Layout.across.
    forward, backward: see tpu_grid; only these two know the form of the log-sum-exp.
    blocks: sizes.
  """
  platform: str
  layout: Callable[..., Layout]
  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, tuple[Array, Array]]]
  blocks: Blocks

  def run(self, kernel: Callable[..., Any], tiles: Tiles, *operands: PyTree) -> Any:
    """A kernel, compiled or interpreted as the platform needs that a program is lowered for.

    That is not always the one at hand: a CPU can compile for a TPU.
    """
    interpreted = dataclasses.replace(tiles, interpret=True)
    return jax.lax.platform_dependent(
        *operands, **{self.platform: functools.partial(kernel, tiles)},
        cpu=functools.partial(kernel, interpreted))


# By the compiler's schedule for a v5e, its matrix units set the pace at these sizes.
TPU = Kernels('tpu', Layout.aligned, tpu_attention.forward, tpu_attention.backward,
              Blocks(1024, 512))
GPU = Kernels('cuda', Layout.across, gpu_attention.forward, gpu_attention.backward,
              Blocks(128, 64))


def choose_kernels(queries: Array) -> Kernels:
  """Those of the machine at hand; a TPU's on a CPU, which interprets them.

  Args:
    queries: [..., H].

  Raises:
    ValueError: another platform, or heads that a GPU cannot hold.
  """
  platform = jax.default_backend()
  if platform not in ('cpu', 'tpu', 'gpu'):
    raise ValueError(f"attention = 'fused' on platform {platform!r}: its kernels are for TPUs and "
                     "NVIDIA GPUs (and interpreted on CPUs, for tests); set attention = 'plain'")
  if platform != 'gpu':
    return TPU
  width, row_bytes = queries.shape[-1], queries.shape[-1] * queries.dtype.itemsize
  if width < 16 or width.bit_count() > 1 or row_bytes > GPU_ROW_BYTES:
    raise ValueError(f"attention = 'fused' on a GPU with heads of {width} x {queries.dtype}: its "
                     f'kernels take a power of two from 16 on, up to {GPU_ROW_BYTES} bytes; set '
                     "attention = 'plain', or dtype = 'bfloat16' where the bytes are too many")
  return GPU
