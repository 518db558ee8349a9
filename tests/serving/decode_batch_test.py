"""Texts that join and leave a running batch are those that are decoded alone."""

import jax
import numpy as np
import pytest

from latent_deliberation.inference import decode
from latent_deliberation.inference.decode import Sampling, filtered, sample
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, generate, score
from latent_deliberation.serving.decode_batch import STEPS, DecodeBatch
from latent_deliberation.serving.row_sampling import RowOptions, _filtered_rows, sample_rows
from tests import tiny
from tests.experts import small

SIZES = (5, 19, 3, 11, 30, 8, 24, 4)
PROMPTS = [np.random.default_rng(size).integers(1, tiny.CONFIG.vocab_size, size).tolist()
           for size in SIZES]
FILTERS = Sampling(1.3, top_k=9, top_p=0.9, min_p=0.02)
SAMPLINGS = [Sampling(), Sampling(1.0), FILTERS, Sampling(), Sampling(1.0), FILTERS, Sampling(1.0),
             FILTERS]
COUNTS = (12, 7, 18, 9, 13, 1, 20, 16)


@pytest.fixture(scope='module')
def experts():
  return small.experts(stars=small.lora(1), law=small.lora(2))


def alone(experts, number, choice=None):
  """The text as `session.generate` decodes it by itself."""
  options = DecodingOptions(COUNTS[number], SAMPLINGS[number], policy=ONCE if choice else NEVER)
  source = experts.source([choice]) if choice else None
  completion, = generate(experts.engine, PROMPTS[number:number + 1], options, [number], source)
  return completion


def read(experts, number, choice=None):
  state = experts.engine.read([PROMPTS[number]])
  if choice is None:
    return state
  return experts.engine.attach(state, experts.augment(state, [{choice: 1.0}]))


def run(batch, experts, order, choices, limits):
  """Decodes texts, each of which joins as soon as a row is free; returns tokens and logprobs."""
  waiting, rows, found = list(order), {}, {number: ([], []) for number in order}
  random = np.random.default_rng(0)
  while waiting or rows:
    if waiting and batch.free:
      number = waiting.pop(0)
      row = batch.join(read(experts, number, choices[number]), SAMPLINGS[number], number)
      rows[number] = row
    for step in batch.decode(int(random.choice(limits))):
      for number, row in list(rows.items()):
        found[number][0].append(int(step.tokens[row]))
        found[number][1].append(float(step.logprobs[row]))
        if len(found[number][0]) == COUNTS[number]:
          batch.leave(row)
          del rows[number]
  return found


@pytest.mark.parametrize('rows, limits', [(2, [1]), (2, [STEPS]), (2, [1, 2, 3, STEPS]), (1, [2])])
def test_rows_are_the_texts_alone(experts, rows, limits):
  """Whatever joins when, each text has its own tokens and log-probabilities."""
  choices = ['stars', None, 'law', None, 'stars', None, None, 'law']
  batch = DecodeBatch(experts.engine, rows)
  found = run(batch, experts, range(len(PROMPTS)), choices, limits)
  for number, (tokens, logprobs) in found.items():
    expected = alone(experts, number, choices[number])
    assert tokens == expected.tokens
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=5e-5)
  assert batch.free == rows


def test_long_use_wraps_all_rings(experts):
  """The index of the rings stays small, and texts stay right, after many more tokens than slots."""
  batch = DecodeBatch(experts.engine, 2)
  order = list(range(len(PROMPTS)))
  for _ in range(4):
    found = run(batch, experts, order, [None] * len(PROMPTS), [STEPS])
  for number, (tokens, _) in found.items():
    assert tokens == alone(experts, number).tokens
  plan = experts.engine.model.plan
  most = plan.global_slots * plan.local_slots + 2 * sum(COUNTS)
  assert int(batch._state.cache.write_index) < most


def test_follower_scores_its_leader(experts):
  """A follower takes the leader's tokens, drawn with latents, and scores them without."""
  batch = DecodeBatch(experts.engine, 2)
  leader = batch.join(read(experts, 1, 'stars'), Sampling(1.0), 1)
  follower = batch.join(read(experts, 1), leader=leader)
  steps = batch.decode(STEPS)
  assert [int(step.tokens[leader]) for step in steps] == [
      int(step.tokens[follower]) for step in steps]
  tokens = [int(step.tokens[leader]) for step in steps]
  assert tokens == alone(experts, 1, 'stars').tokens[:STEPS]
  plain, = score(experts.engine, PROMPTS[1:2], [tokens], DecodingOptions(1))
  found = [float(step.logprobs[follower]) for step in steps]
  np.testing.assert_allclose(found, plain.logprobs, atol=5e-5)
  assert np.abs(np.subtract(found, [step.logprobs[leader] for step in steps])).max() > 0.01


def test_likeliest_tokens(experts):
  """They are reported while a text asks for them, and change no other number."""
  batch = DecodeBatch(experts.engine, 2)
  first = batch.join(read(experts, 0), wants_top=True)
  step, = batch.decode(1)
  assert step.top_tokens.shape == (2, 5)
  assert int(step.top_tokens[first, 0]) == int(step.tokens[first])
  np.testing.assert_allclose(step.top_logprobs[first, 0], step.logprobs[first], atol=1e-6)
  assert (np.diff(step.top_logprobs[first]) <= 0).all()
  batch.leave(first)
  batch.join(read(experts, 0))
  assert batch.decode(1)[0].top_tokens.shape == (2, 0)


def test_one_program_for_all_options(experts):
  """Other options, seeds and lengths of texts compile nothing new."""
  batch = DecodeBatch(experts.engine, 2)
  run(batch, experts, [0, 1], [None] * 8, [STEPS])
  count = decode.decode._cache_size()
  run(batch, experts, [4, 6, 3, 2], [None] * 8, [1, STEPS])
  assert decode.decode._cache_size() == count


@pytest.mark.parametrize('sampling', [
    Sampling(), Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.1), FILTERS, Sampling(1.0, top_p=0.0)], ids=str)
def test_rows_draw_as_one_sampling(sampling):
  """Options as arrays keep the tokens, and draw those, that the same options as constants do."""
  logits = jax.random.normal(jax.random.key(1), (64, 50)) * 2
  keys = jax.random.split(jax.random.key(2), 64)
  full = lambda value, dtype=np.float32: np.full(64, value, dtype)  # noqa: E731
  rows = RowOptions(full(0 if sampling.greedy else sampling.temperature),
                    full(sampling.top_k or 0, np.int32), full(sampling.top_p),
                    full(sampling.min_p), np.arange(64, dtype=np.int32))
  np.testing.assert_array_equal(sample_rows(keys, logits, rows), sample(keys, logits, sampling))
  if not sampling.greedy:
    kept = _filtered_rows(logits / sampling.temperature, rows)
    np.testing.assert_array_equal(np.isinf(kept), np.isinf(filtered(logits, sampling)))


def test_equally_likely_tokens():
  """Tokens as likely as the last of top_k weigh the same in both ways of sampling."""
  logits = jax.numpy.array([[2.0, 1.0, 1.0, 1.0]])
  rows = RowOptions(*(np.array([value], np.float32) for value in (1.0, 2, 0.6, 0.0)), [0])
  kept = _filtered_rows(logits, rows)
  np.testing.assert_array_equal(kept, filtered(logits, Sampling(1.0, top_k=2, top_p=0.6)))


def test_ids_without_a_text():
  """Only allowed ids are drawn, whatever the other rows ask for."""
  logits = jax.random.normal(jax.random.key(1), (4, 50))
  allowed = jax.numpy.arange(50) < 7
  rows = RowOptions(np.array([0, 1, 1, 0.5], np.float32), np.array([0, 0, 3, 0], np.int32),
                    np.ones(4, np.float32), np.zeros(4, np.float32), np.arange(4, dtype=np.int32))
  for seed in range(20):
    keys = jax.random.split(jax.random.key(seed), 4)
    assert (np.asarray(sample_rows(keys, logits, rows, allowed)) < 7).all()
