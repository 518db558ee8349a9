"""Fused attention: the same function as the plain one, without scores in memory.

Plain attention writes [M * Q, S] scores of every head. Here a kernel makes them block by block and
leaves out the blocks of keys that no query of a block sees: beyond its furthest horizon, before its
sliding window, in other documents. Traces in the order of their anchors so cost half of the keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import PartitionSpec

from latent_deliberation.array_types import Array, Float, Int, RowTokens, typed
from latent_deliberation.model import attention
from latent_deliberation.model.attention import Visibility
from latent_deliberation.model.cache import KVCache
from latent_deliberation.model.kernels.machines import Kernels, choose_kernels
from latent_deliberation.model.kernels.tiling import Inputs, Layout, Operands, lay_out

# What a remat policy may keep of a layer so that its backward pass need not run the kernel again.
SAVED = ('attention_mixed', 'attention_lse')


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
    visibility: Visibility,
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
    ValueError: another platform; heads that a GPU cannot hold; several rows without a cache; heads
      split otherwise than kv heads.
  """
  kernels = kernels or choose_kernels(queries)
  if cache is None and (queries.shape[1] > 1 or visibility.first is not None):
    raise ValueError(f"attention = 'fused' on {queries.shape[1]} rows without a cache: it takes "
                     "rows over a cache, or one causal row; set attention = 'plain'")
  inputs = Inputs(queries, keys, values, positions, visibility, window, cache)
  return _over_mesh(functools.partial(_attend, Options(cap, kernels)), inputs)(inputs)


def _over_mesh(function, inputs: Inputs):
  """The function on each device's own texts and heads, where there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  queries = nn.logical_to_mesh_axes(('batch', 'trace', None, 'heads'))
  fresh = nn.logical_to_mesh_axes(('batch', 'trace', None, 'kv_heads'))
  batch, trace, _, kv_heads = fresh
  if queries != fresh and inputs.keys.shape[3] > 1:
    raise ValueError(
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
      options.kernels.forward, layout.tiles, *operands), SAVED)
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
