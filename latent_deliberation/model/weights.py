"""Loads and saves the weights of a decoder: native, Hugging Face, Google and GGUF checkpoints.

  config, params = weights.load('gemma-2-2b', dtype=jnp.float32)
  logits, cache = Decoder(config).apply({'params': params}, tokens)

`_open` decides the format of a directory. Each format is a module of model/checkpoints. What is no
path may be a name; see model/checkpoints/named.py.
"""

import dataclasses
import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
from absl import logging
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.errors import MissingError, UserError, differences
from latent_deliberation.files import (
  as_path,
  at_hand,
  copy_vocabulary,
  explain_failed_write,
  find_inside,
  list_directory,
  whole_directory,
)
from latent_deliberation.host_memory import return_memory
from latent_deliberation.model.checkpoints import hugging_face, native
from latent_deliberation.model.checkpoints.hugging_face_config import CONFIG, read_config
from latent_deliberation.model.checkpoints.layout import stored_shapes
from latent_deliberation.model.checkpoints.safetensors_io import SUFFIX, SafetensorsSource
from latent_deliberation.model.checkpoints.source import (
  READABLE,
  OrbaxSource,
  Source,
  assemble,
  check_memory,
  check_tensors,
  is_orbax,
  on_first_device,
  refuse_pickles,
  shape_differences,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import COPROCESSOR, DECODER, GGUF, TOKENIZER, TOKENIZER_JSON
from latent_deliberation.progress import announced

FORMATS = ('native', 'huggingface')  # of `save`; 'google' and 'gguf' can only be read
MATRICES = ('w', 'transposed', 'table', 'head')  # names of the weights of products


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A decoder on disk. Names and shapes of its tensors are known; its weights are not read yet.

  Attributes:
    directory: directory of the checkpoint; the file, if it is a GGUF file.
    format: 'native', 'huggingface', 'google' or 'gguf'.
    config: architecture.
    source: tensors of the checkpoint.
    fingerprint: fingerprint of the weights as stored; '' if the format has none.
    vocabulary_hash: hash of the vocabulary of the training text; '' if unknown.
  """
  directory: Path
  format: str
  config: TransformerConfig
  source: Source
  fingerprint: str
  vocabulary_hash: str
  _expected: Mapping[str, tuple[int, ...]]
  _padded: tuple[str, ...]
  _is_foreign: Callable[[str], bool]
  _read: Callable[[Mapping[str, Sharding], DTypeLike | None], Params]

  @functools.cached_property
  def tokenizer(self) -> Path | None:
    """Path of the SentencePiece model in the directory, or else of its tokenizer.json, or None.

    It is on this machine. A GGUF file holds the vocabulary itself, which is rebuilt into the user's
    cache.

    Raises:
      UserError: the vocabulary of a GGUF file is of an unknown kind, or damaged.
    """
    if self.format == 'gguf':
      return _import('gguf_tokenizer').cache_tokenizer(self.source)
    # Google's downloads have the tokenizer next to the directory of the checkpoint.
    around = [self.directory.parent] if self.format == 'google' else []
    paths = (place / name for name in (TOKENIZER, TOKENIZER_JSON)
             for place in (self.directory, *around))
    found = next((path for path in paths if path.is_file()), None)
    return found and at_hand(found, 'tokenizer*.json')

  @property
  def left_out(self) -> list[str]:
    """Names of tensors of other parts than the decoder, such as a vision tower."""
    return [name for name in self.source.tensors if name not in self._expected]

  def check(self) -> None:
    """Raises UserError if tensors differ from those of the config; the message lists them all."""
    check_tensors(self.source, self._expected, self._padded, self._is_foreign)

  @announced("loading the decoder's weights", every=None)
  def load(self, shardings: Callable[[PyTree], PyTree] | None = None,
           dtype: DTypeLike | None = None) -> Params:
    """Returns the parameters. Logs a warning for each that has values that are not finite.

    Args:
      shardings: function from boxed shapes to shardings. Tensors are read straight onto them: a
        host holds its share and one tensor more. Default: the first device.
      dtype: dtype of the parameters; default as stored.

    Raises:
      UserError: see `check`; or tensors are damaged, the dtype is not one of READABLE, or the CPU's
        free memory cannot hold the parameters.
    """
    if dtype is not None:
      _check_dtype(dtype)
    self.check()
    placed = self.check_memory(shardings, dtype)
    # Read every tensor straight onto its sharding.
    flat = traverse_util.flatten_dict(
        self._read(traverse_util.flatten_dict(placed, sep='/'), dtype), sep='/')
    for path, leaf in flat.items():
      if dtype is not None:  # one at a time, to hold only one leaf in both dtypes
        flat[path] = leaf.astype(dtype)
      if not _is_finite(flat[path]):
        logging.warning('%s: %s has values that are not finite (NaN or infinity) in %s',
                        self.directory, path, flat[path].dtype)
    return_memory()
    return traverse_util.unflatten_dict(flat, sep='/')

  def check_memory(self, shardings: Callable[[PyTree], PyTree] | None = None,
                   dtype: DTypeLike | None = None) -> PyTree:
    """Returns the shardings of `load`. Raises UserError if free memory cannot hold the weights."""
    boxed = boxed_shapes(self.config)
    placed = (shardings or on_first_device)(boxed)
    check_memory(self.directory, boxed, placed, self._value_bytes(dtype))
    return placed

  def _value_bytes(self, dtype: DTypeLike | None) -> float:
    """Returns the most bytes that a value takes while it is loaded, as a mean over the tensors."""
    if dtype is not None and self.format != 'native':
      return jnp.dtype(dtype).itemsize
    tensors = [self.source.tensors[name] for name in self._expected]
    stored = (sum(tensor.nbytes for tensor in tensors)
              / sum(math.prod(tensor.shape) for tensor in tensors))
    # Our format is held as stored until its fingerprint is known.
    return stored if dtype is None else max(stored, jnp.dtype(dtype).itemsize)


def _check_dtype(dtype: DTypeLike) -> None:
  """Raises UserError if weights cannot be read into this dtype."""
  try:
    known = str(jnp.dtype(dtype)) in READABLE
  except TypeError:  # no dtype has this name
    known = False
  if not known:
    raise UserError(f'dtype = {dtype!r}: set one of {READABLE}')


@jax.jit
def _is_finite(leaf: Array) -> Array:
  return jnp.isfinite(leaf).all()


def load(directory: str | Path, dtype: DTypeLike | None = None,
         shardings: Callable[[PyTree], PyTree] | None = None,
         config: TransformerConfig | None = None) -> tuple[TransformerConfig, Params]:
  """Returns a decoder's architecture and parameters.

  Arguments and errors are those of `open_checkpoint` and `Checkpoint.load`.
  """
  checkpoint = open_checkpoint(directory, config)
  return checkpoint.config, checkpoint.load(shardings, dtype)


def round_matrices(params: Params, dtype: str) -> Params:
  """Returns the parameters, with matrices that are wider than `dtype` rounded to it.

  Otherwise products would round them, at every call of a program. Adapters are small and stay.
  """
  def rounded(path: tuple, leaf: Array) -> Array:
    is_wider = leaf.dtype.itemsize > jnp.dtype(dtype).itemsize
    return leaf.astype(dtype) if is_wider and getattr(path[-1], 'key', '') in MATRICES else leaf

  return jax.tree_util.tree_map_with_path(rounded, params)


def open_checkpoint(directory: str | Path, config: TransformerConfig | None = None) -> Checkpoint:
  """Opens a decoder of any format, without reading its weights.

  Args:
    directory: directory of the decoder, path of a GGUF file, name of an installed model, or
      hf://ORG/NAME. A path that exists goes before a name. From an object store, our own format
      and Google's are read in place, the others from a copy on this machine.
    config: architecture that the decoder must have; default the stored one. A Google checkpoint
      needs it if no preset has its sizes.

  Raises:
    UserError: there is no decoder, it is damaged or pickled, or its architecture is unsupported or
      differs from `config`.
  """
  path = as_path(os.path.expanduser(directory))
  if not path.exists():
    # Imported only for a name, to keep what every run imports small.
    named = importlib.import_module('latent_deliberation.model.checkpoints.named')
    path = named.find(str(directory))
  checkpoint = _open(path.absolute(), config)
  # List every key that differs, not only the first.
  if config is not None and checkpoint.config != config:
    lines = differences(dataclasses.asdict(checkpoint.config), dataclasses.asdict(config),
                        'decoder.')
    raise UserError('\n'.join([f'the decoder in {directory} differs from the config:', *lines,
                               'Change the config, or give another decoder.']))
  return checkpoint


def _open(directory: Path, config: TransformerConfig | None) -> Checkpoint:
  """Decides the format of a checkpoint by the files in its directory, and opens it."""
  if directory.is_file() and directory.suffix == GGUF:
    return _open_gguf(directory)
  if directory.is_file():
    raise UserError(f'{directory} is a file: give its directory, or a {GGUF} file')
  if not directory.is_dir():
    raise MissingError(f'{directory} does not exist: give the directory of a decoder')
  openers = {'native': _open_native, 'google': lambda found: _open_google(found, config),
             'huggingface': _open_hugging_face, 'gguf': _open_gguf}
  _refuse_other_parts(directory)
  formats = _find_formats(directory)
  if len(formats) > 1:
    raise UserError(f'{directory} holds decoders of several formats, {formats}: move all files but '
                    'those of one to another directory')
  if formats:
    return openers[formats[0]](directory)
  if (directory / CONFIG).is_file():
    return _open_hugging_face(directory)  # says what is missing
  # Some levels off, as runs/x for runs/x/decoder, or Hugging Face's hub/models--X/snapshots/HASH.
  inner = find_inside(directory, lambda folder: bool(_find_formats(folder)), depth=3)
  if directory / DECODER in inner:  # of a run, which may keep decoders of fewer steps beside it
    inner = [directory / DECODER]
  if len(inner) == 1:
    logging.info('%s holds a decoder in %s', directory, inner[0])
    return _open(inner[0], config)
  if inner:
    raise UserError(f'{directory} holds no decoder itself, but {len(inner)} in its folders: give '
                    f'one of {", ".join(map(str, inner))}')
  if any(path.suffix == SUFFIX for path in list_directory(directory)):
    return _open_hugging_face(directory)  # as above
  refuse_pickles(directory)
  raise MissingError(
      f'{directory} holds no decoder: neither {native.DESCRIPTION}, which launch/pretrain.py '
      f'writes to <workdir>/decoder, nor {CONFIG} and safetensors (Hugging Face), '
      'nor an orbax checkpoint (Google). Give the directory of a decoder')


def _find_formats(directory: Path) -> list[str]:
  """Returns the formats of the decoders in a directory itself; usually one or none."""
  names = {path.name for path in list_directory(directory) if path.is_file()}
  suffixes = {Path(name).suffix for name in names}
  formats = []
  if native.DESCRIPTION in names:
    formats.append('native')
  if is_orbax(directory):
    formats.append('google')
  # Like transformers, GGUF files beside the weights are read only if they are named.
  if CONFIG in names and SUFFIX in suffixes:
    formats.append('huggingface')
  elif GGUF in suffixes:
    formats.append('gguf')
  return formats


def _refuse_other_parts(directory: Path) -> None:
  """Raises UserError for a folder of a decoder, and for a coprocessor."""
  if directory.name == native.WEIGHTS and (directory.parent / native.DESCRIPTION).is_file():
    raise UserError(f'{directory} is a part of a decoder: give {directory.parent}')
  if (directory / f'{COPROCESSOR}.json').is_file():
    raise UserError(f'{directory} holds a coprocessor: give the decoder that it was trained on, '
                    'and this one as --coprocessor')


def _open_native(directory: Path) -> Checkpoint:
  described, source = native.describe(directory), native.open_weights(directory)
  return Checkpoint(
      directory, 'native', described.config, source, described.fingerprint,
      described.vocabulary_hash,
      native.shapes(described.config), (), lambda name: False,
      lambda shardings, dtype: native.read(source, described, shardings))


def _open_gguf(path: Path) -> Checkpoint:
  # The tensors have Hugging Face's names and shapes, so its layout serves.
  gguf_io = _import('gguf_io')
  source = gguf_io.GGUFSource(at_hand(gguf_io.find_file(path)))
  config = gguf_io.read_config(source)
  layout = hugging_face.find_layout(config)
  return Checkpoint(
      source.file, 'gguf', config, source, '', '', stored_shapes(layout, config), (),
      lambda name: False,
      lambda shardings, dtype: assemble(source, layout, config, shardings, dtype))


def _import(name: str) -> ModuleType:
  """Returns a module of model.checkpoints that few decoders need."""
  return importlib.import_module(f'latent_deliberation.model.checkpoints.{name}')


def _open_google(directory: Path, config: TransformerConfig | None) -> Checkpoint:
  google = _import('google')
  source = OrbaxSource(directory, google.plain_name)
  config = config or google.find_config(source.tensors, str(directory))
  layout = google.find_layout(config, source.tensors)
  return Checkpoint(
      directory, 'google', config, source, '', '', stored_shapes(layout, config), (google.TABLE,),
      google.is_foreign,
      lambda shardings, dtype: assemble(source, layout, config, shardings, dtype))


def _open_hugging_face(directory: Path) -> Checkpoint:
  directory = at_hand(directory)
  config = read_config(directory)
  # All names together tell the prefix of the decoder.
  source = SafetensorsSource(
      directory, lambda names: hugging_face.plain_names(names, directory, config.tied_head))
  layout = hugging_face.find_layout(config)
  if not config.tied_head:
    hugging_face.check_own_head(source)

  # A tied head is compared with the table only when weights are read.
  def read(shardings: Mapping[str, Sharding], dtype: DTypeLike | None) -> Params:
    if config.tied_head:
      hugging_face.check_tied_head(source)
    return assemble(source, layout, config, shardings, dtype)

  return Checkpoint(
      directory, 'huggingface', config, source, '', '', stored_shapes(layout, config), (),
      hugging_face.is_foreign, read)


def save(directory: str | Path, config: TransformerConfig, params: Params,
         vocabulary_hash: str = '', format: str = 'native', tokenizer: Path | None = None,
         complete: Callable[[Path], None] | None = None) -> None:
  """Writes a decoder bit by bit. After an error, nothing is left of it.

  Args:
    directory: new directory.
    config: architecture.
    params: parameters of that architecture.
    vocabulary_hash: hash of the vocabulary of the training text; only the native format keeps it.
    format: one of FORMATS.
    tokenizer: SentencePiece model or tokenizer.json to copy into the directory; default none.
    complete: writes more files into the directory, which is given to it before it has its name.

  Raises:
    UserError: `directory` exists or cannot be written; or the format is unknown or cannot describe
      the architecture; or the parameters are those of another architecture.
  """
  if format not in FORMATS:
    raise UserError(f'format = {format!r}: set one of {FORMATS}')
  # Refuse parameters that `load` would refuse.
  given = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep='/').items()}
  lines = shape_differences(given, native.shapes(config))
  if lines:
    raise UserError('\n'.join(['the parameters differ from the config:', *lines,
                               'Give the config that they were made with.']))
  # The directory gets its name when all files in it are complete.
  directory = as_path(directory)
  with whole_directory(directory) as partial, explain_failed_write(directory):
    if tokenizer is not None and jax.process_index() == 0:
      copy_vocabulary(tokenizer, partial, TOKENIZER)
    if format == 'native':
      native.write(partial, config, params, vocabulary_hash)
    else:
      hugging_face.write(partial, config, params)
    if complete is not None and jax.process_index() == 0:
      complete(partial)
