"""A fingerprint of weights that is the same on any mesh and differs when a single bit does."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Params

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _checksums(leaf: Array) -> Array:
  """Two uint32 sums over the bits of a leaf, each element weighted by a hash of its index.

  Integer sums wrap, so they are exact in any order: sharded or not, the result is the same.
  """
  bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    step = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
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
