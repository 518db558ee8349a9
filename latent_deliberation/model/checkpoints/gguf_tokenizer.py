"""The vocabulary of a GGUF file, rebuilt as the file that its model was published with.

A vocabulary of the kind 'llama' becomes a SentencePiece model. Byte-level BPE, of the kind 'gpt2',
becomes a tokenizer.json. The metadata hold tokens and merges, but only the name of the rule that
cuts a text into words before merges apply. Such rules are known here by their names.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from latent_deliberation.errors import UserError
from latent_deliberation.files import write_whole
from latent_deliberation.model.checkpoints.gguf_io import GGUFSource
from latent_deliberation.paths import (
  TOKENIZER,
  TOKENIZER_CONFIG,
  TOKENIZER_JSON,
  cache_directory,
)

# Types of a token in the metadata, with SentencePiece's own numbers.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = '\u2581'  # SentencePiece's sign for a space


def cache_tokenizer(source: GGUFSource) -> Path | None:
  """Returns the path of the rebuilt vocabulary in the user's cache; None if the file has none.

  Raises:
    UserError: see `rebuild_sentencepiece` and `rebuild_byte_pairs`.
  """
  kind = source.get('tokenizer.ggml.model')
  if kind is None:
    return None
  if kind not in ('llama', 'gpt2'):
    raise UserError(f'{source.file}: tokenizer.ggml.model = {kind!r} is neither llama '
                    '(SentencePiece) nor gpt2 (byte-level BPE): give the tokenizer of the model, '
                    '--vocabulary=PATH, or for training --config.data.vocabulary_path=PATH')
  try:
    if kind == 'llama':
      files = {TOKENIZER: rebuild_sentencepiece(source)}
    else:
      # Named last, so that a tokenizer.json is never alone.
      tokenizer, config = rebuild_byte_pairs(source)
      files = {TOKENIZER_CONFIG: _to_json(config), TOKENIZER_JSON: _to_json(tokenizer)}
  except UserError:
    raise
  except (TypeError, ValueError, IndexError, AttributeError) as error:
    # A damaged file may have values of any type and size.
    raise UserError(f'{source.file}: its vocabulary is damaged ({type(error).__name__}: '
                    f'{str(error):.120}): download it again') from error
  # The directory is a hash of the content, so two files of one vocabulary share it.
  content_hash = hashlib.sha256(b''.join(files.values())).hexdigest()[:16]
  directory = cache_directory('tokenizers') / content_hash
  for name, content in files.items():
    if not (directory / name).is_file():
      write_whole(directory / name, content)
  return directory / list(files)[-1]


def _to_json(value: Mapping[str, Any]) -> bytes:
  return json.dumps(value, ensure_ascii=False).encode()


def rebuild_sentencepiece(source: GGUFSource) -> bytes:
  """Returns the SentencePiece model that the metadata describe, as the bytes of a tokenizer.model.

  Raises:
    UserError: the vocabulary is incomplete, or has more pieces than the table has embeddings.
  """
  pieces, types = _read_tokens(source)
  scores = source.get('tokenizer.ggml.scores', [])
  ids = {name: source.get(f'tokenizer.ggml.{name}_token_id')
         for name in ('padding', 'eos', 'bos', 'unknown')}
  if len(scores) != len(pieces) or ids['unknown'] is None:
    raise UserError(
        f'{source.file}: the vocabulary has {len(pieces)} tokens, {len(scores)} scores and '
        f'unknown_token_id {ids["unknown"]}: download it again')
  model = sentencepiece_model_pb2.ModelProto()
  for number, (piece, score, type_) in enumerate(zip(pieces, scores, types, strict=True)):
    # User-defined pieces hold real spaces in the file, where SentencePiece wants its sign. The
    # unknown piece has the type of a control piece in the file, where SentencePiece wants its own.
    model.pieces.add(
        piece=piece.replace(' ', _SPACE) if type_ == _USER_DEFINED else piece, score=score,
        type=_UNKNOWN if number == ids['unknown'] else type_)
  # The ids of special pieces; -1 for none.
  spec = model.trainer_spec
  spec.model_type, spec.vocab_size = spec.BPE, len(pieces)
  spec.byte_fallback = _BYTE in types
  for ours, theirs in (('pad', 'padding'), ('eos', 'eos'), ('bos', 'bos'), ('unk', 'unknown')):
    number = -1 if ids[theirs] is None else ids[theirs]
    setattr(spec, f'{ours}_id', number)
    if number >= 0:
      setattr(spec, f'{ours}_piece', pieces[number])
  # Gemma and Llama leave a text as it is, except for spaces.
  normaliser = model.normalizer_spec
  normaliser.name, normaliser.escape_whitespaces = 'identity', True
  normaliser.add_dummy_prefix = bool(source.get('tokenizer.ggml.add_space_prefix', True))
  normaliser.remove_extra_whitespaces = False
  return model.SerializeToString()


def _read_tokens(source: GGUFSource) -> tuple[Sequence[str], Sequence[int]]:
  """Returns text and type of every token.

  Raises:
    UserError: their numbers differ, or there are more tokens than embeddings.
  """
  tokens, types = (source.get(f'tokenizer.ggml.{key}', []) for key in ('tokens', 'token_type'))
  rows = source.num_embeddings
  if not 0 < len(tokens) <= rows or len(types) != len(tokens):
    raise UserError(f'{source.file}: the vocabulary has {len(tokens)} tokens and {len(types)} '
                    f'types, for {rows} embeddings: download it again')
  return tokens, types


# --- Byte-level BPE ---

# Words of Llama 3 and Qwen 2: contractions, letters, digits, signs and line ends. They differ in
# the number of digits in a word.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
          r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _bytes(use_regex: bool) -> dict[str, Any]:
  """Returns the step that spells bytes as characters, after cutting GPT-2's words if asked to."""
  return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
          'use_regex': use_regex}


def _words(digits: str) -> list[dict[str, Any]]:
  """Returns the steps that cut _WORDS and spell their bytes."""
  return [{'type': 'Split', 'pattern': {'Regex': _WORDS.format(digits=digits)},
           'behavior': 'Isolated', 'invert': False}, _bytes(use_regex=False)]


# tokenizer.ggml.pre -> the steps that cut a text into words.
PRE_TOKENIZERS = {
    'gpt-2': [_bytes(use_regex=True)],
    'smollm': [{'type': 'Digits', 'individual_digits': True}, _bytes(use_regex=True)],
    'llama-bpe': _words(r'\p{N}{1,3}'),
    'qwen2': _words(r'\p{N}')}
# Those whose texts are brought to Unicode's composed form before, and those in which a word that is
# a token is taken whole.
_COMPOSED, _WHOLE_WORDS = ('qwen2',), ('llama-bpe',)


def rebuild_byte_pairs(source: GGUFSource) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the tokenizer.json and the tokenizer_config.json that the metadata describe.

  Control tokens become special tokens, and unused ones too. User-defined tokens are found in a text
  before it is cut into words.

  Raises:
    UserError: the rule that cuts words is unknown. One called 'default' is: llama.cpp writes this
      name where it does not know the rule.
    UserError: the vocabulary is incomplete, has a token twice, a merge of unknown tokens, or more
      tokens than the table has embeddings.
  """
  rule = source.get('tokenizer.ggml.pre')
  if rule not in PRE_TOKENIZERS:
    raise UserError(f'{source.file}: tokenizer.ggml.pre = {rule!r} is not one of '
                    f'{", ".join(PRE_TOKENIZERS)}: give the tokenizer of the model, '
                    '--vocabulary=PATH, or for training --config.data.vocabulary_path=PATH')
  tokens, types = _read_tokens(source)
  vocabulary = {token: number for number, token in enumerate(tokens)}
  if len(vocabulary) != len(tokens):
    twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
    raise UserError(f'{source.file}: the token {twice!r} is there twice: download it again')
  special = (_UNKNOWN, _CONTROL, _UNUSED)
  tokenizer = {
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [
          {'id': number, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
           'normalized': False, 'special': type_ in special}
          for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
          if type_ in (*special, _USER_DEFINED)],
      'normalizer': {'type': 'NFC'} if rule in _COMPOSED else None,
      'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': PRE_TOKENIZERS[rule]},
      'post_processor': None, 'decoder': _bytes(use_regex=True),
      'model': {
          'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
          'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
          'ignore_merges': rule in _WHOLE_WORDS, 'vocab': vocabulary,
          'merges': _read_merges(source, vocabulary)}}
  return tokenizer, {'tokenizer_class': 'PreTrainedTokenizerFast', **_read_special(source, tokens)}


def _read_merges(source: GGUFSource, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
  """Returns the pairs of tokens that become one, in their order."""
  merges = []
  for merge in source.get('tokenizer.ggml.merges', []):
    first, _, second = merge.partition(' ')
    for token in (first, second, first + second):
      if token not in vocabulary:
        raise UserError(f'{source.file}: the merge {merge!r} needs the token {token!r}, which is '
                        'not there: download it again')
    merges.append((first, second))
  return merges


def _read_special(source: GGUFSource, tokens: Sequence[str]) -> dict[str, str]:
  """Returns the tokens of a tokenizer_config.json that the metadata name."""
  named = {}
  for ours, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
    number = source.get(f'tokenizer.ggml.{theirs}_token_id')
    if number is not None:
      if not 0 <= number < len(tokens):
        raise UserError(f'{source.file}: {theirs}_token_id = {number}, but there are '
                        f'{len(tokens)} tokens: download it again')
      named[f'{ours}_token'] = tokens[number]
  return named
