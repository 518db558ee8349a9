"""What a trained coprocessor is: coprocessor.json, which stands beside its weights."""

import dataclasses
import json
from pathlib import Path

from absl import logging

from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.model.transformer_config import TransformerConfig

DESCRIPTION, _FORMAT = 'coprocessor.json', 1
REMEDY = ('Copy the package again, or remove it and run launch/train.py once more, which writes '
          'it anew from its checkpoint')


@dataclasses.dataclass(frozen=True)
class Description:
  """What a trained coprocessor is, without its weights.

  Attributes:
    model: architecture of its decoder.
    config: how its latents are made, and what was trained.
    decoder: fingerprint of its decoder's weights, as they are stored.
    vocabulary: hash of the vocabulary of the text that it was trained on.
    steps: updates that it was trained for.
    frozen_dtype: what its decoder's weights were kept in meanwhile; '' in packages that do not say.
  """
  model: TransformerConfig
  config: DeliberationConfig
  decoder: str
  vocabulary: str
  steps: int
  frozen_dtype: str = dataclasses.field(default='', kw_only=True)


def write_description(directory: Path, description: Description, fingerprint: str) -> None:
  """Writes coprocessor.json.

  Args:
    fingerprint: of the parameters beside it.
  """
  content = {
      'format': _FORMAT, 'fingerprint': fingerprint, 'decoder': description.decoder,
      'vocabulary': description.vocabulary, 'steps': description.steps,
      'frozen_dtype': description.frozen_dtype,
      'config': dataclasses.asdict(description.config),
      'model': dataclasses.asdict(description.model)}
  (directory / DESCRIPTION).write_text(json.dumps(content, indent=2) + '\n')


def read_description(directory: Path) -> tuple[Description, str]:
  """What coprocessor.json says, and the fingerprint of the parameters beside it.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise FileNotFoundError(f'{directory} holds no trained coprocessor: {DESCRIPTION}, which '
                            'launch/train.py writes to <workdir>/coprocessor, is not there')
  try:
    stored = json.loads(path.read_text())
    if stored['format'] != _FORMAT:
      raise ValueError(f'format {stored["format"]!r}, expected {_FORMAT}')
    description = Description(
        TransformerConfig(**stored['model']), DeliberationConfig(**stored['config']),
        stored['decoder'], stored['vocabulary'], stored['steps'],
        frozen_dtype=stored.get('frozen_dtype', ''))  # which earlier packages lack
    return description, stored['fingerprint']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is damaged or of another format ({type(error).__name__}: {error}). '
                     f'{REMEDY}') from error


def describe(directory: str | Path) -> Description:
  """What coprocessor.json says alone; see `read_description` for what is raised."""
  return read_description(Path(directory))[0]


def check_decoder(description: Description, decoder: str) -> None:
  """Raises ValueError unless `decoder` is the fingerprint of the decoder it was trained on."""
  if decoder != description.decoder:
    raise ValueError(
        f'the coprocessor was trained on a decoder with fingerprint {description.decoder}, this '
        f'one has {decoder}: give the decoder that it was trained on, or train one for this')


def compare_frozen_dtype(description: Description, dtype: str) -> None:
  """Logs a warning where frozen weights are int8 now and were not in training, or the reverse.

  Args:
    dtype: what the decoder's weights are kept in now.
  """
  trained = description.frozen_dtype
  if trained and (trained == 'int8') != (dtype == 'int8'):
    logging.warning(
        'the coprocessor was trained beside frozen weights in %s, and reads those of %s now: it '
        'works, on slightly other hidden states; train one beside %s for exact results', trained,
        dtype, dtype)
