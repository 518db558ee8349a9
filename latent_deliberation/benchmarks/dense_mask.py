"""Two slower ways to compute the training loss, for benchmarks: separate traces, one dense mask.

Shared-prefix attention replaces both. Their value and gradient are those of
`objectives.augmentation`, to rounding.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.traces import Placement, Traces, place, sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache, attend
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.layers import FeedForward, RMSNorm
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.model.rotary import rotate
from latent_deliberation.model.transformer import REMAT_POLICIES, LayerTraits, layer_traits
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.training.step import LossFn


def separate_traces(deliberator: Deliberator, loss_chunk: int) -> LossFn:
  """Returns the loss with each trace as a text of its own, which repeats the trunk a trace."""
  alone = deliberator.with_traces(1, deliberator.config.num_ahead)

  def loss(params: Params, decoder_params: Params, batch: Batch,
           keys: Array) -> tuple[Array, Array]:
    traces = sample_traces(keys, batch, deliberator.config)
    texts = jax.tree.map(lambda leaf: jnp.repeat(leaf, traces.anchors.shape[1], axis=0), batch)
    traces = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, *leaf.shape[2:]), traces)
    hidden = alone.forward(params, decoder_params, texts, traces)
    return _summed(deliberator, hidden, traces, decoder_params, loss_chunk)

  return loss


def check_dense(decoder_config: TransformerConfig, config: DeliberationConfig) -> None:
  """Raises UserError for options that `dense_mask` does not have; its loss would be another."""
  for name, value, needed in (
      ('deliberation.trainable', config.trainable, 'full'),
      ('deliberation.reads', config.reads, 'cache'),
      ('deliberation.num_layers', config.num_layers, 0),
      ('deliberation.max_delay', config.max_delay, 0),
      ('decoder.post_norms', decoder_config.post_norms, True),
      ('decoder.qk_norm', decoder_config.qk_norm, False),
      ('decoder.norm_offset', decoder_config.norm_offset, True),
      ('decoder.activation', decoder_config.activation, 'gelu'),
      ('decoder.qkv_bias', decoder_config.qkv_bias, False)):
    if value != needed:
      raise UserError(f'{name} = {value!r}, but the dense mask needs {needed!r}. Set that, or '
                      'leave the dense mask out.')


def check_weights(frozen_dtype: str, what: str) -> None:
  """Raises UserError for int8 weights, which `what` does not multiply."""
  if frozen_dtype in INT8_DTYPES:
    raise UserError(f'computation.frozen_dtype = {frozen_dtype!r}: {what} has no int8 weights. Set '
                    '--config.computation.frozen_dtype=bfloat16.')


def dense_mask(deliberator: Deliberator, loss_chunk: int) -> LossFn:
  """Returns the loss with trunk and traces as one sequence of T + M (Z + A - 1) tokens.

  Raises:
    UserError: the deliberator has an option that the mask lacks; see `check_dense`.
  """
  check_dense(deliberator.decoder.config, deliberator.config)

  def loss(params: Params, decoder_params: Params, batch: Batch,
           keys: Array) -> tuple[Array, Array]:
    config = deliberator.config
    traces = sample_traces(keys, batch, config)
    placement = place(batch, traces.anchors, config, config.num_ahead)
    _, cache = deliberator.prefill(decoder_params, batch)
    latents = _dense_latents(deliberator, params, decoder_params, placement, cache)
    hidden = _dense_second_pass(deliberator, decoder_params, latents, batch, traces, placement)
    return _summed(deliberator, hidden, traces, decoder_params, loss_chunk)

  return loss


def _summed(deliberator: Deliberator, hidden: Array, traces: Traces, decoder_params: Params,
            loss_chunk: int) -> tuple[Array, Array]:
  """Returns (summed negative log-likelihood, number of targets)."""
  nll = ahead_nll(hidden, traces, decoder_params, deliberator.decoder.config.final_softcap,
                  loss_chunk)
  return jnp.sum(nll * traces.counted), jnp.sum(traces.counted)


def _embed(deliberator: Deliberator, decoder_params: Params, tokens: Array) -> Array:
  return deliberator.decoder.apply({'params': decoder_params}, tokens, method='embed')


def _dense_latents(deliberator: Deliberator, params: Params, decoder_params: Params,
                   placement: Placement, cache: KVCache) -> Array:
  """Returns latents [B, M, Z, D]; the soft tokens of all traces are one row of M Z tokens."""
  coprocessor = deliberator.coprocessor
  batch, num_traces, num_latents = placement.latent_positions.shape
  base = _embed(deliberator, decoder_params, placement.base_tokens)
  row = lambda leaf: jnp.repeat(leaf, num_latents, axis=1)[:, None]  # noqa: E731
  first = jnp.broadcast_to(jnp.arange(num_traces) * num_latents, (batch, num_traces))
  outputs, _ = coprocessor.transformer.apply(
      {'params': params['transformer']},
      coprocessor.feed(params, base).reshape(batch, 1, num_traces * num_latents, -1),
      placement.latent_positions.reshape(batch, 1, -1),
      AttentionMaskSpec(row(placement.segments), row(placement.coprocessor_prefix_length),
                        row(first)), cache)
  return coprocessor.compose(params, outputs.reshape(base.shape), base)


def _dense_second_pass(deliberator: Deliberator, decoder_params: Params, latents: Array,
                       batch: Batch, traces: Traces, placement: Placement) -> Array:
  """Returns hidden states [B, M, A, D] that predict the ahead tokens."""
  num_texts, num_traces, num_latents, width = latents.shape
  length = batch.tokens.shape[1]

  # One sequence: the trunk, then latents and ahead tokens of each trace.
  trunk = _embed(deliberator, decoder_params, batch.tokens[:, None])
  ahead = _embed(deliberator, decoder_params, traces.ahead_tokens[..., :-1])
  fed = jnp.concatenate([latents, ahead], axis=2)
  queries = fed.shape[2]
  x = jnp.concatenate([trunk, fed.reshape(num_texts, 1, -1, width)], axis=2)

  # Positions, segments and length of the visible prefix, of each token of the sequence.
  append = lambda trunk, traces: jnp.concatenate(  # noqa: E731
      [trunk, traces.reshape(num_texts, -1)], axis=1)
  spread = lambda leaf: jnp.repeat(leaf, queries, axis=1)  # noqa: E731
  positions = append(batch.positions, jnp.concatenate(
      [placement.latent_positions, placement.ahead_positions[..., :-1]], axis=-1))
  segments = append(batch.segments, spread(placement.segments))
  order = jnp.arange(positions.shape[1])
  prefix_length = append(jnp.broadcast_to(order[:length] + 1, batch.tokens.shape),
                         spread(placement.decoder_prefix_length))

  # A token sees its prefix of the trunk and the earlier tokens of its own trace.
  trace = jnp.where(order < length, -1, (order - length) // queries)

  in_trunk = (order < length) & (order < prefix_length[..., None])
  in_trace = (trace >= 0) & (trace[:, None] == trace) & (order <= order[:, None])
  same = (segments[..., None] == segments[:, None]) & (segments[:, None] > 0)
  visible = (in_trunk | in_trace) & same
  hidden = _transform(deliberator.decoder, decoder_params, x, positions[:, None],
                      visible[:, None])
  hidden = hidden[:, 0, length:].reshape(num_texts, num_traces, queries, width)
  return hidden[:, :, num_latents - 1:]


def _transform(decoder: Decoder, decoder_params: Params, x: Array, positions: Array,
               visible: Array) -> Array:
  """Runs Gemma 2's layers over one row a text, [B, 1, S, D], under a mask [B, 1, S, S]."""
  config, transformer = decoder.config, decoder_params['transformer']
  apart = positions[..., :, None] - positions[..., None, :]
  scale = config.head_dim ** -0.5 if config.query_scale is None else config.query_scale
  norm = lambda weight, x: RMSNorm(config.norm_epsilon).apply({'params': weight}, x)  # noqa: E731

  def run_block(x: Array, layer: tuple[LayerTraits, Params]) -> tuple[Array, None]:
    traits, block = layer
    read = norm(block['attention_in'], x)
    queries, keys, values = (
        jnp.tensordot(read, block['attention'][name]['w'], axes=1)
        for name in ('query', 'key', 'value'))
    queries, keys = rotate(queries, keys, positions, traits.frequencies, scale)
    mixed = attend(queries, keys, values,
                   visible & (apart < traits.window), cap=config.attention_softcap)
    mixed = jnp.tensordot(mixed, block['attention']['out']['w'], axes=2)
    x = x + norm(block['attention_out'], mixed)
    # Weights get no gradient here, and without one, flattening only costs time on a TPU.
    fed = FeedForward(config.hidden_dim, flatten_batch=False).apply(
        {'params': block['feed_forward']}, norm(block['feed_forward_in'], x))
    x = x + norm(block['feed_forward_out'], fed)
    return nn.with_logical_constraint(x, ('batch', 'trace', 'length', 'activation')), None

  policy = REMAT_POLICIES[decoder.remat]
  if policy is not None:
    run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=not decoder.scan)
  x, _ = jax.lax.scan(run_block, x, (layer_traits(config), transformer['blocks']),
                      unroll=1 if decoder.scan else config.num_layers)
  return norm(transformer['final_norm'], x)
