"""Texts deliberate where their policy says, and training agrees with what follows."""

import itertools

import jax
import numpy as np
import pytest

from latent_deliberation.deliberation.deliberation_config import LATENTS
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import Engine, copied
from latent_deliberation.inference.policy import Gate, Policy
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  augmented,
  plain_logprobs,
  read_without_cache,
  trained_logprobs,
)

GATE = Gate(np.random.default_rng(3).standard_normal(16).astype(np.float32), np.float32(-0.5))


@pytest.mark.parametrize('latents', [
    pytest.param(latents, marks=[pytest.mark.slow] * (latents != 'refining'))
    for latents in LATENTS])
@pytest.mark.parametrize('policy, stops', [
    pytest.param(Policy(every=5), (0, 5, 10), marks=pytest.mark.slow),
    (Policy(at=(3, 4, 11)), (3, 4, 11))], ids=['every', 'at'])
def test_latents_at_several_places_match_training(
    decoder_params, latents, policy, stops):
  engine, *trained = augmented(decoder_params, latents=latents, positions='shift')
  completions = generate(engine, PROMPTS, DecodingOptions(14, policy=policy))
  for prompt, completion in zip(PROMPTS, completions, strict=True):
    assert completion.latents_at == list(stops)
    tokens, found = completion.tokens, completion.logprobs
    np.testing.assert_allclose(found[:stops[0]], plain_logprobs(
        decoder_params, prompt, tokens[:stops[0]]), atol=5e-5)
    for start, end in itertools.pairwise((*stops, 14)):
      expected = trained_logprobs(
          *trained, decoder_params, prompt + tokens[:start], tokens[start:end])
      np.testing.assert_allclose(found[start:end], expected, atol=5e-5)


@pytest.mark.parametrize('gate', [None, GATE], ids=['entropy', 'learned'])
def test_gate_opens_at_high_scores(made, decoder_params, gate):
  engine, *trained = made
  plain = generate(engine, PROMPTS, DecodingOptions(12))
  score = entropies_of if gate is None else predictions_of
  scores = [score(decoder_params, prompt, completion.tokens)
            for prompt, completion in zip(PROMPTS, plain, strict=True)]
  threshold = float(np.quantile(np.concatenate(scores), 0.79))  # between two of 36
  policy = Policy(threshold=threshold, gate=gate, min_gap=12)
  completions = generate(engine, PROMPTS, DecodingOptions(12, policy=policy))
  expected = [list(np.flatnonzero(score > threshold)[:1]) for score in scores]
  assert [completion.latents_at for completion in completions] == expected
  assert sorted(map(len, expected)) != [0, 0, 0]
  for prompt, before, after, at in zip(PROMPTS, plain, completions, expected, strict=True):
    at = at[0] if at else 12
    assert after.tokens[:at] == before.tokens[:at]
    if at < 12:
      trained_says = trained_logprobs(
          *trained, decoder_params, prompt + after.tokens[:at], after.tokens[at:])
      np.testing.assert_allclose(after.logprobs[at:], trained_says, atol=5e-5)


def test_gate_score_needs_no_cache(decoder_params):
  """At every step, the gate reads the hidden state that the uncached decoder has there."""
  plain = Engine(tiny.CONFIG, decoder_params, length=LENGTH)
  state = copied(plain.read(PROMPTS))
  keys, found, tokens = jax.vmap(jax.random.key)(np.zeros(3, np.uint32)), [], []
  for count in range(12):
    found.append(GATE.score(state.hidden))
    state, decoded = plain.decode(state, keys, count=count, active=np.ones(3, bool), limit=1,
                                  size=16, sampling=Sampling())
    tokens.append(decoded.tokens[0])
  for prompt, scores, chosen in zip(PROMPTS, np.transpose(found), np.transpose(tokens),
                                    strict=True):
    np.testing.assert_allclose(scores, predictions_of(decoder_params, prompt, chosen), atol=1e-4)


def predictions_of(decoder_params, prompt, tokens):
  hidden, _ = read_without_cache(decoder_params, prompt, tokens)
  return hidden @ GATE.weight + GATE.bias


def entropies_of(decoder_params, prompt, tokens):
  _, logits = read_without_cache(decoder_params, prompt, tokens)
  log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
  return -(np.exp(log_p) * log_p).sum(axis=-1)
