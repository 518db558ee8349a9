"""The data files of benchmarks on local disk: a folder a task, with a JSON object a line."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.errors import MissingError, UserError

TASKS = Path(__file__).with_name('tasks')  # the task files of lm-evaluation-harness
_ENDINGS = ('.jsonl', '.jsonl.gz')


class Doc(dict[str, Any]):
  """A document, which says where it is from if it lacks a field.

  Attributes:
    where: its number and its file.
  """

  def __init__(self, fields: Mapping[str, Any], where: str):
    super().__init__(fields)
    self.where = where

  def __missing__(self, field: str) -> Any:
    raise UserError(f'{self.where} has no {field!r}: give documents with the fields that '
                    'docs/benchmarks.md names, or leave the task out')


def find_file(data: str, folder: str, name: str) -> Path:
  """Returns the file of a split: NAME.jsonl or NAME.jsonl.gz, or a sample such as NAME_1000.jsonl.

  Of several samples it is the largest one.

  Raises:
    MissingError: none of the directories has it.
  """
  places = [Path(os.path.expanduser(each)) / folder for each in data.split(os.pathsep)]
  for place in places:
    for ending in _ENDINGS:
      if (place / f'{name}{ending}').is_file():
        return place / f'{name}{ending}'
  for place in places:
    samples = {path: int(found[1]) for path in sorted(place.glob(f'{name}_*')) if (
        found := re.fullmatch(rf'{re.escape(name)}_(\d+)\.jsonl(?:\.gz)?', path.name))}
    if samples:
      return max(samples, key=samples.get)
  raise MissingError(f'{places[0]}/{name}.jsonl is missing, also with .gz: put the documents of '
                     f'this task there, a JSON object a line, or leave the task out'
                     + (f'. Nor is it in {", ".join(map(str, places[1:]))}' if places[1:] else ''))


def read_documents(path: Path) -> list[Doc]:
  """Returns the documents of a .jsonl or .jsonl.gz file.

  Raises:
    UserError: it has no document, or a line is no JSON object.
  """
  opened = gzip.open if path.suffix == '.gz' else open
  docs = []
  try:
    with opened(path, 'rt', encoding='utf-8') as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          doc = json.loads(line)
          if not isinstance(doc, dict):
            raise ValueError(f'line {number} is no JSON object')
          docs.append(Doc(doc, f'document {len(docs)} of {path}'))
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise UserError(f'{path} cannot be read ({error}): give a file with a JSON object a line'
                    ) from error
  if not docs:
    raise UserError(f'{path} holds no document: give one with a JSON object a line')
  return docs


def check_gold(docs: Sequence[Doc], key: str, where: str) -> None:
  """Raises UserError where a document has no gold answer, as those of hidden test sets."""
  # A hidden label is -1 in many sets. An answer in words may be -1.
  hidden = (None, '', [], -1, '-1') if key == 'label' else (None, '', [])
  for number, doc in enumerate(docs):
    if doc.get(key) in hidden:
      raise UserError(f'document {number} of {where} has {key} = {doc.get(key)!r}: it has no gold '
                      'answer. Give a split with answers, such as the validation split')
