"""The compiled programs of inference: read, read on, augment, attach, decode. All are pure.

A `State` is a value, like the caches of training: augmenting leaves it alone, attaching gives
another one, and detaching is going back to the one before. One base state can so serve many
coprocessors at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latent_deliberation.array_types import Array, Params
from latent_deliberation.batch import Batch
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.placement import place
from latent_deliberation.inference import stack
from latent_deliberation.inference.cache import CachePlan, SlotCache, SlotIndex
from latent_deliberation.inference.sampling import Sampling, entropy, sample
from latent_deliberation.model.cache import KeysValues
from latent_deliberation.model.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Model:
  """All that is compiled in, beside the shapes of the arrays.

  Attributes:
    decoder, coprocessor: without weights; there may be no coprocessor.
    plan: slots of the cache.
    rules: logical axis -> mesh axes; empty without a mesh.
  """
  decoder: Decoder
  coprocessor: Coprocessor | None
  plan: CachePlan
  rules: tuple[tuple[str, tuple[str, ...]], ...] = ()


@struct.dataclass
class Weights:
  """Attributes:
    embedder: table of the decoder.
    layers: of the decoder.
    coprocessor: its parameters but for a transformer: soft tokens and gate; None without one.
    thinker: its layers; None for constant soft tokens.
  """
  embedder: Params
  layers: stack.Layers
  coprocessor: Params | None = None
  thinker: stack.Layers | None = None


@struct.dataclass
class State:
  """B texts that have been read, and what comes next.

  Attributes:
    cache: their keys and values.
    logits: [B, V] of the next token.
    position: int32 [B] that the next token will have.
    lengths: int32 [B] tokens of each text, without latents.
  """
  cache: SlotCache
  logits: Array
  position: Array
  lengths: Array


@struct.dataclass
class Augmentation:
  """Latents for the end of each text of a state, read by the decoder and ready to be attached.

  Attributes:
    latents: keys and values of each layer, [B, 1, Z, K, H].
    positions: int32 [B, Z] of the latents.
    hidden: int32 [B, Z] positions of the tokens that they stand for; -1 for none.
    anchor: int32 [B] position of the next token in the state that was augmented.
    ahead: int32 [B] position of the next token behind the latents.
    logits: [B, V] of that token.
    finite: bool [B] False where anything of a text's latents is not finite.
  """
  latents: tuple[KeysValues, ...]
  positions: Array
  hidden: Array
  anchor: Array
  ahead: Array
  logits: Array
  finite: Array


def embed(model: Model, weights: Weights, tokens: Array) -> Array:
  """Input embeddings [B, Q, D] of tokens [B, Q]."""
  variables = {'params': {'embedder': weights.embedder}}
  return model.decoder.apply(variables, tokens[:, None], method='embed')[:, 0]


def _logits(model: Model, weights: Weights, hidden: Array) -> Array:
  return model.decoder.apply({'params': {'embedder': weights.embedder}}, hidden, method='logits')


@functools.partial(jax.jit, static_argnums=0)
def read(model: Model, weights: Weights, tokens: Array, count: Array) -> State:
  """Reads texts from their beginning.

  Args:
    tokens: int32 [B, T]; a text stands at the end of its row, behind holes.
    count: int32 [B] tokens of each text.
  """
  with nn.logical_axis_rules(model.rules):
    config = model.decoder.config
    index = _index(tokens, count, jnp.zeros_like(count))
    hidden, fresh = stack.run(config, weights.layers, embed(model, weights, tokens),
                              index.positions, index.segments)
    cache = SlotCache.empty(model.plan, config, len(tokens), hidden.dtype).fill(fresh, index)
    return State(cache, _logits(model, weights, hidden[:, -1]), count, count)


@functools.partial(jax.jit, static_argnums=0)
def entropies(model: Model, weights: Weights, tokens: Array, count: Array) -> Array:
  """Entropy of the next token behind every token, nats [B, T]; see `read`."""
  with nn.logical_axis_rules(model.rules):
    index = _index(tokens, count, jnp.zeros_like(count))
    hidden, _ = stack.run(model.decoder.config, weights.layers, embed(model, weights, tokens),
                          index.positions, index.segments)
    # One position of every text at a time: all logits at once would be [B, T, V].
    return jax.lax.map(lambda states: entropy(_logits(model, weights, states)),
                       jnp.swapaxes(hidden, 0, 1)).T


@functools.partial(jax.jit, static_argnums=0)
def read_on(model: Model, weights: Weights, state: State, tokens: Array, count: Array) -> State:
  """Reads more of the same texts in one pass; see `read`. A text of no more tokens is as before."""
  with nn.logical_axis_rules(model.rules):
    index = _index(tokens, count, state.position)
    hidden, fresh = stack.run(
        model.decoder.config, weights.layers, embed(model, weights, tokens), index.positions,
        index.segments, state.cache)
    logits = jnp.where((count > 0)[:, None], _logits(model, weights, hidden[:, -1]), state.logits)
    return State(state.cache.append(fresh, index), logits, state.position + count,
                 state.lengths + count)


def _index(tokens: Array, count: Array, start: Array) -> SlotIndex:
  """What to write for texts at the ends of their rows, whose first tokens are at `start` [B]."""
  order = jnp.arange(tokens.shape[1]) - (tokens.shape[1] - count[:, None])
  real = order >= 0
  return SlotIndex(jnp.where(real, tokens, 0), jnp.where(real, start[:, None] + order, 0),
                   real.astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def augment(model: Model, weights: Weights, state: State) -> Augmentation:
  """Latents for the end of every text: the coprocessor reads its cache, the decoder the latents."""
  with nn.logical_axis_rules(model.rules):
    decoder, coprocessor = model.decoder.config, model.coprocessor
    newest = state.cache.newest(coprocessor.config.num_latents)
    text = Batch(newest.tokens, newest.segments, newest.positions)
    last = jnp.full((len(newest.tokens), 1), coprocessor.config.num_latents - 1)
    placement = place(text, last, coprocessor.config, num_ahead=1)
    positions = placement.latent_positions[:, 0]
    rest = embed(model, weights, placement.base_tokens[:, 0])[:, None]
    thoughts = coprocessor.feed(weights.coprocessor, rest)
    seen = jnp.ones_like(positions)
    if weights.thinker is not None:
      hidden, _ = stack.run(decoder, weights.thinker, thoughts[:, 0], positions, seen, state.cache,
                            coprocessor.transformer.lora)
      thoughts = hidden[:, None]
    latents = coprocessor.compose(weights.coprocessor, thoughts, rest)[:, 0]
    replaces = (placement.coprocessor_horizon - placement.decoder_horizon > 0)  # [B, 1]
    replaced = jnp.where(replaces, newest.positions, -1)
    hidden, fresh = stack.run(decoder, weights.layers, latents, positions, seen,
                              state.cache.hide(replaced))
    logits = _logits(model, weights, hidden[:, -1])
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
              for leaf in jax.tree.leaves((fresh, logits))]
    return Augmentation(tuple(fresh), positions, replaced, state.position,
                        placement.ahead_positions[:, 0, 0], logits, jnp.stack(finite).all(axis=0))


@functools.partial(jax.jit, static_argnums=0)
def attach(model: Model, state: State, augmentation: Augmentation, rows: Array) -> State:
  """The state with latents in the cache of the texts `rows`, where they are finite.

  Texts that have gone on since they were augmented keep the logits of their next token; what is
  decoded from there on sees the latents.
  """
  with nn.logical_axis_rules(model.rules):
    rows = rows & augmentation.finite
    cache = state.cache.attach(augmentation.latents, augmentation.positions, augmentation.hidden,
                               rows)
    in_time = rows & (state.position == augmentation.anchor)
    shift = augmentation.ahead - augmentation.anchor
    return state.replace(
        cache=cache, logits=jnp.where(in_time[:, None], augmentation.logits, state.logits),
        position=jnp.where(rows, state.position + shift, state.position))


@jax.jit
def choose(rows: Array, chosen: State, other: State) -> State:
  """`chosen` for the texts `rows`, `other` for the rest; both have written as many slots."""
  def pick(new: Array, old: Array) -> Array:
    if old.ndim == 0:  # the cursor
      return old
    return jnp.where(jnp.expand_dims(rows, tuple(range(1, old.ndim))), new, old)
  return jax.tree.map(pick, chosen, other)


@struct.dataclass
class Decoded:
  """What a call of `decode` did.

  Attributes:
    tokens: int32 [size, B]; 0 where a text has ended. Only the first `steps` rows are filled.
    log_probabilities: float32 [size, B].
    steps: int32 [].
    active: bool [B] texts that have not ended.
    uncertain: bool [B] texts whose next token is more uncertain than the threshold.
  """
  tokens: Array
  log_probabilities: Array
  steps: Array
  active: Array
  uncertain: Array


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'size', 'eos', 'gated'),
                   donate_argnames='keys_values')
def decode(model: Model, weights: Weights, keys_values: tuple[tuple[Array, ...], ...],
           state: State, keys: Array, count: Array, active: Array, limit: Array, threshold: Array,
           gate_from: Array, *, sampling: Sampling, size: int, eos: int | None,
           gated: bool) -> tuple[State, Decoded]:
  """Decodes up to `limit` tokens of every active text in one loop.

  Args:
    keys_values: the cache's keys and values, which are overwritten; `state` has others or none.
    keys: [B] PRNG keys.
    count: int32 [] tokens decoded so far; the token after n others is drawn with fold_in(key, n).
    limit: at most `size`, which is compiled in.
    threshold: entropy in nats above which the loop stops, before the token is drawn.
    gate_from: int32 [B] tokens that must be decoded before a text may do so.
    eos: id that ends a text.
    gated: whether there is a threshold.
  """
  def uncertain(step: Array, logits: Array, active: Array) -> Array:
    if not gated:
      return jnp.zeros_like(active)
    return active & (count + step >= gate_from) & (entropy(logits) > threshold)

  def go_on(carry: tuple) -> Array:
    step, *_, active, stop = carry
    return (step < limit) & active.any() & ~stop.any()

  def body(carry: tuple) -> tuple:
    step, cache, newest, logits, position, tokens, log_probabilities, active, _ = carry
    cache = _with_batch(cache).append(*newest)
    drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, count + step)
    token, log_probability = sample(drawn, logits, sampling)
    token = jnp.where(active, token, 0)
    index = jax.tree.map(lambda leaf: leaf[:, None], SlotIndex(
        token, position, active.astype(jnp.int32)))
    hidden, fresh = stack.run(model.decoder.config, weights.layers,
                              embed(model, weights, index.tokens), index.positions,
                              index.segments, cache)
    logits = _logits(model, weights, hidden[:, -1])
    tokens = tokens.at[step].set(token)
    log_probabilities = log_probabilities.at[step].set(log_probability)
    position = position + active
    if eos is not None:
      active = active & (token != eos)
    return (step + 1, _without_batch(cache), (fresh, index), logits, position, tokens,
            log_probabilities, active, uncertain(step + 1, logits, active))

  with nn.logical_axis_rules(model.rules):
    begun = state.cache.replace(keys=keys_values[0], values=keys_values[1])
    cache, *newest = begun.pop()
    first = jnp.zeros((), jnp.int32)
    carry = (first, _without_batch(cache), tuple(newest), state.logits, state.position,
             jnp.zeros((size, len(active)), jnp.int32), jnp.zeros((size, len(active))), active,
             uncertain(first, state.logits, active))
    steps, cache, newest, logits, position, tokens, log_probabilities, active, stop = (
        jax.lax.while_loop(go_on, body, carry))
    state = State(_with_batch(cache).append(*newest), logits, position,
                  state.lengths + position - state.position)
    return state, Decoded(tokens, log_probabilities, steps, active, stop)


def _without_batch(cache: SlotCache) -> SlotCache:
  """A cache of one text without its batch axis, to be carried through a loop.

  XLA leaves an axis of 1 out of matrix products; were it there in what is carried, every step would
  copy the whole cache to take it away.
  """
  if cache.keys[0].shape[0] > 1:
    return cache
  return cache.replace(keys=tuple(each[0] for each in cache.keys),
                       values=tuple(each[0] for each in cache.values))


def _with_batch(cache: SlotCache) -> SlotCache:
  """The way back."""
  if cache.keys[0].ndim == 4:
    return cache
  return cache.replace(keys=tuple(each[None] for each in cache.keys),
                       values=tuple(each[None] for each in cache.values))
