"""A kv-cache of fixed slots, written in place inside a compiled loop.

All rows of a batch write the same slot at the same step. Prompts are aligned at their ENDS, with
padding before the short ones, so a decode step is one slice update and not a scatter over rows.
Layers of one kind share an index, which says what each slot holds. The slots of a kind are a ring:
a global layer has one for every token of a text, a local layer only as many as its window reaches.

The slots of latents come after the ring. Refining latents hide the tokens that they replace and
overwrite nothing, so other latents, or none, may take their place later.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Bool, Float, Int
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.model.attention import KeysValues, KVCache
from latent_deliberation.model.products import on_bits
from latent_deliberation.model.transformer_config import TransformerConfig

SlotUpdate = Callable[[Array, Array, int], Array]  # (old, new, axis of the slots) -> array
_LAST, _THIRD = 3, 2  # axes of the slots
_AXES = {_LAST: ('batch', 'kv_heads', 'head_dim', 'slot'),
         _THIRD: ('batch', 'kv_heads', 'slot', 'head_dim')}


@dataclasses.dataclass(frozen=True)
class CachePlan:
  """Numbers of slots.

  Attributes:
    kinds: 'global' or 'local' for each of the L layers.
    global_slots: largest number of tokens of a text. No layer has more token slots.
    local_slots: number of tokens that a local layer keeps.
    latent_slots: Z, slots for latents, after those for tokens in every layer.
  """
  kinds: tuple[str, ...]
  global_slots: int
  local_slots: int
  latent_slots: int

  def slots(self, kind: str) -> int:
    """Returns the number of token slots in a layer of this kind."""
    return self.local_slots if kind == 'local' else self.global_slots


def plan_cache(config: TransformerConfig, length: int, num_latents: int = 0,
               refining: bool = False) -> CachePlan:
  """Returns the plan for texts of at most `length` tokens.

  Refining latents are placed up to num_latents - 1 tokens before the last one, and each sees a
  whole window from its place. Local layers keep that many tokens more.
  """
  window = config.window + (num_latents - 1 if refining else 0)
  return CachePlan(config.layer_kinds, length, min(window, length), num_latents)


def cache_bytes(plan: CachePlan, config: TransformerConfig, dtype: str) -> int:
  """Returns the bytes of keys and values that one text takes."""
  slots = sum(plan.slots(kind) + plan.latent_slots for kind in plan.kinds)
  return 2 * slots * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def check_length(config: TransformerConfig, length: int, dtype: str, mesh: Mesh | None = None,
                 texts: int = 1) -> None:
  """Raises UserError where the cache of texts of `length` tokens would not fit the memory."""
  check_integer('length', length, 1)
  needed = texts * cache_bytes(plan_cache(config, length), config, dtype)
  # A mesh divides the cache, and tells itself where it does not fit.
  available = None if mesh is not None else _memory(jax.local_devices()[0])
  if available is not None and needed > available:
    whose, fewer = ('one text', '') if texts == 1 else (f'{texts} texts', ' or fewer rows (--rows)')
    raise UserError(f'length = {length}: the kv-cache of {whose} would take '
                    f'{needed / 2**30:,.1f} GiB, and the device has {available / 2**30:,.1f} GiB: '
                    f'give a smaller length (--length){fewer}')


def _memory(device: jax.Device) -> int | None:
  """Returns the bytes of memory of a device; None where they are not known."""
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return (device.memory_stats() or {}).get('bytes_limit')


def choose_rows(rows: Bool[Array, 'B'], new: Array, old: Array) -> Array:
  """Takes the texts `rows` from `new`, [B, ...], and the others from `old`."""
  return jnp.where(jnp.expand_dims(rows, tuple(range(1, old.ndim))), new, old)


@struct.dataclass
class SlotIndex:
  """Contents of the slots of one kind of layer, slots + Z of them in each text.

  Attributes:
    tokens: token ids; 0 for padding and latents.
    positions: rotary positions.
    segments: 1 for what is seen; 0 for padding; -1 for a token that latents hide.
  """
  tokens: Int[Array, 'B S']
  positions: Int[Array, 'B S']
  segments: Int[Array, 'B S']


@struct.dataclass
class RingKVCache:
  """Keys and values of B texts in fixed slots.

  Attributes:
    keys, values: arrays of each of the L layers, with S = slots + Z. The axes are in the order in
      which a CPU's matrix products read them, so a decode step copies neither. Keys of bfloat16
      have that of values.
    index: kind of layer -> contents of its slots.
    write_index: number of slots written so far. The newest token of every text is in the slot
      before it.
    plan: numbers of slots.
  """
  keys: tuple[Float[Array, 'B K H S'], ...] | tuple[Float[Array, 'B K S H'], ...]
  values: tuple[Float[Array, 'B K S H'], ...]
  index: dict[str, SlotIndex]
  write_index: Int[Array, '']
  plan: CachePlan = struct.field(pytree_node=False)

  @property
  def keys_axis(self) -> int:
    """Axis of the slots in keys."""
    return _keys_axis(self.keys[0].dtype)

  @classmethod
  def empty(cls, plan: CachePlan, config: TransformerConfig, batch: int,
            dtype: str) -> 'RingKVCache':
    """Returns a cache of nothing but padding."""
    # Layers of one kind share their index, and so their number of slots.
    widths = {kind: plan.slots(kind) + plan.latent_slots for kind in plan.kinds}
    values = tuple(jnp.zeros((batch, config.num_kv_heads, widths[kind], config.head_dim), dtype)
                   for kind in plan.kinds)
    keys = tuple(jnp.moveaxis(each, _THIRD, _keys_axis(each.dtype)) for each in values)
    nothing = {kind: jnp.zeros((batch, width), jnp.int32) for kind, width in widths.items()}
    index = {kind: SlotIndex(padding, padding, padding) for kind, padding in nothing.items()}
    return cls(keys, values, index, jnp.zeros((), jnp.int32), plan)

  def fill(self, fresh: Sequence[KeysValues], index: SlotIndex) -> 'RingKVCache':
    """Writes the first tokens of every text as `append` would, but faster."""
    length = index.tokens.shape[1]

    def updater(slots: int) -> SlotUpdate:
      def update(old: Array, new: Array, axis: int) -> Array:
        # Of a text longer than the ring, the newest tokens stay, each in its slot of the ring.
        if length > slots:
          new = jax.lax.slice_in_dim(new, length - slots, length, axis=axis)
          new = jnp.roll(new, length % slots, axis)
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis)
      return update

    return self._updated(updater, fresh, index, self.write_index + length)

  def append(self, fresh: Sequence[KeysValues], index: SlotIndex) -> 'RingKVCache':
    """Writes up to Q more tokens to every text.

    Args:
      fresh: keys and values of each layer, [B, 1, Q, K, H].
      index: [B, Q], with padding before the tokens of a text. Texts stay aligned at their ends. A
        text that has ended takes one padding at every step of Q = 1.
    """
    length = index.tokens.shape[1]
    count = jnp.sum(index.segments > 0, axis=1)
    write_index = self.write_index + (1 if length == 1 else jnp.max(count))

    def updater(slots: int) -> SlotUpdate:
      # One token: the same slot in every text.
      if length == 1:
        at = self.write_index % slots
        return lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis)
      # Several tokens, a different number in each text: every slot takes its content from the old
      # slots or, after them in `both`, from the new tokens. The texts that get fewer tokens move
      # their old ones on, which keeps all texts aligned at their ends.
      age = (write_index - 1 - jnp.arange(slots)) % slots  # 0 for the newest token
      kept = (self.write_index - 1 - (age - count[:, None])) % slots
      sources = jnp.where(age < count[:, None], slots + length - 1 - age, kept)

      def update(old: Array, new: Array, axis: int) -> Array:
        tokens, latents = jnp.split(old, [slots], axis)
        both = jnp.concatenate([tokens, new], axis)
        taken = jax.vmap(lambda row, at: jnp.take(row, at, axis - 1))(both, sources)
        return jnp.concatenate([taken, latents], axis)
      return update

    return self._updated(updater, fresh, index, write_index)

  def attach(self, latents: Sequence[KeysValues], positions: Array, hidden: Array,
             rows: Bool[Array, 'B']) -> 'RingKVCache':
    """Writes latents over those that the cache may hold already.

    Args:
      latents: keys and values of each layer, [B, 1, Z, K, H].
      positions: [B, Z] positions of the latents.
      hidden: [B, Z] positions of the tokens that the latents replace; -1 for none.
      rows: texts that get latents; the others stay as they are.
    """
    def updater(slots: int) -> SlotUpdate:
      def update(old: Array, new: Array, axis: int) -> Array:
        # Latents go after the ring. Other texts keep what they hold there.
        before = jax.lax.slice_in_dim(old, slots, old.shape[axis], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(
            old, choose_rows(rows, new, before), slots, axis)
      return update

    index = SlotIndex(jnp.zeros_like(positions), positions, jnp.ones_like(positions))
    shown = self._updated(updater, latents, index, self.write_index).hide(hidden)
    # Other texts also keep the tokens that they hide.
    return shown.replace(index=jax.tree.map(
        functools.partial(choose_rows, rows), shown.index, self.index))

  def insert(self, row: Array, other: 'RingKVCache') -> 'RingKVCache':
    """Returns the cache with the one text of `other`, a cache of the same plan, in the place `row`.

    The text is turned in its rings, so that its newest token is in the slot of all newest tokens.
    """
    def place(kind: str, old: Array, new: Array, axis: int) -> Array:
      tokens, latents = jnp.split(new, [self.plan.slots(kind)], axis)
      turned = jnp.roll(tokens, self.write_index - other.write_index, axis)
      return jax.lax.dynamic_update_slice_in_dim(
          old, jnp.concatenate([turned, latents], axis), row, 0)

    layers = [tuple(on_bits(functools.partial(place, kind, axis=axis), *each)
                    for kind, *each in zip(self.plan.kinds, *arrays, strict=True))
              for arrays, axis in (((self.keys, other.keys), self.keys_axis),
                                   ((self.values, other.values), _THIRD))]
    index = {kind: jax.tree.map(functools.partial(place, kind, axis=1), where, other.index[kind])
             for kind, where in self.index.items()}
    return RingKVCache(*layers, index, self.write_index, self.plan)

  def hide(self, positions: Array) -> 'RingKVCache':
    """Hides the tokens at `positions` [B, Z] and shows all others."""
    index = {}
    for kind, where in self.index.items():
      # Latents are never hidden. The sign of a segment says whether a token is.
      is_token = jnp.arange(where.tokens.shape[1]) < self.plan.slots(kind)
      hidden = is_token & (where.positions[..., None] == positions[:, None]).any(axis=-1)
      shown = jnp.abs(where.segments)
      index[kind] = where.replace(segments=jnp.where(hidden, -shown, shown))
    return self.replace(index=index)

  def resized(self, plan: CachePlan) -> 'RingKVCache':
    """Returns the cache in the slots of another plan.

    Slots that only one of the two plans has must not have been written yet.
    """

    def resize(kind: str, array: Array, axis: int) -> Array:
      # Cut or pad the slots of tokens. Those of latents stay after them.
      tokens, latents = jnp.split(array, [self.plan.slots(kind)], axis)
      tokens = jax.lax.slice_in_dim(tokens, 0, min(tokens.shape[axis], plan.slots(kind)), axis=axis)
      widths = [(0, 0)] * array.ndim
      widths[axis] = (0, plan.slots(kind) - tokens.shape[axis])
      return jnp.concatenate([jnp.pad(tokens, widths), latents], axis)

    layers = [tuple(resize(kind, array, axis)
                    for kind, array in zip(plan.kinds, arrays, strict=True))
              for arrays, axis in ((self.keys, self.keys_axis), (self.values, _THIRD))]
    index = {kind: jax.tree.map(functools.partial(resize, kind, axis=1), where)
             for kind, where in self.index.items()}
    return RingKVCache(*layers, index, self.write_index, plan)

  def layer(self, number: int) -> KVCache:
    """Returns one layer as a block reads it."""
    index = self.index[self.plan.kinds[number]]
    return KVCache(_to_block(self.keys[number], self.keys_axis),
                   _to_block(self.values[number], _THIRD), index.positions, index.segments)

  def pop(self) -> tuple['RingKVCache', list[KeysValues], SlotIndex]:
    """Takes off the newest token; returns the cache without it, and what `append` needs for it.

    A loop that appends a token at the START of the next step reads what it has just written. If it
    wrote what it has just read, XLA would copy the whole cache at every step.
    """
    write_index = self.write_index - 1

    def newest(kind: str, array: Array, axis: int) -> Array:
      at = write_index % self.plan.slots(kind)
      return on_bits(lambda array: jax.lax.dynamic_slice_in_dim(array, at, 1, axis), array)

    fresh = [
        KeysValues(_to_block(newest(kind, keys, self.keys_axis), self.keys_axis)[:, None],
                   _to_block(newest(kind, values, _THIRD), _THIRD)[:, None])
        for kind, keys, values in zip(self.plan.kinds, self.keys, self.values, strict=True)]
    # Every kind holds the newest token, and any index would do.
    kind = max(self.index, key=self.plan.slots)
    index = jax.tree.map(lambda leaf: newest(kind, leaf, 1), self.index[kind])
    return self.replace(write_index=write_index), fresh, index

  def newest(self, count: int) -> SlotIndex:
    """Returns the last `count` tokens of every text, [B, count]."""
    # The largest ring goes back furthest.
    kind = max(self.index, key=self.plan.slots)
    at = (self.write_index - count + jnp.arange(count)) % self.plan.slots(kind)
    return jax.tree.map(lambda leaf: jnp.take(leaf, at, axis=1), self.index[kind])

  def _updated(self, updater: Callable[[int], SlotUpdate], fresh: Sequence[KeysValues],
               index: SlotIndex, write_index: Array) -> 'RingKVCache':
    """Returns the cache after updater(slots) has updated every layer and every index."""
    # Layers of a kind hold the same tokens, so one update serves all of them.
    updates = {kind: updater(self.plan.slots(kind)) for kind in self.index}

    def layers(old: Sequence[Array], new: Sequence[Array], axis: int) -> tuple[Array, ...]:
      written = []
      for kind, before, after in zip(self.plan.kinds, old, new, strict=True):
        # The constraint keeps texts and kv heads on the devices that work on them.
        after = _to_slots(after[:, 0].astype(before.dtype), axis)
        update = functools.partial(updates[kind], axis=axis)
        written.append(nn.with_logical_constraint(on_bits(update, before, after), _AXES[axis]))
      return tuple(written)

    return self.replace(
        keys=layers(self.keys, [each.keys for each in fresh], self.keys_axis),
        values=layers(self.values, [each.values for each in fresh], _THIRD),
        index={kind: jax.tree.map(functools.partial(update, axis=1), self.index[kind], index)
               for kind, update in updates.items()},
        write_index=write_index)


def _keys_axis(dtype: DTypeLike) -> int:
  # A product of bfloat16 takes no transposed matrix: XLA on a CPU would copy it, as float32.
  return _THIRD if dtype == jnp.bfloat16 else _LAST


def _to_slots(fresh: Array, axis: int) -> Array:
  """Moves the token axis of keys or values [B, Q, K, H] to where the cache has its slots."""
  return jnp.moveaxis(fresh, 1, axis)


def _to_block(slots: Array, axis: int) -> Array:
  """Undoes `_to_slots`, for a block."""
  return jnp.moveaxis(slots, axis, 1)
