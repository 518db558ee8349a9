"""Large weights are transposed for speed, and give the same numbers."""

import jax
import numpy as np
import pytest

from latent_deliberation.inference import passes
from latent_deliberation.inference.engine import Engine
from tests import tiny
from tests.inference.small import LENGTH, PROMPTS


@pytest.mark.parametrize('config, rows', [
    (tiny.CONFIG, 1), (tiny.CONFIG, 3), (tiny.LLAMA, 3)], ids=['gemma-1', 'gemma-3', 'llama-3'])
def test_transposed_weights_give_same_logits(monkeypatch, config, rows):
  prompts, decoder_params = PROMPTS[:rows], tiny.decoder_params(config)
  stored = Engine(config, decoder_params, length=LENGTH)
  monkeypatch.setattr(passes, 'CACHED_BYTES', 0)
  transposed = Engine(config, decoder_params, length=LENGTH)
  names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(
      transposed.weights.layers.blocks[0])}
  assert 'transposed' in names and 'w' not in names
  one, other = stored.read(prompts), transposed.read(prompts)
  whole = tiny.read(decoder_params, np.array(prompts[:1]), config=config)[1][0, -1]
  np.testing.assert_allclose(one.logits[0], whole, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-5)
  token = [[7]] * rows
  np.testing.assert_allclose(stored.read_on(one, token).logits,
                             transposed.read_on(other, token).logits, rtol=1e-5, atol=1e-5)


def test_unstacking_twice_changes_nothing(decoder_params):
  layers = passes.unstack(decoder_params['transformer'])
  assert passes.unstack(layers) is layers
