"""What is decoded is what the decoder says uncached, and with latents what training says."""

import itertools

import jax
import numpy as np
import pytest

from latent_deliberation.deliberation.deliberation_config import LATENTS
from latent_deliberation.errors import UserError
from latent_deliberation.inference import decode, passes
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.policy import ONCE, Gate, Policy
from latent_deliberation.inference.session import DecodingOptions, generate, stream
from latent_deliberation.model import weights
from latent_deliberation.model.layers import quantise
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from tests import tiny
from tests.inference.small import (
  LENGTH,
  PROMPTS,
  assert_same,
  augmented,
  plain_log_probabilities,
  trained_log_probabilities,
)

SCHEMES = [('refining', 'share'), *itertools.product(('paper', 'anchored'), ('shift', 'share'))]
NUCLEUS = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02)


@pytest.fixture(scope='module')
def plain(decoder_params):
  return Generator(tiny.CONFIG, decoder_params, length=LENGTH)


@pytest.fixture
def refining(made):
  return made[0]


def test_greedy_decoding_from_the_cache_is_greedy_decoding_without_one(plain, decoder_params):
  for prompt, completion in zip(PROMPTS, generate(plain, PROMPTS, DecodingOptions(24)), strict=True):
    assert len(completion.tokens) == 24 and completion.finish_reason == 'length'
    _, logits, _ = tiny.read(decoder_params, np.array([[*prompt, *completion.tokens]]))
    np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1:-1], axis=-1),
                                  completion.tokens)
    expected = plain_log_probabilities(decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize('latents, positions', SCHEMES)
def test_what_follows_latents_is_what_training_says_of_it(decoder_params, latents, positions):
  generator, *trained = augmented(decoder_params, latents=latents, positions=positions)
  before = generate(generator, PROMPTS, DecodingOptions(9))
  for prompt, completion, other in zip(
      PROMPTS, generate(generator, PROMPTS, DecodingOptions(9, policy=ONCE)), before, strict=True):
    expected = trained_log_probabilities(*trained, decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)
    assert np.abs(np.subtract(completion.logprobs, other.logprobs)).max() > 0.01


@pytest.mark.parametrize('trainable, num_layers', [('lora', 0), ('lora', 1), ('constant', 0)])
def test_adapters_and_constant_soft_tokens_and_fewer_layers_too(
    decoder_params, trainable, num_layers):
  generator, *trained = augmented(
      decoder_params, trainable=trainable, num_layers=num_layers, gate='channel')
  for prompt, completion in zip(
      PROMPTS, generate(generator, PROMPTS, DecodingOptions(5, policy=ONCE)), strict=True):
    expected = trained_log_probabilities(*trained, decoder_params, prompt, completion.tokens)
    np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)


@pytest.mark.parametrize('how', [
    DecodingOptions(18), DecodingOptions(18, NUCLEUS), DecodingOptions(18, NUCLEUS, policy=Policy(every=7))],
    ids=['greedy', 'sampled', 'augmented'])
def test_prompts_in_a_batch_are_the_same_prompts_alone(refining, how):
  together = generate(refining, PROMPTS, how, seeds=[3, 1, 4])
  for prompt, seed, completion in zip(PROMPTS, (3, 1, 4), together, strict=True):
    alone, = generate(refining, [prompt], how, seeds=[seed])
    assert alone.tokens == completion.tokens
    np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=5e-5)


def test_a_seed_decides_and_another_seed_decides_otherwise(plain):
  options = DecodingOptions(20, NUCLEUS)
  first, second = generate(plain, [PROMPTS[0]] * 2, options, seeds=[5, 6])
  again, = generate(plain, [PROMPTS[0]], options, seeds=[6])
  assert first.tokens != second.tokens and again.tokens == second.tokens


def test_latents_that_were_given_up_leave_no_bit_behind(refining):
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
def test_a_stream_that_was_given_up_at_any_moment_leaves_no_bit_behind(refining, delay):
  base = refining.read(PROMPTS)
  never = generate(refining, base, DecodingOptions(8))
  for blocks in range(1, 8):
    following = stream(refining, base, DecodingOptions(20, policy=Policy(every=3), timing=LatentTiming(delay)))
    for _ in range(blocks):
      *_, last = next(following)
    following.close()
    assert_same(generate(refining, base, DecodingOptions(8)), never)
  assert len(last.latents_at) > 1


def test_one_base_serves_several_coprocessors(decoder_params, refining):
  base = refining.read(PROMPTS)
  other = Generator(tiny.CONFIG, decoder_params, length=LENGTH, coprocessor=(
      refining.model.coprocessor.config,
      tiny.coprocessor_params(tiny.deliberator(), decoder_params, seed=7)))
  alone = [generate(each, each.attach(base, each.augment(base)), DecodingOptions(6))
           for each in (refining, other)]
  both = [each.augment(base) for each in (refining, other)]
  for each, augmentation, expected in zip((refining, other), both, alone, strict=True):
    assert_same(generate(each, each.attach(base, augmentation), DecodingOptions(6)), expected)
  assert alone[0][0].logprobs != alone[1][0].logprobs


def test_texts_without_latents_in_a_batch_with_latents_are_as_before(refining):
  base = refining.read(PROMPTS)
  mixed = refining.attach(base, refining.augment(base), np.array([True, False, True]))
  plain, with_latents = (generate(refining, state, DecodingOptions(8)) for state in (base, mixed))
  assert_same(plain[1:2], with_latents[1:2])
  assert plain[0].logprobs != with_latents[0].logprobs


@pytest.mark.parametrize('latents', LATENTS)
def test_reading_on_behind_latents_is_decoding_behind_them(decoder_params, latents):
  generator, *_ = augmented(decoder_params, latents=latents, positions='shift')
  base = generator.read(PROMPTS)
  state = generator.attach(base, generator.augment(base))
  completions = generate(generator, state, DecodingOptions(9))
  more = generator.read_on(state, [completion.tokens[:size] for completion, size in zip(
      completions, (7, 0, 4), strict=True)])
  for completion, size, after in zip(completions, (7, 0, 4),
                                     generate(generator, more, DecodingOptions(2)), strict=True):
    assert after.tokens == completion.tokens[size:size + 2]
    np.testing.assert_allclose(after.logprobs,
                               completion.logprobs[size:size + 2], atol=5e-5)


def test_an_end_ends_its_own_text_and_no_other(plain):
  whole = generate(plain, PROMPTS, DecodingOptions(24))
  eos = whole[0].tokens[10]
  for completion, long in zip(generate(plain, PROMPTS, DecodingOptions(24, eos=eos)), whole, strict=True):
    end = long.tokens.index(eos) + 1 if eos in long.tokens else 24
    assert completion.tokens == long.tokens[:end]
    assert completion.logprobs == long.logprobs[:end]
    assert completion.finish_reason == ('eos' if eos in long.tokens else 'length')


def test_a_stop_ends_its_own_text_and_no_other(plain):
  whole = generate(plain, PROMPTS, DecodingOptions(24))
  last = whole[1].tokens[4:6]
  options = DecodingOptions(24, stop=lambda tokens: tokens[-2:] == last)
  for completion, long in zip(generate(plain, PROMPTS, options), whole, strict=True):
    assert completion.tokens == long.tokens[:len(completion.tokens)]
    stopped = completion.tokens[-2:] == last
    assert completion.finish_reason == ('stop' if stopped else 'length')
  assert generate(plain, PROMPTS, options)[1].finish_reason == 'stop'


def test_a_stream_begins_with_one_token_and_only_grows(plain):
  sizes, last = [], None
  for completions in stream(plain, PROMPTS, DecodingOptions(24)):
    sizes.append([len(completion.tokens) for completion in completions])
    last = completions
  assert sizes == [[size] * 3 for size in (1, 17, 24)]
  assert_same(last, generate(plain, PROMPTS, DecodingOptions(24)))


def test_nothing_is_compiled_again_for_other_prompts_and_numbers_of_tokens(plain):
  generate(plain, PROMPTS, DecodingOptions(3))
  compiled = decode.decode._cache_size(), passes.read._cache_size()
  generate(plain, [prompt[:-1] for prompt in PROMPTS[:2]] + [PROMPTS[1]], DecodingOptions(20))
  assert (decode.decode._cache_size(), passes.read._cache_size()) == compiled


def test_any_mesh_decodes_what_one_device_does(refining, decoder_params):
  mesh = make_mesh(MeshConfig(2, 2, 2))
  place = shardings_of(weights.boxed_shapes(tiny.CONFIG), mesh, DEFAULT_RULES)
  sharded, *_ = augmented(jax.device_put(decoder_params, place), mesh=mesh)
  options = DecodingOptions(8, NUCLEUS, policy=Policy(at=(0, 4)))
  for one, other in zip(generate(refining, PROMPTS, options), generate(sharded, PROMPTS, options),
                        strict=True):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize('prompts, more, message', [
    ([], {}, 'there is no prompt'), ([[1], []], {}, 'prompt 1 is empty'),
    ([[1, 38]], {}, 'prompt 0 has the token 38, the decoder knows 0 to 37'),
    ([[1, -1]], {}, 'prompt 0 has the token -1'),
    ([[1], [1] * 45], {}, 'text 1 has 45 tokens, 4 more are asked for, .* room for 48: shorten'),
    ([[1, 2]], dict(policy=ONCE), 'text 0 has 2 tokens, but refining latents stand in the place '
     'of its last 3')])
def test_a_bad_prompt_is_refused_before_anything_is_read(
    refining, monkeypatch, prompts, more, message):
  monkeypatch.setattr(refining, 'read', lambda *unused: pytest.fail('reading began'))
  with pytest.raises(UserError, match=message):
    stream(refining, prompts, DecodingOptions(4, **more))


def test_other_bad_input_is_refused(refining, decoder_params):
  state = refining.read(PROMPTS)
  for call, message in (
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1]), '1 seeds .* for 3 texts'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4), seeds=[1, 2, -1]), 'between 0 and'),
      (lambda: stream(refining, PROMPTS, DecodingOptions(4, policy=Policy(
          threshold=0.0, gate=Gate(np.zeros(9), 0.0)))), r'shape \(9,\), .* asks for \(16,'),
      (lambda: DecodingOptions(0), 'max_tokens = 0'),
      (lambda: Generator(tiny.CONFIG, decoder_params, length=0), 'length = 0'),
      (lambda: Generator(tiny.CONFIG, quantise(decoder_params), length=9), 'are in int8'),
      (lambda: refining.read_on(state, [[1]]), '1 prompts for a state of 3 texts'),
      (lambda: refining.read_on(state, [[], [1] * 30, []]), 'text 1 has 49 tokens'),
      (lambda: Generator(tiny.CONFIG, decoder_params, length=9, coprocessor=(
          tiny.CHOICES, {'soft_tokens': np.zeros((3, 5))})), r'shape \(3, 5\), .* \(3, 16\)')):
    with pytest.raises(UserError, match=message):
      call()
