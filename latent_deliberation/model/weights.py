"""Weights of a decoder, in and out: our own format, Hugging Face directories, Google's orbax.

  config, params = weights.load('gemma-2-2b', dtype=jnp.float32)
  logits, cache = Decoder(config).apply({'params': params}, tokens)
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.errors import UserError
from latent_deliberation.files import whole_directory
from latent_deliberation.model.checkpoints import google, hugging_face, native
from latent_deliberation.model.checkpoints.layout import stored_shapes
from latent_deliberation.model.checkpoints.safetensors_io import SafetensorsSource
from latent_deliberation.model.checkpoints.source import (
  READABLE,
  OrbaxSource,
  Source,
  assemble,
  check_tensors,
  is_orbax,
  on_first_device,
  refuse_pickles,
  shape_differences,
)
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import TransformerConfig

FORMATS = ('native', 'huggingface')  # that can be written
TOKENIZER = 'tokenizer.model'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A decoder on disk, of which names and shapes have been read.

  Attributes:
    directory: where it lies.
    format: 'native', 'huggingface' or 'google'.
    config: the architecture.
    source: the tensors that are there.
    fingerprint: of the weights as stored; '' where the format does not tell.
    vocabulary: hash of the vocabulary of the training text; '' where it is not known.
  """
  directory: Path
  format: str
  config: TransformerConfig
  source: Source
  fingerprint: str
  vocabulary: str
  _expected: Mapping[str, tuple[int, ...]]
  _padded: tuple[str, ...]
  _is_foreign: Callable[[str], bool]
  _read: Callable[[Mapping[str, Sharding]], Params]

  @property
  def tokenizer(self) -> Path | None:
    """The SentencePiece model beside the weights, where there is one."""
    # The gemma library's downloads hold the checkpoint and its tokenizer side by side.
    around = [self.directory.parent] if self.format == 'google' else []
    paths = (place / TOKENIZER for place in (self.directory, *around))
    return next(filter(Path.is_file, paths), None)

  @property
  def left_out(self) -> list[str]:
    """Tensors that are no part of the decoder, such as those of a vision tower."""
    return [name for name in self.source.tensors if name not in self._expected]

  def check(self) -> None:
    """Raises UserError where the tensors are not those of the config; names all of them."""
    check_tensors(self.source, self._expected, self._padded, self._is_foreign)

  def load(self, shardings: Callable[[PyTree], PyTree] | None = None,
           dtype: DTypeLike | None = None) -> Params:
    """The parameters; values that are not finite are warned of by path.

    Args:
      shardings: maps boxed shapes to shardings, onto which tensors are read directly, so that a
        host holds its share and one tensor more; default is the first device.
      dtype: what to keep the weights in; default as stored.

    Raises:
      UserError: see `check`; or the tensors are damaged.
    """
    if dtype is not None and str(jnp.dtype(dtype)) not in READABLE:
      raise UserError(f'dtype {dtype!r}: weights are kept in one of {READABLE}')
    self.check()
    boxed = boxed_shapes(self.config)
    placed = (shardings or on_first_device)(boxed)
    flat = traverse_util.flatten_dict(
        self._read(traverse_util.flatten_dict(placed, sep='/')), sep='/')
    for path, leaf in flat.items():
      if dtype is not None:  # one at a time, so that there are never two of all
        flat[path] = leaf.astype(dtype)
      if not _is_finite(flat[path]):
        logging.warning('%s: %s has values that are not finite (NaN or infinity) in %s',
                        self.directory, path, flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep='/')


@jax.jit
def _is_finite(leaf: Array) -> Array:
  return jnp.isfinite(leaf).all()


def load(path: str | Path, dtype: DTypeLike | None = None,
         shardings: Callable[[PyTree], PyTree] | None = None,
         config: TransformerConfig | None = None) -> tuple[TransformerConfig, Params]:
  """A decoder's architecture and its parameters; see `open_checkpoint` and `Checkpoint.load`."""
  checkpoint = open_checkpoint(path, config)
  return checkpoint.config, checkpoint.load(shardings, dtype)


def open_checkpoint(path: str | Path, config: TransformerConfig | None = None) -> Checkpoint:
  """A decoder on disk, in any format that we read, without reading its weights.

  Args:
    path: a directory.
    config: the architecture, which an orbax checkpoint of sizes that no preset has does not tell.

  Raises:
    UserError: there is no decoder.
    UserError: what is there is damaged, pickled, or of an architecture that we do not have, or
      not of `config`.
  """
  checkpoint = _open(Path(path).absolute(), config)
  if config is not None and checkpoint.config != config:
    there, here = dataclasses.asdict(checkpoint.config), dataclasses.asdict(config)
    lines = [f'  decoder.{key}: {there[key]!r} there, {here[key]!r} in the config'
             for key in there if there[key] != here[key]]
    raise UserError('\n'.join([f'the decoder in {path} is another one:', *lines,
                                'Change the config, or give the decoder that it means.']))
  return checkpoint


def _open(directory: Path, config: TransformerConfig | None) -> Checkpoint:
  """The checkpoint in a directory, by what is in it."""
  if not directory.is_dir():
    raise UserError(
        f'{directory} is ' + ('a file: give the directory that it lies in' if directory.exists()
                              else 'not there: give the directory of a decoder'))
  if (directory / native.DESCRIPTION).is_file():
    return _open_native(directory)
  if is_orbax(directory):
    return _open_google(directory, config)
  if (directory / hugging_face.CONFIG).is_file() or list(directory.glob('*.safetensors*')):
    return _open_hugging_face(directory)
  inner = [child for child in sorted(directory.iterdir()) if child.is_dir() and is_orbax(child)]
  if len(inner) == 1:  # the library's downloads put the tokenizer beside the checkpoint
    return _open_google(inner[0], config)
  refuse_pickles(directory)
  raise UserError(
      f'{directory} holds no decoder: neither {native.DESCRIPTION}, which launch/pretrain.py '
      f'writes to <workdir>/decoder, nor {hugging_face.CONFIG} and safetensors (Hugging '
      'Face), nor an orbax checkpoint (Google)')


def _open_native(directory: Path) -> Checkpoint:
  described, source = native.describe(directory), native.open_weights(directory)
  return Checkpoint(
      directory, 'native', described.config, source, described.fingerprint, described.vocabulary,
      native.shapes(described.config), (), lambda name: False,
      lambda shardings: native.read(source, described, shardings))


def _open_google(directory: Path, config: TransformerConfig | None) -> Checkpoint:
  source = OrbaxSource(directory, google.plain_name)
  config = config or google.find_config(source.tensors, str(directory))
  layout = google.find_layout(config, source.tensors)
  return Checkpoint(
      directory, 'google', config, source, '', '', stored_shapes(layout, config), (google.TABLE,),
      google.is_foreign, lambda shardings: assemble(source, layout, config, shardings))


def _open_hugging_face(directory: Path) -> Checkpoint:
  source = SafetensorsSource(directory, hugging_face.plain_name)
  config = hugging_face.read_config(directory)
  layout = hugging_face.find_layout(config)

  def read(shardings: Mapping[str, Sharding]) -> Params:
    hugging_face.check_head(source)
    return assemble(source, layout, config, shardings)

  return Checkpoint(
      directory, 'huggingface', config, source, '', '', stored_shapes(layout, config), (),
      hugging_face.is_foreign, read)


def save(directory: str | Path, config: TransformerConfig, params: Params, vocabulary: str = '',
         format: str = 'native', tokenizer: Path | None = None) -> None:
  """Writes a decoder, whole or not at all, every bit as it is.

  Args:
    vocabulary: hash of the vocabulary that it was trained with; kept by our own format.
    format: one of FORMATS.
    tokenizer: a SentencePiece model to lay beside the weights.

  Raises:
    UserError: `directory` exists already; nothing is overwritten.
    UserError: an unknown format, an architecture that the format cannot describe, or parameters
      of another architecture.
  """
  if format not in FORMATS:
    raise UserError(f'format {format!r}: a decoder is written as one of {FORMATS}')
  given = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep='/').items()}
  lines = shape_differences(given, native.shapes(config))
  if lines:
    raise UserError('\n'.join(['these parameters are not of this config:', *lines,
                                'Give the config that they were made with.']))
  with whole_directory(Path(directory)) as partial:
    if tokenizer is not None and jax.process_index() == 0:
      shutil.copyfile(tokenizer, partial / TOKENIZER)
    if format == 'native':
      native.write(partial, config, params, vocabulary)
    else:
      hugging_face.write(partial, config, params)
