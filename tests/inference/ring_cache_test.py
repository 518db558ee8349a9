"""Slots hold the newest tokens of every text, whatever was written in what order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_deliberation.inference.ring_cache import RingKVCache, SlotIndex, plan_cache
from latent_deliberation.model.attention import KeysValues
from tests import tiny

BATCH, LENGTH, LATENTS = 3, 24, 2
HEADS, WIDTH = tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim
PLAN = plan_cache(tiny.CONFIG, LENGTH, LATENTS, refining=True)
FILL, APPEND = jax.jit(RingKVCache.fill), jax.jit(RingKVCache.append)


def content(tokens, positions):
  """Keys and values of each layer that say which token they belong to, [B, 1, Q, K, H]."""
  shape = (*tokens.shape, HEADS, WIDTH)
  own = jnp.asarray(tokens * 100 + positions, jnp.float32)[..., None, None]
  return [KeysValues(jnp.broadcast_to(own + layer / 8, shape)[:, None],
                     jnp.broadcast_to(-own - layer / 8, shape)[:, None])
          for layer in range(tiny.CONFIG.num_layers)]


def chunk(texts, counts, width):
  """The next `counts` tokens of texts, at the ends of rows of `width`; the texts grow.

  A text without a token takes a padding, None in its list, where the width is 1.
  """
  tokens, positions, segments = np.zeros((3, BATCH, width), np.int32)
  for row, count in enumerate(counts):
    for at in range(width - count, width):
      tokens[row, at] = len(texts[row]) % 37 + 1 + row
      positions[row, at] = len(texts[row]) - texts[row].count(None)
      segments[row, at] = 1
      texts[row].append(int(tokens[row, at]))
    if width == 1 and not count:
      texts[row].append(None)
  return content(tokens, positions), SlotIndex(*map(jnp.asarray, (tokens, positions, segments)))


def check(cache, texts):
  """Each layer holds the last tokens of each text, with their own keys and values."""
  for number, kind in enumerate(PLAN.kinds):
    layer, index = cache.layer(number), cache.index[kind]
    for row, text in enumerate(texts):
      position = itertools.count()
      numbered = [None if token is None else (next(position), token) for token in text]
      expected = dict(filter(None, numbered[-PLAN.slots(kind):]))
      slots = np.flatnonzero(np.asarray(layer.segments[row]) > 0)
      found = {int(layer.positions[row, slot]): int(index.tokens[row, slot]) for slot in slots}
      assert found == expected and len(slots) == len(expected)
      own = np.array([100 * found[at] + at for at in np.asarray(layer.positions[row, slots])])
      own = (own + number / 8).astype(layer.keys.dtype)
      np.testing.assert_array_equal(layer.keys[row, slots, 1, 3], own)
      np.testing.assert_array_equal(layer.values[row, slots, 0, 2], -own)


def filled(counts, width, dtype='float32'):
  texts = [[] for _ in range(BATCH)]
  empty = RingKVCache.empty(PLAN, tiny.CONFIG, BATCH, dtype)
  return FILL(empty, *chunk(texts, counts, width)), texts


def test_local_layers_keep_a_window():
  assert (PLAN.slots('local'), PLAN.slots('global')) == (tiny.CONFIG.window + LATENTS - 1, LENGTH)
  cache, _ = filled((4, 2, 1), 4)
  assert [values.shape[2] - LATENTS for values in cache.values] == [5, LENGTH, 5]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('counts, width', [((4, 2, 1), 4), ((7, 8, 3), 8), ((20, 6, 5), 32)])
def test_newest_tokens_are_there(counts, width, dtype):
  cache, texts = filled(counts, width, dtype)
  check(cache, texts)
  step = ((1, 1, 1), 1)
  for more, width in (step, ((0, 3, 2), 4), step, step, ((1, 0, 0), 2)):
    cache = APPEND(cache, *chunk(texts, more, width))
    check(cache, texts)


def writes(*widths):
  """A width, and a number of tokens that fits it for each text."""
  return st.sampled_from(widths).flatmap(
      lambda width: st.tuples(st.tuples(*[st.integers(0, width)] * BATCH), st.just(width)))


@settings(max_examples=25, deadline=None)
@given(first=writes(4, 8, 32), more=st.lists(writes(1, 2, 8), max_size=9))
def test_any_writes_keep_newest_tokens(first, more):
  """Whatever is filled and appended, each text has the newest tokens that a list would have."""
  cache, texts = filled(*first)
  for counts, width in more:
    cache = APPEND(cache, *chunk(texts, counts, width))
  check(cache, texts)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_pop_and_append_change_no_bit(dtype):
  cache, _ = filled((7, 8, 3), 8, dtype)
  without, *newest = jax.jit(RingKVCache.pop)(cache)
  jax.tree.map(np.testing.assert_array_equal, APPEND(without, *newest), cache)


def attached(cache, rows, hidden=(-1, -1), seed=0):
  positions = jnp.full((BATCH, LATENTS), 50 + seed)
  latents = content(np.full((BATCH, LATENTS), 9 + seed), np.asarray(positions))
  return jax.jit(RingKVCache.attach)(cache, latents, positions,
                                     jnp.broadcast_to(jnp.array(hidden), (BATCH, LATENTS)),
                                     jnp.asarray(rows))


def seen(cache, number, row):
  layer = cache.layer(number)
  return sorted(int(at) for at in layer.positions[row][np.asarray(layer.segments[row]) > 0])


def test_latents_hide_what_they_replace():
  cache, texts = filled((4, 2, 4), 4)
  both = attached(cache, [True, False, True], hidden=(2, 3))
  for number, kind in enumerate(PLAN.kinds):
    assert seen(both, number, 0) == [0, 1, 50, 50]
    assert seen(both, number, 1) == [0, 1]
    tokens = slice(0, PLAN.slots(kind))
    np.testing.assert_array_equal(both.keys[number][..., tokens], cache.keys[number][..., tokens])
    np.testing.assert_array_equal(both.values[number][1], cache.values[number][1])


def test_other_latents_replace_the_first():
  cache, _ = filled((4, 2, 4), 4)
  first = attached(cache, [True] * 3, hidden=(2, 3))
  second = attached(first, [True, False, True], hidden=(0, -1), seed=1)
  assert seen(second, 1, 0) == [1, 2, 3, 51, 51]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]),
               (second.keys, second.index), (first.keys, first.index))


def test_later_tokens_leave_latents_in_place():
  cache, texts = filled((4, 2, 4), 4)
  both = attached(cache, [True] * 3)
  for count, width in ((1, 1), (3, 4)):
    both = APPEND(both, *chunk(texts, [count] * 3, width))
  assert seen(both, 1, 0) == [*range(8), 50, 50]
  assert seen(both, 0, 0) == [*range(3, 8), 50, 50]
