"""Hugging Face's tokenizer.json, run by the tokenizers library.

Data and inference share it, and nothing here needs TensorFlow. The file says how text becomes ids.
Which tokens begin and end a text is in tokenizer_config.json beside it.
"""

import codecs
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.paths import TOKENIZER_CONFIG

MODELS = ('BPE', 'Unigram', 'WordPiece')
# It stands between the documents that Qwen was trained on, and Qwen names no other beginning.
SEPARATOR = '<|endoftext|>'


class TokenizerJson:
  """A tokenizer.json with its special tokens.

  The name of a special token in a text is encoded as ordinary characters, and decoding leaves out
  special ids. A text that the vocabulary cannot spell loses characters: SmolLM2's, for instance,
  lacks a few control characters.

  Attributes:
    path: path of the tokenizer.json.
    size: V, one more than the largest id of an ordinary token, of `bos` and of `eos`. Special
      tokens of other parts may come after, such as that of a picture in Gemma 3.
    bos: id that begins a text: bos_token, or else that of SEPARATOR. Rows and prompts begin with
      it, also where the model's own tokenizer adds no beginning.
    eos: id that ends a text: eos_token.
    unk: id of what the vocabulary cannot spell; None if that is left out.
    special: ids of special tokens.
    pieces: ordinary and special tokens by id.
    hash: hash of everything that decides how text becomes ids.

  Raises:
    MissingError: there is no such file.
    UserError: the tokenizers library is not installed.
    UserError: the file is damaged, of an unknown type, or has two tokens for an id or none.
    UserError: tokenizer_config.json is missing or damaged, or names no end or an unknown token.
  """

  def __init__(self, path: Path):
    self.path = path
    if not path.is_file():
      raise MissingError(f'no vocabulary at {path}: give the path of a tokenizer.json')
    content = path.read_bytes()
    self._tokenizer, described = _open(path, content)
    # The library accepts two tokens of one id, and gives an added token the next id that is free.
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    _check_ids(path, ids, described.get('added_tokens') or ())
    added = self._tokenizer.get_added_tokens_decoder()
    self.pieces = {number: piece for piece, number in ids.items()}
    self.special = frozenset(number for number, token in added.items() if token.special)
    # Lengths of a file's own choice would cut or fill texts.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    # Ids with a meaning.
    self.bos, self.eos = _read_ends(path.with_name(TOKENIZER_CONFIG), ids)
    model = described['model']
    self.unk = model.get('unk_id', ids.get(model.get('unk_token')))
    self.size = 1 + max(self.bos, self.eos, *(set(self.pieces) - self.special))
    self.hash = hashlib.sha256(content + f'{self.bos} {self.eos}'.encode()).hexdigest()
    self._is_byte_level = 'ByteLevel' in json.dumps(described.get('decoder'))
    self._added = frozenset(added)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without its beginning and end."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special ones. Bytes that are not UTF-8 become U+FFFD."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def bytes_per_token(self) -> np.ndarray:
    """Returns the UTF-8 bytes of text that each id stands for, int32 [V]; 0 for special ids.

    Exact for byte-level BPE and Gemma's vocabulary, where a text comes back unchanged.
    """
    return np.array([0 if i in self.special else self._width(i) for i in range(self.size)],
                    np.int32)

  def _width(self, number: int) -> int:
    """Returns the bytes of an ordinary token."""
    piece = self.pieces[number]
    if self._is_byte_level and number not in self._added:  # each character stands for one byte
      return len(piece)
    if re.fullmatch('<0x[0-9A-F]{2}>', piece):
      return 1
    return len(piece.replace('\u2581', ' ').encode())


def _open(path: Path, content: bytes) -> tuple[Any, Mapping[str, Any]]:
  """Returns the library's tokenizer, and the content of the file."""
  if importlib.util.find_spec('tokenizers') is None:
    raise UserError(f"{path} needs the tokenizers library: pip install -e '.[tokenizers]'")
  # Imported lazily, because the library is an extra.
  from tokenizers import Tokenizer
  damaged = f'{path} ({len(content):,} bytes) is not a whole tokenizer.json'
  try:
    described = json.loads(content)
    kind = described['model'].get('type', 'BPE')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'{damaged} ({error}): download it again') from error
  if kind not in MODELS:
    raise UserError(f'{path}: model.type = {kind!r} is not one of {", ".join(MODELS)}: give the '
                    'tokenizer of another model')
  try:
    return Tokenizer.from_buffer(content.removeprefix(codecs.BOM_UTF8)), described
  except Exception as error:  # the library raises nothing narrower
    raise UserError(f'{damaged} ({error}): download it again') from error


def _check_ids(path: Path, ids: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
  """Raises UserError unless each id up to the largest has one token, the one that the file says."""
  owners: dict[int, str] = {}
  for piece, number in ids.items():
    if number in owners:
      raise UserError(f'{path}: {owners[number]!r} and {piece!r} both have the id {number}: '
                      'download it again')
    owners[number] = piece
  missing = next((number for number in range(len(ids)) if number not in owners), None)
  if missing is not None:
    raise UserError(f'{path}: no token has the id {missing}, and the largest is {max(owners)}: '
                    'download it again')
  for token in added:
    read = ids.get(token['content'])
    if read != token['id']:
      raise UserError(f'{path}: {token["content"]!r} has the id {token["id"]}, but the tokenizers '
                      f'library gives it {read}: download it again')


def piece_of(token: Any) -> str:
  """Returns a special token, which is stored as text or as an object with its text; '' for none."""
  return (token.get('content') if isinstance(token, dict) else token) or ''


def _read_ends(path: Path, ids: Mapping[str, int]) -> tuple[int, int]:
  """Returns the ids that begin and end a text, which a tokenizer_config.json names."""
  try:
    config = json.loads(path.read_bytes())
    names = [config.get(key) for key in ('bos_token', 'eos_token')]
  except FileNotFoundError as error:
    raise UserError(f'no file {path}, which names the tokens that begin and end a text: copy it '
                    'there from where the tokenizer.json is from') from error
  except (ValueError, AttributeError, RecursionError) as error:
    raise UserError(f'{path} is not a whole JSON object ({error}): download it again') from error
  bos, eos = map(piece_of, names)
  bos = bos or SEPARATOR
  if not (isinstance(bos, str) and isinstance(eos, str) and bos in ids and eos in ids):
    raise UserError(f'{path}: bos_token {bos!r} and eos_token {eos or None!r} must both be tokens '
                    'of the vocabulary: set them to the tokens that begin and end a text')
  return ids[bos], ids[eos]
