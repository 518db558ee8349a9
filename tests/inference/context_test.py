"""Prompts behind a text that was read and augmented ahead of time."""

import dataclasses

import pytest

from latent_deliberation.cli.generate import Request, Writer
from latent_deliberation.errors import UserError
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.generator import open_generator
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.prefix_cache import check_context, open_context, save_context
from latent_deliberation.inference.session import DecodingOptions, generate

TEXT, PROMPTS = 'Document 3: the ', ['7th', 'forty. the 9th']
REQUEST = Request(DecodingOptions(12), cache='given')


@pytest.fixture(scope='module')
def opened(quickstart):
  return open_generator(quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor'),
                        length=120)


@pytest.fixture(scope='module')
def directory(opened, tmp_path_factory):
  directory = tmp_path_factory.mktemp('context') / 'cache'
  save_context(TEXT, directory, *opened)
  return directory


def test_prompts_go_on_behind_the_text_and_its_latents(opened, directory):
  generator, tokenizer = opened
  writer = Writer(*opened, REQUEST, open_context(directory, generator))
  for prompt, found in zip(PROMPTS, writer.compare(PROMPTS), strict=True):
    whole, = generate(generator, [tokenizer.encode(TEXT + prompt)], DecodingOptions(12))
    assert found['plain']['tokens'] == whole.tokens
    state = generator.read([tokenizer.encode(TEXT)])
    state = generator.attach(state, generator.augment(state))
    state = generator.read_on(state, [tokenizer.encode(prompt)[1:]])
    expected, = generate(generator, state, DecodingOptions(12))
    assert found['augmented']['tokens'] == expected.tokens
    assert found['augmented']['logprobs'] == pytest.approx(
        expected.logprobs, abs=1e-5)
    assert found['augmented']['logprobs'] != found['plain']['logprobs']
  assert ''.join(writer.write_slowly(PROMPTS[0])) == writer.write(PROMPTS)[0]['text']


def test_what_is_no_context_is_refused(opened, directory, tmp_path):
  generator, tokenizer = opened
  with pytest.raises(UserError, match='--cache=there brings its latents with it'):
    dataclasses.replace(REQUEST, cache='there', how=DecodingOptions(4, policy=ONCE))
  assert dataclasses.replace(REQUEST, compared=True).options.policy == NEVER
  state = generator.read([tokenizer.encode(prompt) for prompt in PROMPTS])
  prefix_cache.save(tmp_path / 'two', generator, state, generator.augment(state))
  prefix_cache.save(tmp_path / 'plain', generator, generator.read([tokenizer.encode(TEXT)]))
  with pytest.raises(UserError, match='has 2 texts with latents .*, 1 with latents is expected'):
    open_context(tmp_path / 'two', generator)
  with pytest.raises(UserError, match='has 1 texts without latents'):
    open_context(tmp_path / 'plain', generator)
  with pytest.raises(UserError, match='text 0 has 18 tokens, 108 more are asked for'):
    Writer(*opened, dataclasses.replace(REQUEST, how=DecodingOptions(108)),
           open_context(directory, generator)).write(['a'])


def test_a_document_is_checked_before_a_decoder_is_there(tmp_path):
  document = tmp_path / 'text.txt'
  with pytest.raises(UserError, match=f'no file {document}'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  document.write_bytes(b'caf\xe9')
  with pytest.raises(UserError, match='is not UTF-8'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  assert not (tmp_path / 'new').exists()
  document.write_text('')
  with pytest.raises(UserError, match='is empty'):
    check_context(tmp_path / 'new/cache', document, 'trained')
  document.write_text(TEXT)
  with pytest.raises(UserError, match='is not written over'):
    check_context(tmp_path, document, 'trained')
  assert check_context(tmp_path / 'new/cache', document, 'trained') == TEXT
  for nothing in ('', 'none'):
    with pytest.raises(UserError, match=f'--coprocessor={nothing}: .* give the directory of'):
      check_context(tmp_path / 'other', document, nothing)
