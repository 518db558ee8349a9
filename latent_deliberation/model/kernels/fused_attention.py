"""Fused attention: the function of attention.attend_visible, without scores in memory.

Plain attention writes [M * Q, S] scores of every head. A kernel computes them block by block. It
skips blocks of keys that no query of a block sees: those after the longest prefix, those before the
sliding window, and those of other documents. With traces in the order of their anchors, this saves
half of the keys.

This module chooses the kernels of a machine (`choose_kernels`), runs them under a mesh, and defines
the gradient. tiling.py has the layout; tpu_attention.py and gpu_attention.py have the kernels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array, Float, Int, PyTree, RowTokens, typed
from latent_deliberation.errors import UserError
from latent_deliberation.model import attention
from latent_deliberation.model.attention import FUSED_RESULTS, AttentionMaskSpec, KVCache
from latent_deliberation.model.kernels import gpu_attention, tpu_attention
from latent_deliberation.model.kernels.fused_rotary import rotate
from latent_deliberation.model.kernels.tiling import (
  Blocks,
  Inputs,
  Layout,
  Operands,
  Tiles,
  lay_out,
  pad,
)

# The functions with which model/transformer.py replaces the plain ones.
__all__ = ['attend_visible', 'pad', 'rotate', 'row_major']

# Largest size of one token of one head that fits a GPU's shared memory; see gpu_attention.py.
GPU_ROW_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The kernels for one kind of machine.

  Attributes:
    platform: jax's name of the platform that a program is lowered for.
    layout: Layout.aligned or Layout.across.
    forward, backward: see tpu_attention; only these two know the shape of the log-sum-exp.
    blocks: sizes of the blocks.
  """
  platform: str
  layout: Callable[..., Layout]
  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, tuple[Array, Array]]]
  blocks: Blocks

  def run(self, kernel: Callable[..., Any], tiles: Tiles, *operands: PyTree) -> Any:
    """Runs a kernel: compiled on its platform, interpreted on a CPU.

    The platform is the one that a program is lowered for: a CPU can compile for a TPU.
    """
    interpreted = dataclasses.replace(tiles, interpret=True)
    return jax.lax.platform_dependent(
        *operands, **{self.platform: functools.partial(kernel, tiles)},
        cpu=functools.partial(kernel, interpreted))


# At these sizes, the compiler's schedule for a v5e is bound by the matrix units.
TPU = Kernels('tpu', Layout.aligned, tpu_attention.forward, tpu_attention.backward,
              Blocks(1024, 512))
GPU = Kernels('cuda', Layout.across, gpu_attention.forward, gpu_attention.backward,
              Blocks(128, 64))


def choose_kernels(queries: Array) -> Kernels:
  """Returns the kernels of this machine; a CPU interprets those of a TPU.

  Args:
    queries: [..., H] queries; only their width and dtype matter.

  Raises:
    UserError: unknown platform, or heads that do not fit a GPU.
  """
  platform = jax.default_backend()
  if platform not in ('cpu', 'tpu', 'gpu'):
    raise UserError(f"attention = 'fused' on platform {platform!r}: its kernels are for TPUs and "
                    "NVIDIA GPUs (CPUs interpret them, for tests); set attention = 'plain'")
  if platform != 'gpu':
    return TPU
  # Triton takes powers of two, and blocks of rows must fit shared memory.
  width, row_bytes = queries.shape[-1], queries.shape[-1] * queries.dtype.itemsize
  if width < 16 or width.bit_count() > 1 or row_bytes > GPU_ROW_BYTES:
    raise UserError(f"attention = 'fused' on a GPU with heads of {width} x {queries.dtype}: its "
                    f'kernels take powers of two from 16 on, of at most {GPU_ROW_BYTES} bytes; set '
                    "attention = 'plain', or dtype = 'bfloat16' to halve the bytes")
  return GPU


@dataclasses.dataclass(frozen=True)
class Options:
  """The arguments of `attend_visible` that are compiled in."""
  cap: float | None
  kernels: Kernels

  def layout(self, shape: tuple[int, ...], kv_heads: int, cached: int | None) -> Layout:
    """Returns the layout of these kernels; arguments as in Layout.aligned."""
    return self.kernels.layout(self.kernels.blocks, self.cap, shape, kv_heads, cached)


@typed
def attend_visible(
    queries: Float[Array, 'B M Q N H'],
    keys: Float[Array, 'B M Q K H'],
    values: Float[Array, 'B M Q K H'],
    positions: RowTokens,
    mask_spec: AttentionMaskSpec,
    window: Int[Array, ''],
    cache: KVCache | None = None,
    cap: float | None = None,
    kernels: Kernels | None = None,
) -> Float[Array, 'B M Q N H']:
  """The function of attention.attend_visible; compiled on TPUs and GPUs, interpreted on CPUs.

  The backward pass is fused if the cache is a constant, like that of the frozen decoder. It is the
  plain one if there is no cache or if gradients flow into it. Under a mesh, each device works on
  its own texts and heads, by the logical-axis rules.

  Args:
    kernels: kernels to run, for tests and tuning; default `choose_kernels`.

  Raises:
    UserError: see `choose_kernels`; or several rows without a cache, or different splits of heads
      and kv heads.
  """
  kernels = kernels or choose_kernels(queries)
  if cache is None and (queries.shape[1] > 1 or mask_spec.first is not None):
    raise UserError(f"attention = 'fused' on {queries.shape[1]} rows without a cache: it takes "
                    "rows over a cache, or one causal row; set attention = 'plain'")
  inputs = Inputs(queries, keys, values, positions, mask_spec, window, cache)
  return _over_mesh(functools.partial(_attend, Options(cap, kernels)), inputs)(inputs)


def _over_mesh(function, inputs: Inputs):
  """Returns the function for each device's own texts and heads; unchanged without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  queries = nn.logical_to_mesh_axes(('batch', 'trace', None, 'heads'))
  fresh = nn.logical_to_mesh_axes(('batch', 'trace', None, 'kv_heads'))
  batch, trace, _, kv_heads = fresh
  # A device must hold the keys of its queries. A single kv head cannot be split.
  if queries != fresh and inputs.keys.shape[3] > 1:
    raise UserError(
        f"attention = 'fused': the rules split 'heads' over {queries[3]} and 'kv_heads' over "
        f'{kv_heads}, so a device lacks the keys of its queries; give both the same rule')
  # Integers of rows follow the traces. The cache follows texts and kv heads.
  rows, text = PartitionSpec(batch, trace), PartitionSpec(batch)
  shared = PartitionSpec(batch, None, kv_heads)
  cache = inputs.cache and KVCache(shared, shared, text, text)
  specs = Inputs(queries, fresh, fresh, rows, rows, PartitionSpec(), cache)
  return jax.shard_map(function, in_specs=(specs,), out_specs=queries, check_vma=False)


def row_major(x: Array) -> Array:
  """Constrains activations [B, M, Q, D] to this order of axes in memory.

  XLA may choose column-major order, which the kernels do not take. It would then transpose the
  residuals of each layer.
  """
  constrain = functools.partial(with_layout_constraint, layouts=MemoryLayout((0, 1, 2, 3)))
  if jax.sharding.get_abstract_mesh().empty:
    return constrain(x)
  # Device by device, because the partitioner does not know the constraint and would gather x.
  axes = nn.logical_to_mesh_axes(('batch', 'trace', 'length', 'activation'))
  return jax.shard_map(constrain, in_specs=axes, out_specs=axes, check_vma=False)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> Array:
  return _run(options, inputs)[0]


def _run(options: Options, inputs: Inputs) -> tuple[Array, tuple[Operands, Array, Array]]:
  """Returns the result, and the residuals of the fused gradient."""
  shape, kv_heads = inputs.queries.shape, inputs.keys.shape[3]
  layout = options.layout(shape, kv_heads, inputs.cache and inputs.cache.keys.shape[1])
  operands = lay_out(layout, inputs)
  mixed, lse = map(checkpoint_name, options.kernels.run(
      options.kernels.forward, layout.tiles, *operands), FUSED_RESULTS)
  return layout.unflatten(mixed, shape), (operands, mixed, lse)


def _attend_forward(options: Options, inputs: Inputs):
  # The fused gradient takes the cache as a constant. The plain one needs all inputs.
  cache = inputs.cache
  constant = cache is not None and not (cache.keys.perturbed or cache.values.perturbed)
  inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
  result, residuals = _run(options, inputs)
  return result, residuals if constant else inputs


def _attend_backward(options: Options, residuals, cotangent: Array | SymbolicZero):
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  # Gradients that flow into a cache, or a row without one: differentiate plain attention.
  if isinstance(residuals, Inputs):
    return (_plain_backward(options, residuals, cotangent),)
  # Fused: gradients of queries, own keys and own values. The constant cache gets none.
  operands, mixed, lse = residuals
  shape, kv_heads = cotangent.shape, operands.own.keys.shape[1]
  layout = options.layout(shape, kv_heads, operands.shared.keys.shape[2])
  queries, own = options.kernels.run(
      options.kernels.backward, layout.tiles, *operands, mixed, lse, layout.flatten(cotangent))
  keys, values = (layout.unflatten(x, (*shape[:3], kv_heads, shape[4])) for x in own)
  return (Inputs(layout.unflatten(queries, shape), keys, values, None, None, None, None),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _plain_backward(options: Options, inputs: Inputs, cotangent: Array) -> Inputs:
  """Returns the gradients by all inputs, with the cache; integer inputs get None."""

  def plain(inputs: Inputs) -> Array:
    return attention.attend_visible(*inputs, cap=options.cap)

  _, pull = jax.vjp(plain, inputs)
  return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf,
                      pull(cotangent)[0])
