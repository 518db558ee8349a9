"""A cache is a value: what is appended can be taken off again, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.attention import KeysValues, KVCache


def fresh(length, rows=1, seed=0):
  """Keys and values, positions and segments of two texts."""
  random = np.random.default_rng(seed)
  keys, values = random.normal(size=(2, 3, 2, rows, length, 2, 4)).astype(np.float32)
  positions, segments = random.integers(1, 9, (2, 2, rows, length)).astype(np.int32)
  return KeysValues(jnp.asarray(keys), jnp.asarray(values)), positions, segments


def test_appended_tokens_stand_behind_the_others():
  first, second = fresh(3), fresh(2, seed=1)
  cache = KVCache.empty(first[0]).append(*first).append(*second)
  assert cache.length == 5
  np.testing.assert_array_equal(cache.keys[:, :, :3], first[0].keys[:, :, 0])
  np.testing.assert_array_equal(cache.values[:, :, 3:], second[0].values[:, :, 0])
  np.testing.assert_array_equal(cache.positions, np.concatenate(
      [first[1][:, 0], second[1][:, 0]], axis=1))
  np.testing.assert_array_equal(cache.segments, np.concatenate(
      [first[2][:, 0], second[2][:, 0]], axis=1))


def test_truncating_undoes_appending_and_neither_changes_the_cache():
  first, second = fresh(3), fresh(2, seed=1)
  cache = KVCache.empty(first[0]).append(*first)
  before = jax.tree.map(np.array, cache)
  longer = cache.append(*second)
  jax.tree.map(np.testing.assert_array_equal, longer.truncate(3), before)
  jax.tree.map(np.testing.assert_array_equal, cache, before)
  assert longer.length == 5 and cache.truncate(0).length == 0


def test_traces_of_one_text_cannot_be_appended_to_one_cache():
  with pytest.raises(UserError, match='3 rows of fresh tokens, expected 1'):
    KVCache.empty(fresh(2)[0]).append(*fresh(2, rows=3))


@pytest.mark.parametrize('length', [-1, 4])
def test_a_length_that_the_cache_does_not_have_is_refused(length):
  with pytest.raises(UserError, match=f'cache of 3 tokens to {length}'):
    KVCache.empty(fresh(3)[0]).append(*fresh(3)).truncate(length)
