"""A cache read from disk is the cache that was written, and no other decoder takes it."""

import json

import jax
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.policy import ONCE, Gate, Policy
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import tiny
from tests.inference.small import LENGTH, PROMPTS, assert_same, augmented


@pytest.fixture(scope='module')
def generator(decoder_params):
  return augmented(decoder_params)[0]


@pytest.fixture
def saved(generator, tmp_path):
  state = generator.read(PROMPTS)
  augmentation = generator.augment(state)
  prefix_cache.save(tmp_path / 'cache', generator, state, augmentation)
  return tmp_path / 'cache', state, augmentation


def test_decoding_from_a_loaded_cache_is_decoding_from_a_fresh_one(generator, saved):
  directory, state, augmentation = saved
  loaded, latents = prefix_cache.load(directory, generator)
  assert_same(generate(generator, loaded, DecodingOptions(12)), generate(generator, state, DecodingOptions(12)))
  assert_same(generate(generator, generator.attach(loaded, latents), DecodingOptions(12)),
              generate(generator, generator.attach(state, augmentation), DecodingOptions(12)))


def test_a_gate_opens_behind_a_loaded_cache_where_it_does_behind_a_fresh_one(generator, saved):
  directory, state, _ = saved
  gate = Gate(np.ones(tiny.CONFIG.embed_dim, np.float32), np.float32(0))
  least, *_ = sorted(gate.score(state.hidden))  # so that two of three texts deliberate at once
  options = DecodingOptions(12, policy=Policy(threshold=float(least), gate=gate, apart=4))
  fresh, loaded = (generate(generator, each, options)
                   for each in (state, prefix_cache.load(directory, generator)[0]))
  assert_same(fresh, loaded)
  assert [completion.latents_at for completion in fresh] == [
      completion.latents_at for completion in loaded]
  assert sum(completion.latents_at[:1] == [0] for completion in loaded) == 2


def test_attached_latents_and_what_was_read_behind_them_are_kept(generator, saved, tmp_path):
  _, state, augmentation = saved
  state = generator.read_on(generator.attach(state, augmentation), [[4, 5], [], [6]])
  prefix_cache.save(tmp_path / 'more', generator, state)
  loaded, latents = prefix_cache.load(tmp_path / 'more', generator)
  assert latents is None
  assert_same(generate(generator, loaded, DecodingOptions(6)), generate(generator, state, DecodingOptions(6)))


def test_a_cache_fits_a_generator_of_another_length(generator, saved, decoder_params):
  directory, state, _ = saved
  longer, *_ = augmented(decoder_params, length=2 * LENGTH)
  loaded, latents = prefix_cache.load(directory, longer)
  for one, other in zip(generate(longer, longer.attach(loaded, latents), DecodingOptions(40)),
                        generate(generator, PROMPTS, DecodingOptions(12, policy=ONCE)),
                        strict=True):
    assert one.tokens[:12] == other.tokens
  shorter, *_ = augmented(decoder_params, length=20)
  with pytest.raises(UserError, match='global_slots = 48, this generator has 20, and 24 slots'):
    prefix_cache.load(directory, shorter)


def test_slots_that_were_not_reached_take_no_room(saved, decoder_params, tmp_path):
  longer, *_ = augmented(decoder_params, length=2 * LENGTH)
  state = longer.read(PROMPTS)
  prefix_cache.save(tmp_path / 'longer', longer, state, longer.augment(state))
  sizes = [(directory / 'cache.safetensors').stat().st_size
           for directory in (saved[0], tmp_path / 'longer')]
  assert sizes[0] == sizes[1]


def test_a_cache_can_be_read_by_others_than_who_wrote_it(saved):
  assert (saved[0] / 'cache.safetensors').stat().st_mode & 0o777 == 0o644


def test_a_cache_of_another_decoder_is_refused(saved, generator, decoder_params):
  directory, *_ = saved
  changed = jax.tree.map(np.array, decoder_params)
  changed['embedder']['table'][0, 0] += 1e-6
  other, *_ = augmented(jax.tree.map(jax.numpy.asarray, changed))
  with pytest.raises(UserError, match=f'fingerprint {generator.fingerprint}, this one has '
                     f'{other.fingerprint}: read the text'):
    prefix_cache.load(directory, other)


@pytest.mark.parametrize('choices', [dict(num_latents=2), dict(latents='anchored')])
def test_a_cache_for_other_latents_is_refused(saved, decoder_params, choices):
  other, *_ = augmented(decoder_params, **choices)
  with pytest.raises(UserError, match='has coprocessor = .*, this generator has .*: make a gen'):
    prefix_cache.load(saved[0], other)
  plain = Generator(tiny.CONFIG, decoder_params, length=LENGTH)
  with pytest.raises(UserError, match='made with one, this generator works without a copro'):
    prefix_cache.load(saved[0], plain)


def test_a_cache_with_latents_of_other_weights_is_refused(saved, decoder_params):
  _, deliberator, params = augmented(decoder_params)
  params['soft_tokens'] = params['soft_tokens'] + 1
  other = Generator(tiny.CONFIG, decoder_params, length=LENGTH,
                    coprocessor=(deliberator.config, params))
  with pytest.raises(UserError, match="coprocessor = {'weights': '.*'}, this generator has {'wei"):
    prefix_cache.load(saved[0], other)


@pytest.mark.parametrize('section, key', [('', 'local_slots'), ('coprocessor.', 'weights'),
                                          ('model.', 'rope_scaling')])
def test_a_cache_of_an_older_version_is_refused_as_such_with_what_it_lacks(
    generator, saved, section, key):
  description = saved[0] / 'cache.json'
  content = json.loads(description.read_text())
  del (content[section[:-1]] if section else content)[key]
  description.write_text(json.dumps(content))
  with pytest.raises(UserError, match=rf"older version, .* not say \['{section}{key}'\].* again"):
    prefix_cache.load(saved[0], generator)


def test_nothing_is_overwritten_and_nothing_damaged_is_loaded(generator, saved):
  directory, state, _ = saved
  with pytest.raises(UserError, match='exists already'):
    prefix_cache.save(directory, generator, state)
  arrays = directory / 'cache.safetensors'
  whole = arrays.read_bytes()
  arrays.write_bytes(whole[:200])
  with pytest.raises(UserError, match='cannot be read .*: it is truncated or absent'):
    prefix_cache.load(directory, generator)
  arrays.write_bytes(whole)
  description = directory / 'cache.json'
  text = description.read_text()
  description.write_text(text.replace('"texts": 3', '"texts": 2'))
  with pytest.raises(UserError, match='one of the two was replaced'):
    prefix_cache.load(directory, generator)
  description.write_text(text[:50])
  with pytest.raises(UserError, match='cache.json is damaged'):
    prefix_cache.load(directory, generator)
  description.unlink()
  with pytest.raises(UserError, match='holds no cache.json'):
    prefix_cache.load(directory, generator)
