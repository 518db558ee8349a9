"""DataConfig: the source of a run's text, its vocabulary and the form of its rows.

The byte vocabulary is here too, since programs without TensorFlow use it.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from latent_deliberation.errors import UserError

# sources.py says how to add a source, and checks on import that it can read each of these.
SOURCES = ('stdlib', 'text', 'tfds', 'mixture', 'synthetic')
VOCABULARIES = ('sentencepiece', 'byte')
MODES = ('packed', 'online')

# Keys that only some sources read. The others would ignore them, so they are refused there.
KEYS_OF_SOURCES = {
    'files': ('text',), 'name': ('tfds', 'mixture', 'synthetic'), 'data_dir': ('tfds',),
    'options': ('synthetic',), 'documents': ('synthetic',), 'questions': ('synthetic',)}
NEEDED_KEYS = ('files', 'name')  # those of them that have no usable default

# Special ids of every vocabulary that this project makes. They are Gemma's.
PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
SPECIAL_IDS = 4

# The byte vocabulary: the id of a byte is its value plus SPECIAL_IDS.
BYTE_VOCABULARY_SIZE = SPECIAL_IDS + 256
BYTE_VOCABULARY_HASH = hashlib.sha256(b'bytes from 4 on').hexdigest()

# Special ids, bytes and the newline. Each character of the corpus needs one piece more.
SMALLEST_SENTENCEPIECE = BYTE_VOCABULARY_SIZE + 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows of tokens.

  Attributes:
    source: where the documents come from.
      'stdlib' reads the standard library of the running interpreter, 'text' local files, 'tfds' a
      TensorFlow data set. 'mixture' takes a seqio task or mixture that is already registered.
      'synthetic' draws questions of a task in studies/synthetic.
    files: for 'text': files, globs or directories; '~' is the home directory, as in every path.
      A directory stands for all .txt, .jsonl and .ndjson files below it, compressed ones included.
      A .jsonl, .ndjson or .json file holds one document a line. Any other file is one document.
    text_key: field that holds the text, in a line of JSON or in a TFDS example.
    name: for 'tfds', the data set with its version, such as 'c4/en:3.1.0'.
      For 'mixture', the registered name. For 'synthetic', the task: a key of TASKS in
      studies/synthetic/documents.py.
    options: for 'synthetic': options of the task by name; the others keep their defaults.
    documents: for 'synthetic': number of documents, both splits together.
    questions: for 'synthetic': questions in a document, all about the same context.
    data_dir: for 'tfds': directory of prepared data sets; '' for TFDS's own default.
    vocabulary: 'sentencepiece' or 'byte'; a mixture brings its own instead.
    vocabulary_path: path of a SentencePiece model or a tokenizer.json; '' trains a model.
      A copy is kept in the work directory.
    vocabulary_size: number of pieces of a trained vocabulary; others ignore it.
    length: T, tokens of a row.
    validation_percent: percentage of the documents that is held out, 1 to 99.
      A data set or mixture with a 'validation' split uses that split instead.
    mode: 'packed' trains on rows that are packed once, 'online' on a stream.
      Validation always reads packed rows.
    seed: seed of the order of documents, and of synthetic documents.
      The order of packed rows has a seed of its own.
    max_tokens: tokens to pack of each split, cut to whole rows; 0 packs every document once.
      With a limit, a mixture repeats training text where it must to keep its rates.
  """
  source: str = 'stdlib'
  files: tuple[str, ...] = ()
  text_key: str = 'text'
  name: str = ''
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  documents: int = 100_000
  questions: int = 16
  data_dir: str = ''
  vocabulary: str = 'sentencepiece'
  vocabulary_path: str = ''
  vocabulary_size: int = 4096
  length: int = 256
  validation_percent: int = 5
  mode: str = 'packed'
  seed: int = 0
  max_tokens: int = 0

  def __post_init__(self):
    if isinstance(self.files, str):
      raise UserError(f'files = {self.files!r} is one string: write a tuple, ({self.files!r},)')
    if not isinstance(self.options, Mapping):
      raise UserError(f"options = {self.options!r}: write a mapping, for instance {{'nodes': 8}}")
    # Own copies, so that the caller's objects may change later.
    object.__setattr__(self, 'files', tuple(map(os.path.expanduser, self.files)))
    for key in ('data_dir', 'vocabulary_path'):
      object.__setattr__(self, key, os.path.expanduser(getattr(self, key)))
    object.__setattr__(self, 'options', dict(self.options))
    for key, choices in (('source', SOURCES), ('vocabulary', VOCABULARIES), ('mode', MODES)):
      if getattr(self, key) not in choices:
        raise UserError(f'{key} = {getattr(self, key)!r}: choose one of {choices}')
    self._check_source()
    self._check_vocabulary()
    self._check_numbers()

  def _check_source(self) -> None:
    """Raises UserError unless the source has the keys that it needs, and none that it ignores."""
    # A key that the source would ignore is a mistake, unless it has its default.
    for key, sources in KEYS_OF_SOURCES.items():
      value, default = getattr(self, key), {} if key == 'options' else getattr(DataConfig, key)
      if self.source in sources and key in NEEDED_KEYS and not value:
        raise UserError(f'source = {self.source!r} needs {key}, which is empty: give it')
      if self.source not in sources and value != default:
        raise UserError(
            f'{key} = {value!r} has no meaning for source = {self.source!r}: leave it at '
            f'{default!r}, or choose a source among {sources}')
    if self.source == 'tfds' and ':' not in self.name:
      raise UserError(f'name = {self.name!r} has no version. Write name/config:version, for '
                      "instance 'c4/en:3.1.0'. Otherwise a later release could change the data")
    if not self.text_key:
      raise UserError("text_key = '': name the field that holds the text")

  def _check_vocabulary(self) -> None:
    if self.vocabulary_path and self.vocabulary == 'byte':
      raise UserError(f"vocabulary_path = {self.vocabulary_path!r}, but vocabulary = 'byte' has "
                      "no file: leave it empty, or set vocabulary = 'sentencepiece'")
    if self.vocabulary_path and self.source == 'mixture':
      raise UserError(f'vocabulary_path = {self.vocabulary_path!r}, but the mixture {self.name!r} '
                      'brings its own vocabulary: leave it empty')

  def _check_numbers(self) -> None:
    bounds = {
        'documents': (2, 2**63 - 1),  # one for each split
        'questions': (1, 2**31 - 1),
        'vocabulary_size': (SMALLEST_SENTENCEPIECE + 1, 2**31 - 1),
        'length': (2, 2**31 - 1),
        'validation_percent': (1, 99),
        'seed': (0, 2**31 - 2),  # TensorFlow takes seeds modulo 2**31 - 1
        'max_tokens': (0, 2**63 - 1),
    }
    for key, (low, high) in bounds.items():
      value = getattr(self, key)
      if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f'{key} = {value!r}: it must be an integer')
      if not low <= value <= high:
        raise UserError(f'{key} = {value}: it must be between {low} and {high}')
    if 0 < self.max_tokens < self.length:
      raise UserError(f'max_tokens = {self.max_tokens} is less than one row of length = '
                      f'{self.length} tokens: raise it, or set 0 for every document')


def encode_bytes(text: str) -> list[int]:
  """Returns the ids of a text in the byte vocabulary, without special ids."""
  return [SPECIAL_IDS + byte for byte in text.encode()]


def decode_bytes(ids: Sequence[int]) -> str:
  """Returns the text of ids in the byte vocabulary.

  Special ids are left out. Bytes that are not UTF-8 become U+FFFD.
  """
  return bytes(i - SPECIAL_IDS for i in ids if i >= SPECIAL_IDS).decode(errors='replace')
