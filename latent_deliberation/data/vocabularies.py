"""Vocabularies of the input pipeline: UTF-8 bytes, SentencePiece models, or a tokenizer.json.

A SentencePiece model is given, or trained here. Vocabularies that are made here have Gemma's
special ids: padding 0, end 1, beginning 2, unknown 3.
"""

import hashlib
import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from absl import logging

from latent_deliberation.data.data_config import (
  BOS_ID,
  BYTE_VOCABULARY_HASH,
  BYTE_VOCABULARY_SIZE,
  EOS_ID,
  PAD_ID,
  SPECIAL_IDS,
  UNK_ID,
  DataConfig,
  decode_bytes,
  encode_bytes,
  open_sentencepiece,
)
from latent_deliberation.data.host_tensorflow import seqio, tf
from latent_deliberation.data.rows import Framing
from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.files import as_path, at_hand, copy_vocabulary, write_whole
from latent_deliberation.paths import VOCABULARY_FILE, kept_vocabulary

# More text than this hardly changes a few thousand pieces. It trains in about ten seconds.
TRAINING_BYTES = 16 << 20
# In characters of at most 4 bytes. SentencePiece leaves out lines of more than 4192 bytes.
LONGEST_LINE = 1000


class ByteVocabulary(seqio.Vocabulary):
  """The byte vocabulary of data_config.py for seqio."""

  @property
  def bos_id(self) -> int:
    return BOS_ID

  @property
  def eos_id(self) -> int:
    return EOS_ID

  @property
  def unk_id(self) -> int:
    return UNK_ID

  @property
  def _base_vocab_size(self) -> int:
    return BYTE_VOCABULARY_SIZE

  def _encode(self, s: str) -> list[int]:
    return encode_bytes(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return decode_bytes(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    return SPECIAL_IDS + tf.cast(tf.io.decode_raw(s, tf.uint8), tf.int32)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    pieces = tf.constant([b''] * SPECIAL_IDS + [bytes([byte]) for byte in range(256)])
    return tf.strings.reduce_join(tf.gather(pieces, ids), axis=-1)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ByteVocabulary)

  def __hash__(self) -> int:
    return hash(ByteVocabulary)


class JsonVocabulary(seqio.Vocabulary):
  """A tokenizer.json for seqio; see `TokenizerJson` for arguments and errors."""

  def __init__(self, path: Path):
    super().__init__()
    # By name, since only some vocabularies need this module and its library.
    module = importlib.import_module('latent_deliberation.data.tokenizer_json')
    self.tokenizer = module.TokenizerJson(path)

  @property
  def bos_id(self) -> int:
    return self.tokenizer.bos

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos

  @property
  def unk_id(self) -> int | None:
    return self.tokenizer.unk

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.size

  def _encode(self, s: str) -> list[int]:
    return self.tokenizer.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array outside of a graph
      whole = np.asarray(text, object).item().decode(errors='replace')
      return np.array(self.tokenizer.encode(whole), np.int32)

    # Stateless, so that the position of a stream can be saved.
    return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    text = tf.numpy_function(lambda ids: self.tokenizer.decode(ids).encode(), [ids], tf.string,
                             stateful=False)
    return tf.ensure_shape(text, [])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, JsonVocabulary) and self.tokenizer.hash == other.tokenizer.hash

  def __hash__(self) -> int:
    return hash(self.tokenizer.hash)


Vocabulary = ByteVocabulary | seqio.SentencePieceVocabulary | JsonVocabulary


def train_sentencepiece(texts: Iterable[str], path: Path, size: int) -> None:
  """Trains `size` BPE pieces on the first 16 MB of `texts` and writes the model to `path`.

  As in Gemma, each digit is a piece, unknown characters fall back to bytes, and nothing is
  normalised. Spaces are kept, and runs of spaces may be pieces. Text therefore comes back
  unchanged, except for U+2581, SentencePiece's own sign for a space. A newline is always one piece.

  Raises:
    UserError: the text has too few or too many characters and pairs for `size` pieces.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        # Nothing of the text may be changed or dropped, so that ids give it back.
        sentence_iterator=_lines(texts), model_writer=model, model_type='bpe', vocab_size=size,
        pad_id=PAD_ID, eos_id=EOS_ID, bos_id=BOS_ID, unk_id=UNK_ID,
        pad_piece='<pad>', eos_piece='<eos>', bos_piece='<bos>', unk_piece='<unk>',
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        user_defined_symbols=['\n'], normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2)
  except RuntimeError as error:
    # SentencePiece puts the line of its source and the failed condition before the reason.
    reason = str(error).rpartition('] ')[2]
    raise UserError(f'vocabulary_size = {size} does not fit the text: {reason} Change '
                    "vocabulary_size, give more text, or set vocabulary = 'byte'") from error
  write_whole(path, model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """Yields lines to train on, the long ones in parts, until there are enough bytes."""
  room = TRAINING_BYTES
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), LONGEST_LINE):
        yield line[start:start + LONGEST_LINE]
    # A text is used whole, so the last one may exceed the limit.
    room -= len(text.encode())
    if room <= 0:
      return


def load_vocabulary(path: Path) -> seqio.SentencePieceVocabulary | JsonVocabulary:
  """Opens a SentencePiece model, or a .json file of Hugging Face.

  Raises:
    MissingError: there is no such file.
    UserError: the file is damaged or of another kind, or `check_vocabulary` refuses it.
  """
  if not path.is_file():
    raise MissingError(f'no vocabulary at {path}: give the path of a SentencePiece model or a '
                       "tokenizer.json, or vocabulary_path = '' to train one")
  path = at_hand(path, 'tokenizer*.json')
  if path.suffix == '.json':
    vocabulary = JsonVocabulary(path)
    check_vocabulary(vocabulary, str(path))
    return vocabulary
  open_sentencepiece(path)  # says what is wrong with a file; seqio's errors do not
  vocabulary = seqio.SentencePieceVocabulary(str(path))
  check_vocabulary(vocabulary, str(path))
  return vocabulary


def check_vocabulary(vocabulary: seqio.Vocabulary, origin: str) -> None:
  """Refuses a vocabulary without an id that begins a text, or one that ends it.

  Raises:
    UserError: as above, or the vocabulary is of a type that is not in `Vocabulary`.
  """
  if not isinstance(vocabulary, Vocabulary):
    raise UserError(f'{origin}: vocabulary of type {type(vocabulary).__name__}: use one of '
                    f'{[each.__name__ for each in Vocabulary.__args__]}')
  # seqio gives None, and SentencePiece -1, for an id that is not there.
  if vocabulary.bos_id in (None, -1) or vocabulary.eos_id in (None, -1):
    raise UserError(
        f'{origin}: bos id {vocabulary.bos_id}, eos id {vocabulary.eos_id}, but every document '
        'needs both. Train the vocabulary with --eos_id=1 --bos_id=2, or take another')


def framing_of(vocabulary: Vocabulary) -> Framing:
  """Returns the ids that begin, end and fill rows of a vocabulary.

  Id 0 fills rows where it is padding in the SentencePiece model, as in Gemma. In a tokenizer.json
  it does where it is a special token that no text gives, and that does not begin or end one. In
  SmolLM2-Instruct it is <|endoftext|>. Elsewhere BOS fills rows: in Llama 2 and Mistral id 0 is
  <unk>, in Llama 3 and Qwen '!', and in the base SmolLM2 the beginning and the end.
  """
  bos, eos = vocabulary.bos_id, vocabulary.eos_id
  if isinstance(vocabulary, JsonVocabulary):
    is_free = PAD_ID in vocabulary.tokenizer.special and PAD_ID not in (
        bos, eos, vocabulary.tokenizer.unk)
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    is_free = vocabulary.tokenizer.pad_id() == PAD_ID  # seqio always says that padding is 0
  else:
    is_free = True
  return Framing(bos, eos, PAD_ID if is_free else bos)


def open_vocabulary(config: DataConfig, prepared_dir: Path,
                    texts: Callable[[], Iterable[str]]) -> Vocabulary:
  """Opens the vocabulary of prepared data, which keep their own copy of its files.

  A copy that is there is never overwritten.

  Args:
    config: kind of the vocabulary, and its path or size.
    prepared_dir: directory that holds, or will hold, vocabulary.model or tokenizer.json.
    texts: returns the training split; called only if a vocabulary must be trained.

  Raises:
    UserError: the directory holds another vocabulary than the configuration asks for.
    UserError: see `load_vocabulary` and `train_sentencepiece`.
  """
  if config.vocabulary == 'byte':
    return ByteVocabulary()
  # The copy in the directory is the one that is used. What the configuration says is compared.
  kept = kept_vocabulary(prepared_dir)
  if config.vocabulary_path:
    path = as_path(config.vocabulary_path)
    given = load_vocabulary(path)
    if not kept.exists():
      kept = copy_vocabulary(path, prepared_dir, VOCABULARY_FILE)
    vocabulary = load_vocabulary(kept)
    asked, found = vocabulary_hash(given), vocabulary_hash(vocabulary)
  else:
    if not kept.exists():
      logging.info('training a vocabulary of %d pieces', config.vocabulary_size)
      train_sentencepiece(texts(), kept, config.vocabulary_size)
    vocabulary = load_vocabulary(kept)
    asked, found = f'{config.vocabulary_size} pieces', f'{vocabulary.vocab_size} pieces'
  # An old copy may differ from what the configuration asks for now.
  if asked != found:
    raise UserError(f'{kept} has {found}, the configuration asks for {asked}: use another '
                    'directory, or configure the vocabulary that is there')
  return vocabulary


def vocabulary_hash(vocabulary: Vocabulary) -> str:
  """Returns the sha256 of everything that determines how text becomes ids."""
  if isinstance(vocabulary, ByteVocabulary):
    return BYTE_VOCABULARY_HASH
  if isinstance(vocabulary, JsonVocabulary):
    return vocabulary.tokenizer.hash
  return hashlib.sha256(vocabulary.sp_model).hexdigest()


def bytes_per_token(vocabulary: Vocabulary) -> np.ndarray:
  """Returns the UTF-8 bytes of text that each id stands for, int32 [V]; 0 for special ids.

  Exact for a vocabulary that does not change text, such as those trained here and Gemma's.
  """
  if isinstance(vocabulary, JsonVocabulary):
    return vocabulary.tokenizer.bytes_per_token()
  if isinstance(vocabulary, ByteVocabulary):
    return (np.arange(vocabulary.vocab_size) >= SPECIAL_IDS).astype(np.int32)
  # A SentencePiece id is a special sign, one byte, or a piece of text.
  tokenizer = vocabulary.tokenizer

  def width(i: int) -> int:
    """Returns the bytes of a piece, in which U+2581 stands for a space."""
    if tokenizer.is_control(i) or tokenizer.is_unknown(i):
      return 0
    return 1 if tokenizer.is_byte(i) else len(tokenizer.id_to_piece(i).replace('▁', ' ').encode())

  return np.array([width(i) for i in range(vocabulary.vocab_size)], np.int32)
