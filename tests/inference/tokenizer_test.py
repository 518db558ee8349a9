"""Text becomes the ids that training saw, and comes back."""

import pytest

from latent_deliberation.data import vocabularies
from latent_deliberation.errors import UserError
from latent_deliberation.inference.tokenizer import ByteTokenizer, open_tokenizer, stop_at

TEXTS = ['def f(x):\n    return x + 1  # é — 漢字 🙂', ' leading and trailing ', 'ß']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'vocabulary.model'
  lines = [f'def function_{i}(x):\n  return x + {i}  # the {i}th of them\n' for i in range(60)]
  vocabularies.train_sentencepiece(lines, path, 340)
  return path


@pytest.mark.parametrize('kind', ['byte', 'sentencepiece'])
def test_ids_are_those_of_prepared_data(kind, model):
  if kind == 'byte':
    tokenizer, vocabulary = open_tokenizer('byte'), vocabularies.ByteVocabulary()
  else:
    tokenizer, vocabulary = open_tokenizer(model), vocabularies.load_vocabulary(model)
  assert tokenizer.hash == vocabularies.vocabulary_hash(vocabulary)
  assert (tokenizer.size, tokenizer.eos) == (vocabulary.vocab_size, vocabulary.eos_id)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert ids == [vocabulary.bos_id, *vocabulary.encode(text)]
    assert tokenizer.decode([*ids, tokenizer.eos]) == text


def test_stop_at_last_token(model):
  """A text ends at the token that completes a stop string."""
  for tokenizer in (ByteTokenizer(), open_tokenizer(model)):
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
