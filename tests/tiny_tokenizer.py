"""A byte-level tokenizer.json with few tokens, and the tokenizer_config.json beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL = ('<pad>', '<begin>', '<end>', '<other>')  # ids 0 to 3
ENDS = {'bos_token': '<begin>', 'eos_token': '<end>'}
MERGES = (('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('Ġ', 'Ġ'), ('r', 'e'))


def letters() -> list[str]:
  """The 256 characters that stand for bytes, in the order of the bytes."""
  own = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = (chr(256 + number) for number in range(256))
  return [chr(byte) if byte in own else next(others) for byte in range(256)]


def describe(special: Sequence[str] = SPECIAL, merges: Sequence[Sequence[str]] = MERGES,
             **model: Any) -> dict[str, Any]:
  """Returns the content of a tokenizer.json.

  Args:
    special: special tokens, which come first.
    merges: pairs of tokens, in order. What they give comes after the bytes.
    model: other values of the model.
  """
  tokens = [*special, *letters(), *(first + second for first, second in merges)]
  added = [{'id': number, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
            'normalized': False, 'special': True} for number, token in enumerate(special)]
  words = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  return {
      'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
      'normalizer': None, 'pre_tokenizer': words, 'post_processor': None, 'decoder': words,
      'model': {'type': 'BPE', 'dropout': None, 'unk_token': None,
                'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': False,
                'byte_fallback': False, 'ignore_merges': False,
                'vocab': {token: number for number, token in enumerate(tokens)},
                'merges': [list(pair) for pair in merges], **model}}


def write(directory: Path, content: Mapping[str, Any] | None = None,
          config: Mapping[str, Any] | None = ENDS) -> Path:
  """Writes both files, or only the first without a `config`, and returns the first."""
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / 'tokenizer.json'
  path.write_text(json.dumps(describe() if content is None else content))
  if config is not None:
    (directory / 'tokenizer_config.json').write_text(json.dumps(config))
  return path
