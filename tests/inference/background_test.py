"""Latents join where they were to, or when they are ready, and no token waits for them unasked."""

import signal
import threading
import time

import jax
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.inference import background, passes
from latent_deliberation.inference.background import AugmentationStats, LatentTiming
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import generate, stream
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  assert_same,
  augmented,
  decoding,
  trained_log_probabilities,
)


def test_an_interruption_of_waiting_does_not_forget_a_thread_that_computes():
  gate = threading.Event()
  attempt = background.BackgroundAugmentation(lambda state: gate.wait(60) and state, np.float32(7), 60)
  interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
  interrupt.start()
  with pytest.raises(KeyboardInterrupt):
    attempt.wait()
  interrupt.join()
  assert not attempt.is_ready()
  gate.set()
  assert attempt.result() == 7


def test_in_the_background_without_delay_is_synchronous(generator):
  """The latents are made in a thread; given time before the first token, they change nothing."""
  state = generator.read(PROMPTS)
  synchronous = generate(generator, generator.attach(state, generator.augment(state)),
                         decoding(NEVER))
  assert_same(generate(generator, PROMPTS, decoding(delay=0)), synchronous)


@pytest.mark.parametrize('delay', [1, 4])
def test_late_latents_are_seen_from_where_they_join_and_not_before(generator, delay):
  plain, late = (generate(generator, PROMPTS, decoding(policy, delay=delay))
                 for policy in (NEVER, ONCE))
  for before, after in zip(plain, late, strict=True):
    assert after.latents_at == [delay]
    # The token that was next when they joined had been predicted without them.
    assert after.tokens[:delay + 1] == before.tokens[:delay + 1]
    assert after.logprobs[:delay + 1] == before.logprobs[:delay + 1]
    assert after.logprobs[delay + 1] != before.logprobs[delay + 1]


@pytest.mark.parametrize('latents, positions', [
    ('refining', 'share'), ('paper', 'shift'), ('anchored', 'share')])
def test_late_latents_are_what_training_with_that_delay_knew(decoder_params, latents, positions):
  late, *trained = augmented(decoder_params, latents=latents, positions=positions)
  for prompt, completion in zip(
      PROMPTS, generate(late, PROMPTS, decoding(max_tokens=11, delay=3)), strict=True):
    expected = trained_log_probabilities(*trained, decoder_params, prompt, completion.tokens, 3)
    # The first token is predicted by the last latent in training, by the last token here.
    np.testing.assert_allclose(completion.logprobs[1:], expected[1:], atol=5e-5)


def test_latents_that_come_when_they_are_ready_join_where_they_would_with_that_delay(
    generator, monkeypatch):
  own, gate = generator.augment, threading.Event()

  def waiting(state):
    gate.wait(60)
    return own(state)

  monkeypatch.setattr(generator, 'augment', waiting)
  for completions in stream(generator, PROMPTS, decoding(delay=None, max_tokens=28)):
    if len(completions[0].tokens) == 5:
      gate.set()
      time.sleep(0.05)
  monkeypatch.setattr(generator, 'augment', own)
  joined, = completions[0].latents_at
  assert joined >= 5 and generator.stats.joined == 1
  assert_same(completions, generate(generator, PROMPTS, decoding(delay=joined, max_tokens=28)))


def test_latents_that_never_come_in_time_are_counted_as_late(generator, monkeypatch):
  gate = threading.Event()
  monkeypatch.setattr(generator, 'augment', lambda state: gate.wait(60))
  found = generate(generator, PROMPTS, decoding(delay=None))
  gate.set()
  assert generator.stats == AugmentationStats(begun=1, late=1)
  monkeypatch.undo()
  assert_same(found, generate(generator, PROMPTS, decoding(NEVER)))


def test_the_first_token_does_not_wait_for_the_coprocessor(generator, monkeypatch):
  asked = []
  monkeypatch.setattr(generator, 'augment', lambda state: asked.append(state))
  following = stream(generator, PROMPTS, decoding(delay=None))
  assert [len(completion.tokens) for completion in next(following)] == [1, 1, 1]
  assert not asked


def test_after_warming_up_the_coprocessor_is_not_compiled_again(decoder_params):
  fresh, *_ = augmented(decoder_params, length=LENGTH - 1)
  fresh.warm_up(len(PROMPTS))
  compiled = [program._cache_size() for program in (passes.augment, passes.attach)]
  generate(fresh, PROMPTS, decoding(delay=3))
  assert fresh.stats == AugmentationStats(begun=1, joined=1)
  assert compiled == [program._cache_size() for program in (passes.augment, passes.attach)]


def test_a_worker_on_another_device_makes_the_same_latents(made, decoder_params):
  generator, deliberator, params = made
  there = jax.device_put((decoder_params, params), jax.devices()[5])
  worker = Generator(tiny.CONFIG, there[0], length=LENGTH,
                     coprocessor=(deliberator.config, there[1]))
  helped = Generator(tiny.CONFIG, decoder_params, length=LENGTH, worker=worker,
                     coprocessor=(deliberator.config, params))
  for delay in (0, 2):
    assert_same(generate(helped, PROMPTS, decoding(delay=delay)),
                generate(generator, PROMPTS, decoding(delay=delay)))
  assert helped.stats == AugmentationStats(begun=2, joined=2)


@pytest.mark.parametrize('values, message', [
    (dict(delay=-1), 'delay = -1'), (dict(timeout=0), 'timeout = 0'),
    (dict(timeout=float('nan')), 'timeout = nan')])
def test_arrivals_that_cannot_be_are_refused(values, message):
  with pytest.raises(UserError, match=message):
    LatentTiming(**values)
