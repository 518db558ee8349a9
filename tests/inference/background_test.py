"""Whatever becomes of the coprocessor, and whenever, the decoder's own stream goes on."""

import itertools
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from latent_deliberation.inference import background, programs
from latent_deliberation.inference import generate as decoding_module
from latent_deliberation.inference.background import Arrival, Counts
from latent_deliberation.inference.generate import Decoding, generate, stream
from latent_deliberation.inference.generator import Generator, copied
from latent_deliberation.inference.policy import NEVER, ONCE, Policy
from latent_deliberation.inference.sampling import Sampling
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  assert_same,
  augmented,
  trained_log_probabilities,
)

SAMPLED = Sampling(temperature=1.0)


@pytest.fixture(scope='module')
def made(decoder_params):
  return augmented(decoder_params)


@pytest.fixture
def generator(made):
  made[0].counts, made[0]._warned = Counts(), False
  return made[0]


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


def decoding(policy=ONCE, max_tokens=12, **arrival):
  return Decoding(max_tokens, SAMPLED, policy=policy, arrival=Arrival(**arrival))


def raising(state):
  raise MemoryError('out of memory')


def hanging(state):
  threading.Event().wait()


def die(state):
  raise SystemExit


FAULTS = {'raises': (raising, 'it raised MemoryError: out of memory'),
          'exits': (die, 'it raised SystemExit'),
          'hangs': (hanging, r'it took longer than 0.2 s')}


@pytest.mark.parametrize('delay', [0, 3, None])
@pytest.mark.parametrize('fault', [*FAULTS, 'not a number'])
def test_a_coprocessor_that_fails_changes_no_bit_is_said_once_and_counted(
    generator, monkeypatch, warnings, fault, delay):
  plain = generate(generator, PROMPTS, decoding(NEVER))
  if fault in FAULTS:
    replacement, message = FAULTS[fault]
  else:
    own, message = generator.augment, 'some are not finite'
    def replacement(state):
      spoilt = own(state)
      return spoilt.replace(
          latents=jax.tree.map(lambda leaf: leaf * jnp.nan, spoilt.latents),
          logits=spoilt.logits * jnp.nan, finite=jnp.zeros_like(spoilt.finite))
  monkeypatch.setattr(generator, 'augment', replacement)
  # Without a delay the decoder may come to its end before a coprocessor that hangs is given up.
  patient = decoding(Policy(at=(0, 6)), timeout=0.2 if fault == 'hangs' else 60, delay=delay)
  for _ in range(2):
    found = generate(generator, PROMPTS, patient)
    assert_same(found, plain)
    assert not any(completion.latents_at for completion in found)
  assert generator.counts.joined == 0
  assert generator.counts.begun == generator.counts.failed + generator.counts.late >= 2
  if generator.counts.failed:
    said, = warnings
    assert message in said and 'The decoder goes on without them' in said
  if delay is not None:
    assert generator.counts == Counts(begun=4, failed=4)


def test_a_thread_that_ends_without_a_word_is_a_failure(generator, monkeypatch, warnings):
  plain = generate(generator, PROMPTS, decoding(NEVER))
  monkeypatch.setattr(background.Attempt, '_run', lambda *unused: None)
  assert_same(generate(generator, PROMPTS, decoding(delay=0)), plain)
  assert 'its thread ended without a result' in warnings[0]


@pytest.mark.parametrize('place, delay', [
    *itertools.product(['threading.Thread.start', 'attach'], [0, 3, None]),
    ('copied', 3), ('copied', None)])
def test_where_there_is_no_room_for_a_thread_or_a_cache_the_plain_stream_goes_on(
    generator, monkeypatch, warnings, place, delay):
  plain = generate(generator, PROMPTS, decoding(NEVER, max_tokens=28))
  state = generator.read(PROMPTS)

  def fail(*unused):
    raise RuntimeError('RESOURCE_EXHAUSTED')

  if place == 'copied':
    # The first copy is of the state that is given, which the plain decoder makes too.
    monkeypatch.setattr(decoding_module, 'copied', lambda state: (
        monkeypatch.setattr(decoding_module, 'copied', fail), copied(state))[1])
  elif place == 'attach':
    monkeypatch.setattr(generator, 'attach', fail)
  else:
    monkeypatch.setattr(place, fail)
  found = generate(generator, state, decoding(
      Policy(at=(0,), threshold=0.0), max_tokens=28, delay=delay))
  assert_same(found, plain)
  assert generator.counts.joined == 0 and 'RESOURCE_EXHAUSTED' in warnings[0]
  assert generator.counts.begun == generator.counts.failed + generator.counts.late >= 1


def test_an_interruption_of_waiting_does_not_forget_a_thread_that_computes():
  gate = threading.Event()
  attempt = background.Attempt(lambda state: gate.wait(60) and state, np.float32(7), 60)
  interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
  interrupt.start()
  with pytest.raises(KeyboardInterrupt):
    attempt.wait()
  interrupt.join()
  assert not attempt.is_ready()
  gate.set()
  assert attempt.result() == 7


def test_one_text_whose_latents_are_not_finite_stays_plain_alone(generator, monkeypatch, warnings):
  plain, with_latents = (generate(generator, PROMPTS, decoding(policy)) for policy in (NEVER, ONCE))
  own = generator.augment

  def damaged(state):
    augmentation = own(state)
    spoilt = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), augmentation.latents)
    return augmentation.replace(latents=spoilt, finite=augmentation.finite.at[1].set(False))

  monkeypatch.setattr(generator, 'augment', damaged)
  found = generate(generator, PROMPTS, decoding())
  assert_same(found[::2], with_latents[::2])
  assert_same(found[1:2], plain[1:2])
  assert [completion.latents_at for completion in found] == [[0], [], [0]]
  assert len(warnings) == 1


def test_parameters_that_are_not_numbers_are_noticed(made, decoder_params, warnings):
  _, deliberator, params = made
  params = {**params, 'gate': params['gate'].at[0, 0].set(jnp.nan)}
  broken = Generator(tiny.CONFIG, decoder_params, length=LENGTH,
                     coprocessor=(deliberator.config, params))
  plain = generate(broken, PROMPTS, decoding(NEVER))
  assert_same(generate(broken, PROMPTS, decoding()), plain)
  assert broken.counts == Counts(begun=1, failed=1)
  state = broken.read(PROMPTS)
  by_hand = broken.attach(state, broken.augment(state))
  assert_same(generate(broken, by_hand, decoding(NEVER)), plain)


def test_a_missing_coprocessor_is_the_plain_decoder(decoder_params, warnings):
  plain = Generator(tiny.CONFIG, decoder_params, length=LENGTH)
  assert_same(generate(plain, PROMPTS, decoding()), generate(plain, PROMPTS, decoding(NEVER)))
  assert plain.counts == Counts(begun=1, failed=1)
  assert 'there is no coprocessor' in warnings[0]
  for call in (lambda: plain.augment(plain.read(PROMPTS)), lambda: plain.warm_up(1)):
    with pytest.raises(RuntimeError, match='has no coprocessor'):
      call()


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
    assert after.log_probabilities[:delay + 1] == before.log_probabilities[:delay + 1]
    assert after.log_probabilities[delay + 1] != before.log_probabilities[delay + 1]


@pytest.mark.parametrize('latents, positions', [
    ('refining', 'share'), ('paper', 'shift'), ('anchored', 'share')])
def test_late_latents_are_what_training_with_that_delay_knew(decoder_params, latents, positions):
  late, *trained = augmented(decoder_params, latents=latents, positions=positions)
  for prompt, completion in zip(
      PROMPTS, generate(late, PROMPTS, decoding(max_tokens=11, delay=3)), strict=True):
    expected = trained_log_probabilities(*trained, decoder_params, prompt, completion.tokens, 3)
    # The first token is predicted by the last latent in training, by the last token here.
    np.testing.assert_allclose(completion.log_probabilities[1:], expected[1:], atol=5e-5)


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
  assert joined >= 5 and generator.counts.joined == 1
  assert_same(completions, generate(generator, PROMPTS, decoding(delay=joined, max_tokens=28)))


def test_latents_that_never_come_in_time_are_counted_as_late(generator, monkeypatch):
  gate = threading.Event()
  monkeypatch.setattr(generator, 'augment', lambda state: gate.wait(60))
  found = generate(generator, PROMPTS, decoding(delay=None))
  gate.set()
  assert generator.counts == Counts(begun=1, late=1)
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
  compiled = [program._cache_size() for program in (programs.augment, programs.attach)]
  generate(fresh, PROMPTS, decoding(delay=3))
  assert fresh.counts == Counts(begun=1, joined=1)
  assert compiled == [program._cache_size() for program in (programs.augment, programs.attach)]


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
  assert helped.counts == Counts(begun=2, joined=2)


@pytest.mark.parametrize('values, message', [
    (dict(delay=-1), 'delay = -1'), (dict(timeout=0), 'timeout = 0'),
    (dict(timeout=float('nan')), 'timeout = nan')])
def test_arrivals_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    Arrival(**values)
