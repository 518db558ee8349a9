"""The decoder: a language model of embedder, transformer and output head.

`fingerprint` gives any tree of weights a short name that changes with every bit of it.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latent_deliberation.array_types import (
  Array,
  Float,
  Params,
  PyTree,
  Rows,
  RowTokens,
  Tokens,
  typed,
)
from latent_deliberation.model.attention import AttentionMaskSpec, KeysValues, KVCache, softcap
from latent_deliberation.model.layers import Embedder
from latent_deliberation.model.products import contract
from latent_deliberation.model.transformer import Transformer
from latent_deliberation.model.transformer_config import TransformerConfig


class Decoder(nn.Module):
  """A decoder of the Gemma or Llama family.

  Its parameters are {'embedder': ..., 'transformer': ...}.

  Attributes:
    config: architecture.
    dtype: dtype of the computation; the weights keep their own.
    remat, scan, attention, activations: see Transformer.
  """
  config: TransformerConfig
  dtype: str = 'float32'
  remat: str = 'none'
  scan: bool = True
  attention: str = 'plain'
  activations: str | None = None

  def setup(self):
    self.embedder = Embedder(self.config.vocab_size, self.config.embed_dim,
                             self.config.scale_embeddings, self.config.tied_head)
    self.transformer = Transformer(self.config, remat=self.remat, scan=self.scan,
                                   attention=self.attention, activations=self.activations)

  @typed
  def __call__(self, tokens: Tokens, positions: Tokens | None = None,
               segments: Tokens | None = None,
               ) -> tuple[Float[Array, 'B T V'], KVCache]:
    """Returns the logits of whole texts, float32, and their kv-cache.

    Args:
      tokens: token ids.
      positions: position of each token in its document; default 0..T-1.
      segments: document of each token, 0 for padding; default one document a text.
    """
    hidden, cache = self.prefill(tokens, positions, segments)
    return self.logits(hidden), cache

  @typed
  def prefill(self, tokens: Tokens, positions: Tokens | None = None,
              segments: Tokens | None = None) -> tuple[Float[Array, 'B T D'], KVCache]:
    """Returns the hidden states of whole texts, and their kv-cache; arguments as in `__call__`."""
    tokens = jnp.asarray(tokens)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
      segments = jnp.ones_like(tokens)
    # A text is one row of fresh tokens without a cache, so its prefix length is 0.
    positions, segments = positions[:, None], segments[:, None]
    nothing = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    hidden, fresh = self.transform(
        self.embed(tokens[:, None]), positions, AttentionMaskSpec(segments, nothing))
    return hidden[:, 0], KVCache.empty(fresh).append(fresh, positions, segments)

  @typed
  def embed(self, tokens: RowTokens) -> Rows:
    """Returns input embeddings, scaled if the config says so, in the dtype of the computation."""
    return self.embedder.encode(tokens, self.dtype)

  def transform(self, x: Array, positions: Array, mask_spec: AttentionMaskSpec,
                cache: KVCache | None = None) -> tuple[Array, KeysValues]:
    """Runs the transformer on embeddings, which may be latents. See Transformer."""
    return self.transformer(x, positions, mask_spec, cache)

  def logits(self, hidden: Float[Array, '... D']) -> Float[Array, '... V']:
    """Returns soft-capped next-token logits, float32."""
    raw = contract(hidden, self.embedder.output_head.astype(hidden.dtype))
    return softcap(raw, self.config.final_softcap)


def boxed_shapes(config: TransformerConfig) -> PyTree:
  """Returns the shapes of a decoder's parameters, boxed with logical axes; allocates nothing."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)['params']


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_BLOCK = 1 << 24  # elements that are hashed at a time, to bound memory


def _checksums(leaf: Array) -> np.ndarray:
  """Returns two uint32 sums over the bits of a leaf, weighted by a hash of each element's index.

  Integer sums wrap and are therefore exact in any order. Neither shards nor blocks change them.
  Each sum is fetched before the next begins: processes that have several sums under way on CPUs may
  pair one with another, and wait for ever.
  """
  # Slices of an array that is sharded along its first axis would move data: hash it whole.
  if leaf.ndim == 0 or not _is_whole_along_first_axis(leaf):
    return jax.device_get(_block_checksums(leaf, 0))
  rows = max(_BLOCK * len(leaf) // max(leaf.size, 1), 1)
  blocks = [jax.device_get(_block_checksums(leaf[start:start + rows], start))
            for start in range(0, len(leaf), rows)]
  return sum(blocks[1:], blocks[0])


def _is_whole_along_first_axis(leaf: Array) -> bool:
  """Whether every device has the whole first axis: its slices then move no data."""
  return leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] > 0


@jax.jit
def _block_checksums(leaf: Array, start: Array) -> Array:
  """Returns the sums over a leaf whose first element has index `start` along the first axis."""
  bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
  # Hash the place of each element in the whole leaf, axis by axis.
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    step = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    step += jnp.uint32(start) if axis == 0 else 0
    index = _mix(index + step + jnp.uint32(0x9E3779B9) * jnp.uint32(axis + 1))
  # Odd weights are invertible mod 2^32, so that a change of one element always shows.
  first = jnp.sum(bits * (index | 1), dtype=jnp.uint32)
  second = jnp.sum(_mix(bits ^ index), dtype=jnp.uint32)
  return jnp.stack([first, second])


def _mix(x: Array) -> Array:
  """Scrambles 32-bit integers, invertibly (two rounds of xor-shift and multiply)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def fingerprint(params: Params) -> str:
  """Returns a hash of a tree of arrays: paths, shapes, dtypes and every bit; 32 hex digits."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  hasher = hashlib.sha256()
  for path, leaf in leaves:
    hasher.update(f'{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} '.encode())
    hasher.update(_checksums(jnp.asarray(leaf)).astype('<u4').tobytes())
  return hasher.hexdigest()[:32]
