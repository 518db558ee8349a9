"""Experts that were added to this machine: a directory with a folder NAME@FINGERPRINT for each.

`add` downloads a package there, whole or not at all, and believes nothing before it is checked: the
card has the hash of every file, and the address that of the card.
"""

import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import Card, is_address, split_address
from latent_deliberation.experts.index import Entry, Place, find_entry, read_index
from latent_deliberation.experts.package import (
  CARD,
  CARD_BYTES,
  check_names,
  check_package,
  parse_card,
  read_card,
  write_card,
)
from latent_deliberation.files import explain_failed_write, list_directory, whole_directory
from latent_deliberation.paths import cache_directory
from latent_deliberation.progress import Progress

_VARIABLE = 'LATENT_DELIBERATION_EXPERTS'  # directory of added experts


def added_directory(given: str = '') -> Path:
  """Returns the directory of added experts: a given one, that of the environment, or a default.

  Raises:
    UserError: it is a URL.
  """
  place = given or os.environ.get(_VARIABLE) or str(cache_directory('experts'))
  if ':/' in place:
    raise UserError(f'{place} is a URL, and added experts must be on a disk of this machine: give '
                    f'a directory of it, by --experts or {_VARIABLE}')
  return Path(os.path.expanduser(place))


def list_added(directory: Path) -> list[tuple[Card, Path]]:
  """Returns the cards of added experts with their directories; damaged ones with a warning."""
  found = []
  for path in list_directory(directory):
    try:
      if (path / CARD).is_file():
        found.append((read_card(path), path))
    except FileNotFoundError:  # removed meanwhile
      continue
    except (UserError, OSError) as error:
      _warn_once(f'{path} is left out: {error}')
  return found


@functools.lru_cache(1024)  # a server looks again and again
def _warn_once(message: str) -> None:
  logging.warning('%s', message)


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
    try:
      check_package(target)
    except UserError as error:
      logging.warning('%s: it is downloaded again', error)
      _discard(target)
    else:
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
  local = Path(os.path.expanduser(source))
  if '://' not in source and (local / CARD).is_file():
    # A folder may have any name. That of an address promises a fingerprint.
    return Place.at(source), split_address(last)[1] if is_address(last) else ''
  if '@' in last:
    return Place.at(source), split_address(last)[1]
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
  target.parent.mkdir(exist_ok=True)
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
  _, fingerprint = split_address(written)
  # Where the card is damaged, the name of the folder still says which expert it was.
  path = directory / written
  if not fingerprint or not path.is_dir():
    path = find_added(written, directory)
  _discard(path)
  return path


def _discard(path: Path) -> None:
  # Out of sight first, so that a removal that is stopped leaves no half of a package.
  hidden = path.with_name(f'.{path.name}.removed-{secrets.token_hex(4)}')
  with explain_failed_write(path):
    path.rename(hidden)
    shutil.rmtree(hidden)


def index_of(directory: Path) -> list[Entry]:
  """Returns the added experts as an index lists them."""
  return [Entry.of(card) for card, _ in list_added(directory)]
