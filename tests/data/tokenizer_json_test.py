"""A tokenizer.json is read as the tokenizers library reads it, or refused."""

import importlib.util

import numpy as np
import pytest

from latent_deliberation.data.tokenizer_json import TokenizerJson
from latent_deliberation.errors import MissingError, UserError
from tests import tiny_tokenizer

pytest.importorskip('tokenizers')

TEXTS = ['', ' ', '\n', 'the  theatre\t\r\n\n 2025', 'é 漢字 🎉 e\u0301', '<begin>the<pad><end>',
         '\x00\x7f']


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return TokenizerJson(tiny_tokenizer.write(tmp_path_factory.mktemp('tokenizer')))


@pytest.mark.parametrize('text', TEXTS)
def test_text_comes_back(tokenizer, text):
  """Names of special tokens stay text, special ids have none, and every byte is counted."""
  ids = tokenizer.encode(text)
  assert not set(ids) & tokenizer.special
  framed = [tokenizer.bos, *ids, tokenizer.eos, 0]
  assert tokenizer.decode(framed) == text
  assert tokenizer.bytes_per_token()[np.array(framed)].sum() == len(text.encode())


def test_ids(tokenizer):
  """Merges apply in words, and ids with a meaning are those of tokenizer_config.json."""
  assert [tokenizer.pieces[i] for i in tokenizer.encode('the theatre')] == [
      'the', 'Ġthe', 'a', 't', 're']
  assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.size) == (1, 2, None, 265)
  assert tokenizer.special == {0, 1, 2, 3}


def test_text_is_whole(tokenizer, tmp_path):
  """What the file says of the length of texts is not used."""
  content = tiny_tokenizer.describe() | {
      'truncation': {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst',
                     'stride': 0},
      'padding': {'strategy': {'Fixed': 40}, 'direction': 'Right', 'pad_to_multiple_of': None,
                  'pad_id': 0, 'pad_type_id': 0, 'pad_token': '<pad>'}}
  other = TokenizerJson(tiny_tokenizer.write(tmp_path, content))
  assert other.encode('the theatre') == tokenizer.encode('the theatre')


def test_beginning(tmp_path):
  """Without a bos_token <|endoftext|> begins a text, and a token may be an object."""
  content = tiny_tokenizer.describe(special=('<|endoftext|>', '<end>'))
  path = tiny_tokenizer.write(
      tmp_path, content, {'bos_token': None, 'eos_token': {'content': '<end>', 'lstrip': False}})
  tokenizer = TokenizerJson(path)
  assert (tokenizer.bos, tokenizer.eos) == (0, 1)


def test_size(tmp_path):
  """Special tokens after all others need no embedding."""
  content = tiny_tokenizer.describe()
  size = len(content['model']['vocab'])
  content['added_tokens'].append(content['added_tokens'][0] | {'id': size, 'content': '<image>'})
  tokenizer = TokenizerJson(tiny_tokenizer.write(tmp_path, content))
  assert tokenizer.size == size == len(tokenizer.bytes_per_token())
  assert tokenizer.decode([size]) == ''


def test_hash(tmp_path):
  """The hash tells files and ends apart, and no other key of tokenizer_config.json."""
  hashes = [TokenizerJson(tiny_tokenizer.write(tmp_path / str(number), content, config)).hash
            for number, (content, config) in enumerate([
                (None, tiny_tokenizer.ENDS), (None, tiny_tokenizer.ENDS | {'model_max_length': 8}),
                (None, tiny_tokenizer.ENDS | {'eos_token': '<other>'}),
                (tiny_tokenizer.describe(merges=()), tiny_tokenizer.ENDS)])]
  assert hashes[0] == hashes[1]
  assert len(set(hashes)) == 3


def renumber(**ids):
  """The content of a tokenizer.json in which some tokens have other ids."""
  content = tiny_tokenizer.describe()
  content['model']['vocab'].update(ids)
  return content


def add(**token):
  """The content of a tokenizer.json with one more special token."""
  content = tiny_tokenizer.describe()
  content['added_tokens'].append(content['added_tokens'][0] | token)
  return content


@pytest.mark.parametrize('content, message', [
    ({}, r"tokenizer.json \(2 bytes\) .*'model'"),
    ([], r'tokenizer.json \(2 bytes\)'),
    (tiny_tokenizer.describe() | {'model': {'type': 'BPE'}}, r'tokenizer.json \([\d,]+ bytes\)'),
    (tiny_tokenizer.describe(type='WordLevel'), "model.type = 'WordLevel' .*BPE, Unigram"),
    (tiny_tokenizer.describe(merges=(('t', 'h'), ('th', 'is'))), 'Token `is` out of vocabulary'),
    (renumber(re=900), 'no token has the id 264, .* 900'),
    (renumber(re=263), "'ĠĠ' and 're'|'re' and 'ĠĠ'.* 263"),
    (add(content='<image>', id=300), "'<image>' has the id 300, .* 265"),
    (add(content='<begin>', id=9), "'<begin>' has the id 9, .* 1"),
    (add(content='', id=265), "'' has the id 265, .* None"),
])
def test_damaged_file(tmp_path, content, message):
  """A file that would be read wrongly is refused, with what is wrong in it."""
  with pytest.raises(UserError, match=message):
    TokenizerJson(tiny_tokenizer.write(tmp_path, content))


def test_cut_file(tmp_path):
  """A file that ends too early is refused, and one that is not there."""
  path = tiny_tokenizer.write(tmp_path)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match=r'tokenizer.json \(1,000 bytes\)'):
    TokenizerJson(path)
  with pytest.raises(MissingError, match='absent.json'):
    TokenizerJson(tmp_path / 'absent.json')


@pytest.mark.parametrize('config, message', [
    (None, 'no file .*/tokenizer_config.json'),
    ([], 'tokenizer_config.json .*JSON'),
    ({'bos_token': '<begin>'}, "tokenizer_config.json: .*'<begin>' and eos_token None"),
    ({'bos_token': '<begin>', 'eos_token': '</s>'}, "tokenizer_config.json: .*eos_token '</s>'"),
    ({'eos_token': '<end>'}, r"tokenizer_config.json: bos_token '<\|endoftext\|>'"),
])
def test_bad_ends(tmp_path, config, message):
  """Without a beginning or an end of texts, a tokenizer is refused."""
  with pytest.raises(UserError, match=message):
    TokenizerJson(tiny_tokenizer.write(tmp_path, config=config))


def test_library_missing(tmp_path, monkeypatch):
  """Without the tokenizers library, the error says how to install it."""
  path = tiny_tokenizer.write(tmp_path)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"tokenizer.json .*pip install -e '.\[tokenizers\]'"):
    TokenizerJson(path)


def test_sentencepiece_style(tmp_path):
  """Pieces of bytes, and pieces with the sign for a space, as Gemma's tokenizer.json has them."""
  pieces = ['<pad>', '<end>', '<begin>', '<unk>', 'a', '\u2581', '\u2581a',
            *(f'<0x{byte:02X}>' for byte in range(256))]
  content = tiny_tokenizer.describe(
      special=pieces[:4], merges=(), vocab={piece: number for number, piece in enumerate(pieces)},
      unk_token='<unk>', byte_fallback=True) | {
          'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'},
          'pre_tokenizer': None,
          'decoder': {'type': 'Sequence', 'decoders': [
              {'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '},
              {'type': 'ByteFallback'}, {'type': 'Fuse'}]}}
  content['model']['merges'] = [['\u2581', 'a']]
  tokenizer = TokenizerJson(tiny_tokenizer.write(tmp_path, content))
  for text in ('a  a', ' é🎉\n'):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[np.array(ids)].sum() == len(text.encode())
  assert tokenizer.unk == 3
