"""The slower ways to compute the training loss have its value and its gradient."""

import jax
import numpy as np
import pytest

from latent_deliberation.benchmarks.dense_mask import check_dense, dense_mask, separate_traces
from latent_deliberation.errors import UserError
from latent_deliberation.training.objectives import augmentation
from tests import tiny


@pytest.mark.parametrize('baseline, latents', [
    (dense_mask, 'paper'), (dense_mask, 'refining'), (separate_traces, 'paper')])
def test_baselines_equal_train_step(baseline, latents, batch, decoder_params):
  """A baseline has the loss and the gradient of the train step."""
  deliberator = tiny.deliberator(latents=latents, positions='shift', soft_tokens='free')
  params = tiny.coprocessor_params(deliberator, decoder_params)
  keys = jax.random.split(jax.random.key(3), len(batch.tokens))
  (total, targets), gradient = jax.jit(jax.value_and_grad(
      augmentation(deliberator, loss_chunk=5), has_aux=True))(params, decoder_params, batch, keys)
  (theirs, their_targets), their_gradient = jax.jit(jax.value_and_grad(
      baseline(deliberator, loss_chunk=5), has_aux=True))(params, decoder_params, batch, keys)
  assert targets == their_targets
  np.testing.assert_allclose(theirs, total, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4),
               their_gradient, gradient)


@pytest.mark.parametrize('choices, message', [
    ({'trainable': 'lora', 'lora_rank': 2}, "deliberation.trainable = 'lora'.*'full'"),
    ({'num_layers': 1}, 'deliberation.num_layers = 1'),
    ({'max_delay': 1, 'num_ahead': 4}, 'deliberation.max_delay = 1')])
def test_other_options_are_refused(choices, message):
  """Options that the mask does not have are refused."""
  deliberator = tiny.deliberator(**choices)
  with pytest.raises(UserError, match=message):
    check_dense(deliberator.decoder.config, deliberator.config)
  with pytest.raises(UserError, match=message):
    dense_mask(deliberator, loss_chunk=5)
