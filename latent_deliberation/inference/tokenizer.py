"""Text to the arrays that the decoder reads, and back: tokenizers, stop strings, and prompts.

Nothing here needs TensorFlow.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from latent_deliberation.data.data_config import (
  BOS_ID,
  BYTE_VOCABULARY_HASH,
  BYTE_VOCABULARY_SIZE,
  EOS_ID,
  decode_bytes,
  encode_bytes,
)
from latent_deliberation.data.tokenizer_json import TokenizerJson
from latent_deliberation.errors import UserError
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.paths import VOCABULARY_FILE

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
      raise UserError(f'no vocabulary at {path}: give the path of a SentencePiece model or a '
                      f'tokenizer.json, or {BYTES!r} for the byte vocabulary')
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


class JsonTokenizer:
  """A tokenizer.json, such as that of Llama 3, Qwen or SmolLM2; see `TokenizerJson`."""

  def __init__(self, path: Path):
    self._model = TokenizerJson(path)
    self.size, self.eos, self.hash = self._model.size, self._model.eos, self._model.hash

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [self._model.bos, *self._model.encode(text)]

  def decode(self, ids: Sequence[int]) -> str:
    """See Tokenizer."""
    return self._model.decode(ids)


def open_tokenizer(vocabulary: str | Path) -> Tokenizer:
  """Opens a SentencePiece model, a .json file of Hugging Face, or 'byte'.

  Raises what `SentencePieceTokenizer` and `TokenizerJson` do.
  """
  if vocabulary == BYTES:
    return ByteTokenizer()
  path = Path(vocabulary)
  return JsonTokenizer(path) if path.suffix == '.json' else SentencePieceTokenizer(path)


def tokenizer_of(checkpoint: Checkpoint, vocabulary: str = '') -> Tokenizer:
  """Opens the requested tokenizer, or the one next to a decoder or its run.

  Raises:
    UserError: there is none, or it is not the one that the decoder was trained with.
  """
  # Bytes if the decoder says so, else a file in its directory or up to two above.
  if not vocabulary and checkpoint.vocabulary_hash == ByteTokenizer.hash:
    vocabulary = BYTES
  if not vocabulary:
    directory = checkpoint.directory.absolute()
    places = [place / VOCABULARY_FILE for place in (directory, *directory.parents[:2])]
    found = checkpoint.tokenizer or next((path for path in places if path.is_file()), None)
    if found is None:
      raise UserError(f'no vocabulary next to the decoder in {directory}: give '
                      '--vocabulary=PATH, its SentencePiece model or tokenizer.json, or '
                      f'--vocabulary={BYTES}')
    vocabulary = str(found)
  tokenizer = open_tokenizer(vocabulary)
  # It must be the decoder's own, and have no more pieces than there are embeddings.
  if checkpoint.vocabulary_hash and tokenizer.hash != checkpoint.vocabulary_hash:
    raise UserError(f'the decoder in {checkpoint.directory} was trained with the vocabulary '
                    f'{checkpoint.vocabulary_hash}, but {vocabulary} is {tokenizer.hash}: give the '
                    'vocabulary of its data')
  if tokenizer.size > checkpoint.config.vocab_size:
    raise UserError(f'{vocabulary} has {tokenizer.size} pieces, but the decoder in '
                    f'{checkpoint.directory} has {checkpoint.config.vocab_size} embeddings: give '
                    'the vocabulary that it was trained with')
  return tokenizer


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


# --- Prompts as arrays ---

Prompts = Sequence[Sequence[int]]
SHORTEST = 16  # padded length of the shortest prompts


def check_prompts(prompts: Prompts, before: np.ndarray, vocab_size: int) -> None:
  """Raises UserError where there is no prompt, an empty text, or an unknown token.

  Args:
    before: [B] tokens that each text has already. A text that has some may get an empty prompt.
  """
  if not len(prompts):
    raise UserError('there is no prompt: give at least one')
  for number, prompt in enumerate(prompts):
    # Some token must predict the first decoded one.
    if not len(prompt) and not before[number]:
      raise UserError(f'prompt {number} is empty: give at least the token that begins a text')
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
      raise UserError(f'prompt {number} has the token {unknown[0]}, but the decoder knows 0 to '
                      f'{vocab_size - 1}: use the vocabulary that it was trained with')


def check_room(lengths: np.ndarray, more: int, room: int) -> None:
  """Raises UserError where a text of `lengths` [B] and `more` tokens does not fit a cache."""
  longest = int(np.argmax(lengths))
  if lengths[longest] + more > room:
    raise UserError(
        f'text {longest} has {lengths[longest]} tokens, {more} more are requested, and the cache '
        f'has room for {room}: shorten the text, request fewer, or raise length')


def check_anchors(lengths: np.ndarray, first_anchor: int) -> None:
  """Raises UserError where a text is too short for latents at its end."""
  shortest = int(np.argmin(lengths))
  if lengths[shortest] <= first_anchor:
    raise UserError(
        f'text {shortest} has {lengths[shortest]} tokens, but refining latents replace its last '
        f'{first_anchor + 1}: give a longer prompt')


def align(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens int32 [B, T], with each text at the end of its row, and the lengths [B]."""
  count = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), padded_length(int(count.max()))), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt):] = prompt
  return tokens, count


def padded_length(length: int) -> int:
  """Rounds up to one of 16, 24, 32, 48, 64, 96, ..., so that few shapes are compiled."""
  # The next power of two, or three quarters of it where that is enough.
  padded = max(SHORTEST, 1 << (length - 1).bit_length()) if length else SHORTEST
  return padded * 3 // 4 if padded > SHORTEST and length <= padded * 3 // 4 else padded
