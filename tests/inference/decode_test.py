"""Tokens are drawn from the requested distribution, and from no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.deliberation.loss import entropy
from latent_deliberation.errors import UserError
from latent_deliberation.inference.decode import (
  Sampling,
  filtered,
  likeliest,
  logprobs_of,
  sample,
)

P = np.array([0.05, 0.4, 0.2, 0.3, 0.04, 0.01])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))[None] + 3


@pytest.mark.parametrize('sampling, kept', [
    (Sampling(1.0), [0, 1, 2, 3, 4, 5]), (Sampling(1.0, top_k=2), [1, 3]),
    (Sampling(1.0, top_k=9), [0, 1, 2, 3, 4, 5]), (Sampling(1.0, top_p=0.39), [1]),
    (Sampling(1.0, top_p=0.69), [1, 3]), (Sampling(1.0, top_p=0.71), [1, 2, 3]),
    (Sampling(1.0, min_p=0.49), [1, 2, 3]), (Sampling(1.0, min_p=0.51), [1, 3]),
    (Sampling(0.5, min_p=0.49), [1, 3]), (Sampling(2.0, top_p=0.9), [0, 1, 2, 3, 4]),
    (Sampling(1.0, top_k=3, top_p=0.75), [1, 3]), (Sampling(1.0, min_p=1.0), [1]),
    # The limits of what float32 can hold.
    (Sampling(1.0, top_p=0.0), [1]), (Sampling(1.0, top_p=1e-46), [1]),
    (Sampling(1.0, min_p=1e-46), [0, 1, 2, 3, 4, 5]),
    (Sampling(1.0, top_k=2**40), [0, 1, 2, 3, 4, 5]),
    (Sampling(1e300), [0, 1, 2, 3, 4, 5]), (Sampling(1e-8), [1])])
def test_filters_keep_likeliest_tokens(sampling, kept):
  found = np.asarray(jax.nn.softmax(filtered(LOGITS, sampling), axis=-1))[0]
  relative = (P / P.max()) ** (1 / sampling.temperature)
  expected = np.where(np.isin(np.arange(6), kept), relative, 0)
  np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_frequencies_follow_the_distribution():
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = jnp.repeat(LOGITS, 4000, axis=0)
  tokens = sample(keys, logits, Sampling(0.7, top_k=4))
  expected = np.where(P >= 0.05, P ** (1 / 0.7), 0)
  np.testing.assert_allclose(np.bincount(tokens, minlength=6) / 4000, expected / expected.sum(),
                             atol=0.03)
  # Log-probabilities are those of the model, before any filter.
  np.testing.assert_allclose(logprobs_of(tokens, logits), np.log(P)[tokens], atol=1e-5)


@pytest.mark.parametrize('temperature', [0, 0.0, 5e-324, 1e-45, 1e-38, 1e-30, 9e-9])
def test_zero_temperature_is_greedy(temperature):
  """So is every temperature too low for float32."""
  logits = jnp.concatenate([LOGITS, LOGITS[:, ::-1]])
  for seed in range(3):
    keys = jax.random.split(jax.random.key(seed), 2)
    np.testing.assert_array_equal(sample(keys, logits, Sampling(temperature)), [1, 4])


@pytest.mark.parametrize('sampling', [
    Sampling(), Sampling(1.0), Sampling(1e300), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5),
    Sampling(1.0, min_p=0.9)], ids=str)
def test_ids_without_a_text_are_never_drawn(sampling):
  """Filters keep the likeliest of the other ids."""
  keys = jax.random.split(jax.random.key(0), 200)
  allowed = jnp.array([True, False, True, False, True, False])
  tokens = sample(keys, jnp.repeat(LOGITS, 200, axis=0), sampling, allowed)
  assert set(tokens.tolist()) <= {0, 2, 4} and 2 in tokens


def test_each_text_has_its_own_key():
  keys = jax.random.split(jax.random.key(3), 64)
  logits = jnp.repeat(LOGITS, 64, axis=0)
  tokens = sample(keys, logits, Sampling(1.0))
  again = sample(keys[::-1][:5], logits[:5], Sampling(1.0))
  np.testing.assert_array_equal(again, tokens[::-1][:5])


def test_entropy_with_impossible_tokens():
  logits = jnp.stack([LOGITS[0], jnp.zeros(6), jnp.array([500.0, 0, 0, 0, 0, 0])])
  np.testing.assert_allclose(entropy(logits), [-(P * np.log(P)).sum(), np.log(6), 0], atol=1e-5)


@pytest.mark.parametrize('values, message', [
    (dict(temperature=-0.1), 'temperature = -0.1'), (dict(temperature=float('nan')), 'temperature'),
    (dict(temperature=float('inf')), 'temperature = inf'), (dict(top_k=0), 'top_k = 0'),
    (dict(temperature=10**400), 'temperature = 1000'), (dict(temperature='hot'), "= 'hot'"),
    (dict(top_k=2.5), 'top_k = 2.5'), (dict(top_k=True), 'top_k = True'),
    (dict(top_k=10**30), 'top_k = 1000'),
    (dict(top_p=-0.1), 'top_p = -0.1'), (dict(top_p=1.1), 'top_p = 1.1'),
    (dict(top_p=float('nan')), 'top_p = nan'), (dict(min_p=float('nan')), 'min_p = nan'),
    (dict(min_p=-0.1), 'min_p = -0.1'), (dict(min_p=2.0), 'min_p = 2.0')])
def test_bad_sampling_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    Sampling(**values)


def test_likeliest_is_the_first_largest():
  random = np.random.default_rng(0)
  logits = random.integers(-3, 3, (64, 9)).astype(np.float32)  # most rows have several largest
  logits[0], logits[1, :8], logits[2] = 1.5, -np.inf, -np.inf
  found = likeliest(jnp.asarray(logits))
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))
  assert likeliest(jnp.array([[1.0, jnp.nan, 2.0]])).tolist() == [0]
