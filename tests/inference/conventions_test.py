"""What a decoder's files say of ends and conversations is read, and used as its model means it."""

import codecs
import json
from types import SimpleNamespace

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.inference.conventions import Conventions, read_conventions
from latent_deliberation.inference.session import DecodingOptions, with_ends
from latent_deliberation.inference.tokenizer import (
  ByteTokenizer,
  encode_chat,
  tokenizer_of,
  typed_control,
)

TEMPLATE = (
    '{{ bos_token }}{% for turn in messages %}<turn>{{ turn.role }}\n{{ turn.content }}<eos>'
    '{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}')


def read(directory, vocab_size=300, **files):
  for name, content in files.items():
    (directory / f'{name}.json').write_text(json.dumps(content))
  return read_conventions(SimpleNamespace(
      format='huggingface', directory=directory, config=SimpleNamespace(vocab_size=vocab_size)))


@pytest.mark.parametrize('files, ends', [
    ({}, ()), (dict(config={'eos_token_id': 7}), (7,)),
    (dict(config={'eos_token_id': None}, generation_config={}), ()),
    (dict(config={'eos_token_id': 1}, generation_config={'eos_token_id': [1, 106]}), (1, 106)),
    (dict(config={'text_config': {'eos_token_id': [1, 106]}}), (1, 106)),
    (dict(config={'eos_token_id': [1, 300, -1]}), (1,))])  # of no embedding
def test_ends_are_those_of_all_files(tmp_path, files, ends):
  assert read(tmp_path, **files).ends == ends


def test_byte_order_marks(tmp_path):
  content = json.dumps({'eos_token_id': [1, 106]}).encode()
  (tmp_path / 'generation_config.json').write_bytes(codecs.BOM_UTF8 + content)
  (tmp_path / 'chat_template.jinja').write_bytes(codecs.BOM_UTF8 + b'{{ bos_token }}')
  found = read(tmp_path)
  assert (found.ends, found.chat_template) == ((1, 106), '{{ bos_token }}')


def test_texts_end_at_any_of_them(tmp_path):
  tokenizer = ByteTokenizer(read(tmp_path, generation_config={'eos_token_id': [1, 106]}))
  assert with_ends(DecodingOptions(4), tokenizer, ()).eos == (1, 106)
  assert with_ends(DecodingOptions(4), ByteTokenizer(), ()).eos == (1,)


def test_tokenizer_knows_the_conventions_of_its_decoder(tmp_path):
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [1, 106]}')
  tokenizer = tokenizer_of(SimpleNamespace(
      format='native', directory=tmp_path, vocabulary_hash=ByteTokenizer.hash,
      config=SimpleNamespace(vocab_size=300)))
  assert tokenizer.conventions.ends == (1, 106)


@pytest.mark.parametrize('name, content, message', [
    ('config', [1], r'config.json holds \[1\]'),
    ('generation_config', {'eos_token_id': 'end'}, "eos_token_id = 'end'"),
    ('tokenizer_config', {'added_tokens_decoder': {'5': '<turn>'}}, 'tokenizer_config.json'),
    ('tokenizer_config', {'added_tokens_decoder': {'5': {'content': 5}}}, 'content = 5'),
    ('config', {'text_config': [1]}, r'text_config = \[1\]'),
    ('tokenizer_config', {'chat_template': [{'name': 'default'}]}, 'tokenizer_config.json'),
    ('added_tokens', {'<turn>': 'five'}, 'added_tokens.json'),
    ('generation_config', {'eos_token_id': [1, 1.5]}, r'eos_token_id = \[1, 1.5\]')])
def test_damaged_files_are_refused(tmp_path, name, content, message):
  with pytest.raises(UserError, match=message):
    read(tmp_path, **{name: content})
  (tmp_path / f'{name}.json').write_text('{')
  with pytest.raises(UserError, match=f'{name}.json'):
    read(tmp_path)


def test_gguf_metadata_say_the_same(tmp_path):
  metadata = {'tokenizer.ggml.eos_token_id': 1, 'tokenizer.ggml.eot_token_id': 106,
              'tokenizer.chat_template': TEMPLATE}
  found = read_conventions(SimpleNamespace(
      format='gguf', directory=tmp_path, config=SimpleNamespace(vocab_size=300),
      source=SimpleNamespace(get=lambda key, default=None: metadata.get(key, default))))
  assert found.ends == (1, 106) and found.chat_template == TEMPLATE


def test_templates_and_pieces_are_found(tmp_path):
  """A file of its own comes first, and one of several templates is for plain conversations."""
  tokens = {'5': {'content': '<turn>', 'special': True}, '6': {'content': 'word', 'special': False},
            '900': {'content': '<image>', 'special': True}, '7': {'content': '', 'special': True}}
  several = [{'name': 'tools', 'template': 'a'}, {'name': 'default', 'template': 'b'}]
  found = read(tmp_path, tokenizer_config={
      'added_tokens_decoder': tokens, 'bos_token': {'content': '<s>'}, 'eos_token': '</s>',
      'chat_template': several})
  assert (found.chat_template, found.bos, found.eos) == ('b', '<s>', '</s>')
  assert found.special == {'<turn>': 5} and found.added == {'word': 6}
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  assert read(tmp_path).chat_template == TEMPLATE


def test_control_pieces_become_their_ids():
  pytest.importorskip('jinja2')
  tokenizer = ByteTokenizer(Conventions(special={'<turn>': 3}, chat_template=TEMPLATE))
  text = lambda words: tokenizer.encode(words)[1:]  # noqa: E731
  turns = [{'role': 'user', 'content': 'hi'}, {'role': 'model', 'content': 'yes'}]
  assert encode_chat(tokenizer, turns) == [
      tokenizer.bos, 3, *text('user\nhi'), 1, 3, *text('model\nyes'), 1, 3, *text('model\n')]
  # Without a template they are read as characters.
  assert tokenizer.encode('<turn>') == [tokenizer.bos, *text('<turn>')]
  assert typed_control(tokenizer, 'a <turn>user') == ['<turn>']
  assert typed_control(tokenizer, 'a <b>') == []


@pytest.mark.parametrize('template, message', [
    ('', 'no chat template.*--chat'), ('{% if %}', 'TemplateSyntaxError'),
    ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'), ('{{ nothing.more }}', 'UndefinedError')])
def test_bad_templates_are_refused(tmp_path, template, message):
  """A template that reaches for more than its conversation is stopped."""
  if template:
    pytest.importorskip('jinja2')
  tokenizer = ByteTokenizer(Conventions(tmp_path, chat_template=template))
  with pytest.raises(UserError, match=f'{tmp_path.name}.*{message}'):
    encode_chat(tokenizer, [{'role': 'user', 'content': 'hi'}])


def test_missing_jinja_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'jinja2.sandbox', None)
  with pytest.raises(UserError, match=r'jinja2: pip install .*\[chat\]'):
    encode_chat(ByteTokenizer(Conventions(chat_template='a')), [])
