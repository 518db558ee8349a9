"""Which parameters have gradients in the forward pass, and that gradients stay finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.deliberation_config import LATENTS
from latent_deliberation.model.kernels import fused_attention
from tests import tiny
from tests.deliberation.anchored import WEIGHT, many_traces, traces_at


@pytest.mark.parametrize('latents', LATENTS)
def test_start_has_gradients(decoder_params, batch, latents):
  """At the start, the gate has a gradient, and with paper latents every parameter has one."""
  deliberator = tiny.deliberator(latents=latents)
  params = nn.unbox(tiny.start(deliberator, jax.random.key(0), decoder_params))
  _, gradients = many_traces(deliberator, params, decoder_params, batch)
  moves = {key: any(np.any(leaf != 0) for leaf in jax.tree.leaves(branch))
           for key, branch in gradients.items()}
  # A closed gate stops all gradients but its own. The latents of the paper have no gate.
  opens = latents == 'paper'
  assert moves == {key: opens or key == 'gate' for key in params}


@pytest.mark.parametrize('tuned', [False, True])
def test_trunk_is_constant(decoder_params, batch, tuned):
  """The trunk has no gradient unless the decoder is trained."""
  deliberator = dataclasses.replace(tiny.deliberator(), tuned=tuned)

  def total(decoder_params):
    _, cache = deliberator.prefill(decoder_params, batch)
    return jnp.sum(cache.keys) + jnp.sum(cache.values)

  gradients = jax.jit(jax.grad(total))(decoder_params)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients)) == (not tuned)


@pytest.mark.parametrize('tuned', [False, True])
def test_fused_gradient_of_constant_trunk(decoder_params, batch, monkeypatch, tuned):
  """The fused gradient is used with a constant trunk, also under scan and remat."""
  plain = fused_attention._plain_backward
  calls = []
  monkeypatch.setattr(fused_attention, '_plain_backward',
                      lambda *args: calls.append(args) or plain(*args))
  deliberator = dataclasses.replace(
      tiny.deliberator(attention='fused', remat='full'), tuned=tuned)
  params = tiny.coprocessor_params(deliberator, decoder_params)

  def total(params, decoder_params):
    return deliberator.forward(params, decoder_params, batch, traces_at(batch)).sum()

  jax.eval_shape(jax.grad(total, argnums=(0, 1) if tuned else 0), params, decoder_params)
  assert bool(calls) == tuned


def test_invalid_traces_are_finite(decoder_params):
  """Invalid traces and their gradients are finite."""
  batch = tiny.packed_batch([(7, 4), ()])
  anchors = jnp.array([[4, 0, 12, 18], [0, 5, 12, 18]])
  traces = traces_at(batch, anchors)
  deliberator = tiny.deliberator(latents='refining')
  params = tiny.coprocessor_params(deliberator, decoder_params)
  hidden, gradients = tiny.forward_and_gradient(
      deliberator, params, decoder_params, batch, traces, 100 * WEIGHT)
  assert all(np.isfinite(leaf).all() for leaf in [hidden, *jax.tree.leaves(gradients)])
