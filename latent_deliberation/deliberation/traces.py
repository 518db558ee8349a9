"""Traces: where in a trunk to deliberate, and where their latents and ahead tokens stand.

Paper, section 2.3. `sample_traces` draws anchors, `place` gives positions and prefix lengths. The
three parametrisations of latents and the two position schemes differ in the integers of a
Placement and in nothing else; one forward pass serves all of them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Batch
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig


@struct.dataclass
class Traces:
  """M traces of each of B texts, in the order of their anchors.

  Attributes:
    anchors: int32 [B, M] trunk index of the last token that a trace may see.
    valid: bool [B, M] False where a text had fewer than M places left.
    ahead_tokens: int32 [B, M, A] the tokens behind the anchor.
    ahead_valid: bool [B, M, A] False past the end of the anchor's document.
    delay: int32 [B, M] ahead tokens that have been read when the latents join; None for none.
  """
  anchors: Array
  valid: Array
  ahead_tokens: Array
  ahead_valid: Array
  delay: Array | None = None

  @property
  def counted(self) -> Array:
    """bool [B, M, A] valid ahead tokens that the latents had a chance to predict.

    The token after a delay of d is predicted by the d-th, which had not seen them.
    """
    if self.delay is None:
      return self.ahead_valid
    index = jnp.arange(self.ahead_tokens.shape[-1])
    delay = self.delay[..., None]
    return self.ahead_valid & ((delay == 0) | (index > delay))


def sample_traces(keys: Array, batch: Batch, config: DeliberationConfig,
                  first_anchor: int = 0) -> Traces:
  """Draws M distinct anchors from every text, uniformly among those that can hold a trace.

  An anchor needs a next token in its own document and `config.first_anchor` tokens before it, and
  is one of `config.anchor_tokens` where there are any.
  The draw depends on a text's own key alone, so neither the mesh nor gradient accumulation
  changes it.

  Args:
    keys: [B] PRNG keys, one a text.
    batch: packed texts.
    first_anchor: least index in its document that an anchor may have, beside that of `config`.
  """
  following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
  allowed = ((batch.segments > 0) & (following == batch.segments)
             & (batch.positions >= max(first_anchor, config.first_anchor)))
  if config.anchor_tokens:
    allowed &= jnp.isin(batch.tokens, jnp.array(config.anchor_tokens))
  length = batch.tokens.shape[1]
  score = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
  score, anchors = jax.lax.top_k(jnp.where(allowed, score, -1.0), config.num_traces)
  # Sorted, so that a kernel can skip the blocks of keys beyond a group's last anchor.
  order = jnp.argsort(jnp.where(score >= 0, anchors, length), axis=-1)
  anchors = jnp.take_along_axis(anchors, order, axis=-1).astype(jnp.int32)
  valid = jnp.take_along_axis(score, order, axis=-1) >= 0
  traces = gather_traces(batch, anchors, valid, config.num_ahead)
  if config.max_delay:
    draw = lambda key: jax.random.randint(  # noqa: E731
        jax.random.fold_in(key, 1), (config.num_traces,), 0, config.max_delay + 1)
    traces = traces.replace(delay=jax.vmap(draw)(keys))
  return traces


def gather_traces(batch: Batch, anchors: Array, valid: Array, num_ahead: int) -> Traces:
  """The traces of given anchors [B, M]; ahead tokens of another document are marked invalid."""
  length = batch.tokens.shape[1]
  index = anchors[..., None] + 1 + jnp.arange(num_ahead)
  inside = index < length
  index = jnp.minimum(index, length - 1)
  ahead_tokens = take_from_trunk(batch.tokens, index)
  same = take_from_trunk(batch.segments, index) == take_from_trunk(
      batch.segments, anchors[..., None])
  return Traces(anchors=anchors, valid=valid, ahead_tokens=ahead_tokens,
                ahead_valid=inside & same & valid[..., None])


def take_from_trunk(trunk: Array, index: Array) -> Array:
  """trunk [B, T] at indices [B, M, ...]."""
  return jax.vmap(lambda row, at: row[at])(trunk, index)


@struct.dataclass
class Placement:
  """Attributes, all int32:
    segments: [B, M] document of the trace.
    latent_positions: [B, M, Z].
    ahead_positions: [B, M, A].
    base_tokens: [B, M, Z] token whose embedding a latent, or a additive soft token, starts from.
    coprocessor_prefix_length: [B, M] trunk tokens that the coprocessor reads.
    decoder_prefix_length: [B, M] trunk tokens that the decoder's second pass reads beside latents.
    late: bool [B, M, A] ahead tokens that were read before the latents came; None for none.
  """
  segments: Array
  latent_positions: Array
  ahead_positions: Array
  base_tokens: Array
  coprocessor_prefix_length: Array
  decoder_prefix_length: Array
  late: Array | None = None


def place(batch: Batch, anchors: Array, config: DeliberationConfig, num_ahead: int,
          delay: Array | None = None) -> Placement:
  """Placement of the traces that start at `anchors` [B, M].

  Args:
    delay: [B, M] ahead tokens that are read before the latents come; None for none.
  """
  latents = jnp.arange(config.num_latents)
  anchor_positions = take_from_trunk(batch.positions, anchors)[..., None]
  ahead_positions = anchor_positions + 1 + jnp.arange(num_ahead)
  late = None if delay is None else jnp.arange(num_ahead) < delay[..., None]
  prefix_length = anchors + 1
  decoder_prefix_length = prefix_length
  base = jnp.broadcast_to(anchors[..., None], (*anchors.shape, config.num_latents))
  if config.latents == 'refining':
    base = anchors[..., None] + 1 - config.num_latents + latents
    latent_positions = anchor_positions + 1 - config.num_latents + latents
    decoder_prefix_length = prefix_length - config.num_latents
  elif config.positions == 'share':
    latent_positions = anchor_positions + 0 * latents
  else:
    latent_positions = anchor_positions + 1 + latents
    shifted = ahead_positions + config.num_latents
    ahead_positions = shifted if late is None else jnp.where(late, ahead_positions, shifted)
  # Traces that do not exist have arbitrary anchors; their indices must still be indices.
  base = jnp.maximum(base, 0)
  return Placement(
      segments=take_from_trunk(batch.segments, anchors),
      latent_positions=latent_positions,
      ahead_positions=ahead_positions,
      base_tokens=take_from_trunk(batch.tokens, base),
      coprocessor_prefix_length=prefix_length,
      decoder_prefix_length=decoder_prefix_length,
      late=late)
