"""A kv-cache of fixed slots, written in place inside a compiled loop.

All rows of a batch write the same slot at the same step: prompts are aligned at their ENDS (short
ones have padding before them), so that a decode step is one slice update instead of a scatter over
rows. Layers of one kind share an index of what stands where. The slots of a kind are a ring:
global layers have as many as a text has tokens, local layers only those that a window reaches.

Behind the ring stand the slots of latents. Refining latents hide the tokens that they replace and
overwrite nothing, so that other latents, or none, may follow them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import KeysValues, KVCache
from latent_deliberation.model.transformer_config import TransformerConfig

Writer = Callable[[Array, Array, int], Array]  # (old, new, axis of the slots) -> array
_KEYS, _VALUES = 3, 2  # axes of the slots
_AXES = {_KEYS: ('batch', 'kv_heads', 'head_dim', 'slot'),
         _VALUES: ('batch', 'kv_heads', 'slot', 'head_dim')}


@dataclasses.dataclass(frozen=True)
class CachePlan:
  """How many slots the layers have.

  Attributes:
    kinds: of the L layers.
    global_slots: tokens that a text may have; no layer has more slots than that.
    local_slots: tokens that a local layer keeps.
    latent_slots: Z, slots of latents, behind those of tokens in every layer.
  """
  kinds: tuple[str, ...]
  global_slots: int
  local_slots: int
  latent_slots: int

  def slots(self, kind: str) -> int:
    """Slots of tokens in a layer of this kind."""
    return self.local_slots if kind == 'local' else self.global_slots


def plan_cache(config: TransformerConfig, length: int, num_latents: int = 0,
               refining: bool = False) -> CachePlan:
  """The plan for texts of at most `length` tokens.

  Refining latents stand up to num_latents - 1 tokens before the last one, and see a whole window
  from there.
  """
  window = config.window + (num_latents - 1 if refining else 0)
  return CachePlan(config.layer_kinds, length, min(window, length), num_latents)


@struct.dataclass
class SlotIndex:
  """What stands in the slots of one kind of layer, int32 [B, slots + Z] each.

  Attributes:
    tokens: ids; 0 for padding and latents.
    positions: rotary positions.
    segments: 1 for what is seen; 0 for a padding; -1 for a token that latents hide.
  """
  tokens: Array
  positions: Array
  segments: Array


@struct.dataclass
class RingKVCache:
  """Keys and values of B texts in fixed slots.

  Attributes:
    keys, values: of each of the L layers, [B, K, H, slots + Z] and [B, K, slots + Z, H]: as matrix
      products read them, so that a decode step copies neither.
    index: kind of layer -> what stands in its slots.
    write_index: int32 [], slots written so far; the newest token of every text is in the one before.
    plan: the number of slots.
  """
  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  index: dict[str, SlotIndex]
  write_index: Array
  plan: CachePlan = struct.field(pytree_node=False)

  @classmethod
  def empty(cls, plan: CachePlan, config: TransformerConfig, batch: int, dtype: str) -> 'RingKVCache':
    """A cache of padding."""
    widths = {kind: plan.slots(kind) + plan.latent_slots for kind in plan.kinds}
    values = tuple(jnp.zeros((batch, config.num_kv_heads, widths[kind], config.head_dim), dtype)
                   for kind in plan.kinds)
    keys = tuple(jnp.swapaxes(each, 2, 3) for each in values)
    nothing = {kind: jnp.zeros((batch, width), jnp.int32) for kind, width in widths.items()}
    index = {kind: SlotIndex(padding, padding, padding) for kind, padding in nothing.items()}
    return cls(keys, values, index, jnp.zeros((), jnp.int32), plan)

  def fill(self, fresh: Sequence[KeysValues], index: SlotIndex) -> 'RingKVCache':
    """The cache with the first tokens of every text, as `append` would write them, but faster."""
    length = index.tokens.shape[1]

    def writer(slots: int) -> Writer:
      def write(old: Array, new: Array, axis: int) -> Array:
        if length > slots:
          new = jax.lax.slice_in_dim(new, length - slots, length, axis=axis)
          new = jnp.roll(new, length % slots, axis)
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis)
      return write

    return self._written(writer, fresh, index, self.write_index + length)

  def append(self, fresh: Sequence[KeysValues], index: SlotIndex) -> 'RingKVCache':
    """The cache with up to Q more tokens in every text.

    Args:
      fresh: of each layer, [B, 1, Q, K, H].
      index: [B, Q]; padding come before the tokens of a text. Texts stay aligned at their ends, but
        for those that have ended, which take one padding at every step of Q = 1.
    """
    length = index.tokens.shape[1]
    count = jnp.sum(index.segments > 0, axis=1)
    write_index = self.write_index + (1 if length == 1 else jnp.max(count))

    def writer(slots: int) -> Writer:
      if length == 1:
        at = self.write_index % slots
        return lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis)
      age = (write_index - 1 - jnp.arange(slots)) % slots  # 0 for the newest token
      kept = (self.write_index - 1 - (age - count[:, None])) % slots
      sources = jnp.where(age < count[:, None], slots + length - 1 - age, kept)

      def write(old: Array, new: Array, axis: int) -> Array:
        tokens, latents = jnp.split(old, [slots], axis)
        both = jnp.concatenate([tokens, new], axis)
        taken = jax.vmap(lambda row, at: jnp.take(row, at, axis - 1))(both, sources)
        return jnp.concatenate([taken, latents], axis)
      return write

    return self._written(writer, fresh, index, write_index)

  def attach(self, latents: Sequence[KeysValues], positions: Array, hidden: Array,
             rows: Array) -> 'RingKVCache':
    """The cache with latents, in the place of those that it may hold already.

    Args:
      latents: of each layer, [B, 1, Z, K, H].
      positions: [B, Z] of the latents.
      hidden: [B, Z] positions of the tokens that they stand for; -1 for none.
      rows: bool [B] texts that get latents; the others are left as they are.
    """
    def choose(new: Array, old: Array) -> Array:
      return jnp.where(jnp.expand_dims(rows, tuple(range(1, old.ndim))), new, old)

    def writer(slots: int) -> Writer:
      def write(old: Array, new: Array, axis: int) -> Array:
        before = jax.lax.slice_in_dim(old, slots, old.shape[axis], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(old, choose(new, before), slots, axis)
      return write

    index = SlotIndex(jnp.zeros_like(positions), positions, jnp.ones_like(positions))
    shown = self._written(writer, latents, index, self.write_index).hide(hidden)
    return shown.replace(index=jax.tree.map(choose, shown.index, self.index))

  def hide(self, positions: Array) -> 'RingKVCache':
    """The cache with the tokens at `positions` [B, Z] hidden, and all others shown."""
    index = {}
    for kind, where in self.index.items():
      is_token = jnp.arange(where.tokens.shape[1]) < self.plan.slots(kind)
      hidden = is_token & (where.positions[..., None] == positions[:, None]).any(axis=-1)
      shown = jnp.abs(where.segments)
      index[kind] = where.replace(segments=jnp.where(hidden, -shown, shown))
    return self.replace(index=index)

  def resized(self, plan: CachePlan) -> 'RingKVCache':
    """The cache in the slots of another plan, where those that only one has are not written yet."""

    def resize(kind: str, array: Array, axis: int) -> Array:
      tokens, latents = jnp.split(array, [self.plan.slots(kind)], axis)
      tokens = jax.lax.slice_in_dim(tokens, 0, min(tokens.shape[axis], plan.slots(kind)), axis=axis)
      widths = [(0, 0)] * array.ndim
      widths[axis] = (0, plan.slots(kind) - tokens.shape[axis])
      return jnp.concatenate([jnp.pad(tokens, widths), latents], axis)

    layers = [tuple(resize(kind, array, axis)
                    for kind, array in zip(plan.kinds, arrays, strict=True))
              for arrays, axis in ((self.keys, _KEYS), (self.values, _VALUES))]
    index = {kind: jax.tree.map(functools.partial(resize, kind, axis=1), where)
             for kind, where in self.index.items()}
    return RingKVCache(*layers, index, self.write_index, plan)

  def layer(self, number: int) -> KVCache:
    """What a block reads of one layer."""
    index = self.index[self.plan.kinds[number]]
    return KVCache(_outside(self.keys[number], _KEYS), _outside(self.values[number], _VALUES),
                   index.positions, index.segments)

  def pop(self) -> tuple['RingKVCache', list[KeysValues], SlotIndex]:
    """The cache with its newest token still to be appended, and what `append` is to be given.

    A loop that appends a token at the start of the next step reads what it has just written; were
    it to write what it has read, XLA would copy the whole cache at every step.
    """
    write_index = self.write_index - 1

    def newest(kind: str, array: Array, axis: int) -> Array:
      return jax.lax.dynamic_slice_in_dim(array, write_index % self.plan.slots(kind), 1, axis)

    fresh = [
        KeysValues(_outside(newest(kind, keys, _KEYS), _KEYS)[:, None],
                   _outside(newest(kind, values, _VALUES), _VALUES)[:, None])
        for kind, keys, values in zip(self.plan.kinds, self.keys, self.values, strict=True)]
    kind = max(self.index, key=self.plan.slots)
    index = jax.tree.map(lambda leaf: newest(kind, leaf, 1), self.index[kind])
    return self.replace(write_index=write_index), fresh, index

  def newest(self, count: int) -> SlotIndex:
    """The last `count` tokens of every text, [B, count]."""
    kind = max(self.index, key=self.plan.slots)
    at = (self.write_index - count + jnp.arange(count)) % self.plan.slots(kind)
    return jax.tree.map(lambda leaf: jnp.take(leaf, at, axis=1), self.index[kind])

  def _written(self, writer: Callable[[int], Writer], fresh: Sequence[KeysValues],
               index: SlotIndex, write_index: Array) -> 'RingKVCache':
    """The cache after the writes of writer(slots) to every layer and to what stands where."""
    writers = {kind: writer(self.plan.slots(kind)) for kind in self.index}

    def layers(old: Sequence[Array], new: Sequence[Array], axis: int) -> tuple[Array, ...]:
      written = []
      for kind, before, after in zip(self.plan.kinds, old, new, strict=True):
        after = _inside(after[:, 0].astype(before.dtype), axis)
        written.append(nn.with_logical_constraint(writers[kind](before, after, axis), _AXES[axis]))
      return tuple(written)

    return self.replace(
        keys=layers(self.keys, [each.keys for each in fresh], _KEYS),
        values=layers(self.values, [each.values for each in fresh], _VALUES),
        index={kind: jax.tree.map(functools.partial(write, axis=1), self.index[kind], index)
               for kind, write in writers.items()},
        write_index=write_index)


def _inside(fresh: Array, axis: int) -> Array:
  """Keys or values [B, Q, K, H] in the order of the slots."""
  return jnp.moveaxis(fresh, 1, axis)


def _outside(slots: Array, axis: int) -> Array:
  """The other way round, for a block."""
  return jnp.moveaxis(slots, axis, 1)
