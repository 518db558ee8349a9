"""Local text as an indexed, checked list of documents; no TensorFlow here.

Opening a corpus reads all of it once. Every file is decoded and every line parsed, so that a bad
byte is named before any long work. The contents are hashed for the manifest of packed rows.

Afterwards a document is read by its number, which makes shuffling and sharding exact and cheap. The
index takes about 30 bytes a document. For more than about 10^8 documents use a TFDS data set.
"""

import array
import codecs
import dataclasses
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.text_files import (
  TextFile,
  decode,
  list_files,
  list_stdlib,
  make_plain,
)
from latent_deliberation.errors import UserError
from latent_deliberation.progress import Progress

GIANT = 4  # a document of more than 1 / GIANT of the text to hold out is trained on


@dataclasses.dataclass(frozen=True)
class TextCorpus:
  """Local documents by number; a `Corpus` as sources.py describes it.

  Attributes:
    files: files of the corpus, sorted by name.
    text_key: field of a JSON line that holds its text.
    file_of: int32 [documents], index into files.
    start: int64 [documents], first byte of the document in its plain file.
    size: int64 [documents], bytes of the document in its plain file (of the whole JSON line).
    held_out: bool [documents], True for validation.
    fingerprint: hash of the names and contents of all files, and of how older code read or split
      them, where that differs. Rows of older code then stay apart from those of this code.
  """
  files: tuple[TextFile, ...]
  text_key: str
  file_of: np.ndarray
  start: np.ndarray
  size: np.ndarray
  held_out: np.ndarray
  fingerprint: str

  def describe(self) -> str:
    """Returns a line about the documents, for the log."""
    return (f'{len(self.size)} documents in {len(self.files)} files, {self.size.sum() / 1e6:.1f} '
            f'MB, {self.held_out.sum()} documents held out')

  def numbers(self, split: str) -> np.ndarray:
    """Returns the numbers of the documents of 'train' or 'validation', int64."""
    return np.flatnonzero(self.held_out == (split == 'validation'))

  def read(self, number: int) -> str:
    """Returns the text of one document."""
    file = self.files[self.file_of[number]]
    with file.plain.open('rb') as stream:
      stream.seek(self.start[number])
      content = stream.read(self.size[number])
    if file.has_lines:
      return json.loads(content)[self.text_key]
    return decode(content, file.path)


def open_corpus(config: DataConfig) -> TextCorpus:
  """Lists, checks, hashes and splits the documents of a 'stdlib' or 'text' configuration.

  The hash of its name decides whether a document is held out. The choice is therefore the same on
  every machine, and new files do not move old documents. Empty documents are left out. Equal
  documents are in the same split: all are held out if the name of one says so.

  Two exceptions keep the splits useful. If one split would be empty, the document that is nearest
  to the limit changes sides. A document of more than a quarter of the text to hold out is trained
  on, unless all held-out documents are as large.

  Raises:
    MissingError: a glob or directory has no file to read.
    UserError: a file is not text or damaged, a line is not JSON or has no text, or there are fewer
      than two different documents. The message names the file, and the byte or line in it.
  """
  files = list_stdlib() if config.source == 'stdlib' else list_files(config.files)
  # Copies of compressed files live as long as the corpus.
  copies = Path(tempfile.mkdtemp(prefix='latent_deliberation-'))
  try:
    corpus = _read_corpus(files, config, copies)
  except BaseException:
    shutil.rmtree(copies)
    raise
  weakref.finalize(corpus, shutil.rmtree, copies, ignore_errors=True)
  return corpus


def _read_corpus(files: Sequence[TextFile], config: DataConfig, copies: Path) -> TextCorpus:
  """Reads all files once, and returns their documents; see `open_corpus`."""
  # Plain arrays, since a corpus may have millions of documents.
  name_hashes, text_hashes, places = bytearray(), bytearray(), array.array('q')
  corpus_hash = hashlib.sha256()
  progress = Progress('checking the corpus', 'files', len(files))
  files = list(files)
  for index, file in enumerate(files):
    files[index] = file = make_plain(file, copies / str(index))
    # The hash of a document's name decides its split, that of all contents is the fingerprint.
    file_hash = hashlib.sha256()
    for name, start, size, text in _index_file(file, config.text_key, file_hash):
      name_hashes += hashlib.sha256(name.encode()).digest()[:8]
      text_hashes += hashlib.blake2b(text.encode(), digest_size=8).digest()
      places.extend((index, start, size))
    corpus_hash.update(f'{file.name}\0{file_hash.hexdigest()}\0'.encode())
    if file.has_lines and file.path.suffix != '.jsonl':  # one document in older code
      corpus_hash.update(b'lines\0')
    progress.update(index + 1)
  # One row for each document, as columns.
  file_of, start, size = np.array(places, np.int64).reshape(-1, 3).T
  names, texts = np.frombuffer(name_hashes, '>u8'), np.frombuffer(text_hashes, np.uint64)
  different = len(np.unique(texts))
  if different < 2:
    raise UserError(
        f'the corpus has {different} documents that differ and are not empty, in {len(files)} '
        'files. It needs at least 2, one to train on and one to validate on. Give more files, or '
        'split the text (split -C 64k --additional-suffix=.txt all.txt part-)')
  if different < len(size):
    logging.info('%d documents are equal to an earlier one, and in the same split as that',
                 len(size) - different)
  total, percent = size.sum(), config.validation_percent
  held_out = _hold_out(*_join_equal(texts, names, size), total, percent)
  # Older code did not compare texts.
  if not np.array_equal(held_out, _hold_out(names, size, total, percent)):
    corpus_hash.update(b'equal documents in one split\0')
  return TextCorpus(tuple(files), config.text_key, file_of.astype(np.int32), start, size, held_out,
                    corpus_hash.hexdigest())


def _join_equal(texts: np.ndarray, names: np.ndarray,
                size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the least hash of a name and the largest size among equal documents, [documents] each.

  Args:
    texts, names: hashes of texts and names, uint64 [documents].
    size: bytes, int64 [documents].
  """
  _, group = np.unique(texts, return_inverse=True)
  least = np.full(group.max() + 1, np.iinfo(np.uint64).max, np.uint64)
  np.minimum.at(least, group, names)
  largest = np.zeros(group.max() + 1, np.int64)
  np.maximum.at(largest, group, size)
  return least[group], largest[group]


def _hold_out(names: np.ndarray, size: np.ndarray, total: int, percent: int) -> np.ndarray:
  """Returns whether each document is held out, bool [documents]; see `open_corpus`."""
  held_out = names < np.uint64(2**64 * percent // 100)
  # A validation loss must not depend on a single document. In the standard library, the language
  # reference of pydoc_data is 6% of all text.
  giant = size > total * percent / 100 / GIANT
  if (held_out & ~giant).any():
    held_out &= ~giant
  # Neither split may be empty.
  if not held_out.any():
    held_out[names == names.min()] = True
  if held_out.all():
    held_out[names == names.max()] = False
  return held_out


def _index_file(file: TextFile, text_key: str,
                file_hash: 'hashlib._Hash') -> Iterator[tuple[str, int, int, str]]:
  """Yields (name, first byte, bytes, text) of a file's documents; updates the file's hash."""
  if not file.has_lines:
    # A whole file is one document, or none if it is empty.
    content = file.plain.read_bytes()
    file_hash.update(content)
    text = decode(content, file.path)
    if _is_json_line(text.partition('\n')[0], text_key):
      logging.log_first_n(
          logging.WARNING, '%s is read as one document, but its first line is JSON with %r: name '
          'it .jsonl if every line is a document. This is logged once.', 1, file.path, text_key)
    if text:
      yield file.name, 0, len(content), text
    return
  # Every line of JSON is a document, but for blank ones. Places count all bytes.
  start = 0
  with file.plain.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      file_hash.update(line)
      is_blank = not line.removeprefix(codecs.BOM_UTF8).strip()
      text = '' if is_blank else _parse_line(line, start, number, file.path, text_key)
      if text:
        yield f'{file.name}:{number}', start, len(line), text
      start += len(line)


def _is_json_line(line: str, text_key: str) -> bool:
  """Whether a line of a file that is one document looks like a document of its own."""
  if not line.startswith('{'):
    return False
  try:
    return text_key in json.loads(line)
  except (ValueError, RecursionError):
    return False


def _parse_line(line: bytes, start: int, number: int, path: Path, text_key: str) -> str:
  """Returns the text of a line of .jsonl. Raises UserError that names the place and the fault."""
  where = f'{path}:{number}'
  remedy = "write one JSON object a line (jq -c '.[]' FILE makes lines of a JSON list)"
  if path.suffix.lower() == '.json':
    remedy += ', or name the file .txt to take it whole'
  line = decode(line, path, start)
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f'{where}: not JSON ({error}): {remedy}') from error
  except (ValueError, RecursionError) as error:  # thousands of digits or brackets
    raise UserError(f'{where}: JSON that Python does not read ({error}): leave the line out, or '
                    'keep only the text of it') from error
  if not isinstance(record, dict) or text_key not in record:
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise UserError(f'{where}: no text under text_key = {text_key!r}, found {found}: set text_key '
                    f'to the field that holds the text, or {remedy}')
  if not isinstance(record[text_key], str):
    raise UserError(f'{where}: no text under text_key = {text_key!r}, but '
                    f'{str(record[text_key])[:80]}: leave the line out, or set text_key to the '
                    'field that holds the text')
  # Escapes of JSON can hide characters that `decode` does not see.
  text = record[text_key]
  if '\0' in text:
    raise UserError(f'{where}: the text holds a NUL character, so it is binary: leave the line out')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: half a surrogate pair at character {error.start}, which is not '
                    'Unicode text: repair the line or leave it out') from error
  return text
