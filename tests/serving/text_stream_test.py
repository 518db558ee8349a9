"""Pieces of text add up to the text of the whole, whatever the tokens are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_deliberation.inference.session import Completion, text_of
from latent_deliberation.inference.tokenizer import ByteTokenizer, JsonTokenizer, stop_at
from latent_deliberation.serving.text_stream import TextStream
from tests import tiny_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope='module', params=['bytes', 'json'])
def tokenizer(request, tmp_path_factory):
  if request.param == 'bytes':
    return BYTES
  return JsonTokenizer(tiny_tokenizer.write(tmp_path_factory.mktemp('tokenizer')))


def streamed(tokenizer, tokens, stop=(), ended_by='length'):
  """Everything that was given out, and the text of each token."""
  stream = TextStream(tokenizer, tokenizer.encode('Once'), stop)
  given, pieces = [], []
  for number, token in enumerate(tokens):
    if ended_by == 'eos' and number == len(tokens) - 1:
      break
    pieces.append(stream.add(token))
    if number < len(tokens) - 1:
      given.append(stream.give())
  given.append(stream.end(ended_by))
  assert ''.join(given) == stream.text
  return stream.text, pieces, given


@pytest.mark.parametrize('text', ['', ' the end', 'Grüße, 世界 🌍!\n\n the', '🌍', 'a\u0301'])
def test_pieces_are_the_text(tokenizer, text):
  tokens = tokenizer.encode_more(text)
  found, pieces, _ = streamed(tokenizer, tokens)
  assert found == text == ''.join(pieces)
  assert len(pieces) == len(tokens)


@given(st.lists(st.integers(4, 259), max_size=30))
def test_bytes_that_are_no_text(tokens):
  """Nothing given out is taken back, and the whole is as long as the bytes need."""
  found, _, given = streamed(BYTES, tokens)
  assert ''.join(given) == found
  assert len(found) >= len(tokens) / 4


def test_character_waits_for_its_last_token():
  """A character is given out when its last byte has come."""
  _, pieces, _ = streamed(BYTES, BYTES.encode_more('a🌍b'))
  assert pieces == ['a', '', '', '', '🌍', 'b']


@pytest.mark.parametrize('text, stop', [
    ('one two END three', ['END']), ('one\n\ntwo', ['\n\n', 'wo']), ('aab', ['ab']),
    ('die Straße', ['ß'])])
def test_stop_strings_are_cut_off(tokenizer, text, stop):
  """A text ends before its stop string, of which no letter is given out earlier."""
  tokens, stops = tokenizer.encode_more(text), stop_at(tokenizer, stop)
  count = next(count for count in itertools.count(1) if stops(tokens[:count]))
  found, _, given = streamed(tokenizer, tokens[:count], stop, 'stop')
  completion = Completion(tokens[:count], finish_reason='stop')
  assert found == ''.join(given) == text_of(completion, tokenizer, stop, tokenizer.encode('Once'))
  assert found == text[:min(text.find(string) for string in stop if string in text)]


def test_ends_are_no_text(tokenizer):
  """The id that ends a text has no letters; what may become a stop string is given at the end."""
  tokens = [*tokenizer.encode_more('an E'), tokenizer.eos]
  found, _, given = streamed(tokenizer, tokens, ['END'], 'eos')
  assert found == 'an E' and given[-1].endswith(' E')
