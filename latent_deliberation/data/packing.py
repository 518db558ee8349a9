"""Packs the documents of a task into fixed rows, once; training then reads rows at random.

filling.py says how rows are filled, rows.py how they are read.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.host_tensorflow import seqio
from latent_deliberation.data.rows import MANIFEST_FILE, Manifest, PackedRows, Recipe, row_dtypes
from latent_deliberation.data.sources import SPLITS
from latent_deliberation.data.tasks import Documents, iterate
from latent_deliberation.data.vocabularies import bytes_per_token
from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.files import write_whole
from latent_deliberation.paths import ROWS
from latent_deliberation.progress import Progress


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


KNOWN_BY_CONFIG = ('length', 'seed', 'max_tokens')  # of a Recipe; the rest is in the source
TOKENS_PER_FILE = 1 << 24  # 32 to 64 MB a file; packing needs about 200 MB of memory


def prepare(config: DataConfig, workdir: Path) -> Path:
  """Makes sure that a work directory holds the vocabulary and the packed rows of a configuration.

  What is there is checked and kept, what is missing is made: <workdir>/vocabulary.model, and
  <workdir>/rows/train and /validation, each a folder for `PackedRows`. In mode 'online' only
  validation is packed. Where both are there and their source is not, as on the hosts of a pod that
  rows were copied to, they are checked as far as they can be without it. On several hosts that
  share the directory, one of them calls this.

  Returns: <workdir>/rows.

  Raises:
    UserError: see `Documents.open` and `pack`; or the rows that are there were
      made from something else, with each difference named.
  """
  workdir = Path(workdir)
  directory = workdir / ROWS
  try:
    documents = Documents.open(config, workdir)
  except MissingError as absent:
    if config.mode != 'packed' or not all((directory / split).exists() for split in SPLITS):
      raise
    for split in SPLITS:
      _check_recipe(directory / split, {key: getattr(config, key) for key in KNOWN_BY_CONFIG})
    logging.warning('%s. The rows in %s need it no more, and are taken as they are.', absent,
                    directory)
    return directory
  recipes = [documents.recipe(config, split)
             for split in (SPLITS if config.mode == 'packed' else ('validation',))]
  missing = [recipe for recipe in recipes if not (directory / recipe.split).exists()]
  for recipe in recipes:
    if recipe not in missing:
      _check_recipe(directory / recipe.split, vars(recipe))
  for recipe in missing:
    pack(documents, recipe, directory)
  return directory


def _check_recipe(directory: Path, expected: Mapping[str, Any]) -> None:
  found = PackedRows(directory).manifest.recipe
  different = [f'{key}: packed {getattr(found, key)!r}, configured {value!r}'
               for key, value in expected.items() if getattr(found, key) != value]
  if different:
    raise UserError(f'{directory} was packed from something else ({"; ".join(different)}): use '
                     'another work directory, or delete this folder to pack again')


def pack(documents: Documents, recipe: Recipe, directory: Path,
         tokens_per_file: int = TOKENS_PER_FILE) -> Path:
  """Writes <directory>/<split> whole or not at all, and returns it.

  Args:
    documents: what to pack.
    recipe: split, length, seed and limit; see `Documents.recipe`.
    directory: where the folder of the split goes; it must not be there yet.
    tokens_per_file: size of one .npy file.

  Raises:
    UserError: the folder is there.
    UserError: the split has no token, or a document holds the padding id.
  """
  final, partial = directory / recipe.split, directory / f'.{recipe.split}.partial'
  if final.exists():
    raise UserError(f'{final} is there already: delete it to pack again')
  if partial.exists():
    logging.warning('Starting anew where an earlier run was stopped: %s', partial)
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  try:
    manifest = _write_rows(documents, recipe, partial, tokens_per_file)
    write_whole(partial / MANIFEST_FILE, manifest.to_json())
    partial.rename(final)
  except BaseException:
    shutil.rmtree(partial)
    raise
  logging.info('Packed %s: %d documents, %d tokens, %d rows of %d, %.2f bytes of text a token.',
               recipe.split, manifest.documents, manifest.tokens, manifest.rows, recipe.length,
               manifest.text_bytes / manifest.tokens)
  return final


def _write_rows(documents: Documents, recipe: Recipe, directory: Path,
                tokens_per_file: int) -> Manifest:
  """Runs the task once, up to the limit of the recipe, and writes its rows."""
  limit = recipe.max_tokens // recipe.length or None
  provider, begun = documents.provider, 0
  is_mixture = isinstance(provider, seqio.Mixture)
  # Training text up to a limit repeats, or a mixture could not keep its rates; nothing else does.
  repeat = is_mixture and limit is not None and recipe.split == 'train'
  stream = documents.stream(recipe.split, recipe.seed, repeat=repeat)

  def count(stream: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    nonlocal begun
    for document in stream:
      begun += 1
      yield document

  rows = itertools.islice(
      fill_rows(count(iterate(stream)), recipe.length, documents.vocabulary.bos_id), limit)
  files = RowFiles(directory, recipe, bytes_per_token(documents.vocabulary))
  total = None if is_mixture else provider.num_input_examples(recipe.split)
  progress = Progress(f'Packing {recipe.split}', 'rows' if limit else 'documents', limit or total)
  rows_per_file, chunk = max(1, tokens_per_file // recipe.length), []
  for number, row in enumerate(rows, 1):
    chunk.append(row)
    progress.update(number if limit else begun)
    if len(chunk) == rows_per_file:
      files.write(chunk)
      chunk = []
  if chunk:
    files.write(chunk)
  if not files.rows:
    raise UserError(f'{recipe.task} has no token in split {recipe.split!r}: give more documents, '
                     'or change validation_percent')
  return Manifest(
      recipe=recipe, rows=files.rows, tokens=files.tokens, documents=begun,
      text_bytes=files.text_bytes, rows_per_file=rows_per_file, content_hash=files.content_hash)
