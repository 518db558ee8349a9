"""Texts that are decoded together, each of which joins and leaves at any step.

A batch has a fixed number of rows. A newcomer is read in a pass of its own, and its cache is then
written into a free row: `RingKVCache.insert` turns it so that its newest token is in the slot that
all rows write. From there on it is a row like any other, with its own seed, options and count.

A row may follow another: it takes the tokens of its leader and only scores them. So the same text
is read with other latents, or without, in the same step.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from latent_deliberation.array_types import Array
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import GREEDY, Engine
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.ring_cache import CachePlan
from latent_deliberation.serving.row_sampling import RowOptions, RowSampling

STEPS = 4  # largest number of tokens between two looks of the host
MOST_TOP = 5  # likeliest tokens that are reported where a text asks for any
_INT32 = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Step:
  """One decoded token of every row; those of rows without a text mean nothing.

  Attributes:
    tokens, logprobs: [B] the tokens, and their log-probabilities under the model, nats.
    top_tokens, top_logprobs: [B, MOST_TOP] the likeliest tokens; [B, 0] where no text asks.
  """
  tokens: np.ndarray
  logprobs: np.ndarray
  top_tokens: np.ndarray
  top_logprobs: np.ndarray


class DecodeBatch:
  """The rows of one engine.

  Attributes:
    engine: runs the decoder.
    active: bool [B], rows that have a text.
  """

  def __init__(self, engine: Engine, rows: int, eos: tuple[int, ...] = (),
               num_ids: int | None = None):
    """Makes a batch of `rows` empty rows.

    Args:
      eos, num_ids: see `decode.decode`.
    """
    self.engine, self.active = engine, np.zeros(rows, bool)
    self._eos, self._num_ids = eos, num_ids
    # Any text gives the arrays their shapes. No row has it, since none is active.
    self._state = engine.read([[0]] * rows)
    self._options = RowOptions(np.zeros(rows, np.float32), np.zeros(rows, np.int32),
                               np.ones(rows, np.float32), np.zeros(rows, np.float32),
                               np.arange(rows, dtype=np.int32))
    self._counts, self._seeds = np.zeros(rows, np.int32), np.zeros(rows, np.uint32)
    self._wants_top = np.zeros(rows, bool)
    self._keys: Array | None = None

  @property
  def free(self) -> int:
    """Number of rows without a text."""
    return int((~self.active).sum())

  def join(self, state: State, sampling: Sampling = GREEDY, seed: int = 0,
           leader: int | None = None, wants_top: bool = False) -> int:
    """Puts the one text of a state into a free row; returns its number.

    Args:
      state: a text that this engine has read, which stays as it is.
      sampling: options of its draws.
      seed: seed of its draws. The token after n decoded ones does not depend on other texts.
      leader: row whose tokens it takes; None to draw its own.
      wants_top: whether it needs the likeliest tokens at each place.
    """
    row = int(np.flatnonzero(~self.active)[0])
    cache = self._state.cache
    bare = self._state.replace(cache=cache.replace(keys=(), values=()))
    self._state = _insert((cache.keys, cache.values), bare, np.int32(row), state)
    options = self._options
    options.temperature[row] = 0 if sampling.greedy else sampling.temperature
    options.top_k[row] = min(sampling.top_k or 0, _INT32)
    options.top_p[row], options.min_p[row] = sampling.top_p, sampling.min_p
    options.leader[row] = row if leader is None else leader
    self._counts[row], self._seeds[row], self._wants_top[row] = 0, seed, wants_top
    self._keys, self.active[row] = None, True
    return row

  def leave(self, row: int) -> None:
    """Frees a row. What it holds is never seen by another one, and the next text overwrites it."""
    self.active[row] = self._wants_top[row] = False
    self._options.temperature[row] = 0  # so that no filter is run for it
    self._options.leader[row] = row

  def release(self) -> None:
    """Gives the caches back. The batch cannot be used any more."""
    self._state = None

  def decode(self, limit: int) -> list[Step]:
    """Decodes up to `limit` tokens, at most STEPS, of every row that has a text."""
    if self._keys is None:
      self._keys = jax.vmap(jax.random.key)(self.engine.place(self._seeds))
    # Copies, since a device may read them after this call has returned.
    self._state, decoded = self.engine.decode(
        self._state, self._keys, count=self._counts.copy(), active=self.active.copy(),
        limit=limit, size=STEPS, sampling=RowSampling(), eos=self._eos, num_ids=self._num_ids,
        rows=jax.tree.map(np.copy, self._options), num_top=MOST_TOP * bool(self._wants_top.any()))
    found = jax.device_get(decoded)
    self._counts += found.steps
    return [Step(found.tokens[at], found.logprobs[at], found.top_tokens[at], found.top_logprobs[at])
            for at in range(int(found.steps))]


@functools.partial(jax.jit, donate_argnames='keys_values')
def _insert(keys_values: tuple[tuple[Array, ...], ...], bare: State, row: Array,
            text: State) -> State:
  """Returns the state with the one text of `text` in its row `row`; see `decode.decode`."""
  cache = bare.cache.replace(keys=keys_values[0], values=keys_values[1]).insert(row, text.cache)
  # Any multiple of all rings may be taken off. So the index never overflows.
  cache = cache.replace(write_index=cache.write_index % _period(cache.plan))

  def put(old: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, 0)

  return State(cache, *(put(getattr(bare, name), getattr(text, name))
                        for name in ('hidden', 'logits', 'position', 'lengths')))


def _period(plan: CachePlan) -> int:
  """Returns the number of tokens after which all rings are written from their beginnings again."""
  return math.lcm(*(plan.slots(kind) for kind in set(plan.kinds)))
