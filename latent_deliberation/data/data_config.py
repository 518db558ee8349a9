"""DataConfig: the source of a run's text, its vocabulary and the form of its rows.

The byte vocabulary is here too, and `open_sentencepiece`, since programs without TensorFlow use
them.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from latent_deliberation.errors import (
  MOST,
  UserError,
  check_integer,
  check_types,
  problems_of,
  raise_problems,
)

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
    source: where the documents come from; '' follows from what is given.
      That is 'text' with files, 'tfds' with a data_dir or a name with a version, else 'stdlib'.
      'stdlib' reads the standard library of the running interpreter, 'text' local files, 'tfds' a
      TensorFlow data set. 'mixture' takes a seqio task or mixture that is already registered.
      'synthetic' draws questions of a task in studies/synthetic.
    files: for 'text': files, globs or directories; one string may hold several, with commas.
      '~' is the home directory, as in every path. A directory stands for all .txt, .md,
      .markdown, .rst, .jsonl, .ndjson, .jsonlines and .ldjson files below it, compressed ones
      included. A file with one of the last four endings, or .json, holds one document a line.
      Any other file is one document.
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
  source: str = ''
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
    # Own copies, so that the caller's objects may change later.
    if isinstance(self.files, str):
      object.__setattr__(self, 'files', split_files(self.files))
    # A folder may be called 2024, which a flag reads as a number.
    if isinstance(self.files, tuple | list):
      object.__setattr__(self, 'files', tuple(
          str(each) if type(each) is int else each for each in self.files))
    check_types(self)
    object.__setattr__(self, 'files', tuple(map(os.path.expanduser, self.files)))
    for key in ('data_dir', 'vocabulary_path'):
      object.__setattr__(self, key, os.path.expanduser(getattr(self, key)))
    object.__setattr__(self, 'options', dict(self.options))
    if not self.source:
      object.__setattr__(self, 'source', _find_source(self.files, self.name, self.data_dir))
    raise_problems(self._problems())

  def _problems(self) -> Iterator[str]:
    for key, choices in (('source', SOURCES), ('vocabulary', VOCABULARIES), ('mode', MODES)):
      if getattr(self, key) not in choices:
        yield f'{key} = {getattr(self, key)!r}: choose one of {choices}'
    if self.source in SOURCES:
      yield from self._problems_of_source()
    yield from self._problems_of_vocabulary()
    yield from self._problems_of_numbers()

  def _problems_of_source(self) -> Iterator[str]:
    """Yields each key that the source needs and lacks, or has and ignores."""
    # A key that the source would ignore is a mistake, unless it has its default.
    for key, sources in KEYS_OF_SOURCES.items():
      value, default = getattr(self, key), _DEFAULTS[key]
      if self.source in sources and key in NEEDED_KEYS and not value:
        yield f'source = {self.source!r} needs {key}, which is empty: give it'
      if self.source not in sources and value != default:
        yield (f'{key} = {value!r} has no meaning for source = {self.source!r}: leave it at '
               f'{default!r}, or choose a source among {sources}')
    if self.source == 'tfds' and self.name and ':' not in self.name:
      yield (f'name = {self.name!r} has no version. Write name/config:version, for instance '
             "'c4/en:3.1.0'. Otherwise a later release could change the data")
    if not self.text_key:
      yield "text_key = '': name the field that holds the text"

  def _problems_of_vocabulary(self) -> Iterator[str]:
    if self.vocabulary_path and self.vocabulary == 'byte':
      yield (f"vocabulary_path = {self.vocabulary_path!r}, but vocabulary = 'byte' has no file: "
             "leave it empty, or set vocabulary = 'sentencepiece'")
    if self.vocabulary_path and self.source == 'mixture':
      yield (f'vocabulary_path = {self.vocabulary_path!r}, but the mixture {self.name!r} brings '
             'its own vocabulary: leave it empty')

  def _problems_of_numbers(self) -> Iterator[str]:
    bounds = {
        'documents': (2, 2**63 - 1),  # one for each split
        'questions': (1, MOST),
        'vocabulary_size': (SMALLEST_SENTENCEPIECE + 1, MOST),
        'length': (2, MOST),
        'validation_percent': (1, 99),
        'seed': (0, MOST - 1),  # TensorFlow takes seeds modulo 2**31 - 1
        'max_tokens': (0, 2**63 - 1),
    }
    wrong = set()
    for key, (low, high) in bounds.items():
      found = problems_of(check_integer, key, getattr(self, key), low, high)
      if found:
        wrong.add(key)
        yield from found
    if not wrong & {'max_tokens', 'length'} and 0 < self.max_tokens < self.length:
      yield (f'max_tokens = {self.max_tokens} is less than one row of length = {self.length} '
             'tokens: raise it, or set 0 for every document')


# Defaults of the keys that only some sources read.
_DEFAULTS = {field.name: {} if field.name == 'options' else field.default
             for field in dataclasses.fields(DataConfig) if field.name in KEYS_OF_SOURCES}


def split_files(files: str | Sequence[str]) -> tuple[str, ...]:
  """Returns files as a tuple, from one string or several.

  Commas separate the files of a string, unless it is the name of a file that exists.
  """
  if not isinstance(files, str):
    return tuple(files)
  if os.path.exists(os.path.expanduser(files)):
    return (files,)
  return tuple(part.strip() for part in files.split(',') if part.strip())


def _find_source(files: Sequence[str], name: str, data_dir: str) -> str:
  """Returns the source that goes with what is given; see DataConfig.source."""
  if files:
    return 'text'
  return 'tfds' if data_dir or ':' in name else 'stdlib'


def with_given_source(data: Mapping[str, Any], given: Set[str]) -> dict[str, Any]:
  """Returns the keys of a data section that follow from those which the user gave.

  The source follows from them, unless it is given itself. What the config file has for another
  source gets its default, so that it does not stand in the user's way.

  Args:
    data: the section, with the given values in it.
    given: keys of the section that the user gave.
  """
  of_sources = {key: data[key] for key in KEYS_OF_SOURCES if key in given}
  if not given & {'source', *KEYS_OF_SOURCES}:
    return {}
  if 'files' in given and 'source' not in given and not data['files']:
    raise UserError("--config.data.files is empty: give files, or --config.data.source='stdlib'")
  source = data['source']
  if 'source' not in given and not all(source in KEYS_OF_SOURCES[key] for key in of_sources):
    source = _find_source(
        of_sources.get('files', ()), of_sources.get('name', ''), of_sources.get('data_dir', ''))
  return {'source': source} | {
      key: default for key, default in _DEFAULTS.items()
      if key not in given and source not in KEYS_OF_SOURCES[key]}


def encode_bytes(text: str) -> list[int]:
  """Returns the ids of a text in the byte vocabulary, without special ids."""
  return [SPECIAL_IDS + byte for byte in text.encode()]


def decode_bytes(ids: Sequence[int]) -> str:
  """Returns the text of ids in the byte vocabulary.

  Special ids are left out. Bytes that are not UTF-8 become U+FFFD.
  """
  return bytes(i - SPECIAL_IDS for i in ids if i >= SPECIAL_IDS).decode(errors='replace')


def open_sentencepiece(path: Path) -> tuple[Any, bytes]:
  """Opens a SentencePiece model.

  Returns: its SentencePieceProcessor, and the bytes of its file, which determine its hash.

  Raises:
    UserError: the file is something else, or damaged.
  """
  from sentencepiece import SentencePieceProcessor  # reading rows does without
  content, model = path.read_bytes(), SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(content)
  except Exception as error:  # SentencePiece raises what its C++ raises
    raise UserError(f'{path} ({len(content)} bytes) is not a SentencePiece model: {error}. Give '
                    'another vocabulary, or delete a damaged file') from error
  return model, content
