"""The compiled programs of inference: read, read on, augment, attach; `decode` has the loop.

In order: the stack of blocks that every program runs, the values that programs take and give, and
the programs.

All programs are pure. A `State` is a value, like the caches of training: augmenting leaves it
alone, attaching gives another one, and detaching is going back to the one before. One base state
can therefore serve many coprocessors at once.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from latent_deliberation.array_types import Array, Batch, Bool, Float, Int, Params, typed
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.traces import Placement, place
from latent_deliberation.inference.ring_cache import CachePlan, RingKVCache, SlotIndex, choose_rows
from latent_deliberation.model.attention import AttentionMaskSpec, KeysValues
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.layers import LowRank, RMSNorm
from latent_deliberation.model.products import input_axes
from latent_deliberation.model.transformer import Block, layer_traits
from latent_deliberation.model.transformer_config import TransformerConfig

# --- The stack of blocks ---

CACHED_BYTES = 2**21  # a smaller weight stays in a core's cache, so transposing it gains nothing


@struct.dataclass
class Layers:
  """Weights of a transformer, unstacked.

  Attributes:
    blocks: variables of each of the L blocks: 'params', with large projections transposed, and
      'lora' where there are adapters.
    final_norm: parameters of the norm after the blocks.
  """
  blocks: tuple[Params, ...]
  final_norm: Params


def unstack(transformer: Params | Layers) -> Layers:
  """Takes a scanned transformer's parameters apart; see `Projection` for what is transposed.

  Layers that are unstacked already stay as they are.
  """
  if isinstance(transformer, Layers):
    return transformer
  blocks = tuple({'params': _transpose_large(layer)} for layer in _slices(transformer['blocks']))
  return Layers(blocks, transformer['final_norm'])


def adapt(layers: Layers, lora: Params) -> Layers:
  """Returns the same layers with low-rank adapters; only the last ones if there are fewer."""
  adapters = _slices(lora['blocks'])
  return layers.replace(blocks=tuple(
      {**block, 'lora': adapter}
      for block, adapter in zip(layers.blocks[-len(adapters):], adapters, strict=True)))


def _slices(stacked: Params) -> list[Params]:
  length = len(jax.tree.leaves(stacked)[0])
  return [jax.tree.map(lambda leaf: leaf[number], stacked) for number in range(length)]  # noqa: B023


def _transpose_large(params: Params, inputs: int = 1) -> Params:
  transposed = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      transposed[name] = _transpose_large(child, input_axes(name))
    elif name == 'w' and child.nbytes >= CACHED_BYTES:
      # Input axes go last, as `Projection` expects of this name.
      transposed['transposed'] = jnp.moveaxis(child, range(inputs), range(-inputs, 0))
    else:
      transposed[name] = child
  return transposed


def run(config: TransformerConfig, layers: Layers, x: Array, positions: Array, segments: Array,
        cache: RingKVCache | None = None, lora: LowRank | None = None,
        activations: str | None = None) -> tuple[Array, Sequence[KeysValues]]:
  """Runs the blocks; returns hidden states [B, Q, D] after the final norm, and keys and values.

  Args:
    x: [B, Q, D] embeddings of fresh tokens or latents.
    positions, segments: [B, Q]. Segment 0 is padding; all else is one document.
    cache: all tokens that it shows are seen, within a layer's window. If it has more layers than
      `layers`, its last ones are read.
    lora: rank and scale of the adapters in `layers`.
    activations: see Transformer.
  """
  # One row of fresh tokens for each text, which sees the whole prefix.
  rows, positions = x[:, None].astype(activations or x.dtype), positions[:, None]
  everything = jnp.full((len(x), 1), np.iinfo(np.int32).max)
  mask_spec = AttentionMaskSpec(segments[:, None], everything)
  traits = layer_traits(config)
  block, fresh = Block(config, lora, dtype=x.dtype.name), []
  # A shallower coprocessor reads the last layers of the cache.
  skipped = len(cache.keys) - len(layers.blocks) if cache is not None else 0
  for number, variables in enumerate(layers.blocks):
    seen = None if cache is None else cache.layer(skipped + number)
    rows, keys_values = block.apply(variables, rows, (traits.layer(number), seen), positions,
                                    mask_spec)
    fresh.append(keys_values)
  final_norm = RMSNorm(config.norm_epsilon, config.norm_offset)
  hidden = final_norm.apply({'params': layers.final_norm}, rows)
  return hidden[:, 0].astype(x.dtype), fresh


# --- Values that the programs take and give ---


@dataclasses.dataclass(frozen=True)
class Model:
  """The static part of the programs, which is compiled in.

  Attributes:
    decoder: the module, without weights.
    coprocessor: the same for the coprocessor; None without one.
    plan: numbers of slots of the cache.
    rules: logical axis -> mesh axes; empty without a mesh.
  """
  decoder: Decoder
  coprocessor: Coprocessor | None
  plan: CachePlan
  rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

  def with_coprocessor(self, config: DeliberationConfig) -> 'Model':
    """Returns the model with a coprocessor, which computes in the dtypes of the decoder."""
    decoder = self.decoder
    return dataclasses.replace(self, coprocessor=Coprocessor(
        decoder.config, config, dtype=decoder.dtype, activations=decoder.activations))


@struct.dataclass
class Weights:
  """Weights of a decoder and its coprocessor.

  Attributes:
    embedder: embedding table of the decoder.
    layers: layers of the decoder.
    coprocessor: soft tokens and gate of the coprocessor; None without one.
    coprocessor_layers: layers of the coprocessor; None for constant soft tokens.
  """
  embedder: Params
  layers: Layers
  coprocessor: Params | None = None
  coprocessor_layers: Layers | None = None


@struct.dataclass
class State:
  """B texts that have been read, and the prediction of their next tokens.

  Attributes:
    cache: keys and values of the texts.
    hidden: the decoder's state, after the final norm, that predicts the next token.
    logits: prediction of the next token.
    position: position of the next token.
    lengths: number of tokens of each text, without latents.
  """
  cache: RingKVCache
  hidden: Float[Array, 'B D']
  logits: Float[Array, 'B V']
  position: Int[Array, 'B']
  lengths: Int[Array, 'B']


@struct.dataclass
class Augmentation:
  """Latents for the end of each text of a state, already read by the decoder.

  Attributes:
    latents: keys and values of each layer, [B, 1, Z, K, H].
    positions: positions of the latents.
    replaced: positions of the tokens that the latents replace; -1 for none.
    next_position: position of the next token in the state that was augmented.
    next_position_after: position of this token after the latents.
    hidden: the decoder's state that predicts this token after the latents.
    logits: prediction of this token.
    finite: False where any value of a text's latents is not finite.
  """
  latents: tuple[KeysValues, ...]
  positions: Int[Array, 'B Z']
  replaced: Int[Array, 'B Z']
  next_position: Int[Array, 'B']
  next_position_after: Int[Array, 'B']
  hidden: Float[Array, 'B D']
  logits: Float[Array, 'B V']
  finite: Bool[Array, 'B']


def assemble(decoder_params: Params, config: DeliberationConfig | None = None,
             params: Params | None = None) -> Weights:
  """Returns the unstacked weights of a decoder and its coprocessor, if there is one."""
  layers = unstack(decoder_params['transformer'])
  if config is None:
    return Weights(decoder_params['embedder'], layers)
  # Adapters share the decoder's unstacked weights.
  coprocessor_layers = {
      'full': lambda: unstack(params['transformer']),
      'lora': lambda: adapt(layers, params['lora']),
      'constant': lambda: None,
  }[config.trainable]()
  own = {name: params[name] for name in ('soft_tokens', 'gate') if name in params}
  return Weights(decoder_params['embedder'], layers, own, coprocessor_layers)


# --- Programs ---


def embed(model: Model, weights: Weights, tokens: Array) -> Array:
  """Returns input embeddings [B, Q, D] of tokens [B, Q]."""
  variables = {'params': {'embedder': weights.embedder}}
  return model.decoder.apply(variables, tokens[:, None], method='embed')[:, 0]


def predict(model: Model, weights: Weights, hidden: Array) -> Array:
  """Returns logits [B, V] of the next token, from hidden states [B, D]."""
  return model.decoder.apply({'params': {'embedder': weights.embedder}}, hidden, method='logits')


@typed
def logprobs_of(tokens: Int[Array, 'B'], logits: Float[Array, 'B V']) -> Float[Array, 'B']:
  """Returns log-probabilities of tokens under the model itself, before temperature and filters."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def read(model: Model, weights: Weights, tokens: Array, count: Array) -> State:
  """Reads texts from their beginning.

  Args:
    tokens: int32 [B, T], with each text at the end of its row, after padding.
    count: int32 [B], number of tokens of each text.
  """
  with nn.logical_axis_rules(model.rules):
    config = model.decoder.config
    index = _index(tokens, count, jnp.zeros_like(count))
    hidden, fresh = run(config, weights.layers, embed(model, weights, tokens), index.positions,
                        index.segments, activations=model.decoder.activations)
    cache = RingKVCache.empty(model.plan, config, len(tokens), hidden.dtype).fill(fresh, index)
    # Texts are aligned at their ends, so the last column predicts for all of them.
    last = hidden[:, -1]
    return State(cache, last, predict(model, weights, last), count, count)


@functools.partial(jax.jit, static_argnums=0)
def read_on(model: Model, weights: Weights, state: State, tokens: Array, count: Array) -> State:
  """Reads more of the same texts in one pass; see `read`. Texts without new tokens stay as is."""
  with nn.logical_axis_rules(model.rules):
    hidden, fresh, index = _continue(model, weights, state, tokens, count)
    # A text without new tokens keeps its prediction.
    last, more = hidden[:, -1], (count > 0)[:, None]
    return State(state.cache.append(fresh, index), jnp.where(more, last, state.hidden),
                 jnp.where(more, predict(model, weights, last), state.logits),
                 state.position + count, state.lengths + count)


@functools.partial(jax.jit, static_argnums=0)
def score_on(model: Model, weights: Weights, state: State, tokens: Array, count: Array) -> Array:
  """Returns the log-probability of every token that `read_on` would read, nats [B, T].

  It is 0 on padding.
  """
  with nn.logical_axis_rules(model.rules):
    hidden, _, index = _continue(model, weights, state, tokens, count)
    # Each token is predicted by the hidden state before it, the first one by that of the state.
    length = tokens.shape[1]
    is_first = jnp.arange(length) == length - count[:, None]
    before = jnp.where(is_first[..., None], state.hidden[:, None], jnp.roll(hidden, 1, axis=1))

    def logprob(inputs: tuple[Array, Array]) -> Array:
      states, token = inputs
      return logprobs_of(token, predict(model, weights, states))

    # One position of every text at a time: all logits at once would be [B, T, V].
    logprobs = jax.lax.map(logprob, (jnp.swapaxes(before, 0, 1), index.tokens.T)).T
    return jnp.where(index.segments > 0, logprobs, 0.0)


def _continue(model: Model, weights: Weights, state: State, tokens: Array, count: Array,
              ) -> tuple[Array, Sequence[KeysValues], SlotIndex]:
  """Runs more tokens of the texts of a state; returns hidden states, keys and values, and index."""
  index = _index(tokens, count, state.position)
  hidden, fresh = run(model.decoder.config, weights.layers, embed(model, weights, tokens),
                      index.positions, index.segments, state.cache,
                      activations=model.decoder.activations)
  return hidden, fresh, index


def _index(tokens: Array, count: Array, start: Array) -> SlotIndex:
  """Returns the index of texts at the ends of their rows, whose first tokens are at `start` [B]."""
  # Place of each token in its text, negative on the padding before it.
  order = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - count[:, None])
  real = order >= 0
  return SlotIndex(jnp.where(real, tokens, 0), jnp.where(real, start[:, None] + order, 0),
                   real.astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def augment(model: Model, weights: Weights, state: State) -> Augmentation:
  """Makes latents for the end of every text.

  The coprocessor reads the cache of the texts, and the decoder then reads the latents (paper,
  section 2.1).
  """
  return read_latents(model, weights, state, coprocess(model, weights, state))


@functools.partial(jax.jit, static_argnums=0)
def coprocess(model: Model, weights: Weights, state: State) -> Array:
  """Returns what the coprocessor adds to the embeddings of base tokens, [B, Z, D].

  For latents of the 'paper', which have no base, it returns the latents themselves.
  """
  with nn.logical_axis_rules(model.rules):
    coprocessor, (_, placement) = model.coprocessor, _place(model, state)
    # The coprocessor reads the whole cache; constant soft tokens are outputs as they are.
    base = embed(model, weights, placement.base_tokens[:, 0])[:, None]
    outputs = coprocessor.feed(weights.coprocessor, base)
    if weights.coprocessor_layers is not None:
      positions = placement.latent_positions[:, 0]
      hidden, _ = run(coprocessor.transformer_config, weights.coprocessor_layers, outputs[:, 0],
                      positions, jnp.ones_like(positions), state.cache,
                      coprocessor.transformer.lora, coprocessor.activations)
      outputs = hidden[:, None]
    return coprocessor.compose(weights.coprocessor, outputs, jnp.zeros_like(base))[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def read_latents(model: Model, weights: Weights, state: State, added: Array) -> Augmentation:
  """The decoder reads latents for the end of every text.

  Args:
    added: see `coprocess`.
  """
  with nn.logical_axis_rules(model.rules):
    newest, placement = _place(model, state)
    positions, latents = placement.latent_positions[:, 0], added
    if model.coprocessor.config.latents != 'paper':
      latents = embed(model, weights, placement.base_tokens[:, 0]) + added

    # Refining latents replace the last tokens, which are hidden.
    replaces = (placement.coprocessor_prefix_length - placement.decoder_prefix_length > 0)  # [B, 1]
    replaced = jnp.where(replaces, newest.positions, -1)
    hidden, fresh = run(model.decoder.config, weights.layers, latents, positions,
                        jnp.ones_like(positions), state.cache.hide(replaced),
                        activations=model.decoder.activations)
    logits = predict(model, weights, hidden[:, -1])

    # A text fails if any of its new keys, values or logits is not finite.
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
              for leaf in jax.tree.leaves((fresh, logits))]
    return Augmentation(tuple(fresh), positions, replaced, state.position,
                        placement.ahead_positions[:, 0, 0], hidden[:, -1], logits,
                        jnp.stack(finite).all(axis=0))


def _place(model: Model, state: State) -> tuple[SlotIndex, Placement]:
  """Returns the last Z tokens of every text, and the placement of latents at its end."""
  # One trace in each text, whose anchor is the last token.
  config = model.coprocessor.config
  newest = state.cache.newest(config.num_latents)
  last = jnp.full((len(newest.tokens), 1), config.num_latents - 1)
  text = Batch(newest.tokens, newest.segments, newest.positions)
  return newest, place(text, last, config, num_ahead=1)


@functools.partial(jax.jit, static_argnums=0)
def attach(model: Model, state: State, augmentation: Augmentation, rows: Array) -> State:
  """Returns the state with latents in the cache of the texts `rows`, where they are finite.

  A text that has grown since it was augmented keeps the prediction of its next token. The tokens
  after that one see the latents.
  """
  with nn.logical_axis_rules(model.rules):
    rows = rows & augmentation.finite
    cache = state.cache.attach(augmentation.latents, augmentation.positions,
                               augmentation.replaced, rows)
    # In time means that no token came since, so latents also predict the next one.
    in_time = (rows & (state.position == augmentation.next_position))[:, None]
    # Latents with positions of their own move the tokens after them.
    shift = augmentation.next_position_after - augmentation.next_position
    return state.replace(
        cache=cache, hidden=jnp.where(in_time, augmentation.hidden, state.hidden),
        logits=jnp.where(in_time, augmentation.logits, state.logits),
        position=jnp.where(rows, state.position + shift, state.position))


@jax.jit
def choose(rows: Array, chosen: State, other: State) -> State:
  """Takes `chosen` for the texts `rows` and `other` for the others.

  Both must have written as many slots.
  """
  # All but the write_index has a row for each text.
  return jax.tree.map(lambda new, old: choose_rows(rows, new, old) if old.ndim else old,
                      chosen, other)
