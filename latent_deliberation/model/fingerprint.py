"""A fingerprint of weights that is the same on any mesh and differs when a single bit does."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Params

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_BLOCK = 1 << 24  # elements whose hashes exist at the same time


def _checksums(leaf: Array) -> Array:
  """Two uint32 sums over the bits of a leaf, each element weighted by a hash of its index.

  Integer sums wrap, so they are exact in any order: sharded or not, in blocks or at once, the
  result is the same.
  """
  if leaf.ndim == 0 or not _is_whole_along_first_axis(leaf):
    return _block_checksums(leaf, 0)
  rows = max(_BLOCK * len(leaf) // max(leaf.size, 1), 1)
  blocks = [_block_checksums(leaf[start:start + rows], start)
            for start in range(0, len(leaf), rows)]
  return sum(blocks[1:], blocks[0])


def _is_whole_along_first_axis(leaf: Array) -> bool:
  """Whether every device has all of the first axis, so that slices of it move nothing."""
  return leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] > 0


@jax.jit
def _block_checksums(leaf: Array, start: Array) -> Array:
  """The sums over a leaf whose first element has index `start` along the first axis."""
  bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    step = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    step += jnp.uint32(start) if axis == 0 else 0
    index = _mix(index + step + jnp.uint32(0x9E3779B9) * jnp.uint32(axis + 1))
  # Odd weights are invertible mod 2^32: no change of one element can cancel.
  first = jnp.sum(bits * (index | 1), dtype=jnp.uint32)
  second = jnp.sum(_mix(bits ^ index), dtype=jnp.uint32)
  return jnp.stack([first, second])


def _mix(x: Array) -> Array:
  """An invertible scrambling of 32-bit integers (two rounds of xor-shift and multiply)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def fingerprint(params: Params) -> str:
  """Hex digest of a tree of arrays: their paths, shapes, dtypes and every bit of their values."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  sums = jax.device_get([_checksums(jnp.asarray(leaf)) for _, leaf in leaves])
  digest = hashlib.sha256()
  for (path, leaf), checksum in zip(leaves, sums, strict=True):
    digest.update(f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} '.encode())
    digest.update(np.asarray(checksum).astype('<u4').tobytes())
  return digest.hexdigest()[:32]
