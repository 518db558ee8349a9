"""Sampling, and the loop that decodes: one program for all prompts, which copies no cache."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latent_deliberation.array_types import Array, Bool, Float, Int, PyTree, typed
from latent_deliberation.deliberation.loss import entropy
from latent_deliberation.errors import (
  UserError,
  check_integer,
  check_number,
  problems_of,
  raise_problems,
)
from latent_deliberation.inference import passes
from latent_deliberation.inference.passes import Model, State, Weights, embed, logprobs_of, predict
from latent_deliberation.inference.policy import Gate
from latent_deliberation.inference.ring_cache import RingKVCache, SlotIndex
from latent_deliberation.model.products import from_bits, to_bits

# Temperatures below and above which float32 logits leave only the likeliest token, or all alike.
COLDEST, HOTTEST = 1e-8, 1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Options of sampling. The filters work on the tempered distribution, in this order.

  Attributes:
    temperature: divisor of the logits; 0, and anything below COLDEST, takes the likeliest token.
    top_k: number of the likeliest tokens to keep; None keeps all.
    top_p: keeps the likeliest tokens up to the one at which their probability mass reaches top_p.
      0 keeps only the likeliest.
    min_p: keeps tokens at least min_p times as likely as the likeliest.
  """
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    raise_problems([
        *problems_of(check_number, 'temperature', self.temperature, 0),
        *(() if self.top_k is None else problems_of(
            check_integer, 'top_k', self.top_k, 1, 2**63 - 1,
            ', or none to keep all tokens (--top_k=0)')),
        *problems_of(check_number, 'top_p', self.top_p, 0, 1),
        *problems_of(check_number, 'min_p', self.min_p, 0, 1)])

  @property
  def greedy(self) -> bool:
    """Whether the likeliest token is taken."""
    return self.temperature < COLDEST

  def draw(self, keys: Array, logits: Array, allowed: Array | None, rows: PyTree) -> Array:
    """Draws a token for each text; see `sample`. `rows` is for a sampling by text."""
    return sample(keys, logits, self, allowed)


@typed
def filtered(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Returns tempered logits, with -inf for dropped tokens; the likeliest is always kept."""
  # By an infinite temperature, an impossible token would become not a number.
  logits = logits / min(sampling.temperature, HOTTEST)
  if sampling.top_k is None and sampling.top_p >= 1 and sampling.min_p <= 0:
    return logits
  # Only top_p without top_k needs to sort a whole vocabulary.
  candidates = logits
  if sampling.top_k is not None:
    candidates = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
  elif sampling.top_p < 1:
    candidates = falling(logits)
  return drop_unlikely(logits, candidates, sampling.top_p, sampling.min_p)


def falling(logits: Array) -> Array:
  """Returns logits from the largest to the smallest, along the last axis."""
  return -jnp.sort(-logits, axis=-1)


def drop_unlikely(logits: Array, candidates: Array, top_p: Array | float,
                  min_p: Array | float) -> Array:
  """Returns tempered logits with -inf for tokens that top_k, top_p or min_p drops.

  Args:
    logits: tempered logits, [B, V].
    candidates: those that top_k keeps, [B, K], with -inf for others. They fall where top_p is
      below 1.
    top_p, min_p: see Sampling; for all texts, or [B, 1] for each.
  """
  probabilities = jax.nn.softmax(candidates, axis=-1)
  # A token stays if the mass of all likelier ones has not reached top_p.
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  stays = ((before < top_p) | (jnp.asarray(top_p) >= 1)) & (candidates > -jnp.inf)
  largest = jnp.max(candidates, axis=-1, keepdims=True)
  least = jnp.min(jnp.where(stays, candidates, largest), axis=-1, keepdims=True)
  # The logarithm of 0 drops nothing.
  least = jnp.maximum(least, largest + jnp.log(min_p))
  return jnp.where(logits < least, -jnp.inf, logits)


@typed
def sample(keys: Array, logits: Float[Array, 'B V'], sampling: Sampling,
           allowed: Bool[Array, ' V'] | None = None) -> Int[Array, 'B']:
  """Draws a token for each text.

  Args:
    keys: [B] PRNG keys. Each text has its own, so its tokens do not depend on the other texts.
    allowed: ids that may be drawn; None for all.
  """
  if allowed is not None:
    logits = jnp.where(allowed, logits, -jnp.inf)
  if sampling.greedy:
    tokens = likeliest(logits)
  else:
    tokens = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))
  return tokens.astype(jnp.int32)


def likeliest(logits: Array) -> Array:
  """Returns the likeliest token of each text, the first of several, and 0 where any is NaN.

  XLA on a CPU runs these two reductions faster than that of argmax, which has two results.
  """
  largest = jnp.max(logits, axis=-1, keepdims=True)
  ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(logits < largest, len(ids) - 1, ids), axis=-1)


def check_seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
  """Returns a seed for each of `count` texts; 0, 1, 2, ... for None.

  Raises:
    UserError: there is not one for each text, or one is not from 0 to 2**32 - 1.
  """
  seeds = list(range(count)) if seeds is None else list(seeds)
  if len(seeds) != count:
    raise UserError(f'{len(seeds)} seeds {seeds[:4]} for {count} texts: give one for each')
  for seed in seeds:
    check_integer('seed', seed, 0, 2**32 - 1)
  return seeds


@struct.dataclass
class Decoded:
  """Result of a call of `decode`. Only the first `steps` rows are filled.

  Attributes:
    tokens: token ids; 0 where a text has ended.
    logprobs: log-probabilities of the tokens under the model, nats.
    steps: number of tokens that were decoded for every active text.
    active: True for texts that have not ended.
    opened: True for texts whose gate opens at their next token.
    top_tokens, top_logprobs: the likeliest tokens at each place, and their log-probabilities.
  """
  tokens: Int[Array, 'size B']
  logprobs: Float[Array, 'size B']
  steps: Int[Array, '']
  active: Bool[Array, 'B']
  opened: Bool[Array, 'B']
  top_tokens: Int[Array, 'size B top']
  top_logprobs: Float[Array, 'size B top']


@functools.partial(
    jax.jit, static_argnames=('model', 'sampling', 'size', 'eos', 'num_ids', 'num_top'),
    donate_argnames='keys_values')
def decode(model: Model, weights: Weights, keys_values: tuple[tuple[Array, ...], ...],
           state: State, keys: Array, count: Array, active: Array, limit: Array,
           threshold: Array | None, gate: Gate | None, gate_from: Array, forced: Array | None,
           rows: PyTree = None, *, sampling: Sampling, size: int, eos: tuple[int, ...],
           num_ids: int | None, num_top: int = 0) -> tuple[State, Decoded]:
  """Decodes up to `limit` tokens of every active text in one loop.

  Args:
    keys_values: keys and values of the cache, which are overwritten. Those in `state` are not used.
    keys: [B] PRNG keys. The token after n decoded ones is drawn with fold_in(key, n).
    count: int32 [] or [B], number of tokens of each text decoded so far.
    active: bool [B], texts that have not ended.
    limit: number of tokens, at most `size`, which is compiled in.
    threshold: score in nats above which the loop stops before it draws the token; None for never.
    gate: source of the score; None for the entropy of the next token.
    gate_from: int32 [B], tokens that must be decoded before a text's gate may open.
    forced: int32 [size, B], tokens to take instead of drawn ones; None to draw.
    rows: what `sampling.draw` gets: the options of each text where these differ.
    eos: ids that end a text.
    num_ids: ids from here on are never drawn, unless they end a text; None for no such ids.
    num_top: number of the likeliest tokens to report at each place.
  """
  allowed = None
  if num_ids is not None:
    ids = jnp.arange(model.decoder.config.vocab_size)
    allowed = (ids < num_ids) | jnp.isin(ids, jnp.array(eos, jnp.int32))

  def opens(step: Array, hidden: Array, logits: Array, active: Array) -> Array:
    if threshold is None:
      return jnp.zeros_like(active)
    score = entropy(logits) if gate is None else gate.score(hidden)
    return active & (count + step >= gate_from) & (score > threshold)

  # The loop ends at the limit, when all texts have ended, or when a gate opens.
  def continues(carry: tuple) -> Array:
    step, *_, active, opened = carry
    return (step < limit) & active.any() & ~opened.any()

  def body(carry: tuple) -> tuple:
    step, cache, newest, _, logits, position, tokens, logprobs, top, active, _ = carry
    # The token of the step before is appended first; see `RingKVCache.pop`.
    cache = _as_cache(cache).append(*newest)

    # Draw the next token. A text that has ended writes a padding, with segment 0.
    if forced is None:
      drawn = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(count + step, active.shape))
      token = sampling.draw(drawn, logits, allowed, rows)
    else:
      token = forced[step]
    logprob = logprobs_of(token, logits)
    if num_top:
      values, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), num_top)
      top = (top[0].at[step].set(ids.astype(jnp.int32)), top[1].at[step].set(values))
    token = jnp.where(active, token, 0)
    index = jax.tree.map(lambda leaf: leaf[:, None], SlotIndex(
        token, position, active.astype(jnp.int32)))

    # Read it, and predict the one after it.
    hidden, fresh = passes.run(model.decoder.config, weights.layers,
                               embed(model, weights, index.tokens), index.positions,
                               index.segments, cache, activations=model.decoder.activations)
    hidden = hidden[:, -1]
    logits = predict(model, weights, hidden)

    # Record the token. A text that has ended stays at its position.
    tokens = tokens.at[step].set(token)
    logprobs = logprobs.at[step].set(logprob)
    position = position + active
    for ending in eos:
      active = active & (token != ending)
    return (step + 1, _carried(cache), (fresh, index), hidden, logits, position, tokens,
            logprobs, top, active, opens(step + 1, hidden, logits, active))

  with nn.logical_axis_rules(model.rules):
    # The newest token leaves the cache here, and every step appends the one before.
    cache = state.cache.replace(keys=keys_values[0], values=keys_values[1])
    cache, *newest = cache.pop()
    first = jnp.zeros((), jnp.int32)
    shape = (size, len(active))
    top = jnp.zeros((*shape, num_top), jnp.int32), jnp.zeros((*shape, num_top))
    carry = (first, _carried(cache), tuple(newest), state.hidden, state.logits,
             state.position, jnp.zeros(shape, jnp.int32), jnp.zeros(shape), top, active,
             opens(first, state.hidden, state.logits, active))
    steps, cache, newest, hidden, logits, position, tokens, logprobs, top, active, opened = (
        jax.lax.while_loop(continues, body, carry))
    # The loop leaves its last token out, so it is appended now.
    state = State(_as_cache(cache).append(*newest), hidden, logits, position,
                  state.lengths + position - state.position)
    return state, Decoded(tokens, logprobs, steps, active, opened, *top)


def _carried(cache: RingKVCache) -> RingKVCache:
  """Returns a cache as the loop carries it, so that no step copies the whole cache.

  XLA leaves an axis of 1 out of matrix products, so the batch axis of one text is taken away before
  the loop. It writes bfloat16 by way of float32, so the loop has the bits.
  """
  def carried(array: Array) -> Array:
    return to_bits(array[0] if len(array) == 1 else array)

  return cache.replace(keys=tuple(map(carried, cache.keys)),
                       values=tuple(map(carried, cache.values)))


def _as_cache(carried: RingKVCache) -> RingKVCache:
  """Undoes `_carried`."""
  def restored(array: Array) -> Array:
    return from_bits(array[None] if array.ndim == 3 else array)

  return carried.replace(keys=tuple(map(restored, carried.keys)),
                         values=tuple(map(restored, carried.values)))
