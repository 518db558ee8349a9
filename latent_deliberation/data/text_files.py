"""The files of a corpus: those that a path or pattern means, and their text as plain UTF-8.

A directory or wildcard stands for files that people meant, and the log names the others. Compressed
files and UTF-16 are copied once, so that a document can be read at its place.
"""

import bz2
import collections
import contextlib
import dataclasses
import glob
import gzip
import io
import lzma
import os
import shutil
import sysconfig
import tokenize
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

from absl import logging

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.files import JSON_LINES, find_encoding, is_stray

# Endings of the files that a directory stands for. A .json there usually describes the others.
OF_LINES = tuple(ending for ending in JSON_LINES if ending != '.json')
OF_DIRECTORIES = ('.txt', '.md', '.markdown', '.rst', *OF_LINES)
UNPACK = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
# Commands that unpack what Python's own library does not.
UNPACK_BY_HAND = {'.zst': 'zstd -d', '.zip': 'unzip', '.lz4': 'lz4 -d', '.7z': '7z x'}
STDLIB_SUFFIXES = ('.py', '.rst', '.txt')
STDLIB_LEFT_OUT = frozenset(
    ('test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'))


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A file of a corpus.

  Attributes:
    name: path within the corpus, the same on every machine.
    path: path on this machine.
    plain: path of the same text uncompressed and in UTF-8; `path`, or a copy.
  """
  name: str
  path: Path
  plain: Path

  @property
  def has_lines(self) -> bool:
    """Whether each line is a document, as JSON; otherwise the whole file is one."""
    return text_suffix(self.path) in JSON_LINES


def text_suffix(path: Path) -> str:
  """Returns the ending of a file's text in lower case: '.jsonl' for a.JSONL and a.jsonl.gz."""
  is_packed = path.suffix.lower() in (*UNPACK, *UNPACK_BY_HAND)
  return Path(path.stem if is_packed else path.name).suffix.lower()


def list_files(patterns: Sequence[str]) -> tuple[TextFile, ...]:
  """Returns the files that paths, directories and globs mean, each once, sorted by name.

  A path that exists is taken literally, even if it holds wildcard characters. So is the part of a
  glob that exists.

  Raises:
    MissingError: nothing matches.
  """
  files = {}
  for pattern in patterns:
    root, paths = _match(pattern) if pattern else (Path(), [])
    if not paths:
      raise MissingError(
          f'no file matches {pattern!r} (seen from {os.getcwd()}): give existing files, a glob, or '
          f'a directory with files {", ".join(OF_DIRECTORIES)}. Hidden and backup files count only '
          'if they are named')
    # A file that two patterns or two links mean is one file, and has its first name.
    for path in sorted(paths):
      files.setdefault(path.resolve(), TextFile(path.relative_to(root).as_posix(), path, path))
  return tuple(sorted(files.values(), key=lambda file: (file.name, str(file.path))))


def _match(pattern: str) -> tuple[Path, list[Path]]:
  """Returns the directory that names are relative to, and the files of a pattern."""
  path = Path(pattern)
  if path.is_file():
    return path.parent, [path]
  if path.is_dir():
    root, paths = path, _files_below(path)
  else:
    # The longest beginning that exists is a directory, the rest is a pattern.
    parts = path.parts
    fixed = next((n for n in range(len(parts) - 1, 0, -1) if Path(*parts[:n]).is_dir()), 0)
    root = Path(*parts[:fixed])
    found = glob.glob(os.path.join(*parts[fixed:]), root_dir=root, recursive=True)
    paths = [root / name for name in found if (root / name).is_file()]
  kept, left_out, matched = [], collections.Counter(), set(paths)
  for found in paths:
    reason = _reason_to_leave_out(found, root, matched, in_directory=root == path)
    left_out[reason] += 1
    if not reason:
      kept.append(found)
  del left_out['']
  if left_out:
    logging.info('%s: left out %s', pattern, ', '.join(
        f'{count} {reason}' for reason, count in sorted(left_out.items())))
  return root, kept


def _files_below(root: Path) -> list[Path]:
  """Returns the files below a directory, also behind links; warns of folders it may not read."""
  def warn(error: OSError) -> None:
    logging.warning('%s is left out: %s', error.filename, error.strerror)

  found, seen = [], set()
  for folder, folders, names in os.walk(root, onerror=warn, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above would never end
      folders.clear()
      continue
    seen.add(real)
    folders.sort()
    found += (path for name in names if (path := Path(folder, name)).is_file())
  return found


def _reason_to_leave_out(path: Path, root: Path, matched: Collection[Path],
                         in_directory: bool) -> str:
  """Returns what a file is if a directory or wildcard does not mean it, and '' if it does."""
  # A glob finds hidden names only if it asks for them.
  parts = path.relative_to(root).parts if in_directory else (path.name.lstrip('.'),)
  if any(map(is_stray, parts)):
    return 'hidden, backup or unfinished files'
  if in_directory and text_suffix(path) not in OF_DIRECTORIES:
    return f'files {path.suffix or "without an ending"}'
  if text_suffix(path) != path.suffix.lower() and path.with_suffix('') in matched:
    return 'compressed files that are there unpacked, too'
  return ''


def list_stdlib() -> tuple[TextFile, ...]:
  """Returns sources and text documentation of the interpreter, without tests and packages.

  Raises:
    MissingError: the interpreter comes without its sources.
  """
  root = Path(sysconfig.get_path('stdlib'))
  files = []
  for folder, folders, names in os.walk(root):
    # Changed in place, which keeps os.walk out of these folders.
    folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT and not is_stray(name)]
    for name in names:
      path = Path(folder, name)
      if path.suffix in STDLIB_SUFFIXES and not is_stray(name) and path.is_file():
        try:
          # Nobody chose these files, so one that is not text is left out and not refused.
          decode(path.read_bytes(), path)
        except UserError as error:
          logging.info('leaving a file of the standard library out: %s', error)
        else:
          files.append(TextFile(path.relative_to(root).as_posix(), path, path))
  if not files:
    raise MissingError(
        f'the standard library at {root} has no file {", ".join(STDLIB_SUFFIXES)}: this '
        "interpreter comes without its sources, use source = 'text' with files of your own")
  return tuple(sorted(files, key=lambda file: file.name))


def make_plain(file: TextFile, copy: Path) -> TextFile:
  """Returns the file with a plain copy of its text, if it is compressed or in UTF-16.

  Args:
    file: file whose `plain` is its path.
    copy: path for the copy.

  Raises:
    UserError: the file is damaged, or is compressed in a form that Python does not unpack.
  """
  packing = file.path.suffix.lower()
  if packing in UNPACK_BY_HAND:
    raise UserError(f'{file.path} is compressed in a form that Python does not read: unpack it '
                    f'({UNPACK_BY_HAND[packing]} {file.path.name}) and give what comes out')
  unpack = UNPACK.get(packing, open)
  try:
    with unpack(file.path, 'rb') as stream:
      encoding = find_encoding(stream.read(2))
    if unpack is open and encoding != 'utf-16':
      return file
    with (unpack(file.path, 'rt', encoding=encoding, newline='') as source,
          copy.open('w', encoding='utf-8', newline='') as target):
      shutil.copyfileobj(source, target)
  except UnicodeDecodeError as error:
    raise UserError(f'{file.path}: not {error.encoding} text ({error.reason}): convert it '
                    '(iconv -t utf-8) or leave it out') from error
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise UserError(f'{file.path} cannot be unpacked into {copy.parent} ({error}): copy or '
                    'download it again, rename it if it is not compressed, or set TMPDIR to a '
                    'directory with more space') from error
  return dataclasses.replace(file, plain=copy)


def decode(content: bytes, path: Path, start: int = 0) -> str:
  """Returns the text of a file, or of its part from byte `start` on, without a byte order mark.

  Python sources may declare an encoding. Everything else is UTF-8.

  Raises:
    UserError: it is binary or of another encoding; names the byte.
  """
  # A NUL is valid UTF-8, but only binary files hold one.
  nul = content.find(b'\0')
  if nul >= 0:
    raise UserError(f'{path}: NUL at byte {start + nul}, so it is a binary file, or UTF-16 without '
                    'a mark: leave it out, or convert it (iconv -f utf-16 -t utf-8)')
  encoding = 'utf-8'
  if path.suffix == '.py':
    with contextlib.suppress(SyntaxError):
      encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
  try:
    return content.decode(encoding).removeprefix('\ufeff')
  except LookupError as error:  # a codec that makes no text, such as rot13
    raise UserError(f'{path}: its first lines declare the encoding {encoding}, and that is none of '
                    'text: correct it, or leave the file out') from error
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: not {encoding} text at byte {start + error.start} ({error.reason}): '
                    'convert it (iconv -t utf-8) or leave it out') from error
