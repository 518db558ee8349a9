"""Controls have the form of own outputs, and none of their content."""

import jax.numpy as jnp
import numpy as np

from latent_deliberation.evaluation.perplexity import mean, own, shuffled, zero

# Two texts of three traces; the first has two places, what stands at its third is no trace.
THOUGHTS = jnp.arange(6.0).reshape(2, 3, 1, 1)
VALID = jnp.array([[True, True, False], [True, True, True]])


def values(control):
  return np.asarray(control(THOUGHTS, VALID))[..., 0, 0].tolist()


def test_own_thoughts_stay_and_zero_ones_are_none():
  assert values(own) == [[0, 1, 2], [3, 4, 5]] and values(zero) == [[0] * 3] * 2


def test_shuffled_thoughts_are_those_of_traces_of_the_previous_text():
  assert values(shuffled) == [[3, 4, 5], [0, 1, 0]]


def test_mean_thoughts_are_of_the_traces_alone():
  np.testing.assert_allclose(values(mean), (0 + 1 + 3 + 4 + 5) / 5, rtol=1e-6)
