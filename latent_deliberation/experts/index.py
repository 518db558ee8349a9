"""The marketplace: an index of experts, anywhere.

An index is a folder with index.json and a folder NAME@FINGERPRINT for each package. It is reached
as a path, http(s)://, gs://, s3:// or hf://, all through fsspec. It is a file format and no server:
`publish` writes it into a folder, which may then be copied to any of these places.
"""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import GENERAL, Card, format_gain, split_address, words_of
from latent_deliberation.experts.package import check_package, parse_json, write_card
from latent_deliberation.files import explain_failed_write, lock, whole_directory, write_json

INDEX, FORMAT = 'index.json', 1
_INDEX_BYTES = 2**26
_CHUNK = 2**18
_REMOTE = ('http', 'https', 'gs', 's3', 'hf')


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
      raise UserError(f'the entry {values["name"]!r:.80} has a field of another type, or '
                      'characters that cannot be printed')
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


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder anywhere.

  Attributes:
    address: path or URL, without a slash at its end.
  """
  address: str

  @classmethod
  def at(cls, address: str) -> 'Place':
    """Returns the folder at a path, or at an address of one of _REMOTE.

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
    options: dict[str, Any] = {}
    try:
      if path.startswith('http'):
        import aiohttp
        # Without a block size, http needs neither ranges nor the length of a file. A large file may
        # take its time, as long as something comes.
        options = {'block_size': 0, 'client_kwargs': {
            'timeout': aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
      with fsspec.open(path, 'rb', **options) as file:
        while chunk := file.read(_CHUNK):
          yield chunk
    except FileNotFoundError as error:  # over http, also where nobody answers
      raise UserError(f'{path}: there is no such file, or it cannot be reached; give the folder of '
                      'an index, or of an expert') from error
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
  return _entries_of(_read_content(address), f'{Place.at(address).address}/{INDEX}')


def _entries_of(content: Mapping[str, Any], where: str) -> list[Entry]:
  entries = []
  for number, written in enumerate(content['experts']):
    try:
      entries.append(Entry.from_json(written))
    except UserError as error:
      logging.warning('%s: entry %d is left out: %s', where, number, error)
  return entries


def _read_content(address: str) -> Mapping[str, Any]:
  """Returns all of an index.json, also what is not known here; see `read_index`."""
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
  return content


def search(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
  """Returns the experts that have a word in name, description, keywords or decoder, best first."""
  wanted = {word for text in words for word in (text.lower(), *words_of(text))}

  def score(entry: Entry) -> float:
    base = entry.base['name'].lower()
    telling = {entry.name, *words_of(entry.name), base, *words_of(base)}
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
  index = Path(os.path.expanduser(index))
  if '://' in str(index) or ':/' in str(index):
    raise UserError(f'--index={index} is a URL: publish into a folder here, and copy that folder '
                    'to its place')
  with lock(index / 'index.lock', f'publishes in {index}', wait=True):
    content: Mapping[str, Any] = {'format': FORMAT, 'experts': []}
    if (index / INDEX).exists():
      content = _read_content(str(index))
      if card.address in [entry.address for entry in _entries_of(content, str(index / INDEX))]:
        raise UserError(f'{index} has {card.address} already')
    target = index / card.address
    if not target.exists():  # left by a launch that was stopped before it was listed
      with whole_directory(target) as partial, explain_failed_write(target):
        for name in card.files:
          (partial / name).parent.mkdir(exist_ok=True)
          shutil.copyfile(package / name, partial / name)
        write_card(partial, card)
    check_package(target)
    # Entries of newer versions stay as they are.
    write_json(index / INDEX, {**content, 'experts': [
        *content['experts'], dataclasses.asdict(Entry.of(card))]})
  return card
