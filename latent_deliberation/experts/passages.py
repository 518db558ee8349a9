"""Passages: a folder of documents, cut between paragraphs into parts that fit a cache.

A document is a file, or a line of a file of JSON lines. One that cannot be read is left out with a
warning, since a folder of documents holds much that nobody chose.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from latent_deliberation.data.text_files import OF_LINES, UNPACK, UNPACK_BY_HAND, list_files
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.files import read_text
from latent_deliberation.inference.tokenizer import Tokenizer

MOST_BYTES = 2**26  # of one document
PASSAGE = 256  # tokens of a passage, by default


@dataclasses.dataclass(frozen=True)
class Passage:
  """A part of a document.

  Attributes:
    text: its text.
    source: where it is from, such as 'notes/a.txt, passage 2'.
    ids: its tokens, with the one that begins a text.
  """
  text: str
  source: str
  ids: tuple[int, ...]

  @property
  def hash(self) -> str:
    """Hash of the tokens, 16 hexadecimal digits."""
    return hashlib.sha256(np.array(self.ids, np.int32).tobytes()).hexdigest()[:16]


def check_passage_size(size: int) -> None:
  """Raises UserError unless passages can have up to `size` tokens."""
  check_integer('passage', size, 16)


def read_passages(directory: Path, tokenizer: Tokenizer, size: int = PASSAGE) -> list[Passage]:
  """Returns the passages of all documents in a folder, in order.

  Documents that are empty, binary, compressed or larger than MOST_BYTES are left out, each with a
  warning.

  Args:
    directory: folder with .txt, .md and .rst files, and .jsonl files with a "text" on each line.
    size: largest number of tokens of a passage.

  Raises:
    UserError: there is no such folder, or no document in it can be used, or `size` is too small.
  """
  check_passage_size(size)
  passages = []
  for file in list_files([str(directory)]):
    try:
      # All of a file before any of it is taken, since a bad line leaves the whole file out.
      for name, text in list(_read_documents(file.path, file.name)):
        parts = list(_cut(text, tokenizer, size))
        passages += [
            Passage(part, name if len(parts) == 1 else f'{name}, passage {number}',
                    tuple(tokenizer.encode(part)))
            for number, part in enumerate(parts, 1)]
        if not parts:
          logging.warning('%s is empty and is left out.', name)
    except (UserError, OSError) as error:
      logging.warning('%s is left out: %s', file.path, error)
  if not passages:
    raise UserError(f'{directory} has no document that can be used: give a folder with text')
  return passages


def _read_documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
  """Yields name and text of each document of a file. Raises UserError where it is no text.

  Args:
    path: the file.
    name: its path inside the folder of documents.
  """
  if path.suffix.lower() in (*UNPACK, *UNPACK_BY_HAND):
    raise UserError('it is compressed: unpack it')
  if path.stat().st_size > MOST_BYTES:
    raise UserError(f'it has {path.stat().st_size:,} bytes, and at most {MOST_BYTES:,} are read: '
                    'cut it into several files')
  text = read_text(path, 'a document')
  if path.suffix.lower() not in OF_LINES:
    yield name, text
    return
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      try:
        text = json.loads(line)['text']
        text.encode()  # JSON may hold half a surrogate pair
      except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'line {number} is no object with a "text" of Unicode '
                        f'({type(error).__name__})') from error
      yield f'{name}, line {number}', text


def _cut(text: str, tokenizer: Tokenizer, size: int) -> Iterator[str]:
  """Yields parts of a text of at most `size` tokens, cut between paragraphs as far as possible."""
  held, used = [], 0
  for paragraph in filter(str.strip, re.split(r'\n\s*\n', text)):
    for part in _halve(paragraph.strip(), tokenizer, size):
      needed = len(tokenizer.encode(part)) + 2  # and an empty line
      if held and used + needed > size:
        yield '\n\n'.join(held)
        held, used = [], 0
      held.append(part)
      used += needed
  if held:
    yield '\n\n'.join(held)


def _halve(text: str, tokenizer: Tokenizer, size: int) -> Iterator[str]:
  """Yields a paragraph, or halves of it, cut at the space nearest to the middle."""
  # A long text is halved without being counted first.
  if len(text) <= 64 * size and len(tokenizer.encode(text)) <= size - 2 or len(text) < 2:
    yield text
    return
  middle = len(text) // 2
  before, after = text.rfind(' ', 0, middle), text.find(' ', middle)
  places = [place for place in (before, after) if 0 < place < len(text) - 1]
  at = min(places, key=lambda place: abs(place - middle), default=middle)
  for half in (text[:at].strip(), text[at:].strip()):
    yield from _halve(half, tokenizer, size)
