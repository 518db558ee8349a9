"""Whatever becomes of the coprocessor, the decoder's own stream continues."""

import itertools
import threading

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.inference import session
from latent_deliberation.inference.background import AugmentationStats, BackgroundAugmentation
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.policy import NEVER, ONCE, Policy
from latent_deliberation.inference.session import generate
from tests import tiny
from tests.inference.small import LENGTH, PROMPTS, assert_same, decoding


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


def raising(state):
  raise MemoryError('out of memory')


def hanging(state):
  threading.Event().wait()


def exiting(state):
  raise SystemExit


FAULTS = {'raises': (raising, 'it raised MemoryError: out of memory'),
          'exits': (exiting, 'it raised SystemExit'),
          'hangs': (hanging, r'it took longer than 0.2 s')}


@pytest.mark.parametrize('delay', [0, 3, None])
@pytest.mark.parametrize('fault', [*FAULTS, 'not a number'])
def test_failed_coprocessor_changes_no_bit(engine, monkeypatch, warnings, fault, delay):
  """The stream is the plain one; the failure is logged once and counted."""
  plain = generate(engine, PROMPTS, decoding(NEVER))
  if fault in FAULTS:
    replacement, message = FAULTS[fault]
  else:
    own, message = engine.augment, 'some are not finite'
    def replacement(state):
      spoilt = own(state)
      return spoilt.replace(
          latents=jax.tree.map(lambda leaf: leaf * jnp.nan, spoilt.latents),
          logits=spoilt.logits * jnp.nan, finite=jnp.zeros_like(spoilt.finite))
  monkeypatch.setattr(engine, 'augment', replacement)
  if delay is None:  # otherwise the texts may end before the failure
    monkeypatch.setattr(BackgroundAugmentation, 'is_ready', lambda self: self.wait() or True)
  patient = decoding(Policy(at=(0, 6)), timeout=0.2 if fault == 'hangs' else 60, delay=delay)
  for _ in range(2):
    found = generate(engine, PROMPTS, patient)
    assert_same(found, plain)
    assert not any(completion.latents_at for completion in found)
  assert engine.stats == AugmentationStats(begun=4, failed=4)
  said, = warnings
  assert message in said and 'The decoder continues without them' in said


def test_no_latents_are_a_failure(engine, monkeypatch, warnings):
  plain = generate(engine, PROMPTS, decoding(NEVER))
  monkeypatch.setattr(engine, 'augment', lambda state: None)
  assert_same(generate(engine, PROMPTS, decoding(delay=0)), plain)
  assert 'it made no latents' in warnings[0]


@pytest.mark.parametrize('place, delay', [
    *itertools.product(['threading.Thread.start', 'attach'], [0, 3, None]),
    ('copied', 3), ('copied', None)])
def test_no_room_keeps_the_plain_stream(engine, monkeypatch, warnings, place, delay):
  """There may be no room for a thread, for latents, or for a second cache."""
  plain = generate(engine, PROMPTS, decoding(NEVER, max_tokens=28))

  def fail(*unused):
    raise RuntimeError('RESOURCE_EXHAUSTED')

  texts = engine.read(PROMPTS)
  if place == 'copied':
    texts = PROMPTS  # a state that is given is copied, too
    monkeypatch.setattr(session, 'copied', fail)
  elif place == 'attach':
    monkeypatch.setattr(engine, 'attach', fail)
  else:
    monkeypatch.setattr(place, fail)
  found = generate(engine, texts, decoding(
      Policy(at=(0,), threshold=0.0), max_tokens=28, delay=delay))
  assert_same(found, plain)
  assert engine.stats.joined == 0 and 'RESOURCE_EXHAUSTED' in warnings[0]
  assert engine.stats.begun == engine.stats.failed + engine.stats.late >= 1


def test_bad_latents_spare_other_texts(engine, monkeypatch, warnings):
  """Only the text whose latents are not finite stays plain."""
  plain, with_latents = (generate(engine, PROMPTS, decoding(policy)) for policy in (NEVER, ONCE))
  own = engine.augment

  def damaged(state):
    augmentation = own(state)
    spoilt = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), augmentation.latents)
    return augmentation.replace(latents=spoilt, finite=augmentation.finite.at[1].set(False))

  monkeypatch.setattr(engine, 'augment', damaged)
  found = generate(engine, PROMPTS, decoding())
  assert_same(found[::2], with_latents[::2])
  assert_same(found[1:2], plain[1:2])
  assert [completion.latents_at for completion in found] == [[0], [], [0]]
  assert len(warnings) == 1


def test_nan_parameters_are_noticed(made, decoder_params, warnings):
  _, deliberator, params = made
  params = {**params, 'gate': params['gate'].at[0, 0].set(jnp.nan)}
  broken = Engine(tiny.CONFIG, decoder_params, length=LENGTH,
                  coprocessor=(deliberator.config, params))
  plain = generate(broken, PROMPTS, decoding(NEVER))
  assert_same(generate(broken, PROMPTS, decoding()), plain)
  assert broken.stats == AugmentationStats(begun=1, failed=1)
  state = broken.read(PROMPTS)
  by_hand = broken.attach(state, broken.augment(state))
  assert_same(generate(broken, by_hand, decoding(NEVER)), plain)


def test_missing_coprocessor_is_plain_decoder(decoder_params, warnings):
  plain = Engine(tiny.CONFIG, decoder_params, length=LENGTH)
  assert_same(generate(plain, PROMPTS, decoding()), generate(plain, PROMPTS, decoding(NEVER)))
  assert plain.stats == AugmentationStats(begun=1, failed=1)
  assert 'there is no coprocessor' in warnings[0]
  for call in (lambda: plain.augment(plain.read(PROMPTS)), lambda: plain.warm_up(1)):
    with pytest.raises(UserError, match='no coprocessor'):
      call()
