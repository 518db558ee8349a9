"""The kv-cache, the masks that say what each token sees, and attention over both kinds of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.model import attention
from latent_deliberation.model.attention import (
  AttentionMaskSpec,
  KeysValues,
  KVCache,
  attend,
  attend_visible,
  cached_mask,
  fresh_mask,
  softcap,
)
from tests import tiny

GLOBAL = jnp.array(jnp.iinfo(jnp.int32).max)


def fresh_tokens(length, rows=1, seed=0):
  """Keys and values, positions and segments of two texts."""
  random = np.random.default_rng(seed)
  keys, values = random.normal(size=(2, 3, 2, rows, length, 2, 4)).astype(np.float32)
  positions, segments = random.integers(1, 9, (2, 2, rows, length)).astype(np.int32)
  return KeysValues(jnp.asarray(keys), jnp.asarray(values)), positions, segments


def test_append_adds_after_the_last():
  """Appended tokens come after the others."""
  first, second = fresh_tokens(3), fresh_tokens(2, seed=1)
  cache = KVCache.empty(first[0]).append(*first).append(*second)
  assert cache.length == 5
  np.testing.assert_array_equal(cache.keys[:, :, :3], first[0].keys[:, :, 0])
  np.testing.assert_array_equal(cache.values[:, :, 3:], second[0].values[:, :, 0])
  np.testing.assert_array_equal(cache.positions, np.concatenate(
      [first[1][:, 0], second[1][:, 0]], axis=1))
  np.testing.assert_array_equal(cache.segments, np.concatenate(
      [first[2][:, 0], second[2][:, 0]], axis=1))


def test_append_copies():
  """Appending leaves the cache as it is, and its tokens come first in the longer one."""
  first, second = fresh_tokens(3), fresh_tokens(2, seed=1)
  cache = KVCache.empty(first[0]).append(*first)
  before = jax.tree.map(np.array, cache)
  longer = cache.append(*second)
  jax.tree.map(np.testing.assert_array_equal, tiny.truncate(longer, 3), before)
  jax.tree.map(np.testing.assert_array_equal, cache, before)
  assert longer.length == 5 and KVCache.empty(first[0]).length == 0


def test_append_refuses_several_rows():
  """Traces of one text cannot be appended to one cache."""
  with pytest.raises(ValueError, match='3 rows.*expected 1'):
    KVCache.empty(fresh_tokens(2)[0]).append(*fresh_tokens(2, rows=3))


def draw(mask):
  return [''.join('.x'[int(cell)] for cell in row) for row in np.asarray(mask)]


def index(*values):
  return jnp.array(values, jnp.int32)


def fresh(positions, segments, window=GLOBAL):
  mask_spec = AttentionMaskSpec(index(*segments)[None, None], index(0)[None])
  return draw(fresh_mask(index(*positions)[None, None], mask_spec, jnp.asarray(window))[0, 0])


def cached(positions, segments, prefix_length, window=GLOBAL):
  """Fresh tokens (positions, segments) over a cache of documents of 3 and 3 tokens and padding."""
  mask_spec = AttentionMaskSpec(index(*segments)[None, None], index(prefix_length)[None])
  return draw(cached_mask(
      index(*positions)[None, None], mask_spec, index(0, 1, 2, 0, 1, 2, 0)[None],
      index(1, 1, 1, 2, 2, 2, 0)[None], jnp.asarray(window))[0, 0])


def test_fresh_mask_is_causal():
  """Fresh tokens see their own document causally; padding sees nothing."""
  assert fresh([0, 1, 2, 0, 1, 0], [1, 1, 1, 2, 2, 0]) == [
      'x.....',
      'xx....',
      'xxx...',
      '...x..',
      '...xx.',
      '......',
  ]


def test_window_counts_the_query():
  """A window counts the query itself."""
  assert fresh([0, 1, 2, 3], [1] * 4, window=2) == ['x...', 'xx..', '.xx.', '..xx']
  assert fresh([0, 1, 2, 3], [1] * 4, window=1) == ['x...', '.x..', '..x.', '...x']


def test_fresh_mask_with_shared_positions():
  """A row is causal by order, also for tokens that share a position."""
  # Three latents at the anchor's position 5, then two ahead tokens.
  assert fresh([5, 5, 5, 6, 7], [1] * 5, window=2) == ['x....', 'xx...', 'xxx..', 'xxxx.', '...xx']


def test_cached_mask_stops_at_prefix():
  """Cached tokens of the same document are seen, in the prefix only."""
  assert cached([2, 3], [1, 1], prefix_length=2) == ['xx.....', 'xx.....']
  assert cached([2, 3], [2, 2], prefix_length=5) == ['...xx..', '...xx..']
  assert cached([2, 3], [2, 0], prefix_length=7) == ['...xxx.', '.......']


@pytest.mark.parametrize('prefix_length', [0, -2])
def test_empty_prefix_shows_nothing(prefix_length):
  """An empty prefix shows nothing."""
  assert cached([2], [1], prefix_length) == ['.......']


def test_window_reaches_into_cache():
  """A window reaches into the cache exactly as far as it says."""
  assert cached([2, 3, 4], [2] * 3, prefix_length=6, window=3) == ['...xxx.', '....xx.', '.....x.']


def example(seed=0, cached_length=5, length=3):
  """Differentiable arguments of `attend`, and visible keys: B = 2, M = 3, N = 4, K = 2.

  One query of the twelve sees nothing. The others see some of both parts, at random.
  """
  random = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
  inputs = dict(
      queries=normal(2, 3, length, 4, 6), fresh_keys=normal(2, 3, length, 2, 6),
      fresh_values=normal(2, 3, length, 2, 6), cached_keys=normal(2, cached_length, 2, 6),
      cached_values=normal(2, cached_length, 2, 6))
  seen = lambda keys: jnp.asarray(random.random((2, 3, length, keys)) < 0.6)  # noqa: E731
  visible = dict(fresh_visible=seen(length).at[0, 1, 2].set(False),
                 cached_visible=seen(cached_length).at[0, 1, 2].set(False))
  return inputs, visible


def joined(inputs, visible):
  """Keys, values [B, M, P, K, H] and visible [B, M, Q, P]: fresh tokens, then cached ones."""

  def join(name):
    cached = inputs[f'cached_{name}'][:, None]
    fresh = inputs[f'fresh_{name}']
    return jnp.concatenate(
        [fresh, jnp.broadcast_to(cached, (*fresh.shape[:2], *cached.shape[2:]))], axis=2)

  return join('keys'), join('values'), jnp.concatenate(
      [visible['fresh_visible'], visible['cached_visible']], axis=-1)


def slow_attention(queries, keys, values, visible, cap):
  """Attention by a loop over queries, heads and keys, in float64."""
  queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
  group = queries.shape[3] // keys.shape[3]
  out = np.zeros(queries.shape)
  for b, m, q, n in np.ndindex(queries.shape[:-1]):
    total = 0.0
    for p in np.flatnonzero(visible[b, m, q]):
      score = queries[b, m, q, n] @ keys[b, m, p, n // group]
      weight = np.exp(score if cap is None else cap * np.tanh(score / cap))
      total += weight
      out[b, m, q, n] += weight * values[b, m, p, n // group]
    out[b, m, q, n] /= total or 1
  return out


@pytest.mark.parametrize('cap', [None, 0.8])
def test_attend_equals_slow_attention(cap):
  """Attention equals a slow one over cached and fresh keys together."""
  inputs, visible = example()
  expected = slow_attention(inputs['queries'], *joined(inputs, visible), cap)
  np.testing.assert_allclose(attend(**inputs, **visible, cap=cap), expected, rtol=1e-5, atol=1e-6)


def test_attend_without_cache():
  """Without a cache, only fresh keys count."""
  inputs, visible = ({name: value for name, value in part.items() if 'cached' not in name}
                     for part in example())
  expected = slow_attention(*inputs.values(), visible['fresh_visible'], cap=None)
  np.testing.assert_allclose(attend(**inputs, **visible), expected, rtol=1e-5, atol=1e-6)


def test_attend_over_empty_cache():
  """An empty cache is the same as no cache."""
  inputs, visible = example(cached_length=0)
  fresh_alone = {name: value for part in (inputs, visible) for name, value in part.items()
                 if 'cached' not in name}
  np.testing.assert_array_equal(attend(**inputs, **visible), attend(**fresh_alone))


def test_attend_with_large_scores():
  """Scores of any size pick the best key and do not overflow."""
  inputs, visible = example()
  inputs['queries'] *= 1e4
  result = attend(**inputs, **visible)
  keys, values, seen = map(np.asarray, joined(inputs, visible))
  for b, m, q, n in np.ndindex(result.shape[:-1]):
    if seen[b, m, q].any():
      scores = keys[b, m, :, n // 2] @ np.asarray(inputs['queries'][b, m, q, n])
      best = np.where(seen[b, m, q], scores, -np.inf).argmax()
      np.testing.assert_allclose(result[b, m, q, n], values[b, m, best, n // 2], rtol=1e-3)


def test_attend_gradients():
  """Gradients equal those of one plain softmax."""
  inputs, visible = example()
  weight = jax.random.normal(jax.random.key(1), inputs['queries'].shape)

  def split(inputs):
    return jnp.sum(weight * attend(**inputs, **visible, cap=0.8))

  def plain(inputs):
    keys, values, seen = joined(inputs, visible)
    queries = inputs['queries'].reshape(2, 3, 3, 2, 2, 6)
    scores = 0.8 * jnp.tanh(jnp.einsum('BMQKGH,BMPKH->BMKGQP', queries, keys) / 0.8)
    seen = seen[:, :, None, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1) * seen
    mixed = jnp.einsum('BMKGQP,BMPKH->BMQKGH', shares, values)
    return jnp.sum(weight * mixed.reshape(weight.shape))

  gradients, expected = (jax.jit(jax.grad(total))(inputs) for total in (split, plain))
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_attend_to_nothing():
  """A query that sees nothing gives zeros and zero gradients."""
  inputs, visible = example()
  nothing = jax.tree.map(jnp.zeros_like, visible)
  result, pull = jax.vjp(jax.jit(lambda inputs: attend(**inputs, **nothing)), inputs)
  assert np.all(result == 0)
  for gradient in jax.tree.leaves(pull(jnp.full_like(result, 1e6))):
    assert np.all(gradient == 0)


def test_attend_keeps_dtype():
  """The result has the dtype of the queries."""
  inputs, visible = example()
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
  result = attend(**rounded, **visible)
  exact = attend(**jax.tree.map(lambda x: x.astype(jnp.float32), rounded), **visible)
  assert result.dtype == jnp.bfloat16
  np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=0.02)


def test_softcap():
  """A soft-cap bounds x, and None leaves x as it is."""
  x = jnp.array([-1e6, -0.01, 0.0, 1e6])
  np.testing.assert_allclose(softcap(x, 5.0), [-5, -0.01, 0, 5], rtol=1e-5)
  assert softcap(x, None) is x


@pytest.mark.parametrize('slots', [0, 6])
def test_blocks_equal_whole_row(monkeypatch, slots):
  """Blocks of queries give the values and gradients of the whole row."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  length = 17
  fresh = (array(2, 3, length, 4, 8), array(2, 3, length, 2, 8), array(2, 3, length, 2, 8))
  cache = KVCache(array(2, slots, 2, 8), array(2, slots, 2, 8),
                  jnp.broadcast_to(jnp.arange(slots), (2, slots)), jnp.ones((2, slots), int))
  positions = jnp.broadcast_to(slots + jnp.arange(length), (2, 3, length))
  mask_spec = AttentionMaskSpec(
      jnp.broadcast_to(jnp.arange(length) // 9 + 1, positions.shape), jnp.full((2, 3), slots))

  def loss(*fresh):
    mixed = attend_visible(*fresh, positions, mask_spec, jnp.array(7), cache, cap=5.0)
    return jnp.sum(jnp.sin(mixed)), mixed

  results = []
  for least in (100, 5):
    monkeypatch.setattr(attention, 'MIN_BLOCK', least)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    results.append(gradient(*fresh))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)


def test_blocks_skip_later_tokens(monkeypatch):
  """A block is not compared with the tokens after it."""
  monkeypatch.setattr(attention, 'MIN_BLOCK', 4)
  ones = jnp.ones((1, 1, 8, 1, 2))
  keys = ones.at[:, :, 4:].set(jnp.nan)
  seen = attend_visible(ones, keys, keys, jnp.arange(8)[None, None],
                        AttentionMaskSpec(jnp.ones((1, 1, 8), int), jnp.zeros((1, 1), int)), GLOBAL)
  assert np.isfinite(seen[:, :, :4]).all() and np.isnan(seen[:, :, 4:]).all()
