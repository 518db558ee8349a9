"""Packs the documents of a task into rows of fixed length, once. Training reads them in any order.

`prepare` is what a run calls. It packs the splits that are missing with `pack`. `fill_rows` says
how documents fill rows, and rows.py how the files are read.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.host_tensorflow import seqio
from latent_deliberation.data.rows import (
  CHECKSUMS_FILE,
  MANIFEST_FILE,
  Framing,
  Manifest,
  Recipe,
  checksums_of,
  read_manifest,
  smallest_dtype,
)
from latent_deliberation.data.sources import SPLITS, build_source
from latent_deliberation.data.tasks import Documents, iterate
from latent_deliberation.data.vocabularies import bytes_per_token, framing_of
from latent_deliberation.errors import MissingError, UserError, differences
from latent_deliberation.files import (
  begin_directory,
  explain_failed_write,
  finish_directory,
  new_file,
  partial_of,
  remove_tree,
  write_json,
  write_whole,
)
from latent_deliberation.paths import ROWS
from latent_deliberation.progress import Progress

# Fields of a Recipe that a DataConfig gives. The others follow from the source.
KNOWN_BY_CONFIG = ('length', 'seed', 'max_tokens')
HASHES = ('task', 'source_fingerprint')  # other fields of it, which no reader understands
NOT_IN_ROWS = ('files', 'data_dir', 'vocabulary_path', 'mode')  # keys of a DataConfig
SOURCE_FILE = 'source.json'  # next to the folders of the splits
TOKENS_PER_FILE = 1 << 24  # 32 to 64 MB a file; packing needs about 200 MB of memory


def prepare(config: DataConfig, prepared_dir: Path) -> Path:
  """Makes the vocabulary and the packed rows of a configuration, or checks those that are there.

  They are <prepared_dir>/vocabulary.model and the folders <prepared_dir>/rows/train and
  /validation, each of which `PackedRows` opens. Mode 'online' packs only validation. Of several
  processes that share the directory, one calls this.

  Rows may be there while their source is missing, for instance on the hosts of a pod that they were
  copied to. They are then checked against the configuration alone.

  Returns: <prepared_dir>/rows.

  Raises:
    UserError: the rows were made from something else; each difference is named.
    UserError: see `Documents.open` and `pack`.
  """
  directory = prepared_dir / ROWS
  try:
    documents = Documents.open(config, prepared_dir)
  except MissingError as missing:
    if config.mode != 'packed' or not all((directory / split).exists() for split in SPLITS) or (
        _has_text(config)):  # then the vocabulary is missing
      raise
    # Compare what the configuration alone determines. Earlier code kept less.
    saved, current = _read_source(directory), {**_keys_of_rows(config), **_given(config)}
    kept = {key: value for key, value in {
        **saved.get('config', {}), **saved.get('given', {})}.items() if key in current}
    changed = differences(kept, {key: current[key] for key in kept}, 'data.')
    if changed:
      raise UserError('\n'.join([f'{missing}.', f'{directory} was packed from something else:',
                                 *changed])) from missing
    for split in SPLITS:
      _check_recipe(directory / split, {key: getattr(config, key) for key in KNOWN_BY_CONFIG})
    logging.warning('%s. The rows in %s are complete and are used as they are', missing, directory)
    return directory
  described = describe_source(config, documents)
  recipes = [documents.recipe(config, split)
             for split in (SPLITS if config.mode == 'packed' else ('validation',))]
  # All splits that are there are checked before any is packed, which may take long.
  unpacked = [recipe for recipe in recipes if not (directory / recipe.split).exists()]
  for recipe in recipes:
    if recipe not in unpacked:
      _check_recipe(directory / recipe.split, vars(recipe), described)
  for recipe in unpacked:
    pack(documents, recipe, directory)
  if unpacked:
    write_json(directory / SOURCE_FILE, described)
  return directory


def describe_source(config: DataConfig, documents: Documents) -> dict[str, Any]:
  """Returns what the hashes of a Recipe stand for, to explain a difference, as JSON values."""
  source = getattr(documents.provider, 'source', None)  # a mixture has several
  files = getattr(getattr(source, 'corpus', None), 'files', ())
  return json.loads(json.dumps({'config': _keys_of_rows(config), 'given': _given(config),
                                'files': [file.name for file in files]}))


def _keys_of_rows(config: DataConfig) -> dict[str, Any]:
  """Returns the keys that decide what rows hold, and that no manifest has, as JSON values."""
  return json.loads(json.dumps({
      key: value for key, value in dataclasses.asdict(config).items()
      if key not in (*NOT_IN_ROWS, *KNOWN_BY_CONFIG)}))


def _has_text(config: DataConfig) -> bool:
  """Whether the documents of a configuration are on this machine."""
  try:
    build_source(config)
  except MissingError:
    return False
  return True


def _given(config: DataConfig) -> dict[str, Any]:
  """Returns where a configuration looks for documents, as JSON values."""
  return {'source': config.source, 'files': list(config.files), 'name': config.name,
          'data_dir': config.data_dir}


def _read_source(directory: Path) -> dict[str, Any]:
  """Returns what rows were packed from, see `describe_source`; {} for rows of earlier code.

  Raises:
    UserError: the file is damaged.
  """
  path = directory / SOURCE_FILE
  if not path.is_file():
    return {}
  try:
    saved = json.loads(path.read_bytes())
    return {'given': {}, **saved, 'config': dict(saved['config']), 'files': list(saved['files'])}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged ({error!r}): delete it, since it only explains what rows '
                    'were packed from') from error


def _explain(directory: Path, described: Mapping[str, Any], new_text: bool) -> list[str]:
  """Returns a line for each key or set of files that differs; [] where that is not known.

  Args:
    directory: folder of a split.
    described: what its rows should be packed from.
    new_text: whether the documents differ.
  """
  saved = _read_source(directory.parent)
  if not saved:
    return []
  lines = differences(saved['config'], described['config'], 'data.')
  for change, one, other in (('added', described, saved), ('removed', saved, described)):
    names = sorted(set(one['files']) - set(other['files']))
    if names:
      lines.append(f'  files {change}: {len(names)} ({", ".join(names[:3])}'
                   f'{", ..." if len(names) > 3 else ""})')
  if new_text and not lines:
    lines = ['  files: the same names, but their contents have changed']
  return lines


def _check_recipe(directory: Path, expected: Mapping[str, Any],
                  described: Mapping[str, Any] | None = None) -> None:
  """Raises UserError where rows were packed from other values than these fields of a Recipe.

  Args:
    directory: folder of the split.
    expected: fields of a Recipe.
    described: what their hashes stand for; None where that is not known.
  """
  found = read_manifest(directory).recipe
  different = {key for key in expected if getattr(found, key) != expected[key]}
  lines = []
  if described and different & {*HASHES}:
    lines = _explain(directory, described, 'source_fingerprint' in different)
    different -= {*HASHES} if lines else set()
  for keys, prefix in ((different & {*KNOWN_BY_CONFIG}, 'data.'),
                       (different - {*KNOWN_BY_CONFIG}, '')):
    lines += differences({key: getattr(found, key) for key in keys},
                         {key: expected[key] for key in keys}, prefix)
  if lines:
    raise UserError('\n'.join([
        f'{directory} was packed from something else:', *lines,
        f'Use another directory. Deleting {directory.parent} packs again, but what was trained on '
        'the old rows cannot go on.']))


def pack(documents: Documents, recipe: Recipe, directory: Path,
         tokens_per_file: int = TOKENS_PER_FILE) -> Path:
  """Writes the folder <directory>/<split> completely or not at all, and returns it.

  Args:
    documents: documents to pack.
    recipe: split, length, seed and limit; see `Documents.recipe`.
    directory: parent of the folder of the split, which must not exist.
    tokens_per_file: number of tokens in one .npy file.

  Raises:
    UserError: the folder exists, or the split has no token.
    UserError: a document holds an id that means padding, or BOS after its beginning.
  """
  final = directory / recipe.split
  partial = partial_of(final)
  if final.exists():
    raise UserError(f'{final} exists already: delete it to pack again')
  if partial.exists():
    logging.warning('removing %s, which an earlier run did not finish', partial)
  # The folder gets its name when it is complete, so that no reader finds a part of it.
  with explain_failed_write(partial):
    begin_directory(partial)
  try:
    # The manifest comes last. A folder without one is not complete.
    manifest = _write_rows(documents, recipe, partial, tokens_per_file)
    write_whole(partial / MANIFEST_FILE, manifest.seal())
    finish_directory(partial, final)
  except BaseException:
    remove_tree(partial)
    raise
  logging.info('packed %s: %d documents, %d tokens, %d rows of %d, %.2f bytes of text a token',
               recipe.split, manifest.documents, manifest.tokens, manifest.rows, recipe.length,
               manifest.text_bytes / manifest.tokens)
  return final


def _write_rows(documents: Documents, recipe: Recipe, directory: Path,
                tokens_per_file: int) -> Manifest:
  """Reads the documents up to the limit of the recipe, and writes their rows."""
  limit = recipe.max_tokens // recipe.length or None
  provider, begun = documents.provider, 0
  is_mixture = isinstance(provider, seqio.Mixture)
  # With a limit, a mixture keeps its rates only if training text may repeat. Nothing else repeats.
  repeat = is_mixture and limit is not None and recipe.split == 'train'
  stream = documents.stream(recipe.split, recipe.seed, repeat=repeat)

  # Counts the documents that packing has begun. A limit may leave out the end of the last.
  def count(stream: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    nonlocal begun
    for document in stream:
      begun += 1
      yield document

  # Rows are made one by one, so a limit also ends the reading of documents.
  framing = framing_of(documents.vocabulary)
  rows = itertools.islice(fill_rows(count(iterate(stream)), recipe.length, framing), limit)
  files = RowFiles(directory, recipe, framing, bytes_per_token(documents.vocabulary))
  total = None if is_mixture else provider.num_input_examples(recipe.split)
  progress = Progress(f'packing {recipe.split}', 'rows' if limit else 'documents', limit or total)
  # Rows are collected until they fill a file, which bounds the memory.
  rows_per_file, chunk = max(1, tokens_per_file // recipe.length), []
  for number, row in enumerate(rows, 1):
    chunk.append(row)
    progress.update(number if limit else begun)
    if len(chunk) == rows_per_file:
      files.write(chunk)
      chunk = []
  if chunk:
    files.write(chunk)
  files.close()
  if not files.rows:
    raise UserError(f'{recipe.task} has no token in split {recipe.split!r}: give more documents, '
                    'or change validation_percent')
  return Manifest(
      recipe=recipe, rows=files.rows, tokens=files.tokens, documents=begun,
      text_bytes=files.text_bytes, rows_per_file=rows_per_file, content_hash=files.content_hash,
      bos_id=framing.bos_id, **({} if framing.is_usual else {
          'format_version': 3, 'eos_id': framing.eos_id, 'pad_id': framing.pad_id}))


def fill_rows(documents: Iterable[np.ndarray], length: int,
              framing: Framing) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields rows (tokens, segments), int32 [T] each, from documents in the given order.

  A document that does not fit continues in the next row, again after a BOS. A row ends with padding
  only if one place is left, which BOS would fill alone, or if there are no more documents. Where
  one id begins and ends a document, an end that would be alone in the next row is left out.

  Args:
    documents: int32 [n] each, BOS first.
    length: T, at least 2.
    framing: ids that begin, end and fill rows.
  """

  def empty_row() -> tuple[np.ndarray, np.ndarray]:
    return np.full(length, framing.pad_id, np.int32), np.zeros(length, np.int32)

  tokens, segments = empty_row()
  filled = segment = 0
  for document in documents:
    done = 1  # its BOS is written with each of its segments
    while done < len(document):
      # A segment is BOS and as much of the document as the row has room for.
      part = document[done:done + length - filled - 1]
      done += len(part)
      if len(part) == 1 and part[0] == framing.bos_id == framing.eos_id:
        break
      end = filled + 1 + len(part)
      segment += 1
      tokens[filled] = framing.bos_id
      tokens[filled + 1:end] = part
      segments[filled:end] = segment
      filled = end
      if length - filled < 2:
        yield tokens, segments
        tokens, segments = empty_row()
        filled = segment = 0
  if filled:
    yield tokens, segments


def check_segments(tokens: np.ndarray, segments: np.ndarray, framing: Framing, task: str) -> None:
  """Raises UserError unless tokens [B, T] have the segments [B, T] that `fill_rows` gave them.

  They differ where a document holds BOS after its beginning.
  """
  if not np.array_equal(framing.segments(tokens), segments):
    raise UserError(f'{task}: a document holds the BOS id {framing.bos_id} after its beginning, '
                    'and would be read as two documents. Remove the id in the preprocessors of '
                    'the task')


class RowFiles:
  """Writes files of rows one after the other, and counts and hashes their contents.

  Args:
    directory: folder of the files, which must exist.
    recipe: what the rows are made from.
    framing: ids that begin, end and fill rows.
    bytes_per_token: UTF-8 bytes of text that each id stands for, int32 [V].

  Attributes:
    rows, tokens, text_bytes, content_hash: totals of the files so far, as in `Manifest`.
  """

  def __init__(self, directory: Path, recipe: Recipe, framing: Framing,
               bytes_per_token: np.ndarray):
    self._directory, self._recipe, self._framing = directory, recipe, framing
    self._bytes_per_token, self._hash, self._files = bytes_per_token, hashlib.sha256(), 0
    self._checksums: list[np.ndarray] = []
    self.rows = self.tokens = self.text_bytes = 0

  @property
  def content_hash(self) -> str:
    return self._hash.hexdigest()

  def write(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes the next file, from rows as `fill_rows` yields them.

    Raises:
      UserError: a document holds BOS after its beginning.
    """
    tokens, segments = (np.stack(part) for part in zip(*rows, strict=True))
    check_segments(tokens, segments, self._framing, self._recipe.task)
    tokens = tokens.astype(smallest_dtype(self._recipe.vocabulary_size - 1))
    self._save(f'tokens-{self._files:05d}.npy', tokens)
    self._checksums.append(checksums_of(tokens))
    # Segments are part of the hash, though no file holds them: it is that of older packings.
    self._hash.update(tokens)
    self._hash.update(segments.astype(smallest_dtype(self._recipe.length)))
    # Padding adds neither tokens nor text.
    self.tokens += int(np.count_nonzero(segments))
    self.text_bytes += int(self._bytes_per_token[tokens].sum(dtype=np.int64))
    self.rows += len(rows)
    self._files += 1

  def close(self) -> None:
    """Writes the checksums of all rows, after the last file."""
    if self._checksums:
      self._save(CHECKSUMS_FILE, np.concatenate(self._checksums))

  def _save(self, name: str, values: np.ndarray) -> None:
    path = self._directory / name
    with explain_failed_write(path), new_file(path) as here, here.open('wb') as file:
      # As np.save does, which hides a full disk: it lets C close the file, and asks nothing.
      np.lib.format.write_array_header_1_0(
          file, np.lib.format.header_data_from_array_1_0(values))
      file.write(values.data)
      # On disk before the manifest describes it.
      file.flush()
      os.fsync(file.fileno())
