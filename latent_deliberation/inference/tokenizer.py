"""Text to token ids, and back: tokenizers and stop strings.

Nothing here needs TensorFlow.
"""

import codecs
import functools
import hashlib
import importlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
from absl import logging

from latent_deliberation.data.data_config import (
  BOS_ID,
  BYTE_VOCABULARY_HASH,
  BYTE_VOCABULARY_SIZE,
  EOS_ID,
  DataConfig,
  decode_bytes,
  encode_bytes,
  open_sentencepiece,
)
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path, at_hand
from latent_deliberation.inference.conventions import (
  NO_CONVENTIONS,
  Conventions,
  Message,
  read_conventions,
)
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.paths import TOKENIZER_JSON, VOCABULARY_FILE, kept_vocabulary

BYTES = 'byte'  # name of the byte vocabulary, in the place of a path
IDS_BEFORE = 16  # ids before a text that decide how it begins; one of them is more than a space


class Tokenizer(Protocol):
  """Turns text into ids and back.

  Attributes:
    size: number of ids.
    bos, eos: ids that begin and end a text.
    hash: hash of everything that decides how text becomes ids, as in a decoder's description.
    control: pieces that stand for control ids, such as '<start_of_turn>', with the ids.
    conventions: what the decoder's files say of its texts.
  """
  size: int
  bos: int
  eos: int
  hash: str
  control: Mapping[str, int]
  conventions: Conventions

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; the first one begins every text."""

  def encode_more(self, text: str) -> list[int]:
    """Returns the ids of a text that continues another one."""

  def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Returns the text that `ids` add to the text of the ids `before`, without special ones."""


class ByteTokenizer:
  """UTF-8 bytes as ids from 4 on."""
  size = BYTE_VOCABULARY_SIZE
  bos, eos = BOS_ID, EOS_ID
  hash = BYTE_VOCABULARY_HASH

  def __init__(self, conventions: Conventions = NO_CONVENTIONS):
    self.conventions = conventions
    self.control = {'<bos>': BOS_ID, '<eos>': EOS_ID, **conventions.special}

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [BOS_ID, *encode_bytes(text)]

  def encode_more(self, text: str) -> list[int]:
    """See Tokenizer."""
    return encode_bytes(text)

  def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """See Tokenizer. Bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes([i for i in ids if i < self.size])


class SentencePieceTokenizer:
  """A SentencePiece model, such as Gemma's tokenizer.model."""

  def __init__(self, path: Path, conventions: Conventions = NO_CONVENTIONS):
    """Reads the model.

    Raises:
      UserError: there is no such file, it is not a SentencePiece model, or it has no ids that begin
        and end a text.
    """
    if not path.is_file():
      raise UserError(f'no vocabulary at {path}: give the path of a SentencePiece model or a '
                      f'tokenizer.json, or {BYTES!r} for the byte vocabulary')
    self._model, model = open_sentencepiece(path)
    self.size = self._model.vocab_size()
    self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
    self.hash = hashlib.sha256(model).hexdigest()
    self.conventions, self._bytes = conventions, model
    # SentencePiece gives -1 for an id that a model does not have.
    if self.bos < 0 or self.eos < 0:
      raise UserError(f'{path}: bos id {self.bos}, eos id {self.eos}: a text begins '
                      'and ends with one. Give the vocabulary that the decoder was trained with')

  @functools.cached_property
  def control(self) -> Mapping[str, int]:
    """See Tokenizer."""
    own = {self._model.id_to_piece(number): number for number in range(self.size)
           if self._model.is_control(number)}
    added = {piece: number for piece, number in self.conventions.added.items()
             if number >= self.size}
    return {**own, **added, **self.conventions.special}

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [self.bos, *self._model.encode(text)]

  def encode_more(self, text: str) -> list[int]:
    """See Tokenizer."""
    model, collapses = self._continuing
    # A model that collapses spaces drops those that begin a text, and puts one there instead.
    return (self._model if collapses and text[:1].isspace() else model).encode(text)

  @functools.cached_property
  def _continuing(self) -> tuple[sentencepiece.SentencePieceProcessor, bool]:
    """The model without a space before the text, and whether it collapses spaces.

    `add_dummy_prefix`, the default of spm_train, reads every text as if a space came before it.
    """
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto.FromString(self._bytes)
    collapses = model.normalizer_spec.remove_extra_whitespaces
    if not model.normalizer_spec.add_dummy_prefix:
      return self._model, False
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()), collapses

  def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """See Tokenizer."""
    return _decode_after(self._model.decode, self._pieces(before[-IDS_BEFORE:]), self._pieces(ids))

  def _pieces(self, ids: Sequence[int]) -> list[int]:
    """Returns the ids that stand for text."""
    return [int(i) for i in ids if 0 <= i < self.size and not self._model.is_control(int(i))]


class JsonTokenizer:
  """A tokenizer.json, such as that of Llama 3, Qwen or SmolLM2; see data/tokenizer_json.py."""

  def __init__(self, path: Path, conventions: Conventions = NO_CONVENTIONS):
    # Imported only here, to keep what every prompt imports small.
    module = importlib.import_module('latent_deliberation.data.tokenizer_json')
    self._model, self.conventions = module.TokenizerJson(path), conventions
    self.size, self.hash = self._model.size, self._model.hash
    self.bos, self.eos = self._model.bos, self._model.eos

  @functools.cached_property
  def control(self) -> Mapping[str, int]:
    """See Tokenizer."""
    own = {self._model.pieces[number]: number for number in self._model.special}
    return {**own, **self.conventions.special}

  def encode(self, text: str) -> list[int]:
    """See Tokenizer."""
    return [self.bos, *self._model.encode(text)]

  def encode_more(self, text: str) -> list[int]:
    """See Tokenizer."""
    # Some vocabularies read every text as if a space came before it. After a line there is none.
    line, longer = self._model.encode('\n'), self._model.encode('\n' + text)
    if self._adds_space and longer[:len(line)] == line:
      return longer[len(line):]
    return self._model.encode(text)

  @functools.cached_property
  def _adds_space(self) -> bool:
    return self._model.encode('\na')[-1] != self._model.encode('a')[-1]

  def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """See Tokenizer."""
    # A character in bytes must not be cut, since the library then gives up all bytes beside it.
    first = max(0, len(before) - IDS_BEFORE)
    while first and int(before[first]) in self._bytes:
      first -= 1
    known_before, opened = self._split_open(self._known(before[first:]))
    whole, rest = self._split_open([*opened, *self._known(ids)])
    return _decode_after(self._model.decode, known_before, whole) + '\ufffd' * bool(rest)

  @functools.cached_property
  def _bytes(self) -> Mapping[int, int]:
    """The byte that each id stands for which is a byte of a character."""
    return {number: int(piece[3:5], 16) for number, piece in self._model.pieces.items()
            if re.fullmatch('<0x[0-9A-F]{2}>', piece)}

  def _split_open(self, ids: list[int]) -> tuple[list[int], list[int]]:
    """Returns the ids, and apart those at their end that are bytes of an incomplete character."""
    run = list(itertools.takewhile(lambda byte: byte is not None, map(self._bytes.get, ids[::-1])))
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    decoder.decode(bytes(run[::-1]))
    end = len(ids) - len(decoder.getstate()[0])  # it keeps the bytes that it waits with
    return ids[:end], ids[end:]

  def _known(self, ids: Sequence[int]) -> list[int]:
    return [int(i) for i in ids if int(i) in self._model.pieces]


def _decode_after(decode: Callable[[list[int]], str], before: list[int], ids: list[int]) -> str:
  """Returns the text that `ids` add to the text of the ids `before`."""
  # SentencePiece drops the space that begins a text. It must not drop one within a text.
  return decode([*before, *ids])[len(decode(before)):]


def open_tokenizer(vocabulary: str | Path,
                   conventions: Conventions = NO_CONVENTIONS) -> Tokenizer:
  """Opens a SentencePiece model, a .json file of Hugging Face, or 'byte'.

  Raises what `SentencePieceTokenizer` and `TokenizerJson` do.
  """
  if vocabulary == BYTES:
    return ByteTokenizer(conventions)
  path = at_hand(as_path(os.path.expanduser(vocabulary)), 'tokenizer*.json')
  kind = JsonTokenizer if path.suffix == '.json' else SentencePieceTokenizer
  return kind(path, conventions)


def tokenizer_of_data(data: DataConfig, prepared_dir: Path) -> Tokenizer:
  """Opens the tokenizer of prepared data: the copy that they keep, or else the configured one."""
  if data.vocabulary == 'byte':
    return open_tokenizer(BYTES)
  kept = kept_vocabulary(prepared_dir)
  return open_tokenizer(kept if kept.is_file() or not data.vocabulary_path
                        else data.vocabulary_path)


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
    beside = found.with_name(TOKENIZER_JSON)
    if found != beside and beside.is_file():
      logging.info('%s is read, and the %s beside it is not', found, TOKENIZER_JSON)
  tokenizer = open_tokenizer(vocabulary, read_conventions(checkpoint))
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
  before = tokenizer.encode('a')  # a text comes before, so a first space counts

  def stop(tokens: Sequence[int]) -> bool:
    text = tokenizer.decode(tokens[-reach:], [*before, *tokens[:-reach]])
    return any(string in text for string in strings)

  return stop


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """Returns the ids of the prompt that asks for the next turn of a conversation.

  Args:
    tokenizer: tokenizer of the decoder, whose conventions hold a chat template.
    messages: turns so far, with the keys 'role' and 'content'.

  Raises:
    UserError: see `Conventions.render`.
  """
  names = {number: piece for piece, number in tokenizer.control.items()}
  text = tokenizer.conventions.render(
      messages, names.get(tokenizer.bos, ''), names.get(tokenizer.eos, ''))
  # Control pieces become their ids, and the text between them is read as text.
  pieces = '|'.join(map(re.escape, sorted(tokenizer.control, key=len, reverse=True)))
  ids, begun = [], False
  for part in re.split(f'({pieces})', text):
    if part in tokenizer.control:
      ids.append(tokenizer.control[part])
    elif part:
      ids += tokenizer.encode_more(part) if begun else tokenizer.encode(part)[1:]
      begun = True
  return ids


def typed_control(tokenizer: Tokenizer, text: str) -> list[str]:
  """Returns the control pieces that occur in a text, which `encode` reads as plain characters."""
  return [piece for piece, number in tokenizer.control.items()
          if piece in text and number not in tokenizer.encode(piece)[1:]]


def check_unicode(text: str, name: str) -> None:
  """Raises UserError where a text cannot be written as UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{name} is {text!r}, which is not Unicode ({error.reason}): give UTF-8'
                    ) from error
