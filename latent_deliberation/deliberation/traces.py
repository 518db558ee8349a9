"""Traces: the anchors in a trunk, their ahead tokens, and the placement of their latents.

Paper, section 2.3. `sample_traces` draws anchors. `place` computes positions and prefix lengths.
The three kinds of latents and the two position schemes differ only in the integers of a Placement,
so one forward pass serves all of them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Batch, Bool, Int
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig


@struct.dataclass
class Traces:
  """M traces of each of B texts, in the order of their anchors.

  Attributes:
    anchors: trunk index of the last token that a trace may see.
    valid: False where a text had fewer than M places for an anchor.
    ahead_tokens: the tokens after the anchor.
    ahead_valid: False past the end of the anchor's document.
    delay: number of ahead tokens that are read before the latents join; None for no delays.
  """
  anchors: Int[Array, 'B M']
  valid: Bool[Array, 'B M']
  ahead_tokens: Int[Array, 'B M A']
  ahead_valid: Bool[Array, 'B M A']
  delay: Int[Array, 'B M'] | None = None

  @property
  def counted(self) -> Bool[Array, 'B M A']:
    """Valid ahead tokens that the latents had a chance to predict.

    With a delay of d > 0, ahead token d predicts ahead token d + 1 and has seen no latents.
    """
    if self.delay is None:
      return self.ahead_valid
    index = jnp.arange(self.ahead_tokens.shape[-1])
    delay = self.delay[..., None]
    return self.ahead_valid & ((delay == 0) | (index > delay))


def evaluation_keys(seed: int, index: Array | int, batch: Batch) -> Array:
  """Returns the keys for `sample_traces` of batch `index` of an evaluation.

  All that scores, or measures beside scores, takes them, and so has the same places.
  """
  return jax.random.split(jax.random.fold_in(jax.random.key(seed), index), len(batch.tokens))


def sample_traces(keys: Array, batch: Batch, config: DeliberationConfig,
                  first_anchor: int = 0) -> Traces:
  """Draws M distinct anchors from every text, uniformly among all places that can hold a trace.

  An anchor needs a next token in its own document and `config.first_anchor` tokens before it. Where
  `config.anchor_tokens` is not empty, the anchor is one of them. The draw depends on a text's own
  key alone, so neither the mesh nor gradient accumulation changes it.

  Args:
    keys: [B] PRNG keys, one for each text.
    batch: packed texts.
    config: number of traces, ahead tokens and delays.
    first_anchor: least index in its document that an anchor may have, if above `config`'s.
  """
  # Places that can hold a trace.
  following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
  allowed = ((batch.segments > 0) & (following == batch.segments)
             & (batch.positions >= max(first_anchor, config.first_anchor)))
  if config.anchor_tokens:
    allowed &= jnp.isin(batch.tokens, jnp.array(config.anchor_tokens))
  # The M places with the highest random scores. Places that are not allowed score -1.
  length = batch.tokens.shape[1]
  score = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
  score, anchors = jax.lax.top_k(jnp.where(allowed, score, -1.0), config.num_traces)
  # Sorted, so that a kernel can skip the blocks of keys beyond a group's last anchor.
  order = jnp.argsort(jnp.where(score >= 0, anchors, length), axis=-1)
  anchors = jnp.take_along_axis(anchors, order, axis=-1).astype(jnp.int32)
  valid = jnp.take_along_axis(score, order, axis=-1) >= 0
  traces = gather_traces(batch, anchors, valid, config.num_ahead)
  if config.max_delay:
    # A key derived from the text's own, so that delays do not change the anchors.
    draw = lambda key: jax.random.randint(  # noqa: E731
        jax.random.fold_in(key, 1), (config.num_traces,), 0, config.max_delay + 1)
    traces = traces.replace(delay=jax.vmap(draw)(keys))
  return traces


def gather_traces(batch: Batch, anchors: Array, valid: Array, num_ahead: int) -> Traces:
  """Returns the traces of given anchors [B, M]; ahead tokens of other documents are invalid."""
  length = batch.tokens.shape[1]
  index = anchors[..., None] + 1 + jnp.arange(num_ahead)
  # Indices past the end read the last token, and are not valid.
  inside = index < length
  index = jnp.minimum(index, length - 1)
  ahead_tokens = take_from_trunk(batch.tokens, index)
  same = take_from_trunk(batch.segments, index) == take_from_trunk(
      batch.segments, anchors[..., None])
  return Traces(anchors=anchors, valid=valid, ahead_tokens=ahead_tokens,
                ahead_valid=inside & same & valid[..., None])


def take_from_trunk(trunk: Array, index: Array) -> Array:
  """Returns trunk [B, T] at indices [B, M, ...]."""
  return jax.vmap(lambda row, at: row[at])(trunk, index)


@struct.dataclass
class Placement:
  """Positions and prefix lengths of the traces of each text.

  Attributes:
    segments: document of the trace.
    latent_positions: position ids of the latents, and of the soft tokens.
    ahead_positions: position ids of the ahead tokens.
    base_tokens: token whose embedding is the base of a latent, and of an additive soft token.
    coprocessor_prefix_length: number of trunk tokens that the coprocessor reads.
    decoder_prefix_length: number of trunk tokens that the decoder's second pass reads.
    late: ahead tokens that are read before the latents join; None for no delays.
  """
  segments: Int[Array, 'B M']
  latent_positions: Int[Array, 'B M Z']
  ahead_positions: Int[Array, 'B M A']
  base_tokens: Int[Array, 'B M Z']
  coprocessor_prefix_length: Int[Array, 'B M']
  decoder_prefix_length: Int[Array, 'B M']
  late: Bool[Array, 'B M A'] | None = None


def place(batch: Batch, anchors: Array, config: DeliberationConfig, num_ahead: int,
          delay: Array | None = None) -> Placement:
  """Returns the placement of the traces at `anchors` [B, M].

  Args:
    batch: packed texts.
    anchors: trunk indices.
    config: kind of latents and position scheme.
    num_ahead: A, number of ahead tokens.
    delay: [B, M] number of ahead tokens that are read before the latents join; None for none.
  """
  # Ahead tokens continue the document, and 'paper' and 'anchored' latents have the anchor as base.
  latents = jnp.arange(config.num_latents)
  anchor_positions = take_from_trunk(batch.positions, anchors)[..., None]
  ahead_positions = anchor_positions + 1 + jnp.arange(num_ahead)
  late = None if delay is None else jnp.arange(num_ahead) < delay[..., None]
  prefix_length = anchors + 1
  decoder_prefix_length = prefix_length
  base = jnp.broadcast_to(anchors[..., None], (*anchors.shape, config.num_latents))
  # Refining latents replace the last Z trunk tokens. Others share the anchor's position, or
  # shift the ahead tokens that come after them.
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
  # Invalid traces have arbitrary anchors, whose indices must still not be negative.
  base = jnp.maximum(base, 0)
  return Placement(
      segments=take_from_trunk(batch.segments, anchors),
      latent_positions=latent_positions,
      ahead_positions=ahead_positions,
      base_tokens=take_from_trunk(batch.tokens, base),
      coprocessor_prefix_length=prefix_length,
      decoder_prefix_length=decoder_prefix_length,
      late=late)
