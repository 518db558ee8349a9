"""Rounding of tokens to int8 in one pass over memory: the function of products.round_plainly.

XLA on a TPU reads the activations twice, once for the largest value of a token and once to round,
and finds a largest value along registers slowly.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array
from latent_deliberation.model import products
from latent_deliberation.model.kernels.tpu_attention import VMEM_BYTES

BLOCK_BYTES = 4 * 2**20  # of a block in float32, which leaves room for the next one
ROWS = 32  # of a register of int8
LANES = 128  # of a TPU's registers, which a step fills


def round_tokens(x: Array, factor: Array, *, axis: str) -> tuple[Array, Array]:
  """Rounds x * factor to int8, with one step a token. Under a mesh, each device rounds its own.

  A token that is divided over devices needs the largest value of all, which XLA finds.

  Args:
    x: [B, M, Q, W] activations, or others of any axes without a mesh.
    factor: [W] factor of each channel.
    axis: logical name of the last axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _round(x, factor)
  rows = nn.logical_to_mesh_axes(('batch', 'trace', 'length', axis))
  if x.ndim != len(rows) or _size(mesh, rows[3]) > 1:
    return products.round_plainly(x, factor)
  return jax.shard_map(_round, in_specs=(rows, PartitionSpec()), out_specs=(rows, rows),
                       check_vma=False)(x, factor)


def _size(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
  """Returns the number of parts that mesh axes divide an axis into."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def _round(x: Array, factor: Array) -> tuple[Array, Array]:
  values, step = round_rows(x.reshape(-1, x.shape[-1]), factor)
  return values.reshape(x.shape), step.reshape(*x.shape[:-1], 1)


def round_rows(rows: Array, factor: Array, interpret: bool = False) -> tuple[Array, Array]:
  """Rounds the rows of a matrix [R, W]; see `round_tokens`.

  Args:
    rows: the matrix.
    factor: [W].
    interpret: whether to run as ordinary operations, on any platform.
  """
  count, width = rows.shape
  row_bytes = 4 * (-(-width // LANES) * LANES + LANES)  # a row and its step, in whole registers
  block = min(max(BLOCK_BYTES // row_bytes // ROWS, 1) * ROWS, count)
  of_rows = pl.BlockSpec((block, width), lambda i: (i, 0))
  of_steps = pl.BlockSpec((block, 1), lambda i: (i, 0))
  of_factor = pl.BlockSpec((1, width), lambda i: (0, 0))
  moved = rows.size * (rows.dtype.itemsize + 1) + count * LANES * 4  # steps fill whole registers
  return pl.pallas_call(
      _round_kernel, name='rounding', interpret=interpret, grid=(pl.cdiv(count, block),),
      in_specs=(of_rows, of_factor), out_specs=(of_rows, of_steps),
      out_shape=(jax.ShapeDtypeStruct(rows.shape, jnp.int8),
                 jax.ShapeDtypeStruct((count, 1), jnp.float32)),
      cost_estimate=pl.CostEstimate(flops=4 * rows.size, transcendentals=0, bytes_accessed=moved),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel',), vmem_limit_bytes=VMEM_BYTES),
  )(rows, factor[None])


def _round_kernel(rows, factor, values, steps):
  """Writes one block: rows [R, W] * factor [1, W] as values * steps."""
  wide = rows[...].astype(jnp.float32) * factor[...]
  step = products.step_of(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
  steps[...] = step
  # One division a row, and a product an entry.
  values[...] = jnp.round(wide * (1 / step)).astype(jnp.int32).astype(jnp.int8)
