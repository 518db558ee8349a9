"""States on disk come back as they were, for the same decoder; and prompts continue contexts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_deliberation.cli.generate import Request, Writer
from latent_deliberation.errors import UserError
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.engine import Engine, open_engine
from latent_deliberation.inference.policy import NEVER, ONCE, Gate, Policy
from latent_deliberation.inference.prefix_cache import check_context, open_context, save_context
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import tiny
from tests.inference.small import LENGTH, PROMPTS, assert_same, augmented


@pytest.fixture(scope='module')
def engine(decoder_params):
  return augmented(decoder_params)[0]


@pytest.fixture
def saved(engine, tmp_path):
  state = engine.read(PROMPTS)
  augmentation = engine.augment(state)
  prefix_cache.save(tmp_path / 'cache', engine, state, augmentation)
  return tmp_path / 'cache', state, augmentation


def test_loaded_cache_decodes_as_fresh_one(engine, saved):
  directory, state, augmentation = saved
  loaded, latents = prefix_cache.load(directory, engine)
  options = DecodingOptions(12)
  assert_same(generate(engine, loaded, options), generate(engine, state, options))
  assert_same(generate(engine, engine.attach(loaded, latents), options),
              generate(engine, engine.attach(state, augmentation), options))


def test_gate_opens_as_after_fresh_cache(engine, saved):
  directory, state, _ = saved
  gate = Gate(np.ones(tiny.CONFIG.embed_dim, np.float32), np.float32(0))
  least, *_ = sorted(gate.score(state.hidden))  # so that two of three texts deliberate at once
  options = DecodingOptions(12, policy=Policy(threshold=float(least), gate=gate, min_gap=4))
  fresh, loaded = (generate(engine, each, options)
                   for each in (state, prefix_cache.load(directory, engine)[0]))
  assert_same(fresh, loaded)
  assert [completion.latents_at for completion in fresh] == [
      completion.latents_at for completion in loaded]
  assert sum(completion.latents_at[:1] == [0] for completion in loaded) == 2


def test_save_keeps_attached_latents(engine, saved, tmp_path):
  """Attached latents and the tokens after them are saved and loaded."""
  _, state, augmentation = saved
  state = engine.read_on(engine.attach(state, augmentation), [[4, 5], [], [6]])
  prefix_cache.save(tmp_path / 'more', engine, state)
  loaded, latents = prefix_cache.load(tmp_path / 'more', engine)
  assert latents is None
  options = DecodingOptions(6)
  assert_same(generate(engine, loaded, options), generate(engine, state, options))


def test_cache_fits_another_length(engine, saved, decoder_params):
  directory, state, _ = saved
  longer, *_ = augmented(decoder_params, length=2 * LENGTH)
  loaded, latents = prefix_cache.load(directory, longer)
  for one, other in zip(generate(longer, longer.attach(loaded, latents), DecodingOptions(40)),
                        generate(engine, PROMPTS, DecodingOptions(12, policy=ONCE)),
                        strict=True):
    assert one.tokens[:12] == other.tokens
  shorter, *_ = augmented(decoder_params, length=20)
  with pytest.raises(UserError, match='global_slots = 48, .* 20, .* 24 slots'):
    prefix_cache.load(directory, shorter)


def test_unwritten_slots_take_no_room(saved, decoder_params, tmp_path):
  longer, *_ = augmented(decoder_params, length=2 * LENGTH)
  state = longer.read(PROMPTS)
  prefix_cache.save(tmp_path / 'longer', longer, state, longer.augment(state))
  sizes = [(directory / 'cache.safetensors').stat().st_size
           for directory in (saved[0], tmp_path / 'longer')]
  assert sizes[0] == sizes[1]


def test_everybody_can_read_the_cache(saved):
  assert (saved[0] / 'cache.safetensors').stat().st_mode & 0o777 == 0o644


def test_cache_of_another_decoder_is_refused(saved, engine, decoder_params):
  directory, *_ = saved
  changed = jax.tree.map(np.array, decoder_params)
  changed['embedder']['table'][0, 0] += 1e-6
  other, *_ = augmented(jax.tree.map(jax.numpy.asarray, changed))
  with pytest.raises(UserError, match=f'fingerprint {engine.decoder_fingerprint}, .* '
                     f'{other.decoder_fingerprint}'):
    prefix_cache.load(directory, other)


@pytest.mark.parametrize('choices', [dict(num_latents=2), dict(latents='anchored')])
def test_cache_for_other_latents_is_refused(saved, decoder_params, choices):
  other, *_ = augmented(decoder_params, **choices)
  with pytest.raises(UserError, match=f'coprocessor = .*{next(iter(choices))}'):
    prefix_cache.load(saved[0], other)
  plain = Engine(tiny.CONFIG, decoder_params, length=LENGTH)
  with pytest.raises(UserError, match='with a coprocessor, .* without a coprocessor'):
    prefix_cache.load(saved[0], plain)


def test_other_coprocessor_weights_are_refused(saved, decoder_params):
  _, deliberator, params = augmented(decoder_params)
  params['soft_tokens'] = params['soft_tokens'] + 1
  other = Engine(tiny.CONFIG, decoder_params, length=LENGTH,
                 coprocessor=(deliberator.config, params))
  with pytest.raises(UserError, match="coprocessor = {'weights': '.*'}.* {'weights'"):
    prefix_cache.load(saved[0], other)


def plain(description: Path) -> dict[str, Any]:
  """The content of a cache.json without its checksum, so that it may be changed."""
  content = json.loads(description.read_text())
  content.pop('checksum')
  return content


@pytest.mark.parametrize('section, key', [('', 'local_slots'), ('coprocessor.', 'weights'),
                                          ('model.', 'vocab_size')])
def test_older_version_is_refused(engine, saved, section, key):
  description = saved[0] / 'cache.json'
  content = plain(description)
  del (content[section[:-1]] if section else content)[key]
  description.write_text(json.dumps(content))
  with pytest.raises(UserError, match=rf"version.*'{key}'"):
    prefix_cache.load(saved[0], engine)


def test_newer_keys_have_defaults(engine, saved):
  """A cache from before a config had some keys means their defaults."""
  description = saved[0] / 'cache.json'
  content = plain(description)
  del content['model']['norm_offset'], content['coprocessor']['max_delay']
  description.write_text(json.dumps(content))
  loaded, _ = prefix_cache.load(saved[0], engine)
  assert_same(generate(engine, loaded, DecodingOptions(6)),
              generate(engine, saved[1], DecodingOptions(6)))


def test_old_names_still_load(engine, saved):
  """A cache from before names changed: names of arrays, and soft tokens that were 'rested'."""
  directory, state, augmentation = saved
  assert {'state/cache/cursor', 'augmentation/anchor', 'augmentation/ahead'} <= load_file(
      directory / 'cache.safetensors').keys()
  description = directory / 'cache.json'
  content = plain(description)
  assert content['coprocessor']['soft_tokens'] == 'additive'
  content['coprocessor']['soft_tokens'] = 'rested'
  description.write_text(json.dumps(content))
  loaded, latents = prefix_cache.load(directory, engine)
  jax.tree.map(np.testing.assert_array_equal, loaded, state)
  jax.tree.map(np.testing.assert_array_equal, latents, augmentation)


def test_damage_is_refused_and_nothing_overwritten(engine, saved):
  directory, state, _ = saved
  with pytest.raises(UserError, match='exists already'):
    prefix_cache.save(directory, engine, state)
  arrays = directory / 'cache.safetensors'
  whole = arrays.read_bytes()
  arrays.write_bytes(whole[:200])
  with pytest.raises(UserError, match='cache.safetensors is damaged: its hash'):
    prefix_cache.load(directory, engine)
  # A value that is another one leaves shapes as they are.
  arrays.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
  with pytest.raises(UserError, match='cache.safetensors is damaged: its hash'):
    prefix_cache.load(directory, engine)
  arrays.unlink()
  with pytest.raises(UserError, match='cache.safetensors cannot be read'):
    prefix_cache.load(directory, engine)
  arrays.write_bytes(whole)
  description = directory / 'cache.json'
  text = description.read_text()
  description.write_text(text.replace('"texts": 3', '"texts": 2'))
  with pytest.raises(UserError, match='cache.json has changed since it was written'):
    prefix_cache.load(directory, engine)
  description.write_text(json.dumps({**plain(description), 'texts': 2}))
  with pytest.raises(UserError, match='has shape .*cache.json means'):
    prefix_cache.load(directory, engine)
  description.write_text(text[:50])
  with pytest.raises(UserError, match='cache.json is damaged'):
    prefix_cache.load(directory, engine)
  description.write_text('[]')
  with pytest.raises(UserError, match='cache.json is damaged'):
    prefix_cache.load(directory, engine)
  description.unlink()
  with pytest.raises(UserError, match='no cache.json'):
    prefix_cache.load(directory, engine)


# --- Contexts ---

TEXT, AFTER = 'Document 3: the ', ['7th', 'forty. the 9th']
REQUEST = Request(DecodingOptions(12), cache='given')


@pytest.fixture(scope='module')
def opened(quickstart):
  return open_engine(quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor'),
                     length=120)


@pytest.fixture(scope='module')
def context(opened, tmp_path_factory):
  directory = tmp_path_factory.mktemp('context') / 'cache'
  save_context(TEXT, directory, *opened)
  return directory


def test_prompts_continue_a_context(opened, context):
  engine, tokenizer = opened
  writer = Writer(*opened, REQUEST, open_context(context, engine))
  for prompt, found in zip(AFTER, writer.compare(AFTER), strict=True):
    whole, = generate(engine, [tokenizer.encode(TEXT + prompt)], DecodingOptions(12))
    assert found['plain']['tokens'] == whole.tokens
    state = engine.read([tokenizer.encode(TEXT)])
    state = engine.attach(state, engine.augment(state))
    state = engine.read_on(state, [tokenizer.encode(prompt)[1:]])
    expected, = generate(engine, state, DecodingOptions(12))
    assert found['augmented']['tokens'] == expected.tokens
    assert found['augmented']['logprobs'] == pytest.approx(expected.logprobs, abs=1e-5)
    assert found['augmented']['logprobs'] != found['plain']['logprobs']
  *_, last = writer.write_slowly(AFTER[0])
  assert last['text'] == writer.write(AFTER)[0]['text']


def test_bad_contexts_are_refused(opened, context, tmp_path):
  engine, tokenizer = opened
  with pytest.raises(UserError, match='--cache=there .*--at'):
    dataclasses.replace(REQUEST, cache='there', options=DecodingOptions(4, policy=ONCE))
  assert dataclasses.replace(REQUEST, compared=True).options.policy == NEVER
  state = engine.read([tokenizer.encode(prompt) for prompt in AFTER])
  prefix_cache.save(tmp_path / 'two', engine, state, engine.augment(state))
  prefix_cache.save(tmp_path / 'plain', engine, engine.read([tokenizer.encode(TEXT)]))
  with pytest.raises(UserError, match='two has 2 texts with latents'):
    open_context(tmp_path / 'two', engine)
  with pytest.raises(UserError, match='plain has 1 texts without latents'):
    open_context(tmp_path / 'plain', engine)
  with pytest.raises(UserError, match='text 0 has 18 tokens, 108 more'):
    Writer(*opened, dataclasses.replace(REQUEST, options=DecodingOptions(108)),
           open_context(context, engine)).write(['a'])


def test_documents_are_checked_first(tmp_path):
  """A bad document, output or coprocessor is noticed before a decoder is opened."""
  document = tmp_path / 'text.txt'
  with pytest.raises(UserError, match=f'no file {document}'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  document.write_bytes(b'caf\xe9')
  with pytest.raises(UserError, match='text.txt .*UTF-8'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  assert not (tmp_path / 'new').exists()
  document.write_text('')
  with pytest.raises(UserError, match='text.txt is empty'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  document.write_text(TEXT)
  with pytest.raises(UserError, match='exists already'):
    check_context(tmp_path, document, 'trained')
  assert check_context(tmp_path / 'new/cache', document, 'trained') == TEXT
  for nothing in ('', 'none'):
    with pytest.raises(UserError, match=f'--coprocessor={nothing}: '):
      check_context(tmp_path / 'other', document, nothing)
