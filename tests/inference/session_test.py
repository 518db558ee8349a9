"""Texts deliberate where their policy says, and what follows is what training knew there."""

import itertools

import jax
import numpy as np
import pytest

from latent_deliberation.deliberation.deliberation_config import LATENTS
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.generator import Generator, copied
from latent_deliberation.inference.policy import Gate, Policy
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  augmented,
  plain_log_probabilities,
  trained_log_probabilities,
)

GATE = Gate(np.random.default_rng(3).standard_normal(16).astype(np.float32), np.float32(-0.5))


@pytest.mark.parametrize('latents', [
    pytest.param(latents, marks=[pytest.mark.slow] * (latents != 'refining'))
    for latents in LATENTS])
@pytest.mark.parametrize('policy, stops', [
    pytest.param(Policy(every=5), (0, 5, 10), marks=pytest.mark.slow),
    (Policy(at=(3, 4, 11)), (3, 4, 11))], ids=['every', 'at'])
def test_latents_at_several_places_are_each_what_training_knew_there(
    decoder_params, latents, policy, stops):
  generator, *trained = augmented(decoder_params, latents=latents, positions='shift')
  # Two prompts, as every length of text is compiled by itself in training's forward pass.
  for prompt, completion in zip(
      PROMPTS[1:], generate(generator, PROMPTS[1:], DecodingOptions(14, policy=policy)), strict=True):
    assert completion.latents_at == list(stops)
    tokens, found = completion.tokens, completion.logprobs
    np.testing.assert_allclose(found[:stops[0]], plain_log_probabilities(
        decoder_params, prompt, tokens[:stops[0]]), atol=5e-5)
    for start, end in itertools.pairwise((*stops, 14)):
      expected = trained_log_probabilities(
          *trained, decoder_params, prompt + tokens[:start], tokens[start:end])
      np.testing.assert_allclose(found[start:end], expected, atol=5e-5)


@pytest.mark.parametrize('gate', [None, GATE], ids=['entropy', 'learned'])
def test_texts_deliberate_where_their_gate_opens_and_nowhere_else(made, decoder_params, gate):
  generator, *trained = made
  plain = generate(generator, PROMPTS, DecodingOptions(12))
  score = entropies_of if gate is None else predictions_of
  scores = [score(decoder_params, prompt, completion.tokens)
            for prompt, completion in zip(PROMPTS, plain, strict=True)]
  threshold = float(np.quantile(np.concatenate(scores), 0.79))  # between two of 36
  policy = Policy(threshold=threshold, gate=gate, apart=12)
  completions = generate(generator, PROMPTS, DecodingOptions(12, policy=policy))
  expected = [list(np.flatnonzero(score > threshold)[:1]) for score in scores]
  assert [completion.latents_at for completion in completions] == expected
  assert sorted(map(len, expected)) != [0, 0, 0]
  for prompt, before, after, at in zip(PROMPTS, plain, completions, expected, strict=True):
    at = at[0] if at else 12
    assert after.tokens[:at] == before.tokens[:at]
    if at < 12:
      trained_says = trained_log_probabilities(
          *trained, decoder_params, prompt + after.tokens[:at], after.tokens[at:])
      np.testing.assert_allclose(after.logprobs[at:], trained_says, atol=5e-5)


def test_the_gate_scores_every_step_by_the_hidden_state_of_the_uncached_decoder(decoder_params):
  plain = Generator(tiny.CONFIG, decoder_params, length=LENGTH)
  state = copied(plain.read(PROMPTS))
  keys, found, tokens = jax.vmap(jax.random.key)(np.zeros(3, np.uint32)), [], []
  for count in range(12):
    found.append(GATE.score(state.hidden))
    state, decoded = plain.decode(
        state, keys, np.int32(count), np.ones(3, bool), np.int32(1), None, None,
        np.zeros(3, np.int32), sampling=Sampling(), size=16, eos=None)
    tokens.append(decoded.tokens[0])
  for prompt, scores, chosen in zip(PROMPTS, np.transpose(found), np.transpose(tokens),
                                    strict=True):
    np.testing.assert_allclose(scores, predictions_of(decoder_params, prompt, chosen), atol=1e-4)


def predictions_of(decoder_params, prompt, tokens):
  hidden, *_ = tiny.read(decoder_params, np.array([[*prompt, *tokens]]))
  return np.asarray(hidden[0, len(prompt) - 1:-1]) @ GATE.weight + GATE.bias


def test_entropies_are_those_of_the_uncached_decoder(made, decoder_params):
  for prompt, found in zip(PROMPTS, made[0].entropies(PROMPTS), strict=True):
    expected = entropies_of(decoder_params, prompt[:1], prompt[1:] + [0])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def entropies_of(decoder_params, prompt, tokens):
  _, logits, _ = tiny.read(decoder_params, np.array([[*prompt, *tokens]]))
  log_p = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1:-1], axis=-1), np.float64)
  return -(np.exp(log_p) * log_p).sum(axis=-1)
