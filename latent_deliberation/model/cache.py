"""The kv-cache as a value: appending or truncating gives a new one, nothing is ever mutated."""

import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array


@struct.dataclass
class KeysValues:
  """Keys (already rotated to their positions) and values of fresh tokens, [L, B, M, Q, K, H]."""
  keys: Array
  values: Array


@struct.dataclass
class KVCache:
  """What a decoder remembers of B texts of S tokens, packed or not.

  Attributes:
    keys: [L, B, S, K, H], already rotated to their positions.
    values: [L, B, S, K, H].
    positions: [B, S] position of each token in its own document.
    segments: [B, S] document of each token; 0 is a hole that nobody sees.
  """
  keys: Array
  values: Array
  positions: Array
  segments: Array

  @classmethod
  def empty(cls, fresh: KeysValues) -> 'KVCache':
    """A cache of no tokens, shaped to have `fresh` appended."""
    layers, batch, _, _, heads, width = fresh.keys.shape
    keys = jnp.zeros((layers, batch, 0, heads, width), fresh.keys.dtype)
    index = jnp.zeros((batch, 0), jnp.int32)
    return cls(keys=keys, values=keys, positions=index, segments=index)

  @property
  def length(self) -> int:
    """S, the number of cached tokens of each text."""
    return self.keys.shape[2]

  def append(self, fresh: KeysValues, positions: Array, segments: Array) -> 'KVCache':
    """The cache with one row of fresh tokens behind it.

    Args:
      fresh: [L, B, 1, Q, K, H]; a text's cache grows by one row at a time.
      positions: [B, 1, Q].
      segments: [B, 1, Q].
    """
    if fresh.keys.shape[2] != 1:
      raise ValueError(
          f'{fresh.keys.shape[2]} rows of fresh tokens, expected 1: traces of one text are '
          'alternatives, so each continues a cache of its own')
    return KVCache(
        keys=jnp.concatenate([self.keys, fresh.keys[:, :, 0]], axis=2),
        values=jnp.concatenate([self.values, fresh.values[:, :, 0]], axis=2),
        positions=jnp.concatenate([self.positions, positions[:, 0]], axis=1),
        segments=jnp.concatenate([self.segments, segments[:, 0]], axis=1))

  def truncate(self, length: int) -> 'KVCache':
    """The first `length` tokens: detaching latents is truncating the cache they were added to."""
    if not 0 <= length <= self.length:
      raise ValueError(f'cannot truncate a cache of {self.length} tokens to {length}')
    return KVCache(
        keys=self.keys[:, :, :length], values=self.values[:, :, :length],
        positions=self.positions[:, :length], segments=self.segments[:, :length])
