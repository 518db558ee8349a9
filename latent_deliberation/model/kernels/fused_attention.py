"""Fused attention: the same function as the plain one, without scores in memory.

Plain attention writes [M * Q, S] scores of every head. Here a kernel makes them block by block and
leaves out the blocks of keys that no query of a block sees: beyond its furthest prefix_length, before its
sliding window, in other documents. Traces in the order of their anchors so cost half of the keys.
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

# What model/transformer.py takes from here in place of its own plain functions.
__all__ = ['attend_visible', 'pad', 'rotate', 'row_major']

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
    UserError: another platform, or heads that a GPU cannot hold.
  """
  platform = jax.default_backend()
  if platform not in ('cpu', 'tpu', 'gpu'):
    raise UserError(f"attention = 'fused' on platform {platform!r}: its kernels are for TPUs and "
                     "NVIDIA GPUs (and interpreted on CPUs, for tests); set attention = 'plain'")
  if platform != 'gpu':
    return TPU
  width, row_bytes = queries.shape[-1], queries.shape[-1] * queries.dtype.itemsize
  if width < 16 or width.bit_count() > 1 or row_bytes > GPU_ROW_BYTES:
    raise UserError(f"attention = 'fused' on a GPU with heads of {width} x {queries.dtype}: its "
                     f'kernels take a power of two from 16 on, up to {GPU_ROW_BYTES} bytes; set '
                     "attention = 'plain', or dtype = 'bfloat16' where the bytes are too many")
  return GPU


@dataclasses.dataclass(frozen=True)
class Options:
  """Arguments of `attend_visible` that are compiled in."""
  cap: float | None
  kernels: Kernels

  def layout(self, shape: tuple[int, ...], kv_heads: int, cached: int | None) -> Layout:
    """See Layout.aligned."""
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

  The backward pass is fused where the cache is a constant, as the frozen decoder's is. Where there
  is none, or gradients flow into it, the backward pass is the plain one. Under a mesh, each device
  works on its own texts and heads, by the logical-axis rules.

  Args:
    kernels: for tests and tuning; by default those of the machine at hand, a TPU's on a CPU.

  Raises:
    UserError: another platform; heads that a GPU cannot hold; several rows without a cache; heads
      split otherwise than kv heads.
  """
  kernels = kernels or choose_kernels(queries)
  if cache is None and (queries.shape[1] > 1 or mask_spec.first is not None):
    raise UserError(f"attention = 'fused' on {queries.shape[1]} rows without a cache: it takes "
                     "rows over a cache, or one causal row; set attention = 'plain'")
  inputs = Inputs(queries, keys, values, positions, mask_spec, window, cache)
  return _over_mesh(functools.partial(_attend, Options(cap, kernels)), inputs)(inputs)


def _over_mesh(function, inputs: Inputs):
  """The function on each device's own texts and heads, where there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  queries = nn.logical_to_mesh_axes(('batch', 'trace', None, 'heads'))
  fresh = nn.logical_to_mesh_axes(('batch', 'trace', None, 'kv_heads'))
  batch, trace, _, kv_heads = fresh
  if queries != fresh and inputs.keys.shape[3] > 1:
    raise UserError(
        f"attention = 'fused': the rules split 'heads' over {queries[3]} and 'kv_heads' over "
        f'{kv_heads}, so that a device lacks the keys of its queries; give both the same rule')
  rows, text = PartitionSpec(batch, trace), PartitionSpec(batch)
  shared = PartitionSpec(batch, None, kv_heads)
  cache = inputs.cache and KVCache(shared, shared, text, text)
  specs = Inputs(queries, fresh, fresh, rows, rows, PartitionSpec(), cache)
  return jax.shard_map(function, in_specs=(specs,), out_specs=queries, check_vma=False)


def row_major(x: Array) -> Array:
  """Activations [B, M, Q, D] as they are, laid out in memory in this order of axes.

  XLA may choose columns, which the kernels do not take, and then turns each layer's residuals.
  """
  constrain = functools.partial(with_layout_constraint, layouts=MemoryLayout((0, 1, 2, 3)))
  if jax.sharding.get_abstract_mesh().empty:
    return constrain(x)
  # Device by device: a partitioner that does not know the constraint gathers the whole array.
  axes = nn.logical_to_mesh_axes(('batch', 'trace', 'length', 'activation'))
  return jax.shard_map(constrain, in_specs=axes, out_specs=axes, check_vma=False)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, inputs: Inputs) -> Array:
  return _run(options, inputs)[0]


def _run(options: Options, inputs: Inputs) -> tuple[Array, tuple[Operands, Array, Array]]:
  """The result, and all that its fused gradient needs."""
  shape, kv_heads = inputs.queries.shape, inputs.keys.shape[3]
  layout = options.layout(shape, kv_heads, inputs.cache and inputs.cache.keys.shape[1])
  operands = lay_out(layout, inputs)
  mixed, lse = map(checkpoint_name, options.kernels.run(
      options.kernels.forward, layout.tiles, *operands), FUSED_RESULTS)
  return layout.unflatten(mixed, shape), (operands, mixed, lse)


def _attend_forward(options: Options, inputs: Inputs):
  cache = inputs.cache
  constant = cache is not None and not (cache.keys.perturbed or cache.values.perturbed)
  inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
  result, residuals = _run(options, inputs)
  return result, residuals if constant else inputs


def _attend_backward(options: Options, residuals, cotangent: Array | SymbolicZero):
  if isinstance(cotangent, SymbolicZero):
    cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
  if isinstance(residuals, Inputs):
    return (_plain_backward(options, residuals, cotangent),)
  operands, mixed, lse = residuals
  shape, kv_heads = cotangent.shape, operands.own.keys.shape[1]
  layout = options.layout(shape, kv_heads, operands.shared.keys.shape[2])
  queries, own = options.kernels.run(
      options.kernels.backward, layout.tiles, *operands, mixed, lse, layout.flatten(cotangent))
  keys, values = (layout.unflatten(x, (*shape[:3], kv_heads, shape[4])) for x in own)
  return (Inputs(layout.unflatten(queries, shape), keys, values, None, None, None, None),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _plain_backward(options: Options, inputs: Inputs, cotangent: Array) -> Inputs:
  """Gradients by everything that has some, the cache included."""

  def plain(inputs: Inputs) -> Array:
    return attention.attend_visible(*inputs, cap=options.cap)

  _, pull = jax.vjp(plain, inputs)
  return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf,
                      pull(cotangent)[0])
