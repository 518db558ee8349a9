"""Opens a decoder with its coprocessor and controls from disk, for benchmarks.

`find_arm_model` checks all that needs no weights. `open_arm_model` loads the weights, too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import locate_coprocessor
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.perplexity import CONSTANT, OWN
from latent_deliberation.experiment import DTYPES
from latent_deliberation.inference.engine import check_match
from latent_deliberation.inference.tokenizer import Tokenizer, tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import (
  DEFAULT_RULES,
  MeshConfig,
  make_mesh,
  parse_mesh,
  shardings_of,
)


@dataclasses.dataclass(frozen=True)
class FoundArmModel:
  """A decoder and what makes latents for it on disk, checked as far as it goes without weights.

  Attributes:
    checkpoint: the decoder.
    tokenizer: its tokenizer.
    places: directory of the coprocessor under 'own', and of constant soft tokens under 'constant'.
    dtype, max_length: see ArmModel.
    mesh: the devices.
  """
  checkpoint: weights.Checkpoint
  tokenizer: Tokenizer
  places: Mapping[str, Path]
  dtype: str
  max_length: int
  mesh: Mesh

  def load(self) -> ArmModel:
    """Loads the weights.

    Raises:
      UserError: they are damaged, or of another decoder.
    """
    shardings = lambda boxed: shardings_of(boxed, self.mesh, DEFAULT_RULES)  # noqa: E731
    params = self.checkpoint.load(shardings)
    decoder_fingerprint = self.checkpoint.fingerprint or fingerprint(params)
    loaded = {}
    for name, path in self.places.items():
      loaded[name] = coprocessor_checkpoint.load(path, shardings)
      coprocessor_checkpoint.check_decoder(loaded[name], decoder_fingerprint)
    return ArmModel(self.checkpoint.config, params, decoder_fingerprint, self.tokenizer,
                    own=loaded.get(OWN), constant=loaded.get(CONSTANT), dtype=self.dtype,
                    max_length=self.max_length, mesh=self.mesh)


def open_arm_model(decoder: str | Path, coprocessor: str | Path = '', constant: str | Path = '',
                   **options: Any) -> ArmModel:
  """Loads a decoder and what makes latents for it; see `find_arm_model`."""
  return find_arm_model(decoder, coprocessor, constant, **options).load()


def find_arm_model(decoder: str | Path, coprocessor: str | Path = '', constant: str | Path = '', *,
                   vocabulary: str = '', dtype: str = 'float32', max_length: int = 2048,
                   mesh: str = '') -> FoundArmModel:
  """Finds a decoder and what makes latents for it, with all checks that need no weights.

  Args:
    decoder: directory, GGUF file, name or hf:// address of the decoder.
    coprocessor: trained coprocessor, or the work directory of its run; '' for none.
    constant: the same for trained constant soft tokens.
    vocabulary: path of a vocabulary, or 'byte'; '' for the decoder's own.
    dtype: dtype of the computation: 'float32', 'bfloat16', or 'auto' for what the devices are fast
      at.
    max_length: largest number of tokens that the decoder reads of a text.
    mesh: sizes of the mesh, such as 'fsdp=8,data=1'; '' for a copy of the weights on each device.

  Raises:
    UserError: one of them is absent, damaged, or of another decoder; or a value is not allowed.
  """
  if dtype not in (*DTYPES, 'auto'):
    raise UserError(f"dtype = {dtype!r}: give one of {(*DTYPES, 'auto')}")
  # A token that begins a text, and an answer.
  check_integer('max_length', max_length, 2)
  checkpoint = weights.open_checkpoint(decoder)
  tokenizer = tokenizer_of(checkpoint, vocabulary)
  found = {OWN: coprocessor, CONSTANT: constant}
  found = {name: locate_coprocessor(path) for name, path in found.items() if path}
  for name, path in found.items():
    description = coprocessor_checkpoint.describe(path)
    _check_kind(name, path, description.config.trainable == 'constant')
    check_match(checkpoint.config, checkpoint.fingerprint, description, None)
  return FoundArmModel(checkpoint, tokenizer, found, dtype, max_length,
                       make_mesh(parse_mesh(mesh) if mesh else MeshConfig()))


def _check_kind(name: str, path: Path, is_constant: bool) -> None:
  if is_constant != (name == CONSTANT):
    kinds = {True: 'constant soft tokens', False: 'a coprocessor'}
    raise UserError(f'{path} holds {kinds[is_constant]}, but {kinds[not is_constant]} is expected '
                    f'as --{"constant" if name == CONSTANT else "coprocessor"}: give the other one')
