"""Latents join where they should, or when they are ready, and no token waits for them unasked."""

import dataclasses
import signal
import threading
import time

import jax
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.inference import background, passes
from latent_deliberation.inference.background import AugmentationStats, LatentTiming
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import generate, stream
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  assert_same,
  augmented,
  decoding,
  trained_logprobs,
)


def test_interrupted_wait_keeps_the_thread():
  """Ctrl-C while waiting does not forget a thread that still computes."""
  gate = threading.Event()
  augmentation = background.BackgroundAugmentation(
      lambda state: gate.wait(60) and state, np.float32(7), 60)
  interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
  interrupt.start()
  with pytest.raises(KeyboardInterrupt):
    augmentation.wait()
  interrupt.join()
  assert not augmentation.is_ready()
  gate.set()
  assert augmentation.result() == 7


def test_no_delay_is_synchronous(engine):
  """The latents are made in a thread; given time before the first token, they change nothing."""
  state = engine.read(PROMPTS)
  synchronous = generate(engine, engine.attach(state, engine.augment(state)),
                         decoding(NEVER))
  assert_same(generate(engine, PROMPTS, decoding(delay=0)), synchronous)


def test_latents_of_ended_texts_are_late(engine, monkeypatch):
  """If every text that waits ends first, nothing joins, though other texts go on."""
  plain = generate(engine, PROMPTS, decoding(NEVER))
  end = plain[0].tokens[1]
  assert end not in (*plain[1].tokens, *plain[2].tokens)
  engine.stats = AugmentationStats()
  monkeypatch.setattr(engine, 'wants', lambda state: np.array([True, False, False]))
  found = generate(engine, PROMPTS, dataclasses.replace(decoding(delay=4), eos=(end,)))
  assert [len(each.tokens) for each in found] == [2, 12, 12]
  assert engine.stats == AugmentationStats(begun=1, late=1)


@pytest.mark.parametrize('delay', [1, 4])
def test_late_latents_join_after_delay(engine, delay):
  plain, late = (generate(engine, PROMPTS, decoding(policy, delay=delay))
                 for policy in (NEVER, ONCE))
  for before, after in zip(plain, late, strict=True):
    assert after.latents_at == [delay]
    # The token that was next when they joined had been predicted without them.
    assert after.tokens[:delay + 1] == before.tokens[:delay + 1]
    assert after.logprobs[:delay + 1] == before.logprobs[:delay + 1]
    assert after.logprobs[delay + 1] != before.logprobs[delay + 1]


@pytest.mark.parametrize('latents, positions', [
    ('refining', 'share'), ('paper', 'shift'), ('anchored', 'share')])
def test_late_latents_match_training_with_delay(decoder_params, latents, positions):
  late, *trained = augmented(decoder_params, latents=latents, positions=positions)
  for prompt, completion in zip(
      PROMPTS, generate(late, PROMPTS, decoding(max_tokens=11, delay=3)), strict=True):
    expected = trained_logprobs(*trained, decoder_params, prompt, completion.tokens, 3)
    # The first token is predicted by the last latent in training, by the last token here.
    np.testing.assert_allclose(completion.logprobs[1:], expected[1:], atol=5e-5)


def test_ready_latents_join_as_with_delay(engine, monkeypatch):
  """Latents without a delay join where they are ready, as they would with that delay."""
  own, gate, made = engine.augment, threading.Event(), threading.Event()

  def waiting(state):
    gate.wait(60)
    latents = jax.block_until_ready(own(state))
    made.set()
    return latents

  monkeypatch.setattr(engine, 'augment', waiting)
  for completions in stream(engine, PROMPTS, decoding(delay=None, max_tokens=28)):
    if len(completions[0].tokens) == 5:
      gate.set()
      made.wait(60)
      time.sleep(0.05)  # for the thread to hand them over
  monkeypatch.setattr(engine, 'augment', own)
  joined, = completions[0].latents_at
  assert joined >= 5 and engine.stats.joined == 1
  assert_same(completions, generate(engine, PROMPTS, decoding(delay=joined, max_tokens=28)))


def test_late_latents_are_counted(engine, monkeypatch):
  gate = threading.Event()
  monkeypatch.setattr(engine, 'augment', lambda state: gate.wait(60))
  found = generate(engine, PROMPTS, decoding(delay=None))
  gate.set()
  assert engine.stats == AugmentationStats(begun=1, late=1)
  monkeypatch.undo()
  assert_same(found, generate(engine, PROMPTS, decoding(NEVER)))


def test_first_token_does_not_wait(engine, monkeypatch):
  asked = []
  monkeypatch.setattr(engine, 'augment', lambda state: asked.append(state))
  following = stream(engine, PROMPTS, decoding(delay=None))
  assert [len(completion.tokens) for completion in next(following)] == [1, 1, 1]
  assert not asked


def test_warm_up_compiles_the_coprocessor(decoder_params):
  fresh, *_ = augmented(decoder_params, length=LENGTH - 1)
  fresh.warm_up(len(PROMPTS))
  compiled = [program._cache_size() for program in (passes.augment, passes.attach)]
  generate(fresh, PROMPTS, decoding(delay=3))
  assert fresh.stats == AugmentationStats(begun=1, joined=1)
  assert compiled == [program._cache_size() for program in (passes.augment, passes.attach)]


def test_worker_on_another_device(made, decoder_params):
  engine, deliberator, params = made
  there = jax.device_put((decoder_params, params), jax.devices()[5])
  worker = Engine(tiny.CONFIG, there[0], length=LENGTH,
                  coprocessor=(deliberator.config, there[1]))
  helped = Engine(tiny.CONFIG, decoder_params, length=LENGTH, worker=worker,
                  coprocessor=(deliberator.config, params))
  for delay in (0, 2):
    assert_same(generate(helped, PROMPTS, decoding(delay=delay)),
                generate(engine, PROMPTS, decoding(delay=delay)))
  assert helped.stats == AugmentationStats(begun=2, joined=2)


@pytest.mark.parametrize('timeout', [1e300, float('inf')])
def test_timeout_may_be_endless(engine, timeout):
  """A wait of more than threads can count is as long as they can."""
  completions = generate(engine, PROMPTS, decoding(timeout=timeout))
  assert [completion.latents_at for completion in completions] == [[0]] * 3


@pytest.mark.parametrize('values, message', [
    (dict(delay=-1), 'delay = -1'), (dict(delay=0.5), 'delay = 0.5'),
    (dict(timeout=0), 'timeout = 0'), (dict(timeout=float('nan')), 'timeout = nan')])
def test_bad_timing_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    LatentTiming(**values)
