import io

import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.rows import Framing
from latent_deliberation.data.vocabularies import (
  VOCABULARY_FILE,
  ByteVocabulary,
  JsonVocabulary,
  bytes_per_token,
  framing_of,
  load_vocabulary,
  open_vocabulary,
  train_sentencepiece,
  vocabulary_hash,
)
from latent_deliberation.errors import UserError
from tests import tiny_tokenizer

LINES = 'def größe(x):\n    if x > 10:\n        return [x, "ab", 2025]\n\n\n\tpass  # done\r\n'
TEXTS = [LINES * 4, 'the quick brown fox jumps over the lazy dog\n' * 4,
         ' 2025' * 50]
SAMPLES = [LINES, '', ' ', '\n', '  two  spaces  ', 'tab\there', 'ends\n\n', 'unseen: ☃ 漢字 🎉',
           '<eos> <pad> <0x0A> </s>', 'no-newline']
KINDS = ('byte', 'sentencepiece', 'json')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'v.model'
  train_sentencepiece(TEXTS, path, 320)
  return load_vocabulary(path)


@pytest.fixture(scope='module')
def vocabularies(trained, tmp_path_factory):
  """One vocabulary of each kind."""
  path = tiny_tokenizer.write(tmp_path_factory.mktemp('tokenizer'))
  return {'byte': ByteVocabulary(), 'sentencepiece': trained, 'json': load_vocabulary(path)}


def train_foreign(path, **options):
  """A SentencePiece model as others train them."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS * 2), model_writer=model, vocab_size=60, model_type='bpe',
      minloglevel=2, **options)
  path.write_bytes(model.getvalue())
  return path


@pytest.mark.parametrize('sample', SAMPLES)
@pytest.mark.parametrize('kind', KINDS)
def test_text_comes_back(kind, sample, vocabularies):
  vocabulary = vocabularies[kind]
  ids = vocabulary.encode(sample)
  assert vocabulary.decode(ids) == sample
  assert all(4 <= i < vocabulary.vocab_size for i in ids)


@pytest.mark.parametrize('sample', SAMPLES)
@pytest.mark.parametrize('kind', KINDS)
def test_tensorflow_gives_the_same_ids(kind, sample, vocabularies):
  vocabulary = vocabularies[kind]
  ids = vocabulary.encode_tf(tf.constant(sample))
  assert ids.dtype == tf.int32
  assert ids.numpy().tolist() == list(vocabulary.encode(sample))
  stream = tf.data.Dataset.from_tensors(sample).map(vocabulary.encode_tf)
  assert next(stream.as_numpy_iterator()).tolist() == ids.numpy().tolist()
  assert vocabulary.decode_tf(ids).numpy().decode() == sample


@pytest.mark.parametrize('sample', SAMPLES)
@pytest.mark.parametrize('kind', KINDS)
def test_bytes_per_token(kind, sample, vocabularies):
  vocabulary = vocabularies[kind]
  ids = [vocabulary.bos_id, *vocabulary.encode(sample), vocabulary.eos_id, 0]
  assert bytes_per_token(vocabulary)[np.array(ids)].sum() == len(sample.encode())


def test_special_ids_are_gemmas(trained):
  for vocabulary in (trained, ByteVocabulary()):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (
        0, 1, 2, 3)
  assert trained.tokenizer.pad_id() == 0
  assert ByteVocabulary().vocab_size == 260


def test_byte_vocabulary_hash():
  """It names the vocabulary in decoders that are trained already."""
  assert vocabulary_hash(ByteVocabulary()).startswith('f1f92043b145')


def test_pieces(trained):
  """Indentation and newlines are pieces, and each digit is one."""
  pieces = trained.tokenizer.encode('\n    2025', out_type=str)
  assert pieces == ['\n', '▁' * 4, '2', '0', '2', '5']


def test_size_must_fit_the_text(tmp_path):
  with pytest.raises(UserError, match=r'vocabulary_size = 4096 does not fit .* <= \d+'):
    train_sentencepiece(TEXTS, tmp_path / 'v.model', 4096)
  with pytest.raises(UserError, match='vocabulary_size = 262 does not fit .* 262 vs'):
    train_sentencepiece(TEXTS, tmp_path / 'v.model', 262)
  assert not list(tmp_path.iterdir())


def test_framing_of_sentencepiece(tmp_path, trained):
  """Id 0 fills rows where it is padding, and BOS where it is a token."""
  assert framing_of(trained) == framing_of(ByteVocabulary()) == Framing(2, 1, 0)
  assert framing_of(load_vocabulary(train_foreign(tmp_path / 'llama.model'))) == Framing(1, 2, 1)


def test_vocabulary_without_bos(tmp_path):
  path = train_foreign(tmp_path / 't5.model', pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  with pytest.raises(UserError, match='bos id -1, eos id 1'):
    load_vocabulary(path)


@pytest.mark.parametrize('special, ends, framing', [
    (('<pad>', '<begin>', '<end>'), {'bos_token': '<begin>', 'eos_token': '<end>'}, (1, 2, 0)),
    ((), {'bos_token': '!', 'eos_token': '"'}, None),
    (('<|endoftext|>', '<end>'), {'eos_token': '<end>'}, (0, 1, 0)),
    (('<begin>', '<end>'), {'bos_token': '<end>', 'eos_token': '<begin>'}, (1, 0, 1)),
    (('<pad>', '<end>'), {'bos_token': '<end>', 'eos_token': '<end>'}, (1, 1, 0)),
    (('<|endoftext|>',), {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'}, (0, 0, 0)),
])
def test_framing_of_json(special, ends, framing, tmp_path):
  """BOS fills rows unless id 0 is a special token without a meaning."""
  path = tiny_tokenizer.write(tmp_path, tiny_tokenizer.describe(special), ends)
  vocabulary = load_vocabulary(path)
  if framing is None:  # id 0 is a byte
    framing = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.bos_id)
  assert framing_of(vocabulary) == Framing(*framing)


def test_unknown_at_0(tmp_path):
  """Id 0 does not fill rows where it stands for what cannot be spelled."""
  vocabulary = load_vocabulary(
      tiny_tokenizer.write(tmp_path, tiny_tokenizer.describe(unk_token='<pad>')))
  assert framing_of(vocabulary).pad_id == vocabulary.bos_id


def test_missing_vocabulary_is_named(tmp_path):
  with pytest.raises(UserError, match='no vocabulary at .*absent.model'):
    load_vocabulary(tmp_path / 'absent.model')


def test_damaged_vocabulary_is_named(tmp_path):
  for content in (b'', b'not a model'):
    (tmp_path / 'v.model').write_bytes(content)
    with pytest.raises(UserError, match=rf'v.model \({len(content)} bytes\) is not a Sentence'):
      load_vocabulary(tmp_path / 'v.model')


def test_hashes_tell_vocabularies_apart(trained, vocabularies, tmp_path):
  train_sentencepiece(TEXTS, tmp_path / 'v.model', 319)
  hashes = {vocabulary_hash(v) for v in (*vocabularies.values(),
                                         load_vocabulary(tmp_path / 'v.model'))}
  assert len(hashes) == 4
  train_sentencepiece(TEXTS, tmp_path / 'same.model', 320)
  assert vocabulary_hash(load_vocabulary(tmp_path / 'same.model')) == vocabulary_hash(trained)


def test_vocabulary_is_trained_once(tmp_path):
  config = DataConfig(vocabulary_size=320)
  first = open_vocabulary(config, tmp_path, lambda: TEXTS)

  def forbidden():
    raise AssertionError('trained a second time')

  assert vocabulary_hash(open_vocabulary(config, tmp_path, forbidden)) == vocabulary_hash(first)


def test_another_vocabulary_is_refused(tmp_path, trained):
  open_vocabulary(DataConfig(vocabulary_size=319), tmp_path, lambda: TEXTS)
  kept = (tmp_path / VOCABULARY_FILE).read_bytes()
  with pytest.raises(UserError, match='has 319 pieces, .* 320 pieces'):
    open_vocabulary(DataConfig(vocabulary_size=320), tmp_path, lambda: TEXTS)
  with pytest.raises(UserError, match='the configuration asks for .*another directory'):
    open_vocabulary(DataConfig(vocabulary_path=trained.sentencepiece_model_file), tmp_path,
                    lambda: TEXTS)
  assert (tmp_path / VOCABULARY_FILE).read_bytes() == kept


def test_json_is_copied(tmp_path, vocabularies):
  """A tokenizer.json is kept with its ends, and is not exchanged for another vocabulary."""
  given = vocabularies['json']
  config = DataConfig(vocabulary_path=str(given.tokenizer.path))
  for _ in range(2):
    vocabulary = open_vocabulary(config, tmp_path, lambda: TEXTS)
  assert isinstance(vocabulary, JsonVocabulary) and vocabulary == given
  assert vocabulary.tokenizer.path == tmp_path / 'tokenizer.json'
  for other in (DataConfig(vocabulary_size=320), DataConfig(
      vocabulary_path=vocabularies['sentencepiece'].sentencepiece_model_file)):
    with pytest.raises(UserError, match=f'{tmp_path}/tokenizer.json has .* asks for'):
      open_vocabulary(other, tmp_path, lambda: TEXTS)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
      'tokenizer.json', 'tokenizer_config.json']


def test_given_vocabulary_is_copied(tmp_path, trained):
  config = DataConfig(vocabulary_path=trained.sentencepiece_model_file)
  for _ in range(2):
    vocabulary = open_vocabulary(config, tmp_path, lambda: TEXTS)
  assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
  assert vocabulary_hash(load_vocabulary(tmp_path / VOCABULARY_FILE)) == vocabulary_hash(trained)
