"""The kernels for NVIDIA GPUs over their grids: which blocks each program holds.

Eight warps, and blocks of 128 rows and 64 keys, are for Hopper and heads of 256 in bfloat16. Shared
memory, of which a program may have 227 KB, then holds (forward) queries of 64 KB and keys and
values of 32 KB each, twice, since the next block is loaded meanwhile: 192 KB; (gradient of queries)
queries and incoming gradients, 64 KB each, and keys and values once: 192 KB, and no room for twice.
The sums, 128 KB in float32, take half of the registers; those of own keys and values, in blocks of
64, as many.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from latent_deliberation.array_types import Array
from latent_deliberation.model.kernels.gpu_kernels import forward_kernel, own_kernel, query_kernel
from latent_deliberation.model.kernels.tiles import Keys, Rows, Tiles


def _flat(index: Array) -> Array:
  """[B, 2 or 4, S] from the blocks [B, blocks, 2 or 4, S / blocks] of an index."""
  batch, _, parts, _ = index.shape
  return jnp.moveaxis(index, 2, 1).reshape(batch, parts, -1)


def _flat_keys(keys: Keys | tuple[()]) -> Keys | tuple[()]:
  return keys and keys._replace(index=_flat(keys.index))


def _over_rows(kernel, name: str, tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()],
               more: tuple[Array, ...], out_shape, num_stages: int):
  """A kernel over the grid (row block, head, text), with the arrays that both have first.

  Args:
    more: arrays [B, N, I * R, ...] that are held in blocks of rows, as results are.
  """
  batch, blocks = rows.begin.shape
  heads = rows.queries.shape[1]

  def of_rows(leaf) -> pl.BlockSpec:
    rest = leaf.shape[3:]
    return pl.BlockSpec((None, None, tiles.rows, *rest),
                        lambda i, n, b: (b, n, blocks - 1 - i, *(0 for _ in rest)))

  def of_keys(keys: Keys) -> Keys:
    whole = pl.BlockSpec((None, None, *keys.keys.shape[2:]),
                         lambda i, n, b: (b, n // tiles.group, 0, 0))
    of_text = pl.BlockSpec((None, *keys.index.shape[1:]), lambda i, n, b: (b, 0, 0))
    return Keys(whole, whole, of_text)

  shared, own = _flat_keys(shared), _flat_keys(own)
  bound = pl.BlockSpec((None, None), lambda i, n, b: (b, blocks - 1 - i))
  index = pl.BlockSpec((None, 4, tiles.rows), lambda i, n, b: (b, 0, blocks - 1 - i))
  return pl.pallas_call(
      functools.partial(kernel, tiles=tiles), name=name, interpret=tiles.interpret,
      grid=(blocks, heads, batch),
      in_specs=(bound, bound, of_rows(rows.queries), index, of_keys(shared), own and of_keys(own),
                *map(of_rows, more)),
      out_specs=jax.tree.map(of_rows, out_shape), out_shape=out_shape,
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=num_stages),
  )(rows.begin, rows.end, rows.queries, _flat(rows.index), shared, own, *more)


def forward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys | tuple[()]) -> tuple[Array, Array]:
  """Attention of all rows, [B, N, I * R, H], and log-sum-exp of their scores [B, N, I * R]."""
  queries = rows.queries
  out_shape = (jax.ShapeDtypeStruct(queries.shape, queries.dtype),
               jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32))
  return _over_rows(forward_kernel, 'attention', tiles, rows, shared, own, (), out_shape, 2)


def backward(tiles: Tiles, rows: Rows, shared: Keys, own: Keys, mixed: Array, lse: Array,
             cotangent: Array) -> tuple[Array, tuple[Array, Array]]:
  """Gradients of the queries and of (own keys, own values); the shared keys are constants.

  Args:
    mixed, lse: results of `forward`.
    cotangent: gradient of `mixed`.
  """
  delta = jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
  of_rows = lse, delta, cotangent
  by_queries = _over_rows(
      query_kernel, 'attention_gradient', tiles, rows, shared, own, of_rows,
      jax.ShapeDtypeStruct(rows.queries.shape, rows.queries.dtype), 1)
  return by_queries, _own_gradients(tiles, rows, own, *of_rows)


def _own_gradients(tiles: Tiles, rows: Rows, own: Keys, *of_rows: Array) -> tuple[Array, Array]:
  """Over the grid (key block, kv head, text)."""
  batch, kv_heads, length, width = own.keys.shape

  def whole(leaf) -> pl.BlockSpec:
    rest = leaf.shape[2:]
    return pl.BlockSpec((None, leaf.shape[1] // kv_heads, *rest),
                        lambda j, k, b: (b, k, *(0 for _ in rest)))

  def of_text(index: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, *index.shape[1:]), lambda j, k, b: (b, 0, 0))

  index, own = _flat(rows.index), _flat_keys(own)
  all_keys = pl.BlockSpec((None, None, length, width), lambda j, k, b: (b, k, 0, 0))
  block = pl.BlockSpec((None, None, tiles.keys, width), lambda j, k, b: (b, k, j, 0))
  return pl.pallas_call(
      functools.partial(own_kernel, tiles=tiles), name='attention_own_gradient',
      interpret=tiles.interpret, grid=(length // tiles.keys, kv_heads, batch),
      in_specs=(whole(rows.queries), of_text(index), Keys(all_keys, all_keys, of_text(own.index)),
                *map(whole, of_rows)),
      out_specs=(block, block),
      out_shape=(jax.ShapeDtypeStruct(own.keys.shape, own.keys.dtype),) * 2,
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
  )(rows.queries, index, own, *of_rows)
