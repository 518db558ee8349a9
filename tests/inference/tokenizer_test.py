"""Text becomes the ids that training saw, and comes back."""

import io
import itertools

import pytest
import sentencepiece

from latent_deliberation.data import vocabularies
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError
from latent_deliberation.inference.conventions import Conventions
from latent_deliberation.inference.session import Completion, text_of
from latent_deliberation.inference.tokenizer import (
  ByteTokenizer,
  open_tokenizer,
  stop_at,
  tokenizer_of,
  tokenizer_of_data,
)
from latent_deliberation.model import weights
from latent_deliberation.serving.text_stream import TextStream
from tests import tiny_tokenizer
from tests.model.checkpoints import foreign

TEXTS = ['def f(x):\n    return x + 1  # é — 漢字 🙂', ' leading and trailing ', 'ß']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'vocabulary.model'
  lines = [f'def function_{i}(x):\n  return x + {i}  # the {i}th of them\n' for i in range(60)]
  vocabularies.train_sentencepiece(lines, path, 340)
  return path


@pytest.fixture(scope='module')
def tokenizer_json(tmp_path_factory):
  return tiny_tokenizer.write(tmp_path_factory.mktemp('tokenizer'))


@pytest.mark.parametrize('kind', ['byte', 'sentencepiece', 'json'])
def test_ids_are_those_of_prepared_data(kind, model, tokenizer_json):
  path = {'byte': 'byte', 'sentencepiece': model, 'json': tokenizer_json}[kind]
  tokenizer = open_tokenizer(path)
  vocabulary = (vocabularies.ByteVocabulary() if kind == 'byte'
                else vocabularies.load_vocabulary(path))
  assert tokenizer.hash == vocabularies.vocabulary_hash(vocabulary)
  assert (tokenizer.size, tokenizer.eos) == (vocabulary.vocab_size, vocabulary.eos_id)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert ids == [vocabulary.bos_id, *vocabulary.encode(text)]
    assert tokenizer.decode([*ids, tokenizer.eos]) == text


@pytest.fixture(scope='module', params=[True, False], ids=['collapses', 'keeps spaces'])
def dummy_prefix(request, tmp_path_factory):
  """A vocabulary with spm_train's default, a space before every text."""
  path, model = tmp_path_factory.mktemp('defaults') / 'tokenizer.model', io.BytesIO()
  words = ['The cat sat on the mat', 'the rain fell on the cat', 'a train ran on the mat'] * 20
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(words), model_writer=model, vocab_size=300, byte_fallback=True,
      control_symbols=['<turn>'], remove_extra_whitespaces=request.param, hard_vocab_limit=False,
      minloglevel=2)
  path.write_bytes(model.getvalue())
  return open_tokenizer(path)


def test_continuation_keeps_its_first_space(dummy_prefix):
  """It is what it adds to the text of its prompt."""
  tokenizer, prompt = dummy_prefix, dummy_prefix.encode('The cat sat')
  assert prompt + tokenizer.encode_more(' on the mat') == tokenizer.encode('The cat sat on the mat')
  for more in (' on the mat', 's on', ' é 漢', '\N{SLIGHTLY SMILING FACE}'):
    ids = tokenizer.encode_more(more)
    assert tokenizer.decode(ids, prompt) == more
    # A stream shows the same in pieces.
    completion, said = Completion(ids), ''
    for count in range(1, len(ids) + 1):
      text = text_of(Completion(ids[:count]), tokenizer, (), prompt).rstrip('\ufffd')
      assert text.startswith(said)
      said = text
    assert said == text_of(completion, tokenizer, (), prompt) == more
  # After the beginning of a text there is no space.
  assert tokenizer.decode(tokenizer.encode('The')[1:], [tokenizer.bos]) == 'The'


def test_json_vocabulary_that_adds_a_space(tmp_path):
  """A continuation has no space of its own, as with Llama 2's tokenizer.json."""
  tokenizers = pytest.importorskip('tokenizers')
  pieces = ['<unk>', '<s>', '</s>', *'▁acdnlort\n', '▁a', 'ld', '▁on']
  model = tokenizers.models.BPE(
      {piece: number for number, piece in enumerate(pieces)},
      [('▁', 'a'), ('l', 'd'), ('▁o', 'n')][:2], unk_token='<unk>')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')])
  tokenizer.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', 1, 0)])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
  found = open_tokenizer(tmp_path / 'tokenizer.json')
  assert [pieces[i] for i in found.encode('a car')] == ['<s>', '▁a', '▁', 'c', 'a', 'r']
  assert [pieces[i] for i in found.encode_more('ld')] == ['ld']
  assert [pieces[i] for i in found.encode_more(' ld')] == ['▁', 'ld']


def test_stop_string_with_a_space_ends_at_the_first_token(dummy_prefix):
  ids = dummy_prefix.encode_more(' on the mat')
  before = dummy_prefix.encode('The cat sat')
  stop = dummy_prefix.decode(ids[:1], before)
  assert stop[0] == ' ' and stop_at(dummy_prefix, [stop])(ids[:1])
  assert text_of(Completion(ids[:1], finish_reason='stop'), dummy_prefix, [stop], before) == ''


def test_own_vocabularies_need_no_prefix(model, tokenizer_json):
  """Without a dummy prefix, a continuation is read as any text."""
  for tokenizer in (ByteTokenizer(), open_tokenizer(model), open_tokenizer(tokenizer_json)):
    for text in TEXTS:
      assert tokenizer.encode_more(text) == tokenizer.encode(text)[1:]
      assert tokenizer.decode(tokenizer.encode_more(text), tokenizer.encode(TEXTS[0])) == text


def test_ids_that_a_vocabulary_lacks_have_no_text(model, tokenizer_json, dummy_prefix):
  """Tables are often longer than vocabularies, and models have added tokens."""
  for tokenizer in (ByteTokenizer(), open_tokenizer(model), open_tokenizer(tokenizer_json),
                    dummy_prefix):
    ids = tokenizer.encode('the cat')
    lacking = [*itertools.chain(*((token, tokenizer.size + 5) for token in ids)), 2**31, -1]
    assert tokenizer.decode(lacking) == tokenizer.decode(ids) == 'the cat'
    assert stop_at(tokenizer, ['cat'])(lacking)


def test_end_of_a_text_is_not_shown():
  """An end may be a piece of text to the vocabulary."""
  tokenizer = ByteTokenizer(Conventions(ends=(100,)))
  ids = [*tokenizer.encode_more('ab'), 100]
  assert text_of(Completion(ids, finish_reason='eos'), tokenizer, (), ()) == 'ab'
  assert text_of(Completion(ids, finish_reason='length'), tokenizer, (), ()) == 'ab`'


def test_control_pieces_have_ids(dummy_prefix, tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(dummy_prefix._bytes)
  assert dummy_prefix.control['<turn>'] not in dummy_prefix.encode('a<turn>b')
  conventions = Conventions(special={'<turn>': 4}, added={'<new>': dummy_prefix.size, 'the': 5})
  tokenizer = open_tokenizer(path, conventions)
  assert tokenizer.control == {**dummy_prefix.control, '<turn>': 4, '<new>': tokenizer.size}


def test_stop_at_last_token(model, tokenizer_json):
  """A text ends at the token that completes a stop string."""
  for tokenizer in (ByteTokenizer(), open_tokenizer(model), open_tokenizer(tokenizer_json)):
    text = TEXTS[0]
    ids = tokenizer.encode(text)[1:]
    for strings in (['return'], ['漢', 'nowhere'], ['🙂'], ['x + 1', 'n x']):
      stop = stop_at(tokenizer, strings)
      first = next(i for i in range(1, len(ids) + 1)
                   if any(string in tokenizer.decode(ids[:i]) for string in strings))
      assert [stop(ids[:i]) for i in range(1, first + 1)] == [False] * (first - 1) + [True]
    assert not stop_at(tokenizer, ['nowhere'])(ids)
  with pytest.raises(UserError, match=r"\['a', ''\]"):
    stop_at(ByteTokenizer(), ['a', ''])


def test_bad_vocabularies_are_refused(tmp_path, model):
  with pytest.raises(UserError, match="no vocabulary at .*nothing.* 'byte'"):
    open_tokenizer(tmp_path / 'nothing')
  (tmp_path / 'cut').write_bytes(model.read_bytes()[:100])
  with pytest.raises(UserError, match=r'cut \(100 bytes\)'):
    open_tokenizer(tmp_path / 'cut')


def test_tokenizer_of_directory(tmp_path, model):
  """A tokenizer.json beside the weights is found, whatever its id 0 is; SentencePiece is first."""
  foreign.write_hf(tmp_path, foreign.HF_CONFIGS['gemma1'],
                   foreign.hf_tensors(foreign.params_of('gemma1')))
  few = [*tiny_tokenizer.letters()[33:66], '<end>']
  content = tiny_tokenizer.describe(
      special=(), merges=(), vocab={token: number for number, token in enumerate(few)})
  tiny_tokenizer.write(tmp_path, content, {'bos_token': '<end>', 'eos_token': '<end>'})
  tokenizer = tokenizer_of(weights.open_checkpoint(tmp_path))
  assert tokenizer.encode('!"!') == [33, 0, 1, 0]
  assert tokenizer.decode([0, 1, 0]) == '!"!'
  (tmp_path / 'tokenizer.model').write_bytes(model.read_bytes())
  with pytest.raises(UserError, match='tokenizer.model has 340 pieces, .* 38 embeddings'):
    tokenizer_of(weights.open_checkpoint(tmp_path))
  with pytest.raises(UserError, match='tiny.json has 265 pieces, .* 38 embeddings'):
    tiny_tokenizer.write(tmp_path / 'large').rename(tmp_path / 'large/tiny.json')
    tokenizer_of(weights.open_checkpoint(tmp_path), str(tmp_path / 'large/tiny.json'))


def test_tokenizer_of_data(tmp_path):
  """The copy that prepared data keep goes before the path of the config, which may have changed."""
  kept = tiny_tokenizer.write(tmp_path / 'data')
  other = tiny_tokenizer.write(tmp_path / 'other', tiny_tokenizer.describe(merges=()))
  config = DataConfig(vocabulary_path=str(other))
  expected, changed = open_tokenizer(kept).hash, open_tokenizer(other).hash
  assert tokenizer_of_data(config, kept.parent).hash == expected != changed
  assert tokenizer_of_data(config, tmp_path).hash == changed
  assert tokenizer_of_data(DataConfig(vocabulary='byte'), kept.parent).hash == ByteTokenizer.hash
  with pytest.raises(UserError, match=f'{tmp_path}/vocabulary.model'):
    tokenizer_of_data(DataConfig(), tmp_path)


@pytest.fixture(scope='module')
def byte_fallback(tmp_path_factory):
  """A tokenizer.json such as Llama 2's: characters that it lacks are three or four byte pieces."""
  library = pytest.importorskip('tokenizers')
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '\u2581', 'a', 'b']
  made = library.Tokenizer(library.models.BPE(
      {piece: number for number, piece in enumerate(pieces)}, [], unk_token='<unk>',
      byte_fallback=True))
  made.decoder = library.decoders.Sequence([
      library.decoders.Replace('\u2581', ' '), library.decoders.ByteFallback(),
      library.decoders.Fuse()])
  made.add_special_tokens(['<unk>', '<s>', '</s>'])
  path = tmp_path_factory.mktemp('fallback') / 'tokenizer.json'
  made.save(str(path))
  path.with_name('tokenizer_config.json').write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
  return open_tokenizer(path)


def test_characters_in_bytes(byte_fallback):
  """A long run of characters in bytes streams, stops, and ends within one, without loss."""
  text = 'ཀ' * 12
  ids = byte_fallback.encode(text)[1:]
  assert len(ids) == 36 and byte_fallback.decode(ids) == text
  stream = TextStream(byte_fallback, byte_fallback.encode('ab'))
  assert ''.join(stream.add(token) for token in ids) == text
  # The last character is cut, and the ones before are kept.
  assert byte_fallback.decode(ids[:-1]) == text[:-1] + '\ufffd'
  # A prompt that is such a run is followed by its text.
  assert byte_fallback.decode(ids[:6], byte_fallback.encode(text)) == text[:2]
  stop = stop_at(byte_fallback, ['b'])
  assert not stop(ids) and stop([*ids, *byte_fallback.encode('b')[1:]])
