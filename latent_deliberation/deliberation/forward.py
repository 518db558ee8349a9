"""The three passes: prefill, coprocess, second pass. This file is the paper."""

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


@dataclasses.dataclass(frozen=True)
class Deliberator:
  """A frozen decoder and the coprocessor that augments its cache.

  Attributes:
    decoder, coprocessor: without weights.
    tuned: gradients flow through the trunk's cache; only for a control in which the decoder learns.
  """
  decoder: Decoder
  coprocessor: Coprocessor
  tuned: bool = False

  @property
  def config(self) -> DeliberationConfig:
    return self.coprocessor.config

  def with_traces(self, num_traces: int, num_ahead: int) -> 'Deliberator':
    """The same, for other numbers of traces and ahead tokens, and delays that traces bring."""
    config = self.config.with_traces(num_traces, num_ahead)
    return dataclasses.replace(
        self, coprocessor=dataclasses.replace(self.coprocessor, config=config))

  @typed
  def forward(self, params: Params, decoder_params: Params, batch: Batch,
              traces: Traces) -> Float[Array, 'B M A D']:
    """Hidden states from which each ahead token is predicted, all traces of all texts at once.

    Args:
      params: of the coprocessor.
      decoder_params: frozen.
      batch: the trunks.
      traces: where to deliberate.
    """
    trunk, cache = self.prefill(decoder_params, batch)
    placement = place(batch, traces.anchors, self.config, traces.ahead_tokens.shape[-1],
                      traces.delay)
    outputs = self.coprocess(params, decoder_params, placement, trunk, cache)
    latents = self.latents(params, decoder_params, placement, outputs)
    return self.second_pass(decoder_params, latents, traces, placement, cache)

  def prefill(self, decoder_params: Params, batch: Batch) -> tuple[Array, KVCache]:
    """First pass: the decoder reads the trunks. Hidden states [B, T, D] and their kv-cache."""
    hidden, cache = self.decoder.apply(
        {'params': decoder_params}, batch.tokens, batch.positions, batch.segments,
        method='prefill')
    return hidden, cache if self.tuned else jax.lax.stop_gradient(cache)

  def coprocess(self, params: Params, decoder_params: Params, placement: Placement, trunk: Array,
                cache: KVCache) -> Latents:
    """The coprocessor reads the cache. Its outputs [B, M, Z, D] at the soft tokens."""
    base = self._rest(decoder_params, placement)
    return self.coprocessor.read_cache(params, decoder_params, base, placement, trunk, cache)

  def latents(self, params: Params, decoder_params: Params, placement: Placement,
              outputs: Latents) -> Latents:
    """What the decoder is fed for the coprocessor's outputs."""
    return self.coprocessor.compose(params, outputs, self._rest(decoder_params, placement))

  def second_pass(self, decoder_params: Params, latents: Latents, traces: Traces,
                  placement: Placement, cache: KVCache) -> Float[Array, 'B M A D']:
    """The decoder reads [latents, ahead tokens] behind the trunk's cache.

    The last latent predicts the first ahead token, ahead token i predicts ahead token i + 1; the
    last ahead token predicts nothing that the loss is on and is not fed. Ahead tokens that were
    read before the latents came see the trunk as it was, and no latents.
    """
    ahead = self.decoder.apply(
        {'params': decoder_params}, traces.ahead_tokens[..., :-1], method='embed')
    positions = jnp.concatenate(
        [placement.latent_positions, placement.ahead_positions[..., :-1]], axis=-1)
    segments = jnp.broadcast_to(placement.segments[..., None], positions.shape)
    hidden, _ = self.decoder.apply(
        {'params': decoder_params}, jnp.concatenate([latents, ahead], axis=2), positions,
        self._decoder_visibility(placement, segments), cache, method='transform')
    return hidden[:, :, self.config.num_latents - 1:]

  def _decoder_visibility(self, placement: Placement, segments: Array) -> AttentionMaskSpec:
    """What the second pass may see, [B, M, Z + A - 1]."""
    if placement.late is None:
      return AttentionMaskSpec(segments, placement.decoder_prefix_length)
    late = jnp.pad(placement.late[..., :-1], ((0, 0), (0, 0), (self.config.num_latents, 0)))
    prefix_length = jnp.where(late, placement.coprocessor_prefix_length[..., None],
                        placement.decoder_prefix_length[..., None])
    return AttentionMaskSpec(segments, prefix_length, jnp.where(late, self.config.num_latents, 0))

  def _rest(self, decoder_params: Params, placement: Placement) -> Latents:
    """Embeddings [B, M, Z, D] of the tokens that the latents base on."""
    return self.decoder.apply({'params': decoder_params}, placement.base_tokens, method='embed')


@typed
def ahead_nll(hidden: Float[Array, 'B M A D'], traces: Traces, decoder_params: Params,
              final_softcap: float | None, loss_chunk: int) -> Float[Array, 'B M A']:
  """-log p of each ahead token, nats; those that are not valid have a value all the same."""
  batch, num_traces, num_ahead, width = hidden.shape
  nll = token_nll(
      hidden.reshape(batch, num_traces * num_ahead, width),
      traces.ahead_tokens.reshape(batch, -1), decoder_params['embedder']['table'],
      final_softcap, loss_chunk)
  return nll.reshape(batch, num_traces, num_ahead)
