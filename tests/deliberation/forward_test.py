"""Many traces at once equal the paper's dense mask, and inference on each trace alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.deliberation_config import (
  GATES,
  LATENTS,
  SOFT_TOKENS,
  TRAINABLES,
)
from latent_deliberation.deliberation.traces import place
from tests import tiny
from tests.deliberation import dense_reference
from tests.deliberation.anchored import ANCHORS, WEIGHT, many_traces, traces_at

SCHEMES = [('refining', 'share'), *itertools.product(('paper', 'anchored'), ('shift', 'share'))]
# No line of code depends on both trainable and scheme, so most pairs need no test by default.
THOROUGH = [SCHEMES[0], ('paper', 'shift')]
VARIANTS = [
    pytest.param(dict(latents=latents, positions=positions, trainable=trainable), marks=[
        pytest.mark.slow] * (trainable != 'full' and (latents, positions) not in THOROUGH))
    for (latents, positions), trainable in itertools.product(SCHEMES, TRAINABLES)]
OTHER_PARTS = [dict(gate=gate, soft_tokens=soft_tokens) for gate, soft_tokens in zip(
    GATES, SOFT_TOKENS, strict=True) if gate != tiny.CHOICES.gate]
CONTROLS = [dict(num_layers=1), dict(num_layers=1, trainable='lora', lora_alpha=None),
            dict(reads='states')]
name = lambda choices: '-'.join(map(str, choices.values()))  # noqa: E731


@pytest.mark.parametrize('choices', VARIANTS + OTHER_PARTS, ids=name)
def test_equals_dense_mask(decoder_params, batch, choices):
  """Many traces equal one long sequence under a dense mask, with gradients."""
  deliberator = tiny.deliberator(**choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  hidden, gradients = many_traces(deliberator, params, decoder_params, batch)
  expected, pull = jax.vjp(
      lambda params: dense_reference.forward(
          tiny.CONFIG, deliberator.config, params, decoder_params, batch, ANCHORS,
          tiny.CHOICES.num_ahead), params)
  np.testing.assert_allclose(hidden, expected, atol=3e-5)
  for (path, gradient), dense in zip(jax.tree.leaves_with_path(gradients),
                                     jax.tree.leaves(pull(WEIGHT)[0]), strict=True):
    size = np.abs(dense).max()
    assert size > 0.01, f'{jax.tree_util.keystr(path)} does not learn'
    # In float32 either one may be 1e-4 away from the gradient in float64.
    np.testing.assert_allclose(gradient, dense, atol=5e-4 * size,
                               err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize('latents, positions', THOROUGH)
def test_delayed_latents(decoder_params, batch, latents, positions):
  """Delayed latents are seen by later tokens alone."""
  delay = jnp.array([[0, 1, 2, 3], [2, 0, 1, 1]])
  deliberator = tiny.deliberator(latents=latents, positions=positions, max_delay=2)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  hidden, gradients = tiny.forward_and_gradient(
      deliberator, params, decoder_params, batch, traces_at(batch, delay=delay), WEIGHT)
  expected, pull = jax.vjp(
      lambda params: dense_reference.forward(
          tiny.CONFIG, deliberator.config, params, decoder_params, batch, ANCHORS,
          tiny.CHOICES.num_ahead, delay), params)
  np.testing.assert_allclose(hidden, expected, atol=3e-5)
  jax.tree.map(lambda gradient, dense: np.testing.assert_allclose(
      gradient, dense, atol=5e-4 * np.abs(dense).max()), gradients, pull(WEIGHT)[0])
  # Tokens after the first, up to the delay, see no latents: they are the frozen decoder's.
  alone, _, _ = tiny.read(decoder_params, batch.tokens, batch.positions, batch.segments)
  for (text, trace), late in np.ndenumerate(delay):
    ahead = slice(ANCHORS[text, trace] + 1, ANCHORS[text, trace] + 1 + late)
    np.testing.assert_allclose(hidden[text, trace, 1:1 + late], alone[text, ahead], atol=3e-5)


@functools.partial(jax.jit, static_argnums=0)
def read_cache(deliberator, params, decoder_params, text, trunk, cache, num_ahead):
  """Latents for texts that end at their anchors, and their placement."""
  last = jnp.full((len(text.tokens), 1), text.tokens.shape[1] - 1)
  placement = place(text, last, deliberator.config, len(num_ahead))
  outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
  return deliberator.latents(params, decoder_params, placement, outputs), placement


def inferred(deliberator, params, decoder_params, tokens, ahead_tokens):
  """Hidden states [b, A, D] as a server computes them: prefill, read the cache, decode by token.

  Args:
    tokens: [b, n] documents up to their anchors.
    ahead_tokens: [b, A] tokens that are then decoded, teacher-forced.
  """
  length, num_ahead = tokens.shape[1], ahead_tokens.shape[1]
  config = deliberator.decoder.config
  trunk, _, cache = tiny.read(decoder_params, tokens, config=config)
  text = Batch(tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(length), tokens.shape))
  latents, placement = read_cache(
      deliberator, params, decoder_params, text, trunk, cache, tuple(range(num_ahead)))
  if deliberator.config.latents == 'refining':
    cache = tiny.truncate(cache, length - deliberator.config.num_latents)
  hidden, _, cache = tiny.read_on(
      decoder_params, latents[:, 0], placement.latent_positions[0, 0], cache, config)
  states = [hidden[:, -1]]
  for ahead in range(num_ahead - 1):
    x = tiny.embed(decoder_params, ahead_tokens[:, ahead:ahead + 1], config)
    hidden, _, cache = tiny.read_on(
        decoder_params, x, placement.ahead_positions[0, 0, ahead:ahead + 1], cache, config)
    states.append(hidden[:, -1])
  return jnp.stack(states, axis=1)


@pytest.mark.parametrize('choices', VARIANTS + CONTROLS, ids=name)
def test_equals_inference(decoder_params, batch, choices):
  """Each trace equals inference on its document alone."""
  compare_with_inference(tiny.deliberator(**choices), decoder_params, batch)


@pytest.mark.parametrize('choices', [
    dict(trainable='full', num_layers=2), dict(trainable='lora', latents='refining')], ids=name)
def test_llama_equals_inference(batch, choices):
  """So it does with biases, a head of its own, and every other switch of Llama and Qwen."""
  deliberator = tiny.deliberator(tiny.LLAMA, **choices)
  compare_with_inference(deliberator, tiny.decoder_params(tiny.LLAMA), batch)


def compare_with_inference(deliberator, decoder_params, batch):
  """Compares the hidden states of each trace with inference, and checks that gradients flow."""
  params = tiny.coprocessor_params(deliberator, decoder_params)
  traces = traces_at(batch)
  hidden, gradients = many_traces(deliberator, params, decoder_params, batch)
  assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients))
  lengths = np.take_along_axis(np.asarray(batch.positions), np.asarray(ANCHORS), axis=1) + 1
  for length in (3, 5):
    text, trace = np.nonzero(lengths == length)
    inside = np.asarray(ANCHORS)[text, trace, None] + 1 - length + np.arange(length)
    # Tokens past the end of a document are decoded too, and not compared.
    expected = inferred(deliberator, params, decoder_params, batch.tokens[text[:, None], inside],
                        traces.ahead_tokens[text, trace])
    valid = traces.ahead_valid[text, trace]
    assert valid.sum() >= 4
    np.testing.assert_allclose(hidden[text, trace][valid], expected[valid], atol=5e-5)


@pytest.mark.parametrize('trainable', TRAINABLES)
def test_closed_gate_is_frozen(decoder_params, batch, trainable):
  """Refining latents through a closed gate are the frozen decoder."""
  deliberator = tiny.deliberator(latents='refining', trainable=trainable)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  params['gate'] = jnp.zeros_like(params['gate'])
  traces = traces_at(batch)
  hidden, _ = many_traces(deliberator, params, decoder_params, batch)
  frozen, _, _ = tiny.read(decoder_params, batch.tokens, batch.positions, batch.segments)
  for text, trace, ahead in np.argwhere(traces.ahead_valid):
    np.testing.assert_allclose(hidden[text, trace, ahead],
                               frozen[text, ANCHORS[text, trace] + ahead], atol=3e-5)


def test_detached_latents(decoder_params, batch):
  """After latents are detached, the cache is bit for bit as before."""
  tokens = batch.tokens[:, :7]
  trunk, _, cache = tiny.read(decoder_params, tokens)
  before = jax.tree.map(np.array, cache)
  token, latents = tiny.embed(decoder_params, tokens[:, :1]), jnp.ones((2, 3, 16))
  _, plain, _ = tiny.read_on(decoder_params, token, jnp.array([7]), cache)
  _, _, augmented = tiny.read_on(decoder_params, latents, jnp.array([6, 6, 6]), cache)
  _, other, _ = tiny.read_on(decoder_params, token, jnp.array([7]), augmented)
  _, detached, _ = tiny.read_on(decoder_params, token, jnp.array([7]), tiny.truncate(augmented, 7))
  assert np.abs(other - plain).max() > 0.01
  np.testing.assert_array_equal(detached, plain)
  jax.tree.map(np.testing.assert_array_equal, cache, before)


@pytest.mark.parametrize('latents', LATENTS)
def test_dependencies_of_a_trace(decoder_params, batch, latents):
  """A trace depends on its document up to the anchor and on its ahead tokens."""
  deliberator = tiny.deliberator(latents=latents)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  for text in range(2):
    # As many copies of a text as it has tokens, each with another of its tokens exchanged.
    copies = jax.tree.map(lambda leaf, at=text: jnp.repeat(leaf[at:at + 1], tiny.LENGTH, axis=0),
                          batch)
    other = (copies.tokens + 1) % tiny.CONFIG.vocab_size
    changed = copies.replace(tokens=jnp.where(np.eye(tiny.LENGTH), other, copies.tokens))
    anchors = jnp.repeat(ANCHORS[text:text + 1], tiny.LENGTH, axis=0)
    hidden, reference = (tiny.forward(deliberator, params, decoder_params, each,
                                      traces_at(each, anchors)) for each in (changed, copies))
    depends = (hidden != reference).any(axis=-1)  # [token, M, A]
    token, ahead = np.arange(tiny.LENGTH)[:, None, None], np.arange(tiny.CHOICES.num_ahead)
    anchor = np.asarray(ANCHORS[text])[:, None]
    segments = np.asarray(batch.segments[text])
    read = (token <= anchor) & (segments[:, None, None] == segments[anchor])
    fed = (token > anchor) & (token <= anchor + ahead)
    inside = np.broadcast_to(traces_at(batch).ahead_valid[text], depends.shape)
    np.testing.assert_array_equal(depends[inside], (read | fed)[inside])


def test_traces_are_independent(decoder_params, batch):
  """No trace depends on the latents of another."""
  deliberator, traces = tiny.deliberator(), traces_at(batch)
  placement = place(batch, ANCHORS, deliberator.config, tiny.CHOICES.num_ahead)

  @jax.jit
  @jax.vmap
  def gradient(text, trace):
    _, cache = deliberator.prefill(decoder_params, batch)
    return jax.grad(lambda latents: deliberator.second_pass(
        decoder_params, latents, traces, placement, cache)[text, trace].sum())(
            jnp.ones((2, 4, 3, 16)))

  text, trace = (jnp.asarray(part.ravel()) for part in np.indices((2, 4)))
  depends = np.abs(gradient(text, trace)).max(axis=-1) > 0
  np.testing.assert_array_equal(depends.all(axis=-1).reshape(8, 8), np.eye(8, dtype=bool))
  np.testing.assert_array_equal(depends.any(axis=-1).reshape(8, 8), np.eye(8, dtype=bool))
