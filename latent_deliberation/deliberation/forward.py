"""The three passes: prefill, coprocess, second pass. This file is the paper.

Named scopes are the names of the passes in a profile. They change no program.
"""

import dataclasses

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, Batch, Float, Latents, Params, typed
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.loss import token_nll
from latent_deliberation.deliberation.traces import Placement, Traces, place
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.layers import output_head


@dataclasses.dataclass(frozen=True)
class Deliberator:
  """A frozen decoder and the coprocessor that augments its cache.

  Attributes:
    decoder: the decoder module, without weights.
    coprocessor: the coprocessor, without weights.
    tuned: whether gradients flow through the trunk's cache, for a control that trains the decoder.
  """
  decoder: Decoder
  coprocessor: Coprocessor
  tuned: bool = False

  @property
  def config(self) -> DeliberationConfig:
    return self.coprocessor.config

  def with_traces(self, num_traces: int, num_ahead: int) -> 'Deliberator':
    """Returns a copy for other numbers of traces and ahead tokens; traces bring their own delay."""
    config = self.config.with_traces(num_traces, num_ahead)
    return dataclasses.replace(
        self, coprocessor=dataclasses.replace(self.coprocessor, config=config))

  @typed
  def forward(self, params: Params, decoder_params: Params, batch: Batch,
              traces: Traces) -> Float[Array, 'B M A D']:
    """Returns the hidden states that predict each ahead token, for all traces of all texts.

    Args:
      params: parameters of the coprocessor.
      decoder_params: frozen weights of the decoder.
      batch: the trunks.
      traces: where to deliberate.
    """
    trunk, cache = self.prefill(decoder_params, batch)
    # Integers alone place the traces; the passes are the same for every kind of latents.
    placement = place(batch, traces.anchors, self.config, traces.ahead_tokens.shape[-1],
                      traces.delay)
    outputs = self.coprocess(params, decoder_params, placement, trunk, cache)
    latents = self.latents(params, decoder_params, placement, outputs)
    return self.second_pass(decoder_params, latents, traces, placement, cache)

  @jax.named_scope('prefill')
  def prefill(self, decoder_params: Params, batch: Batch) -> tuple[Array, KVCache]:
    """First pass: the decoder reads the trunks. Returns hidden states [B, T, D] and kv-cache."""
    hidden, cache = self.decoder.apply(
        {'params': decoder_params}, batch.tokens, batch.positions, batch.segments,
        method='prefill')
    return hidden, cache if self.tuned else jax.lax.stop_gradient(cache)

  @jax.named_scope('coprocess')
  def coprocess(self, params: Params, decoder_params: Params, placement: Placement, trunk: Array,
                cache: KVCache) -> Latents:
    """The coprocessor reads the cache. Returns its outputs [B, M, Z, D] at the soft tokens."""
    base = self._base(decoder_params, placement)
    return self.coprocessor.read_cache(params, decoder_params, base, placement, trunk, cache)

  def latents(self, params: Params, decoder_params: Params, placement: Placement,
              outputs: Latents) -> Latents:
    """Returns the latents that the decoder reads, made from the coprocessor's outputs."""
    return self.coprocessor.compose(params, outputs, self._base(decoder_params, placement))

  @jax.named_scope('second_pass')
  def second_pass(self, decoder_params: Params, latents: Latents, traces: Traces,
                  placement: Placement, cache: KVCache) -> Float[Array, 'B M A D']:
    """Second pass: the decoder reads [latents, ahead tokens] after the trunk's cache.

    The last latent predicts the first ahead token, and ahead token i predicts ahead token i + 1.
    The last ahead token predicts nothing that the loss covers, so the decoder does not read it.
    Ahead tokens that precede delayed latents see the unchanged trunk and no latents.
    """
    ahead = self.decoder.apply(
        {'params': decoder_params}, traces.ahead_tokens[..., :-1], method='embed')
    positions = jnp.concatenate(
        [placement.latent_positions, placement.ahead_positions[..., :-1]], axis=-1)
    segments = jnp.broadcast_to(placement.segments[..., None], positions.shape)
    hidden, _ = self.decoder.apply(
        {'params': decoder_params}, jnp.concatenate([latents, ahead], axis=2), positions,
        self._decoder_mask_spec(placement, segments), cache, method='transform')
    return hidden[:, :, self.config.num_latents - 1:]

  def _decoder_mask_spec(self, placement: Placement, segments: Array) -> AttentionMaskSpec:
    """Returns the limits of attention in the second pass, [B, M, Z + A - 1]."""
    if placement.late is None:
      return AttentionMaskSpec(segments, placement.decoder_prefix_length)
    # Late ahead tokens see the whole prefix. They skip the latents, which come first in the row.
    late = jnp.pad(placement.late[..., :-1], ((0, 0), (0, 0), (self.config.num_latents, 0)))
    prefix_length = jnp.where(late, placement.coprocessor_prefix_length[..., None],
                              placement.decoder_prefix_length[..., None])
    return AttentionMaskSpec(segments, prefix_length, jnp.where(late, self.config.num_latents, 0))

  def _base(self, decoder_params: Params, placement: Placement) -> Latents:
    """Embeddings [B, M, Z, D] of the base tokens of the latents."""
    return self.decoder.apply({'params': decoder_params}, placement.base_tokens, method='embed')


@jax.named_scope('loss')
@typed
def ahead_nll(hidden: Float[Array, 'B M A D'], traces: Traces, decoder_params: Params,
              final_softcap: float | None, loss_chunk: int) -> Float[Array, 'B M A']:
  """Returns -log p of each ahead token in nats; invalid ahead tokens get a value as well."""
  batch, num_traces, num_ahead, width = hidden.shape
  nll = token_nll(
      hidden.reshape(batch, num_traces * num_ahead, width),
      traces.ahead_tokens.reshape(batch, -1), output_head(decoder_params),
      final_softcap, loss_chunk)
  return nll.reshape(batch, num_traces, num_ahead)
