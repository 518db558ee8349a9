"""The package of an expert: a directory of files that are all checked before one is believed.

  expert.json, README.md  the card, for programs and for people
  coprocessor/            the coprocessor: coprocessor.json and coprocessor.safetensors, as
                          launch/train.py writes them
  routing.safetensors     centroid and gain head, by which routers choose
  sample.safetensors      held-out rows, on which the scores are measured again
  scores.png              the scores, drawn

Nothing in a package is executed or unpickled. Names, kinds and sizes of files are checked first,
then their hashes, then the headers of safetensors files, and then numbers.
"""

import dataclasses
import json
import math
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  DESCRIPTION,
  CoprocessorCheckpoint,
  Description,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import Card, from_json, render, to_json
from latent_deliberation.files import (
  explain_failed_write,
  is_stray,
  sha256_of,
  whole_directory,
)
from latent_deliberation.paths import COPROCESSOR
from latent_deliberation.progress import Progress

CARD, README, PICTURE = 'expert.json', 'README.md', 'scores.png'
ROUTING, SAMPLE = 'routing.safetensors', 'sample.safetensors'
SAMPLE_PARTS = {'tokens': (None, None), 'segments': (None, None), 'texts': (None,)}  # with shapes
WEIGHTS, ABOUT = f'{COPROCESSOR}/coprocessor.safetensors', f'{COPROCESSOR}/{DESCRIPTION}'
# Every file that a package may have besides its card, with the largest size that is accepted.
MOST_BYTES = {ABOUT: 2**18, WEIGHTS: 2**36, ROUTING: 2**26, SAMPLE: 2**26, PICTURE: 2**24}
NEEDED = (ABOUT, WEIGHTS)
CARD_BYTES = 2**21
_HEADER_BYTES = 2**23  # of a safetensors file
_MOST_DEPTH = 32  # of JSON
# Dtypes of tensors, as safetensors writes them.
_DTYPES = {WEIGHTS: ('F32', 'BF16', 'F16'), ROUTING: ('F32',), SAMPLE: ('I32',)}


@dataclasses.dataclass(frozen=True)
class Routing:
  """What routers know of an expert, from the decoder's final hidden state h at an anchor.

  Attributes:
    centroid: float32 [D], mean of h on the expert's own text, less `origin`, of length 1.
    origin: float32 [D], mean of h on general text.
    threshold: cosine of (h - origin) and centroid above which a place counts as its own.
    gain_weight, gain_bias: score of the router 'gain', h @ gain_weight + gain_bias: by how much the
      log-odds that a text is its own exceed those from which on it saves nats.
  """
  centroid: np.ndarray
  origin: np.ndarray
  threshold: float
  gain_weight: np.ndarray
  gain_bias: float


@dataclasses.dataclass(frozen=True)
class Expert:
  """A package in memory.

  Attributes:
    card: its card; None for a coprocessor that came without one.
    coprocessor: its coprocessor.
    routing: what routers know of it; None where its package has nothing.
  """
  card: Card | None
  coprocessor: CoprocessorCheckpoint
  routing: Routing | None = None


# --- Reading ---


def read_card(directory: Path) -> Card:
  """Reads the card of a package, and nothing else.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = directory / CARD
  if not path.is_file() or path.is_symlink():
    raise UserError(f'{directory} holds no {CARD}: give the directory of an expert, which '
                    'launch/experts.py train has written')
  return parse_card(_read_small(path, CARD_BYTES), str(path))


def parse_card(content: bytes, where: str) -> Card:
  """Returns the card in the bytes of an expert.json. Raises UserError where it is none."""
  try:
    return from_json(parse_json(content))
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def parse_json(content: bytes) -> Any:
  """Returns the value of bytes that nobody vouches for. Raises UserError where they are no JSON."""
  try:
    value = json.loads(content, parse_constant=_refuse, parse_float=_finite, parse_int=_small)
    _check_depth(value, _MOST_DEPTH)
    return value
  except (ValueError, RecursionError) as error:
    raise UserError(f'damaged ({type(error).__name__}: {str(error):.120}): get it again') from error


def _refuse(constant: str) -> None:
  raise ValueError(f'{constant} is no number of JSON')


def _finite(written: str) -> float:
  return float(written) if math.isfinite(float(written)) else _refuse(written)


def _small(written: str) -> int:
  return int(written) if abs(int(written)) < 2**63 else _refuse(written)


def _check_depth(value: Any, most: int) -> None:
  if most < 0:
    raise ValueError(f'values are nested more than {_MOST_DEPTH} deep')
  inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
  for each in inner:
    _check_depth(each, most - 1)


def check_package(directory: Path) -> Card:
  """Checks every file of a package, without reading a weight; returns its card.

  Raises:
    UserError: a file is missing, of another size or hash, no regular file, not listed in the card,
      or no safetensors file of the expected dtypes.
  """
  card = read_card(directory)
  check_names(card, str(directory))
  # Nothing may lie there that the card does not list, since readers prefer some names to others.
  if (directory / COPROCESSOR).is_symlink():
    raise UserError(f'{directory / COPROCESSOR} is a link: add the expert again')
  found = {path.relative_to(directory).as_posix()
           for folder in (directory, directory / COPROCESSOR) if folder.is_dir()
           for path in folder.iterdir() if not is_stray(path.name)}
  extra = sorted(found - {CARD, README, COPROCESSOR} - set(card.files))
  if extra:
    raise UserError(f'{directory} holds {extra[:8]}, which its card does not list: remove them, or '
                    'add the expert again')
  progress = Progress(f'checking {card.name}', 'files', len(card.files))
  for done, (name, entry) in enumerate(card.files.items(), start=1):
    check_file(directory / name, entry)
    if name in _DTYPES:
      _check_header(directory / name, _DTYPES[name])
    elif name == ABOUT:
      _check_json(directory / name)
    progress.update(done)
  return card


def check_names(card: Card, where: str) -> None:
  """Raises UserError unless the files of a card are those of a package, and of a sane size."""
  for name, entry in card.files.items():
    if name not in MOST_BYTES:
      raise UserError(f'{where}: its card lists the file {name!r:.80}, which is none of '
                      f'{sorted(MOST_BYTES)}: do not use this package')
    if entry['bytes'] > MOST_BYTES[name]:
      raise UserError(f'{where}: {name} has {entry["bytes"]:,} bytes, and at most '
                      f'{MOST_BYTES[name]:,} are accepted: do not use this package')
  missing = [name for name in NEEDED if name not in card.files]
  if missing:
    raise UserError(f'{where}: its card lists no {missing[0]}: add the expert again')


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
  """Raises UserError unless a file is regular and has the bytes and the hash of its entry."""
  try:
    status = path.lstat()
  except FileNotFoundError:
    raise UserError(f'{path} is missing: add the expert again') from None
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f'{path} is no regular file (a link, for instance): add the expert again')
  if status.st_size != entry['bytes']:
    raise UserError(f'{path} has {status.st_size:,} bytes, and its card says {entry["bytes"]:,}: '
                    'it is damaged; add the expert again')
  actual = sha256_of(path)
  if actual != entry['sha256']:
    raise UserError(f'{path} has the hash {actual[:16]}..., and its card says '
                    f'{entry["sha256"][:16]}...: it was changed or damaged; add the expert again')


def _check_json(path: Path) -> None:
  """Raises UserError unless a small file is JSON that all readers can take."""
  try:
    parse_json(_read_small(path, MOST_BYTES[ABOUT]))
  except UserError as error:
    raise UserError(f'{path}: {error}') from error


def _check_header(path: Path, dtypes: Sequence[str]) -> None:
  """Raises UserError unless a safetensors file has a sane header, and tensors of these dtypes."""
  with path.open('rb') as file:
    start = file.read(8)
    size = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
    if not 0 < size <= min(_HEADER_BYTES, path.stat().st_size - 8):
      raise UserError(f'{path}: its header would take {size:,} bytes: it is no safetensors file, '
                      'or damaged; do not use this package')
    try:
      header = parse_json(file.read(size))
      found = {str(tensor['dtype']) for name, tensor in header.items() if name != '__metadata__'}
    except (UserError, TypeError, KeyError, AttributeError) as error:
      raise UserError(f'{path}: its header is damaged ({error}): do not use this '
                      'package') from error
  if found - set(dtypes):
    raise UserError(f'{path} holds the dtypes {sorted(found - set(dtypes))}, and {list(dtypes)} '
                    'are expected: do not use this package')


def _read_small(path: Path, most: int) -> bytes:
  with path.open('rb') as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise UserError(f'{path} has more than {most:,} bytes: do not use this package')
  return content


def load_package(directory: Path) -> Expert:
  """Checks and reads a package.

  Raises:
    UserError: see `check_package`; card and coprocessor differ; or a weight is not finite.
  """
  card = check_package(directory)
  coprocessor = coprocessor_checkpoint.load(directory / COPROCESSOR)
  check_agreement(card, coprocessor, str(directory))
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(coprocessor.params)):
    raise UserError(f'{directory / WEIGHTS} holds weights that are not finite: do not use this '
                    'package')
  return Expert(card, coprocessor, _read_routing(directory, coprocessor))


def check_agreement(card: Card, description: Description, where: str) -> None:
  """Raises UserError unless a card says of its coprocessor what coprocessor.json says."""
  config = description.config
  for name, said, is_so in (
      ('base.fingerprint', card.base['fingerprint'], description.decoder_fingerprint),
      ('vocabulary', card.vocabulary, description.vocabulary_hash),
      ('latents.number', card.latents.get('number'), config.num_latents),
      ('latents.form', card.latents.get('form'), config.latents)):
    if said != is_so:
      raise UserError(f'{where}: its card has {name} = {said!r}, but {ABOUT} has {is_so!r}: '
                      'do not use this package')


def read_tensors(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
  """Reads a small safetensors file whose header was checked; None stands for any size of an axis.

  Raises:
    UserError: it is damaged, or has other tensors.
  """
  try:
    arrays = load_file(path)
  except (OSError, ValueError, SafetensorError) as error:
    raise UserError(f'{path} is damaged ({error}): add the expert again') from error
  for name in sorted(arrays.keys() | shapes.keys()):
    shape = arrays[name].shape if name in arrays else None
    expected = shapes.get(name)
    if shape is None or expected is None or len(shape) != len(expected) or any(
        size not in (None, found) for size, found in zip(expected, shape, strict=True)):
      raise UserError(f'{path}: {name} has shape {shape}, and {expected} is expected: add the '
                      'expert again')
    if not arrays[name].size:
      raise UserError(f'{path}: {name} is empty: add the expert again')
    if not np.isfinite(arrays[name]).all():
      raise UserError(f'{path}: {name} holds numbers that are not finite: do not use this package')
  return arrays


def _read_routing(directory: Path, description: Description) -> Routing | None:
  path, width = directory / ROUTING, description.decoder_config.embed_dim
  if not path.is_file():
    return None
  arrays = read_tensors(path, {
      'centroid': (width,), 'origin': (width,), 'threshold': (1,), 'gain_weight': (width,),
      'gain_bias': (1,)})
  return Routing(arrays['centroid'], arrays['origin'], float(arrays['threshold'][0]),
                 arrays['gain_weight'], float(arrays['gain_bias'][0]))


def read_sample(directory: Path) -> dict[str, dict[str, np.ndarray]] | None:
  """Reads the held-out rows of a package, by name of the text.

  They are 'tokens' [R, T], 'segments' [R, T], and 'texts' [R], the number of each row's text.

  Returns None where the package has none. Raises UserError where it is damaged.
  """
  path = directory / SAMPLE
  if not path.is_file():
    return None
  try:
    names = sorted({key.partition('/')[0] for key in load_file(path)})
  except (OSError, ValueError, SafetensorError) as error:
    raise UserError(f'{path} is damaged ({error}): add the expert again') from error
  arrays = read_tensors(path, {f'{name}/{part}': shape for name in names
                               for part, shape in SAMPLE_PARTS.items()})
  return {name: {part: arrays[f'{name}/{part}'] for part in SAMPLE_PARTS} for name in names}


# --- Writing ---


def check_sample(sample: Mapping[str, Mapping[str, np.ndarray]]) -> None:
  """Raises UserError if held-out rows are more than a package may hold; see `read_sample`."""
  size, most = len(_sample_file(sample)), MOST_BYTES[SAMPLE]
  if size > most:
    raise UserError(f'the held-out rows take {size:,} bytes, and a package holds at most {most:,}: '
                    'give --nosample, or fewer evaluation.num_texts')


def write_package(directory: Path, card: Card, coprocessor: CoprocessorCheckpoint, *,
                  routing: Routing | None = None,
                  sample: Mapping[str, Mapping[str, np.ndarray]] | None = None,
                  picture: bytes | None = None) -> Card:
  """Writes a package whole or not at all; returns its card, which lists the files.

  Args:
    directory: directory to create.
    card: the card. What it says of files is replaced.
    coprocessor: the coprocessor.
    routing, sample: see `Expert` and `read_sample`; None for none.
    picture: content of scores.png; None for none.

  Raises:
    UserError: `directory` exists already or cannot be written, or the coprocessor takes several
      files.
  """
  check_agreement(card, coprocessor, str(directory))
  with whole_directory(directory) as partial, explain_failed_write(directory):
    coprocessor_checkpoint.save(partial / COPROCESSOR, coprocessor, MOST_BYTES[WEIGHTS])
    if routing is not None:
      (partial / ROUTING).write_bytes(save({
          name: np.atleast_1d(np.asarray(value, np.float32))
          for name, value in vars(routing).items()}))
    if sample:
      (partial / SAMPLE).write_bytes(_sample_file(sample))
    if picture is not None:
      (partial / PICTURE).write_bytes(picture)
    files = {path.relative_to(partial).as_posix(): {
        'bytes': path.stat().st_size, 'sha256': sha256_of(path)}
             for path in sorted(partial.rglob('*')) if path.is_file()}
    card = dataclasses.replace(card, files=files)
    check_names(card, str(directory))
    write_card(partial, card)
  return card


def write_card(directory: Path, card: Card) -> None:
  """Writes expert.json, and README.md, which is rendered from it, into an existing directory."""
  (directory / CARD).write_text(json.dumps(to_json(card), indent=2, allow_nan=False) + '\n')
  (directory / README).write_text(render(card))


def _sample_file(sample: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
  return save({f'{name}/{part}': np.asarray(array, np.int32)
               for name, parts in sample.items() for part, array in parts.items()})
