"""Where latents stand, in a text small enough to count on one's fingers."""

import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.traces import place

BATCH = Batch(tokens=jnp.array([[10, 11, 12, 20, 21, 22, 23, 0]]),
              segments=jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
              positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]))


# Two latents, three ahead tokens, one trace at token 21: index 4, position 1.
@pytest.mark.parametrize('latents, positions, stand, ahead, base, reads, shown', [
    ('paper', 'share', [1, 1], [2, 3, 4], [21, 21], 5, 5),
    ('paper', 'shift', [2, 3], [4, 5, 6], [21, 21], 5, 5),
    ('anchored', 'share', [1, 1], [2, 3, 4], [21, 21], 5, 5),
    ('anchored', 'shift', [2, 3], [4, 5, 6], [21, 21], 5, 5),
    ('refining', 'share', [0, 1], [2, 3, 4], [20, 21], 5, 3),
    ('refining', 'shift', [0, 1], [2, 3, 4], [20, 21], 5, 3)])
def test_a_trace_stands_where_its_scheme_says(
    latents, positions, stand, ahead, base, reads, shown):
  config = DeliberationConfig(num_latents=2, num_ahead=1, num_traces=1, latents=latents,
                              positions=positions)
  placement = place(BATCH, jnp.array([[4]]), config, num_ahead=3)
  np.testing.assert_array_equal(placement.segments, [[2]])
  np.testing.assert_array_equal(placement.latent_positions, [[stand]])
  np.testing.assert_array_equal(placement.ahead_positions, [[ahead]])
  np.testing.assert_array_equal(placement.base_tokens, [[base]])
  np.testing.assert_array_equal(placement.coprocessor_prefix_length, [[reads]])
  np.testing.assert_array_equal(placement.decoder_prefix_length, [[shown]])
