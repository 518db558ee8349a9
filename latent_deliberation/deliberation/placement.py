"""Where latents stand: their positions, the tokens they base on, and what their trace may see.

The three parametrisations and two position schemes differ in these few integers and in nothing
else; the forward pass that uses them is one and the same.
"""

import jax.numpy as jnp
from flax import struct

from latent_deliberation.array_types import Array, Batch
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.traces import take_from_trunk


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
