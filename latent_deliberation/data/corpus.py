"""Local text as an indexed, checked list of documents; no TensorFlow here.

Opening a corpus reads all of it once. Every file is decoded and every line parsed, so that a bad
byte is named before any long work. The contents are hashed for the manifest of packed rows.

Afterwards a document is read by its number, which makes shuffling and sharding exact and cheap. The
index takes about 30 bytes a document. For more than about 10^8 documents use a TFDS data set.
"""

import array
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.progress import Progress

STDLIB_SUFFIXES = ('.py', '.rst', '.txt')
STDLIB_LEFT_OUT = frozenset(
    ('test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'))
GIANT = 4  # a document of more than 1 / GIANT of the text to hold out is trained on


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A file of a corpus.

  Attributes:
    name: path within the corpus, the same on every machine.
    path: path on this machine.
  """
  name: str
  path: Path


@dataclasses.dataclass(frozen=True)
class TextCorpus:
  """Local documents by number; a `Corpus` as sources.py describes it.

  Attributes:
    files: files of the corpus, sorted by name.
    text_key: field of a .jsonl line that holds its text.
    file_of: int32 [documents], index into files.
    start: int64 [documents], first byte of the document in its file.
    size: int64 [documents], bytes of the document in its file (of the whole line in .jsonl).
    held_out: bool [documents], True for validation.
    fingerprint: hash of the names and contents of all files.
  """
  files: tuple[TextFile, ...]
  text_key: str
  file_of: np.ndarray
  start: np.ndarray
  size: np.ndarray
  held_out: np.ndarray
  fingerprint: str

  def numbers(self, split: str) -> np.ndarray:
    """Returns the numbers of the documents of 'train' or 'validation', int64."""
    return np.flatnonzero(self.held_out == (split == 'validation'))

  def read(self, number: int) -> str:
    """Returns the text of one document."""
    file = self.files[self.file_of[number]]
    with file.path.open('rb') as stream:
      stream.seek(self.start[number])
      content = stream.read(self.size[number])
    if file.path.suffix == '.jsonl':
      return json.loads(content)[self.text_key]
    return _decode(content, file.path)


def open_corpus(config: DataConfig) -> TextCorpus:
  """Lists, checks, hashes and splits the documents of a 'stdlib' or 'text' configuration.

  The hash of its name decides whether a document is held out. The choice is therefore the same on
  every machine, and new files do not move old documents. Empty documents are left out.

  Two exceptions keep the splits useful. If one split would be empty, the document that is nearest
  to the limit changes sides. A document of more than a quarter of the text to hold out is trained
  on, unless all held-out documents are as large.

  Raises:
    MissingError: a glob or directory has no file to read.
    UserError: a file is not UTF-8 text, a line is not JSON or has no text, or there are fewer than
      two documents. The message names the file, and the byte or line in it.
  """
  files = _stdlib_files() if config.source == 'stdlib' else _text_files(config.files)
  # Plain arrays, since a corpus may have millions of documents.
  name_hashes, places = bytearray(), array.array('q')
  corpus_hash = hashlib.sha256()
  progress = Progress('checking the corpus', 'files', len(files))
  for index, file in enumerate(files):
    # The hash of a document's name decides its split, that of all contents is the fingerprint.
    file_hash = hashlib.sha256()
    for name, start, size in _index_file(file, config.text_key, file_hash):
      name_hashes += hashlib.sha256(name.encode()).digest()[:8]
      places.extend((index, start, size))
    corpus_hash.update(f'{file.name}\0{file_hash.hexdigest()}\0'.encode())
    progress.update(index + 1)
  # One row for each document, as columns.
  file_of, start, size = np.array(places, np.int64).reshape(-1, 3).T
  if len(size) < 2:
    raise UserError(
        f'the corpus has {len(size)} documents that are not empty in {len(files)} files. It needs '
        'at least 2, one to train on and one to validate on. Give more files, or split the text '
        '(split -C 64k --additional-suffix=.txt all.txt part-)')
  held_out = _hold_out(np.frombuffer(name_hashes, '>u8'), size, config.validation_percent)
  corpus = TextCorpus(files, config.text_key, file_of.astype(np.int32), start, size, held_out,
                      corpus_hash.hexdigest())
  logging.info('the corpus has %d documents in %d files, %.1f MB, %d documents held out',
               len(size), len(files), size.sum() / 1e6, corpus.held_out.sum())
  return corpus


def _hold_out(hashes: np.ndarray, size: np.ndarray, percent: int) -> np.ndarray:
  """Returns whether each document is held out, bool [documents]; see `open_corpus`."""
  held_out = hashes < np.uint64(2**64 * percent // 100)
  # A validation loss must not depend on a single document. In the standard library, the language
  # reference of pydoc_data is 6% of all text.
  giant = size > size.sum() * percent / 100 / GIANT
  if (held_out & ~giant).any():
    held_out &= ~giant
  # Neither split may be empty.
  if not held_out.any():
    held_out[hashes.argmin()] = True
  if held_out.all():
    held_out[hashes.argmax()] = False
  return held_out


def _stdlib_files() -> tuple[TextFile, ...]:
  """Returns sources and text documentation of the interpreter, without tests and packages."""
  root = Path(sysconfig.get_path('stdlib'))
  files = []
  for folder, folders, names in os.walk(root):
    # Changed in place, which keeps os.walk out of these folders.
    folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
    for name in names:
      path = Path(folder, name)
      if path.suffix in STDLIB_SUFFIXES and path.is_file():
        try:
          # Nobody chose these files, so one that is not text is left out and not refused.
          _decode(path.read_bytes(), path)
        except UserError as error:
          logging.info('leaving a file of the standard library out: %s', error)
        else:
          files.append(TextFile(path.relative_to(root).as_posix(), path))
  if not files:
    raise MissingError(
        f'the standard library at {root} has no file {", ".join(STDLIB_SUFFIXES)}: this '
        "interpreter comes without its sources, use source = 'text' with files of your own")
  return tuple(sorted(files, key=lambda file: file.name))


def _text_files(patterns: tuple[str, ...]) -> tuple[TextFile, ...]:
  files = {}
  for pattern in patterns:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
      root = Path(pattern)
      paths = [path for suffix in ('txt', 'jsonl') for path in root.rglob(f'*.{suffix}')]
    else:
      # Names are relative to the part of the pattern before its first wildcard.
      parts = Path(pattern).parts[:-1]
      fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
      root = Path(*parts[:fixed])
      paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
      raise MissingError(
          f'no file matches {pattern!r} (seen from {os.getcwd()}): give existing files, a glob, or '
          'a directory with .txt or .jsonl files')
    # A file that two patterns match is one file.
    files.update((path.resolve(), TextFile(path.relative_to(root).as_posix(), path))
                 for path in paths)
  return tuple(sorted(files.values(), key=lambda file: (file.name, str(file.path))))


def _index_file(file: TextFile, text_key: str,
                file_hash: 'hashlib._Hash') -> Iterator[tuple[str, int, int]]:
  """Yields (name, first byte, bytes) of a file's documents, checked; updates the file's hash."""
  if file.path.suffix != '.jsonl':
    # A whole file is one document, or none if it is empty.
    content = file.path.read_bytes()
    file_hash.update(content)
    _decode(content, file.path)
    if content:
      yield file.name, 0, len(content)
    return
  # Every line of .jsonl is a document, but for blank ones. Places count all bytes.
  start = 0
  with file.path.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      file_hash.update(line)
      if line.strip() and _parse_line(line, start, number, file.path, text_key):
        yield f'{file.name}:{number}', start, len(line)
      start += len(line)


def _parse_line(line: bytes, start: int, number: int, path: Path, text_key: str) -> str:
  """Returns the text of a line of .jsonl. Raises UserError that names the place and the fault."""
  where = f'{path}:{number}'
  try:
    # Bytes, JSON and the field are checked in turn, and each error names the line.
    record = json.loads(_decode(line, path, start))
  except json.JSONDecodeError as error:
    raise UserError(
        f'{where}: not JSON ({error}): a .jsonl file has one JSON object a line') from error
  if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise UserError(f'{where}: no text under text_key = {text_key!r}, found {found}: set text_key '
                    'to the field that holds the text')
  # Escapes of JSON can hide characters that `_decode` does not see.
  text = record[text_key]
  if '\0' in text:
    raise UserError(f'{where}: the text holds a NUL character, so it is binary: leave the line out')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: half a surrogate pair at character {error.start}, which is not '
                    'Unicode text: repair the line or leave it out') from error
  return text


def _decode(content: bytes, path: Path, start: int = 0) -> str:
  """Returns the text of a file, or of its part from byte `start` on.

  Python sources may declare an encoding. Everything else is UTF-8.
  """
  # A NUL is valid UTF-8, but only binary files hold one.
  nul = content.find(b'\0')
  if nul >= 0:
    raise UserError(f'{path}: NUL at byte {start + nul}, so it is a binary file: leave it out')
  encoding = 'utf-8'
  if path.suffix == '.py':
    with contextlib.suppress(SyntaxError):
      encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
  try:
    return content.decode(encoding)
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: not {encoding} text at byte {start + error.start} ({error.reason}): '
                    'convert it (iconv -t utf-8) or leave it out') from error
