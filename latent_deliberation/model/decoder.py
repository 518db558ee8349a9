"""A language model: embed, transform, unembed."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from latent_deliberation.array_types import (
  Array,
  Float,
  PyTree,
  Rows,
  RowTokens,
  Tokens,
  typed,
)
from latent_deliberation.model.attention import AttentionMaskSpec, KeysValues, KVCache, softcap
from latent_deliberation.model.layers import Embedder, contract
from latent_deliberation.model.transformer import Transformer
from latent_deliberation.model.transformer_config import TransformerConfig


class Decoder(nn.Module):
  """A Gemma-style decoder. Its parameters are {'embedder': ..., 'transformer': ...}.

  Attributes:
    config: sizes.
    dtype: of the computation; the weights keep theirs.
    remat, scan, attention: see Transformer.
  """
  config: TransformerConfig
  dtype: str = 'float32'
  remat: str = 'none'
  scan: bool = True
  attention: str = 'plain'

  def setup(self):
    self.embedder = Embedder(self.config.vocab_size, self.config.embed_dim)
    self.transformer = Transformer(self.config, remat=self.remat, scan=self.scan,
                                   attention=self.attention)

  @typed
  def __call__(self, tokens: Tokens, positions: Tokens | None = None,
               segments: Tokens | None = None,
               ) -> tuple[Float[Array, 'B T V'], KVCache]:
    """Logits of whole texts, float32, and their kv-cache.

    Args:
      tokens: ids; positions: default 0..T-1; segments: default one document a row.
    """
    hidden, cache = self.prefill(tokens, positions, segments)
    return self.logits(hidden), cache

  @typed
  def prefill(self, tokens: Tokens, positions: Tokens | None = None,
              segments: Tokens | None = None) -> tuple[Float[Array, 'B T D'], KVCache]:
    """Hidden states [B, T, D] of whole texts, and the kv-cache that holds them."""
    tokens = jnp.asarray(tokens)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
      segments = jnp.ones_like(tokens)
    positions, segments = positions[:, None], segments[:, None]
    nothing = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    hidden, fresh = self.transform(
        self.embed(tokens[:, None]), positions, AttentionMaskSpec(segments, nothing))
    return hidden[:, 0], KVCache.empty(fresh).append(fresh, positions, segments)

  @typed
  def embed(self, tokens: RowTokens) -> Rows:
    """Input embeddings, scaled, in the compute dtype."""
    return self.embedder.encode(tokens, self.dtype)

  def transform(self, x: Array, positions: Array, mask_spec: AttentionMaskSpec,
                cache: KVCache | None = None) -> tuple[Array, KeysValues]:
    """The stack on given input embeddings: where latents enter. See Transformer."""
    return self.transformer(x, positions, mask_spec, cache)

  def logits(self, hidden: Float[Array, '... D']) -> Float[Array, '... V']:
    """Soft-capped next-token logits, float32."""
    raw = contract(hidden, self.embedder.table.astype(hidden.dtype),
                   preferred_element_type='float32')
    return softcap(raw, self.config.final_softcap)


def boxed_shapes(config: TransformerConfig) -> PyTree:
  """Shapes of a decoder's parameters, boxed with their logical axes; nothing is allocated."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)['params']
