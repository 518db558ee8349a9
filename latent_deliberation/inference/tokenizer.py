"""Text to ids and back, without TensorFlow; and strings that end a text."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from latent_deliberation.data.data_config import (
  BOS_ID,
  BYTE_VOCABULARY_HASH,
  BYTE_VOCABULARY_SIZE,
  EOS_ID,
  decode_bytes,
  encode_bytes,
)
from latent_deliberation.errors import UserError

BYTES = 'byte'  # name of the byte vocabulary, in the place of a path


class Tokenizer(Protocol):
  """Attributes:
    size: number of ids.
    eos: id that ends a text.
    hash: hash of everything that decides how text becomes ids, as in a decoder's description.
  """
  size: int
  eos: int
  hash: str

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; the first one begins every text."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special ones."""


class ByteTokenizer:
  """UTF-8 bytes as ids from 4 on."""
  size = BYTE_VOCABULARY_SIZE
  eos = EOS_ID
  hash = BYTE_VOCABULARY_HASH

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [BOS_ID, *encode_bytes(text)]

  def decode(self, ids: Sequence[int]) -> str:
    """See Tokenizer. Bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes(ids)


class SentencePieceTokenizer:
  """A SentencePiece model, such as Gemma's tokenizer.model."""

  def __init__(self, path: Path):
    """Reads the model.

    Raises:
      UserError: there is no such file, it is not a SentencePiece model, or it has no ids that begin
        and end a text.
    """
    if not path.is_file():
      raise UserError(f'no vocabulary at {path}: give the path of a SentencePiece model, '
                      f'or {BYTES!r} for the byte vocabulary')
    model = path.read_bytes()
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # SentencePiece raises what its C++ raises
      raise UserError(f'{path} ({len(model)} bytes) is not a SentencePiece model: {error}. Give '
                      'another path, or delete a damaged file') from error
    self.size = self._model.vocab_size()
    self.eos = self._model.eos_id()
    self.hash = hashlib.sha256(model).hexdigest()
    # SentencePiece gives -1 for an id that a model does not have.
    if self._model.bos_id() < 0 or self.eos < 0:
      raise UserError(f'{path}: bos id {self._model.bos_id()}, eos id {self.eos}: a text begins '
                      'and ends with one. Give the vocabulary that the decoder was trained with')

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [self._model.bos_id(), *self._model.encode(text)]

  def decode(self, ids: Sequence[int]) -> str:
    """See Tokenizer."""
    return self._model.decode([int(i) for i in ids if not self._model.is_control(int(i))])


def open_tokenizer(vocabulary: str | Path) -> Tokenizer:
  """Opens a SentencePiece model, or 'byte'; raises what `SentencePieceTokenizer` does."""
  return ByteTokenizer() if vocabulary == BYTES else SentencePieceTokenizer(Path(vocabulary))


def check_stops(strings: Sequence[str]) -> None:
  """Raises UserError where one of the strings that end a text is empty."""
  if '' in strings:
    raise UserError(f'stop strings {list(strings)}: an empty one would end every text at once; '
                    'leave it out')


def stop_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
  """Returns a function for `DecodingOptions.stop`, or None without any string.

  Given decoded tokens, it tells whether the last one has completed one of the strings.

  Raises:
    UserError: a string is empty.
  """
  check_stops(strings)
  if not strings:
    return None
  # A token may begin before the string that it completes. A character has at most 4 bytes, and
  # so at most 4 tokens.
  reach = 4 * max(map(len, strings)) + 4

  def stop(tokens: Sequence[int]) -> bool:
    text = tokenizer.decode(tokens[-reach:])
    return any(string in text for string in strings)

  return stop
