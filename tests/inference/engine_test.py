"""Decoding agrees with the uncached decoder, and with latents with the forward pass of training."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from latent_deliberation.deliberation.deliberation_config import LATENTS
from latent_deliberation.errors import UserError
from latent_deliberation.inference import decode, passes, ring_cache
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import BATCH_BUDGET, Engine, check_match
from latent_deliberation.inference.policy import ONCE, Gate, Policy
from latent_deliberation.inference.session import (
  DecodingOptions,
  batches,
  generate,
  score,
  stream,
)
from latent_deliberation.model import weights
from latent_deliberation.model.products import quantise
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  assert_same,
  augmented,
  plain_logprobs,
  read_without_cache,
  trained_logprobs,
)

SCHEMES = [('refining', 'share'), *itertools.product(('paper', 'anchored'), ('shift', 'share'))]
NUCLEUS = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02)


@pytest.fixture(scope='module')
def plain(decoder_params):
  return Engine(tiny.CONFIG, decoder_params, length=LENGTH)


@pytest.fixture
def refining(made):
  return made[0]


def test_greedy_decoding_needs_no_cache(plain, decoder_params):
  completions = generate(plain, PROMPTS, DecodingOptions(24))
  for prompt, completion in zip(PROMPTS, completions, strict=True):
    assert len(completion.tokens) == 24 and completion.finish_reason == 'length'
    _, logits = read_without_cache(decoder_params, prompt, completion.tokens)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), completion.tokens)
    expected = plain_logprobs(decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize('prompts', [PROMPTS, PROMPTS[1:2]])
def test_bfloat16_rounds_alone(decoder_params, prompts):
  """The cache is half as large, and tokens are about as likely as in float32."""
  held = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), decoder_params)
  exact = jax.tree.map(lambda leaf: leaf.astype('float32'), held)
  engines = [Engine(tiny.CONFIG, params, length=LENGTH, dtype=dtype)
             for params, dtype in ((held, 'bfloat16'), (exact, 'float32'))]
  sizes = [sum(each.nbytes for each in (*state.cache.keys, *state.cache.values))
           for state in (engine.read(prompts) for engine in engines)]
  assert 2 * sizes[0] == sizes[1]
  completions = generate(engines[0], prompts, DecodingOptions(24))
  for prompt, completion in zip(prompts, completions, strict=True):
    expected = plain_logprobs(exact, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=0.1)
    assert not np.array_equal(completion.logprobs, expected)


def test_bfloat16_latents_round_alone(decoder_params):
  held = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), decoder_params)
  exact = jax.tree.map(lambda leaf: leaf.astype('float32'), held)
  _, *trained = augmented(exact)
  engine = Engine(tiny.CONFIG, held, length=LENGTH, dtype='bfloat16',
                  coprocessor=(trained[0].config, trained[1]))
  options = DecodingOptions(9, policy=ONCE)
  for prompt, completion in zip(PROMPTS, generate(engine, PROMPTS, options), strict=True):
    expected = trained_logprobs(*trained, exact, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=0.1)


@pytest.mark.parametrize('latents, positions', SCHEMES)
def test_tokens_after_latents_match_training(decoder_params, latents, positions):
  engine, *trained = augmented(decoder_params, latents=latents, positions=positions)
  before = generate(engine, PROMPTS, DecodingOptions(9))
  for prompt, completion, other in zip(
      PROMPTS, generate(engine, PROMPTS, DecodingOptions(9, policy=ONCE)), before, strict=True):
    expected = trained_logprobs(*trained, decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)
    assert np.abs(np.subtract(completion.logprobs, other.logprobs)).max() > 0.01


@pytest.mark.parametrize('trainable, num_layers', [('lora', 0), ('lora', 1), ('constant', 0)])
def test_other_coprocessors_match_training(
    decoder_params, trainable, num_layers):
  engine, *trained = augmented(
      decoder_params, trainable=trainable, num_layers=num_layers, gate='channel')
  for prompt, completion in zip(
      PROMPTS, generate(engine, PROMPTS, DecodingOptions(5, policy=ONCE)), strict=True):
    expected = trained_logprobs(*trained, decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)


@pytest.mark.parametrize('options', [
    DecodingOptions(18), DecodingOptions(18, NUCLEUS),
    DecodingOptions(18, NUCLEUS, policy=Policy(every=7))], ids=['greedy', 'sampled', 'augmented'])
def test_batch_is_prompts_alone(refining, options):
  together = generate(refining, PROMPTS, options, seeds=[3, 1, 4])
  for prompt, seed, completion in zip(PROMPTS, (3, 1, 4), together, strict=True):
    alone, = generate(refining, [prompt], options, seeds=[seed])
    assert alone.tokens == completion.tokens
    np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=5e-5)


def test_seeds_decide(plain):
  options = DecodingOptions(20, NUCLEUS)
  first, second = generate(plain, [PROMPTS[0]] * 2, options, seeds=[5, 6])
  again, = generate(plain, [PROMPTS[0]], options, seeds=[6])
  assert first.tokens != second.tokens and again.tokens == second.tokens


def test_detached_latents_leave_no_bit(refining):
  options = DecodingOptions(20, NUCLEUS)
  base = refining.read(PROMPTS)
  before = jax.tree.map(np.array, base)
  never = generate(refining, base, options)
  augmentation = refining.augment(base)
  attached = refining.attach(base, augmentation)
  with_latents = generate(refining, attached, options)
  assert_same(generate(refining, base, options), never)
  assert_same(generate(refining, attached, options), with_latents)
  assert_same(generate(refining, base, DecodingOptions(20, NUCLEUS, policy=ONCE)), with_latents)
  assert never[0].logprobs != with_latents[0].logprobs
  jax.tree.map(np.testing.assert_array_equal, base, before)


@pytest.mark.parametrize('delay', [0, 2])
def test_closed_stream_leaves_no_bit(refining, delay):
  """A stream may be given up at any moment; its state decodes as if it had never begun."""
  options = DecodingOptions(20, policy=Policy(every=3), timing=LatentTiming(delay))
  base = refining.read(PROMPTS)
  never = generate(refining, base, DecodingOptions(8))
  for blocks in range(1, 8):
    following = stream(refining, base, options)
    for _ in range(blocks):
      *_, last = next(following)
    following.close()
    assert_same(generate(refining, base, DecodingOptions(8)), never)
  assert len(last.latents_at) > 1


def test_one_base_serves_several_coprocessors(decoder_params, refining):
  base = refining.read(PROMPTS)
  other = Engine(tiny.CONFIG, decoder_params, length=LENGTH, coprocessor=(
      refining.model.coprocessor.config,
      tiny.coprocessor_params(tiny.deliberator(), decoder_params, seed=7)))
  alone = [generate(each, each.attach(base, each.augment(base)), DecodingOptions(6))
           for each in (refining, other)]
  both = [each.augment(base) for each in (refining, other)]
  for each, augmentation, expected in zip((refining, other), both, alone, strict=True):
    assert_same(generate(each, each.attach(base, augmentation), DecodingOptions(6)), expected)
  assert alone[0][0].logprobs != alone[1][0].logprobs


def test_plain_texts_next_to_augmented_ones(refining):
  base = refining.read(PROMPTS)
  mixed = refining.attach(base, refining.augment(base), np.array([True, False, True]))
  plain, with_latents = (generate(refining, state, DecodingOptions(8)) for state in (base, mixed))
  assert_same(plain[1:2], with_latents[1:2])
  assert plain[0].logprobs != with_latents[0].logprobs


@pytest.mark.parametrize('latents', LATENTS)
def test_reading_on_is_decoding(decoder_params, latents):
  """Given tokens after latents score as decoded ones do, and lead to the same next ones."""
  engine, *_ = augmented(decoder_params, latents=latents, positions='shift')
  base = engine.read(PROMPTS)
  state = engine.attach(base, engine.augment(base))
  completions = generate(engine, state, DecodingOptions(9))
  sizes = (7, 0, 4)
  tokens = [completion.tokens[:size] for completion, size in zip(completions, sizes, strict=True)]
  after_tokens = generate(engine, engine.read_on(state, tokens), DecodingOptions(2))
  scores = engine.score_on(state, tokens)
  for completion, size, after, logprobs in zip(
      completions, sizes, after_tokens, scores, strict=True):
    np.testing.assert_allclose(logprobs, completion.logprobs[:size], atol=5e-5)
    assert after.tokens == completion.tokens[size:size + 2]
    np.testing.assert_allclose(after.logprobs,
                               completion.logprobs[size:size + 2], atol=5e-5)


def test_eos_ends_only_its_own_text(plain):
  whole = generate(plain, PROMPTS, DecodingOptions(24))
  eos = whole[0].tokens[10]
  ended = generate(plain, PROMPTS, DecodingOptions(24, eos=(eos,)))
  for completion, long in zip(ended, whole, strict=True):
    end = long.tokens.index(eos) + 1 if eos in long.tokens else 24
    assert completion.tokens == long.tokens[:end]
    assert completion.logprobs == long.logprobs[:end]
    assert completion.finish_reason == ('eos' if eos in long.tokens else 'length')


def test_any_of_several_ids_ends_a_text(plain):
  whole = generate(plain, PROMPTS, DecodingOptions(24))
  ids = whole[0].tokens[10], whole[1].tokens[5]
  for completion, long in zip(generate(plain, PROMPTS, DecodingOptions(24, eos=ids)), whole,
                              strict=True):
    end = next((place for place, token in enumerate(long.tokens, 1) if token in ids), 24)
    assert completion.tokens == long.tokens[:end]
    assert completion.finish_reason == ('eos' if long.tokens[end - 1] in ids else 'length')


@pytest.mark.parametrize('sampling', [Sampling(), NUCLEUS], ids=['greedy', 'sampled'])
def test_ids_beyond_the_tokenizer_are_never_written(plain, decoder_params, sampling):
  """Only ids below num_ids, and those that end a text; log-probabilities stay the model's."""
  whole = [token for each in generate(plain, PROMPTS, DecodingOptions(24, sampling))
           for token in each.tokens]
  num_ids, eos = max(whole), 37
  options = DecodingOptions(24, sampling, num_ids=num_ids, eos=(eos,))
  for prompt, completion in zip(PROMPTS, generate(plain, PROMPTS, options), strict=True):
    assert all(token < num_ids or token == eos for token in completion.tokens)
    expected = plain_logprobs(decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize('policy', [ONCE, Policy(every=5)], ids=['once', 'every'])
def test_score_is_what_decoding_gave(refining, policy):
  """Given tokens score as when they were drawn, with latents in the same places."""
  options = DecodingOptions(18, NUCLEUS, policy=policy)
  drawn = generate(refining, PROMPTS, options)
  assert_same(score(refining, PROMPTS, [each.tokens for each in drawn], options), drawn)


def test_score_without_latents_is_the_decoders(refining, decoder_params):
  """Continuations have lengths of their own."""
  continuations = [PROMPTS[1], PROMPTS[0], PROMPTS[2][:1]]
  for prompt, tokens, found in zip(
      PROMPTS, continuations, score(refining, PROMPTS, continuations, DecodingOptions(1)),
      strict=True):
    assert found.tokens == tokens
    np.testing.assert_allclose(found.logprobs, plain_logprobs(decoder_params, prompt, tokens),
                               atol=2e-5)


def test_batches_fit_the_budget(refining):
  """The default number of texts is the budget over the bytes of a cache and two rows of logits."""
  cache = refining.read(PROMPTS).cache
  one = sum(each.nbytes for each in (*cache.keys, *cache.values)) // len(PROMPTS)
  one += 2 * 4 * tiny.CONFIG.vocab_size
  assert refining.batch_size == BATCH_BUDGET // one
  assert list(batches(refining, 5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
  assert list(batches(refining, 5)) == [slice(0, 5)]


def test_length_beyond_the_memory_is_refused(decoder_params, monkeypatch):
  """It is noticed before anything is allocated."""
  cache = Engine(tiny.CONFIG, decoder_params, length=4096).read(PROMPTS[:1]).cache
  size = sum(each.nbytes for each in (*cache.keys, *cache.values))
  monkeypatch.setattr(ring_cache, '_memory', lambda device: size)
  Engine(tiny.CONFIG, decoder_params, length=4096)
  with pytest.raises(UserError, match='length = 4097: .* GiB.*--length'):
    Engine(tiny.CONFIG, decoder_params, length=4097)


def test_stop_ends_only_its_own_text(plain):
  whole = generate(plain, PROMPTS, DecodingOptions(24))
  last = whole[1].tokens[4:6]
  options = DecodingOptions(24, stop=lambda tokens: tokens[-2:] == last)
  for completion, long in zip(generate(plain, PROMPTS, options), whole, strict=True):
    assert completion.tokens == long.tokens[:len(completion.tokens)]
    stopped = completion.tokens[-2:] == last
    assert completion.finish_reason == ('stop' if stopped else 'length')
  assert generate(plain, PROMPTS, options)[1].finish_reason == 'stop'


def test_stream_begins_with_one_token(plain):
  sizes, last = [], None
  for completions in stream(plain, PROMPTS, DecodingOptions(24)):
    sizes.append([len(completion.tokens) for completion in completions])
    last = completions
  assert sizes == [[size] * 3 for size in (1, 17, 24)]
  assert_same(last, generate(plain, PROMPTS, DecodingOptions(24)))


def test_other_prompts_compile_nothing(plain):
  generate(plain, PROMPTS, DecodingOptions(3))
  compiled = decode.decode._cache_size(), passes.read._cache_size()
  generate(plain, [prompt[:-1] for prompt in PROMPTS[:2]] + [PROMPTS[1]], DecodingOptions(20))
  assert (decode.decode._cache_size(), passes.read._cache_size()) == compiled


def test_mesh_decodes_as_one_device(refining, decoder_params):
  mesh = make_mesh(MeshConfig(2, 2, 2))
  place = shardings_of(weights.boxed_shapes(tiny.CONFIG), mesh, DEFAULT_RULES)
  sharded, *_ = augmented(jax.device_put(decoder_params, place), mesh=mesh)
  options = DecodingOptions(8, NUCLEUS, policy=Policy(at=(0, 4)))
  for one, other in zip(generate(refining, PROMPTS, options), generate(sharded, PROMPTS, options),
                        strict=True):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_bfloat16_on_a_mesh(decoder_params):
  """Bits of tables and caches are divided over devices like their numbers."""
  held = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), decoder_params)
  mesh = make_mesh(MeshConfig(2, 2, 2))
  place = shardings_of(weights.boxed_shapes(tiny.CONFIG), mesh, DEFAULT_RULES)
  sharded = Engine(tiny.CONFIG, jax.device_put(held, place), length=LENGTH, dtype='bfloat16',
                   mesh=mesh)
  exact = jax.tree.map(lambda leaf: leaf.astype('float32'), held)
  for prompt, completion in zip(PROMPTS, generate(sharded, PROMPTS, DecodingOptions(8)),
                                strict=True):
    expected = plain_logprobs(exact, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=0.1)


@pytest.mark.parametrize('prompts, more, message', [
    ([], {}, 'there is no prompt'), ([[1], []], {}, 'prompt 1 is empty'),
    ([[1, 38]], {}, 'prompt 0 has the token 38.* 0 to 37'),
    ([[1, -1]], {}, 'prompt 0 has the token -1'),
    ([[1], [1] * 45], {}, 'text 1 has 45 tokens, 4 more .* room for 48'),
    ([[1, 2]], dict(policy=ONCE), 'text 0 has 2 tokens, .* last 3')])
def test_bad_prompts_are_refused(refining, monkeypatch, prompts, more, message):
  """Nothing is read before they are refused."""
  monkeypatch.setattr(refining, 'read', lambda *unused: pytest.fail('reading began'))
  with pytest.raises(UserError, match=message):
    stream(refining, prompts, DecodingOptions(4, **more))


def test_other_bad_input_is_refused(refining, decoder_params):
  state = refining.read(PROMPTS)
  for call, message in (
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1]), '1 seeds .* for 3 texts'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1, 2, -1]), 'seed = -1'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4, policy=Policy(
          threshold=0.0, gate=Gate(np.zeros(9), 0.0)))), r'shape \(9,\), .*\(16,'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1, 2, 0.5]), 'seed = 0.5'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1, 2, 2**32]), 'seed = 4294'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(2**31 - 1)), 'text 1 has 19 tokens'),
      (lambda: DecodingOptions(0), 'max_tokens = 0'),
      (lambda: DecodingOptions(10**30), 'max_tokens = 1000'),
      (lambda: DecodingOptions(True), 'max_tokens = True'),
      (lambda: list(batches(refining, 3, -1)), 'batch_size = -1'),
      (lambda: score(refining, PROMPTS, [[1], [], [2]], DecodingOptions(4)), 'continuation 1'),
      (lambda: Engine(tiny.CONFIG, decoder_params, length=0), 'length = 0'),
      (lambda: Engine(tiny.CONFIG, decoder_params, length=10**30), 'length = 1000'),
      (lambda: Engine(tiny.CONFIG, quantise(decoder_params), length=9), 'int8'),
      # Of two decoders, only the keys that differ are named.
      (lambda: check_match(dataclasses.replace(tiny.CONFIG, window=9), '', SimpleNamespace(
          decoder_config=tiny.CONFIG), None), '\n  decoder.window: 4 saved, 9 now\n[^\n]*$'),
      (lambda: refining.read_on(state, [[1]]), '1 prompts for a state of 3 texts'),
      (lambda: refining.read_on(state, [[], [1] * 30, []]), 'text 1 has 49 tokens'),
      (lambda: Engine(tiny.CONFIG, decoder_params, length=9, coprocessor=(
          tiny.CHOICES, {'soft_tokens': np.zeros((3, 5))})), r'shape \(3, 5\), .*\(3, 16\)')):
    with pytest.raises(UserError, match=message):
      call()
