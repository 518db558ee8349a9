"""The losses: next tokens, ahead tokens after latents, and the controls of both."""

import dataclasses

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.loss import token_nll
from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.layers import LowRank, adapt, output_head
from latent_deliberation.training.step import LossFn


def language_modelling(decoder: Decoder, loss_chunk: int) -> LossFn:
  """Returns the next-token loss by the decoder's parameters; `frozen` and keys are unused."""

  def loss(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple[Array, Array]:
    del frozen, keys
    with jax.named_scope('prefill'):
      hidden, _ = decoder.apply({'params': params}, batch.tokens, batch.positions, batch.segments,
                                method='prefill')
    with jax.named_scope('loss'):
      nll = token_nll(hidden[:, :-1], batch.tokens[:, 1:], output_head(params),
                      decoder.config.final_softcap, loss_chunk)
    # A token is no target for the document before it, and padding is no target at all.
    valid = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    return jnp.sum(nll * valid), jnp.sum(valid)

  return loss


def augmentation(deliberator: Deliberator, loss_chunk: int) -> LossFn:
  """Returns the loss -log p(ahead tokens | trunk up to the anchor, latents), paper section 2.2.

  The frozen argument is the decoder's parameters. Gradients flow through the decoder's second pass
  into the latents. Its weights get none, because the loss is differentiated by `params` alone.
  """

  def loss(params: Params, decoder_params: Params, batch: Batch,
           keys: Array) -> tuple[Array, Array]:
    traces = sample_traces(keys, batch, deliberator.config)
    # One prefill serves all traces of a text.
    hidden = deliberator.forward(params, decoder_params, batch, traces)
    nll = ahead_nll(hidden, traces, decoder_params, deliberator.decoder.config.final_softcap,
                    loss_chunk)
    return jnp.sum(nll * traces.counted), jnp.sum(traces.counted)

  return loss


def joint_training(deliberator: Deliberator, loss_chunk: int) -> LossFn:
  """Returns the loss of `augmentation`, by the decoder's weights and constant soft tokens.

  This is the control of arXiv 2510.00494: one model that learns to use its latents replaces two.
  The trainable parameters are {'decoder', 'latents'}; the frozen argument is unused.
  """
  augmented = augmentation(dataclasses.replace(deliberator, tuned=True), loss_chunk)

  def loss(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple[Array, Array]:
    del frozen
    return augmented(params['latents'], params['decoder'], batch, keys)

  return loss


def lora_training(decoder: Decoder, low_rank: LowRank, loss_chunk: int) -> LossFn:
  """Returns the next-token loss of a frozen decoder, by low-rank adapters on its transformer."""
  next_token = language_modelling(decoder, loss_chunk)

  def loss(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple[Array, Array]:
    adapted = {**frozen, 'transformer': adapt(frozen['transformer'], params, low_rank)}
    return next_token(adapted, {}, batch, keys)

  return loss
