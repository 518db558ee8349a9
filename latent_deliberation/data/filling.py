"""Fills fixed rows with documents, and writes rows to numbered .npy files; needs no TensorFlow.

A row is filled to its last token: several short documents, or a part of a long one, whose rest goes
on in the next row. Every segment begins with BOS, a continued one as well: Gemma leans on a BOS in
sight, and a segment without one would be out of its distribution. EOS closes a document, so that a
segment without EOS goes on in the next row. Padding fills the end of the last row, and elsewhere a
single last place, where a BOS alone would teach nothing. No token is dropped.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from latent_deliberation.data.manifest import Recipe, row_dtypes


def fill_rows(documents: Iterable[np.ndarray], length: int,
              bos_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields rows (tokens, segments), int32 [T] each, from documents in the order they come.

  Args:
    documents: int32 [n] each, BOS first.
    length: T, at least 2.
    bos_id: opens every segment.
  """
  tokens, segments = np.zeros((2, length), np.int32)
  filled = segment = 0
  for document in documents:
    done = 1  # its BOS is written with each of its segments
    while done < len(document):
      part = document[done:done + length - filled - 1]
      done += len(part)
      end = filled + 1 + len(part)
      segment += 1
      tokens[filled] = bos_id
      tokens[filled + 1:end] = part
      segments[filled:end] = segment
      filled = end
      if length - filled < 2:
        yield tokens, segments
        tokens, segments = np.zeros((2, length), np.int32)
        filled = segment = 0
  if filled:
    yield tokens, segments


class RowFiles:
  """Writes files of rows one after the other, and counts and hashes what is in them.

  Args:
    directory: of the files; must exist.
    recipe: gives the types of the files.
    bytes_per_token: int32 [V], UTF-8 bytes of text that each id stands for.

  Attributes:
    rows, tokens, text_bytes, content_hash: of all files so far, as in `Manifest`.
  """

  def __init__(self, directory: Path, recipe: Recipe, bytes_per_token: np.ndarray):
    self._directory, self._dtypes = directory, row_dtypes(recipe)
    self._bytes_per_token, self._hash, self._files = bytes_per_token, hashlib.sha256(), 0
    self.rows = self.tokens = self.text_bytes = 0

  @property
  def content_hash(self) -> str:
    return self._hash.hexdigest()

  def write(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes the next pair of files, from rows as `fill_rows` yields them."""
    for kind, part in zip(('tokens', 'segments'), zip(*rows, strict=True), strict=True):
      array = np.stack(part).astype(self._dtypes[kind])
      self._hash.update(array)
      with (self._directory / f'{kind}-{self._files:05d}.npy').open('wb') as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
      if kind == 'tokens':
        self.tokens += int(np.count_nonzero(array))
        self.text_bytes += int(self._bytes_per_token[array].sum(dtype=np.int64))
    self.rows += len(rows)
    self._files += 1
