"""The keys of a config: their values, defaults, allowed values and meanings.

Everything comes from the dataclasses: a field's meaning is its line in the `Attributes:` block of
the class's docstring.
"""

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.data import data_config
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation import deliberation_config
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import DTYPES, FROZEN_DTYPES, Computation
from latent_deliberation.files import check_free, write_whole
from latent_deliberation.model.transformer import ATTENTIONS, REMAT_POLICIES

# Values that a class's own check allows; a key that is not listed shows its type.
CHOICES = {
    Computation: {'dtype': (*DTYPES, 'auto'), 'activations': (*DTYPES, 'auto'),
                  'frozen_dtype': FROZEN_DTYPES, 'remat': tuple(REMAT_POLICIES),
                  'attention': (*ATTENTIONS, 'auto')},
    DataConfig: {'source': data_config.SOURCES, 'vocabulary': data_config.VOCABULARIES,
                 'mode': data_config.MODES},
    DeliberationConfig: {
        'latents': deliberation_config.LATENTS, 'positions': deliberation_config.POSITIONS,
        'initialisation': deliberation_config.INITIALISATIONS,
        'trainable': deliberation_config.TRAINABLES, 'reads': deliberation_config.READS,
        'gate': deliberation_config.GATES, 'soft_tokens': deliberation_config.SOFT_TOKENS},
}
REQUIRED = 'required'

_ATTRIBUTE = re.compile(r'(\w+(?:, \w+)*): +(\S.*)')
_INTRODUCTION = """\
# Config keys

`python launch/config.py --reference=docs/config.md` writes this page; do not edit it. The text
comes from the docstrings of the dataclasses.

- `python launch/config.py --config=configs/quickstart.py` prints the values of a config.
- Every launch script with `--config` takes any key as a flag: `--config.training.batch_size=16`.
- A config file gives a value to each key that is required here.
"""


def parse_docstring(kind: type) -> tuple[str, dict[str, str]]:
  """Returns the first sentence of a class's docstring, and the meaning of each attribute.

  An `Attributes:` block has one `name: meaning` or `name, name: meaning` an entry. Further lines
  of an entry are indented. Another heading, such as `Raises:`, ends the block.

  Raises:
    ValueError: a line of the block is no entry.
  """
  lines = inspect.cleandoc(kind.__doc__ or '').splitlines()
  start = next((number for number, line in enumerate(lines) if line.startswith('Attributes:')),
               len(lines))
  first = ' '.join(lines[:start]).strip()
  sentence = re.split(r'(?<=\.) ', first)[0]
  end = next((number for number, line in enumerate(lines)
              if number > start and re.match(r'(Args|Raises|Returns):', line)), len(lines))
  meanings: dict[str, str] = {}
  names: list[str] = []
  for line in textwrap.dedent('\n'.join(lines[start + 1:end])).splitlines():
    entry = _ATTRIBUTE.fullmatch(line.rstrip())
    if entry:
      names = entry[1].split(', ')
      meanings |= dict.fromkeys(names, entry[2])
    elif names and line.startswith(' '):
      meanings |= {name: f'{meanings[name]} {line.strip()}' for name in names}
    elif line.strip():
      raise ValueError(f'{kind.__name__}: {line!r} in its docstring is not "name: meaning"')
  return sentence, {name: re.sub(r' +', ' ', text) for name, text in meanings.items()}


def meanings_of(kind: type) -> dict[str, str]:
  """Returns the meaning of each field; a field that is itself a config may have none.

  Raises:
    ValueError: a field has no line in the docstring, or a line has no field.
  """
  _, meanings = parse_docstring(kind)
  names = [field.name for field in dataclasses.fields(kind)]
  missing = [field.name for field in dataclasses.fields(kind)
             if field.name not in meanings and not dataclasses.is_dataclass(field.type)]
  unknown = sorted(set(meanings) - set(names))
  if missing or unknown:
    raise ValueError(f'{kind.__name__}: its docstring has no line for {missing}, and explains '
                     f'{unknown}, which are not fields: mend its "Attributes:" block')
  return meanings


def sections_of(kind: type, path: str = '') -> Iterator[tuple[str, type]]:
  """Yields (dotted path, dataclass) of a config's class and of every section inside it."""
  yield path, kind
  for field in dataclasses.fields(kind):
    inside = f'{path}.{field.name}' if path else field.name
    if dataclasses.is_dataclass(field.type):
      yield from sections_of(field.type, inside)
    # A mapping from free names to configs, such as a study's arms.
    for argument in typing.get_args(field.type):
      if dataclasses.is_dataclass(argument):
        yield from sections_of(argument, f'{inside}.NAME')


def format_reference(kinds: Sequence[type]) -> str:
  """Returns the reference of all keys in Markdown: a chapter a kind, a table a dataclass."""
  parts = [_INTRODUCTION]
  done: dict[type, str] = {}
  for kind in kinds:
    paths: dict[type, list[str]] = {}
    for path, section in sections_of(kind):
      paths.setdefault(section, []).append(path)
    parts.append(f'## {kind.__name__}\n')
    for section, names in paths.items():
      if section in done:
        continue
      if '' not in names:
        parts.append(f'### {", ".join(f"`{name}.*`" for name in names)}\n')
      parts.append(_format_section(section, done))
    # Keys of an earlier chapter are not repeated.
    done |= dict.fromkeys(paths, kind.__name__)
  return '\n'.join(parts)


def _format_section(kind: type, done: Mapping[type, str]) -> str:
  sentence, meanings = parse_docstring(kind)[0], meanings_of(kind)
  lines = [*([f'{_escape(sentence)}\n'] if sentence else []),
           '| key | default | values | meaning |', '|---|---|---|---|']
  for field in dataclasses.fields(kind):
    if not dataclasses.is_dataclass(field.type):
      lines.append(f'| `{field.name}` | {_default(field)} | {_values(kind, field)} | '
                   f'{_escape(meanings[field.name])} |')
    elif field.type in done:
      lines.append(f'| `{field.name}.*` | | | All keys of {done[field.type]}, above. |')
    else:
      lines.append(f'| `{field.name}.*` | | | '
                   f'{_escape(meanings.get(field.name, "See its own table below."))} |')
  return '\n'.join(lines) + '\n'


def _default(field: dataclasses.Field) -> str:
  if field.default_factory is not dataclasses.MISSING:
    return _code(field.default_factory())
  return REQUIRED if field.default is dataclasses.MISSING else _code(field.default)


def _values(kind: type, field: dataclasses.Field) -> str:
  choices = CHOICES.get(kind, {}).get(field.name)
  if choices:
    return ', '.join(_code(choice) for choice in choices)
  if typing.get_origin(field.type) is tuple:
    parts = [part.__name__ for part in typing.get_args(field.type) if part is not ...]
    return f'tuple of {parts[0]}' if ... in typing.get_args(field.type) else ', '.join(parts)
  if typing.get_origin(field.type) is not None and issubclass(
      typing.get_origin(field.type), Mapping):
    return 'mapping'
  return (field.type.__name__ if isinstance(field.type, type)
          else str(field.type).replace(' | ', ' or '))


def _code(value: Any) -> str:
  text = str(value).replace('|', r'\|') if isinstance(value, dict) else repr(value)
  return f'`{text}`'


def _escape(text: str) -> str:
  return re.sub(r'([|*<\[\]])', r'\\\1', text)


def format_values(config: Any) -> str:
  """Returns every key of a config with its value and the first sentence of its meaning.

  Args:
    config: an instance of a config's dataclass, such as an Experiment.
  """
  sections = list(_rows(config, ''))
  lines = [line for _, rows in sections for line in rows]
  keys = max(len(key) for key, _, _ in lines)
  values = min(max(len(value) for _, value, _ in lines), 24)
  width = max(shutil.get_terminal_size((140, 24)).columns - keys - values - 4, 40)
  printed = []
  for title, rows in sections:
    printed.append(f'\n{title}' if printed else title)
    for key, value, meaning in rows:
      sentence = re.split(r'(?<=\.) ', meaning)[0].removesuffix('.')
      short = textwrap.shorten(sentence, width, placeholder=' ...')
      printed.append(f'{key:<{keys}}  {value:<{values}}  {short}'.rstrip())
  return '\n'.join(printed)


def _rows(config: Any, path: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
  """Yields (title, rows of key, value and meaning) of a config, then of each section inside it."""
  kind, prefix = type(config), f'{path}.' if path else ''
  meanings = meanings_of(kind)
  rows, inside = [], []
  for field in dataclasses.fields(config):
    key, value = f'{prefix}{field.name}', getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      inside.append((key, value))
      continue
    entries = value if isinstance(value, Mapping) else {}
    configs = {name: entry for name, entry in entries.items() if dataclasses.is_dataclass(entry)}
    inside += [(f'{key}.{name}', entry) for name, entry in configs.items()]
    if not configs:
      rows.append((key, '' if entries else repr(value), meanings[field.name]))
    # Each entry of a mapping is a key of its own.
    rows += [(f'{key}.{name}', repr(entry), '') for name, entry in entries.items()
             if name not in configs]
  sentence = parse_docstring(kind)[0]
  yield f'# {path or kind.__name__}{": " + sentence if sentence else ""}', rows
  for key, value in inside:
    yield from _rows(value, key)


def write_reference(path: Path, kinds: Sequence[type]) -> None:
  """Writes the reference of all keys, over an earlier one at most.

  Raises:
    UserError: the file holds something else.
  """
  title = _INTRODUCTION.splitlines()[0]
  check_free([path], overwrite=path.is_file() and path.read_text().startswith(title))
  write_whole(path, format_reference(kinds).encode())
