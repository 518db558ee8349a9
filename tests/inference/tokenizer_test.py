"""Text becomes the ids that training saw, and comes back."""

import pytest

from latent_deliberation.data import vocabularies
from latent_deliberation.errors import UserError
from latent_deliberation.inference.tokenizer import (
  ByteTokenizer,
  open_tokenizer,
  stop_at,
  tokenizer_of,
)
from latent_deliberation.model import weights
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
