"""What packed rows were made from and what came of it; written beside them as manifest.json."""

import dataclasses
import json
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
MANIFEST_FILE = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that decides the contents of packed rows.

  Attributes:
    task: name of the seqio task or mixture.
    split: 'train' or 'validation'.
    source_fingerprint: of the documents; for local files a hash of their names and contents.
    vocabulary_hash: see vocabularies.py.
    vocabulary_size: V; every token is below it.
    length: T, tokens of a row.
    seed: of the order of documents.
    max_tokens: where packing stopped; 0 for the end of the split.
  """
  task: str
  split: str
  source_fingerprint: str
  vocabulary_hash: str
  vocabulary_size: int
  length: int
  seed: int
  max_tokens: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of packed rows holds.

  Attributes:
    recipe: what it was made from.
    rows: N.
    tokens: tokens in them, padding not counted.
    documents: documents in them.
    text_bytes: UTF-8 bytes of text that the tokens stand for.
    rows_per_file: rows of every file but the last.
    content_hash: sha256 of the rows, file by file, tokens before segments.
    format_version: of this layout.
  """
  recipe: Recipe
  rows: int
  tokens: int
  documents: int
  text_bytes: int
  rows_per_file: int
  content_hash: str
  format_version: int = FORMAT_VERSION

  def to_json(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode() + b'\n'

  @classmethod
  def from_json(cls, content: bytes, origin: Path) -> 'Manifest':
    """Reads what to_json wrote. Raises ValueError, naming `origin`, for anything else."""
    try:
      fields = json.loads(content)
      version = fields['format_version']
      if version == FORMAT_VERSION:
        return cls(**(fields | {'recipe': Recipe(**fields['recipe'])}))
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f'{origin} is not a manifest of packed rows ({error!r}): pack the data '
                       'again into an empty folder') from error
    raise ValueError(f'{origin} has format version {version}, this code reads {FORMAT_VERSION}: '
                     'pack the data again into an empty folder')


def row_dtypes(recipe: Recipe) -> dict[str, np.dtype]:
  """The type of each kind of file: uint16 where every value fits, else int32."""
  limits = {'tokens': recipe.vocabulary_size - 1, 'segments': recipe.length}
  return {kind: np.dtype(np.uint16 if limit < 2**16 else np.int32)
          for kind, limit in limits.items()}
