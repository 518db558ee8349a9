"""The marketplace: an index of experts anywhere, and the directory of those that were added.

An index is a folder with index.json and a folder NAME@FINGERPRINT for each package. It is reached
as a path, http(s)://, gs:// or hf://, all through fsspec. It is a file format and no server:
`publish` writes it into a folder, which may then be copied to any of these places.

`add` downloads a package into the directory of added experts, whole or not at all, and believes
nothing before it is checked: the card has the hash of every file, and the address that of the card.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import (
  GENERAL,
  Card,
  check_name,
  format_gain,
  split_address,
)
from latent_deliberation.experts.package import (
  CARD,
  CARD_BYTES,
  check_names,
  check_package,
  parse_card,
  parse_json,
  read_card,
  write_card,
)
from latent_deliberation.experts.routing import words_of
from latent_deliberation.files import (
  explain_failed_write,
  list_directory,
  lock,
  whole_directory,
  write_json,
)
from latent_deliberation.progress import Progress

INDEX, FORMAT = 'index.json', 1
_INDEX_BYTES = 2**26
_CHUNK = 2**18
_VARIABLE = 'LATENT_DELIBERATION_EXPERTS'  # directory of added experts
_REMOTE = ('http', 'https', 'gs', 'hf')


@dataclasses.dataclass(frozen=True)
class Entry:
  """An expert as an index lists it.

  Attributes:
    name, fingerprint: its address.
    description, licence, keywords: as in its card.
    base: name and fingerprint of its decoder.
    gain, general: nats saved on its own text and on general text, as cells of a table.
    bytes: size of its package.
  """
  name: str
  fingerprint: str
  description: str
  licence: str
  keywords: tuple[str, ...]
  base: Mapping[str, str]
  gain: str
  general: str
  bytes: int

  @classmethod
  def of(cls, card: Card) -> 'Entry':
    """Returns the entry of a card."""
    return cls(card.name, card.fingerprint, card.description, card.licence, card.keywords,
               {key: card.base[key] for key in ('name', 'fingerprint')},
               format_gain(card.scores.get(card.name)), format_gain(card.scores.get(GENERAL)),
               sum(entry['bytes'] for entry in card.files.values()))

  @classmethod
  def from_json(cls, content: Any) -> 'Entry':
    """Returns the entry in a value of index.json, without fields that are not known here.

    Raises:
      UserError: it lacks a field, or has one of another type.
    """
    texts = ('name', 'fingerprint', 'description', 'licence', 'gain', 'general')
    try:
      values = {key: content[key] for key in texts}
      keywords, base, size = tuple(content['keywords']), content['base'], content['bytes']
      decoder = {key: base[key] for key in ('name', 'fingerprint')}
    except (KeyError, TypeError) as error:
      raise UserError(f'an entry is damaged ({type(error).__name__}: {error})') from error
    if not all(isinstance(text, str) and text.isprintable()
               for text in (*values.values(), *keywords, *decoder.values())) or (
        not isinstance(size, int)):
      raise UserError(f'the entry {values["name"]!r:.80} has a field of another type, or signs '
                      'that cannot be printed')
    split_address(f'{values["name"]}@{values["fingerprint"]}')
    return cls(**values, keywords=keywords, base=decoder, bytes=size)

  @property
  def address(self) -> str:
    """NAME@FINGERPRINT."""
    return f'{self.name}@{self.fingerprint}'

  @property
  def row(self) -> list[str]:
    """Cells of a table; see COLUMNS."""
    return [self.address, self.base['name'], self.gain, self.general,
            f'{self.bytes / 2**20:.1f} MiB', self.licence or '-', self.description]


COLUMNS = ('expert', 'decoder', 'nats saved on its text', 'on general text', 'size', 'licence',
           'description')


# --- Places ---


def added_directory(given: str = '') -> Path:
  """Returns the directory of added experts: a given one, that of the environment, or a default."""
  return Path(os.path.expanduser(
      given or os.environ.get(_VARIABLE) or '~/.cache/latent_deliberation/experts'))


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder anywhere.

  Attributes:
    address: path or URL, without a slash at its end.
  """
  address: str

  @classmethod
  def at(cls, address: str) -> 'Place':
    """Returns the folder at a path, http(s)://, gs:// or hf:// address.

    Raises:
      UserError: it is an address of another kind.
    """
    scheme, colon, _ = address.partition('://')
    if colon and scheme not in _REMOTE or '::' in address:
      raise UserError(f'{address:.200}: give a path, or an address that begins with one of '
                      f'{[f"{name}://" for name in _REMOTE]}')
    return cls((address if colon else os.path.expanduser(address)).rstrip('/'))

  def __truediv__(self, name: str) -> 'Place':
    return Place(f'{self.address}/{name}')

  def chunks(self, name: str) -> Iterator[bytes]:
    """Yields the content of a file of the folder, in order.

    Raises:
      UserError: there is none, or it cannot be reached or read to its end.
    """
    if importlib.util.find_spec('fsspec') is None:
      raise UserError(f"{self.address} needs the library fsspec: pip install -e '.[experts]'")
    import fsspec
    path = f'{self.address}/{name}'
    # Without a block size, http needs neither ranges nor the length of a file.
    options = {'block_size': 0} if path.startswith('http') else {}
    try:
      with fsspec.open(path, 'rb', **options) as file:
        while chunk := file.read(_CHUNK):
          yield chunk
    except FileNotFoundError as error:
      raise UserError(f'{path}: there is no such file; give the folder of an index, or of an '
                      'expert') from error
    except Exception as error:  # the libraries of stores have classes of their own
      raise UserError(f'{path} cannot be read ({type(error).__name__}: {str(error):.200}): check '
                      'address, network and rights, and try again') from error

  def read(self, name: str, most: int) -> bytes:
    """Returns a small file. Raises UserError as `chunks` does, or where it has more bytes."""
    parts, size = [], 0
    for chunk in self.chunks(name):
      parts.append(chunk)
      size += len(chunk)
      if size > most:
        raise UserError(f'{self.address}/{name} has more than {most:,} bytes: it is no such file')
    return b''.join(parts)


# --- An index ---


def read_index(address: str) -> list[Entry]:
  """Returns the experts of an index; damaged entries are left out with a warning.

  Raises:
    UserError: there is no index, it cannot be reached, or it is damaged or of another format.
  """
  place = Place.at(address)
  where = f'{place.address}/{INDEX}'
  try:
    content = parse_json(place.read(INDEX, _INDEX_BYTES))
  except UserError as error:
    raise UserError(f'{where}: {error}' if where not in str(error) else str(error)) from error
  if not isinstance(content, Mapping) or content.get('format') != FORMAT or (
      not isinstance(content.get('experts'), list)):
    raise UserError(f'{where} is no index of experts, or of a newer version: format = '
                    f'{content.get("format") if isinstance(content, Mapping) else content!r:.40}, '
                    f'expected {FORMAT}')
  entries = []
  for number, written in enumerate(content['experts']):
    try:
      entries.append(Entry.from_json(written))
    except UserError as error:
      logging.warning('%s: entry %d is left out: %s', where, number, error)
  return entries


def search(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
  """Returns the experts that have a word in name, description, keywords or decoder, best first."""
  wanted = {word for text in words for word in (words_of(text) or [text.lower()])}

  def score(entry: Entry) -> float:
    telling = {*words_of(entry.name), entry.name, entry.base['name'].lower()}
    told = set(words_of(entry.description))
    found = 4 * len(wanted & telling) + 2 * len(wanted & told)
    return found + sum(1 / (1 + place / 16) for place, word in enumerate(entry.keywords)
                       if word in wanted)

  scored = [(score(entry), entry) for entry in entries]
  return [entry for points, entry in sorted(scored, key=lambda pair: -pair[0]) if points > 0]


def find_entry(entries: Sequence[Entry], written: str, where: str) -> Entry:
  """Returns the expert NAME or NAME@FINGERPRINT; of several with one name, the last.

  Raises:
    UserError: there is none.
  """
  name, fingerprint = split_address(written)
  found = [entry for entry in entries if entry.name == name
           and fingerprint in ('', entry.fingerprint)]
  if not found:
    names = sorted({entry.name for entry in entries})
    raise UserError(f'{where} has no expert {written}: it has {names[:20]}')
  return found[-1]


def publish(package: Path, index: Path, force: bool = False) -> Card:
  """Copies a package into an index that is a folder here, and lists it.

  Raises:
    UserError: the package is damaged, shows no gain and is not forced, or is listed already; or
      the folder cannot be written.
  """
  card = check_package(package)
  if not card.gains and not force:
    raise UserError(f'{card.address} shows no gain on its own held-out text: '
                    f'{format_gain(card.scores.get(card.name))} nats. Train it longer or on more '
                    'text, or publish it all the same with --force')
  if '://' in str(index) or ':/' in str(index):
    raise UserError(f'--index={index} is a URL: publish into a folder here, and copy that folder '
                    'to its place')
  with lock(index / 'index.lock', f'publishes in {index}', wait=True):
    entries = read_index(str(index)) if (index / INDEX).exists() else []
    if card.address in [entry.address for entry in entries]:
      raise UserError(f'{index} has {card.address} already')
    target = index / card.address
    if not target.exists():  # left by a launch that was stopped before it was listed
      with whole_directory(target) as partial, explain_failed_write(target):
        for name in card.files:
          shutil.copyfile(package / name, partial / name)
        write_card(partial, card)
    check_package(target)
    write_json(index / INDEX, {'format': FORMAT, 'experts': [
        dataclasses.asdict(entry) for entry in (*entries, Entry.of(card))]})
  return card


# --- Added experts ---


def list_added(directory: Path) -> list[tuple[Card, Path]]:
  """Returns the cards of added experts with their directories; damaged ones with a warning."""
  found = []
  for path in list_directory(directory):
    if not (path / CARD).is_file():
      continue
    try:
      found.append((read_card(path), path))
    except UserError as error:
      logging.warning('%s is left out: %s', path.name, error)
  return found


def find_added(written: str, directory: Path) -> Path:
  """Returns the directory of an added expert, NAME or NAME@FINGERPRINT.

  Raises:
    UserError: there is none, or several have this name.
  """
  name, fingerprint = split_address(written)
  found = [(card, path) for card, path in list_added(directory)
           if card.name == name and fingerprint in ('', card.fingerprint)]
  if not found:
    raise UserError(f'no expert {written} in {directory}: add one with launch/experts.py add, or '
                    'give the directory of its package')
  if len(found) > 1:
    raise UserError(f'{len(found)} experts are called {name}: give one of '
                    f'{", ".join(card.address for card, _ in found)}')
  return found[0][1]


def locate(written: str, directory: Path) -> Path:
  """Returns the directory of a package: a path, or an added expert. Raises as `find_added` does."""
  path = Path(os.path.expanduser(written))
  if (path / CARD).is_file():
    return path
  if os.sep in written or written.startswith(('.', '~')):
    raise UserError(f'{written} holds no {CARD}: give the directory of an expert')
  return find_added(written, directory)


def add(source: str, directory: Path, index: str = '') -> tuple[Card, Path]:
  """Adds an expert; returns its card and its directory.

  Args:
    source: address of a package, as INDEX/NAME@FINGERPRINT or a directory; or NAME, or
      NAME@FINGERPRINT, of an index.
    directory: directory of added experts.
    index: address of the index; '' where `source` says it.

  Raises:
    UserError: there is no such expert, it cannot be reached, or anything about it is not as its
      card says. Nothing is left behind.
  """
  place, expected = _find_source(source, index)
  card = parse_card(place.read(CARD, CARD_BYTES), f'{place.address}/{CARD}')
  if expected and card.fingerprint != expected:
    raise UserError(f'{place.address} has the fingerprint {card.fingerprint}, and {expected} is '
                    'expected: it was replaced; do not use it')
  check_names(card, place.address)
  target = directory / card.address
  if target.exists():
    check_package(target)
    logging.info('%s is there already', target)
    return card, target
  with whole_directory(target) as partial, explain_failed_write(target):
    progress = Progress(f'adding {card.address}', 'bytes',
                        sum(entry['bytes'] for entry in card.files.values()))
    done = 0
    for name, entry in card.files.items():
      done = _download(place, name, entry, partial / name, progress, done)
    write_card(partial, card)
    check_package(partial)
  return card, target


def _find_source(source: str, index: str) -> tuple[Place, str]:
  """Returns the folder of a package, and the fingerprint that its address promises or ''."""
  if index:
    entry = find_entry(read_index(index), source, index)
    return Place.at(index) / entry.address, entry.fingerprint
  folder, _, last = source.rstrip('/').rpartition('/')
  name, at, fingerprint = last.partition('@')
  local = Path(os.path.expanduser(source))
  if at or '://' not in source and (local / CARD).is_file():
    if at:
      check_name(name)
    return Place.at(source), fingerprint
  if not folder:
    raise UserError(f'{source}: give --index=INDEX for the name of an expert, or the address of '
                    'its package')
  # INDEX/NAME is the newest expert of this name.
  entry = find_entry(read_index(folder), last, folder)
  return Place.at(folder) / entry.address, entry.fingerprint


def _download(place: Place, name: str, entry: Mapping[str, Any], target: Path, progress: Progress,
              done: int) -> int:
  """Copies a file, and checks its size and hash on the way; returns the bytes of all so far."""
  hasher, size = hashlib.sha256(), 0
  with target.open('xb') as written:
    for chunk in place.chunks(name):
      size += len(chunk)
      if size > entry['bytes']:
        break
      hasher.update(chunk)
      written.write(chunk)
      progress.update(done + size)
  if size != entry['bytes'] or hasher.hexdigest() != entry['sha256']:
    raise UserError(f'{place.address}/{name} is not the file that its card lists: it was changed '
                    'or cut off; try again, and do not use it if that does not help')
  return done + size


def remove(written: str, directory: Path) -> Path:
  """Removes an added expert; returns the directory that it had.

  Raises:
    UserError: see `find_added`, or it cannot be removed.
  """
  path = find_added(written, directory)
  # Out of sight first, so that a removal that is stopped leaves no half of a package.
  hidden = path.with_name(f'.{path.name}.removed-{secrets.token_hex(4)}')
  with explain_failed_write(path):
    path.rename(hidden)
    shutil.rmtree(hidden)
  return path


def index_of(directory: Path) -> list[Entry]:
  """Returns the added experts as an index lists them."""
  return [Entry.of(card) for card, _ in list_added(directory)]


def as_json(entries: Sequence[Entry]) -> str:
  """Returns entries as JSON, for programs."""
  return json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2)
