"""The card of an expert: what it is, what it works with, how it was made and what it gains.

expert.json is the card for programs. README.md is the same for people, rendered from it. The
fingerprint of an expert is a hash of its card, and the card has a hash of every other file. So
NAME@FINGERPRINT names exactly one package.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from latent_deliberation.errors import UserError, check_integer, check_types
from latent_deliberation.evaluation.perplexity import SHUFFLED
from latent_deliberation.evaluation.report import LABELS
from latent_deliberation.progress import format_duration
from latent_deliberation.tables import format_estimate, markdown_table

FORMAT = 1
GENERAL = 'general'  # name of the scores on text of no domain
AUTO, NONE = 'auto', 'none'  # said in the place of an expert's name
_WORD = re.compile(r'[^\W\d_]{3,}')  # three letters or more
_NAME = re.compile(r'[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?')
_HEXADECIMAL = re.compile(r'[0-9a-f]{16}')
_SHA256 = re.compile(r'[0-9a-f]{64}')


@dataclasses.dataclass(frozen=True)
class Card:
  """A card, without the files that it describes.

  Attributes:
    name: name of the expert.
    description: a sentence for people.
    licence: licence of the weights, such as 'CC-BY-4.0'; '' where nobody said.
    base: the decoder: its 'name' and the 'fingerprint' of its weights.
    vocabulary: hash of the decoder's vocabulary.
    latents: 'number', 'form' and 'trainable' as in DeliberationConfig, and 'parameters', the number
      of trained weights.
    recipe: how it was made: 'text' with its fingerprint, 'general', 'settings', 'steps',
      'starts_from', 'seed', 'seconds', 'command', 'machine' and 'git_commit', as far as they are
      known. 'steps' counts those of the coprocessor that it starts from.
    scores: name of a text -> scores on it; see `measuring.summarise_arms`. The expert's own text
      has the name of the expert.
    keywords: words that set the expert's text apart, the most telling ones first.
    files: name -> 'bytes' and 'sha256' of every other file but README.md.
  """
  name: str
  description: str
  licence: str
  base: Mapping[str, str]
  vocabulary: str
  latents: Mapping[str, Any]
  recipe: Mapping[str, Any]
  scores: Mapping[str, Any]
  keywords: tuple[str, ...]
  files: Mapping[str, Any]

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'keywords', tuple(self.keywords))
    check_name(self.name)
    check_printable(dataclasses.asdict(self), 'the card')
    for key in ('name', 'fingerprint'):
      if not isinstance(self.base.get(key), str):
        raise UserError(f'base.{key} = {self.base.get(key)!r}: give a text')
    for name, entry in self.files.items():
      if not isinstance(entry, Mapping) or not isinstance(entry.get('sha256'), str) or (
          not _SHA256.fullmatch(entry['sha256'])):
        raise UserError(f'files.{name} = {entry!r:.80}: give its bytes and sha256')
      check_integer(f'files.{name}.bytes', entry.get('bytes'), 0, 2**53)

  @functools.cached_property  # a card may be long
  def fingerprint(self) -> str:
    """Hash of everything that the card says, 16 hexadecimal digits."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(f'{FORMAT} {text}'.encode()).hexdigest()[:16]

  @property
  def address(self) -> str:
    """NAME@FINGERPRINT."""
    return f'{self.name}@{self.fingerprint}'

  @property
  def gain(self) -> tuple[float, float, float] | None:
    """Nats that a place saves on the expert's own text, with its interval; None if not measured."""
    return gain_on(self.scores.get(self.name))

  @property
  def gains(self) -> bool:
    """Whether a gain is shown: the interval is above zero, and above another text's latents."""
    gain, other = self.gain, gain_on(self.scores.get(self.name), SHUFFLED)
    return gain is not None and gain[1] > 0 and (other is None or gain[0] > other[0])


def gain_on(scores: Mapping[str, Any] | None,
            arm: str = 'own') -> tuple[float, float, float] | None:
  """Returns nats that a place saves, and the ends of the 95% interval; None if there is none."""
  numbers = numbers_of(scores, arm)
  return numbers if numbers and len(numbers) == 3 else None  # else there were too few texts


def numbers_of(scores: Mapping[str, Any] | None, arm: str = 'own') -> tuple[float, ...] | None:
  """Returns nats that a place saves, with the ends of their interval if they have one.

  Returns None where nothing was measured; a card that nobody vouches for may have anything there.
  """
  try:
    found = scores['gain'][arm]
    numbers = (found['nats'], *(found['ci95'] or ()))
    # A text such as 'nan' would become a number that JSON has not.
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
      return None
    return tuple(map(float, numbers))
  except (KeyError, TypeError, OverflowError):
    return None


def words_of(text: str) -> list[str]:
  """Returns the words of a text, in small letters."""
  return _WORD.findall(text.lower())


def check_name(name: str, key: str = 'name') -> None:
  """Raises UserError unless a name can be that of an expert, a directory and a flag's value.

  Args:
    name: the name.
    key: key or flag that gives it, for the message.
  """
  if not _NAME.fullmatch(name) or name in (AUTO, NONE) or '..' in name:
    raise UserError(f'{key} = {name!r:.80}: give up to 64 small letters, digits, and - . _ between '
                    f'them, and neither {AUTO} nor {NONE}')


def check_printable(value: Any, where: str) -> None:
  """Raises UserError where a text could do more in a terminal than be read."""
  if isinstance(value, Mapping):
    for key, inner in value.items():
      check_printable(key, where)
      check_printable(inner, where)
  elif isinstance(value, list | tuple):
    for inner in value:
      check_printable(inner, where)
  elif isinstance(value, str) and not value.isprintable():
    raise UserError(f'{where} has a text with characters that cannot be printed, {value!r:.80}: '
                    'leave them out')


def is_address(written: str) -> bool:
  """Returns whether a text is NAME@FINGERPRINT, by its form."""
  return _HEXADECIMAL.fullmatch(written.partition('@')[2]) is not None


def split_address(written: str) -> tuple[str, str]:
  """Returns the name and the fingerprint of NAME or NAME@FINGERPRINT; '' for no fingerprint.

  Raises:
    UserError: it is neither.
  """
  name, at, fingerprint = written.partition('@')
  check_name(name)
  if at and not _HEXADECIMAL.fullmatch(fingerprint):
    raise UserError(f'{written!r:.120}: a fingerprint is 16 hexadecimal digits, as '
                    'launch/experts.py list prints it')
  return name, fingerprint


def to_json(card: Card) -> dict[str, Any]:
  """Returns the content of expert.json."""
  return {'format': FORMAT, 'fingerprint': card.fingerprint, **dataclasses.asdict(card)}


def from_json(content: Any) -> Card:
  """Returns the card that the content of an expert.json describes.

  Fields of a later version are left out, so the fingerprint of such a card does not match.

  Raises:
    UserError: it is no card, of another format, or its fingerprint is that of another card.
  """
  if not isinstance(content, Mapping) or content.get('format') != FORMAT:
    found = content.get('format') if isinstance(content, Mapping) else content
    raise UserError(f'format = {found!r:.80}, expected {FORMAT}: it is no card of an expert, or of '
                    'a newer version')
  names = [field.name for field in dataclasses.fields(Card)]
  missing = [name for name in names if name not in content]
  if missing:
    raise UserError(f'the card lacks {missing}: add the expert again')
  card = Card(**{name: content[name] for name in names})
  if content.get('fingerprint') != card.fingerprint:
    raise UserError(f'fingerprint = {content.get("fingerprint")!r:.80}, but the card has '
                    f'{card.fingerprint}: it was changed, or has fields of a newer version; add '
                    'the expert again')
  return card


# --- For people ---


def render(card: Card) -> str:
  """Returns the card as a page of GitHub Markdown."""
  latents, recipe = card.latents, card.recipe
  title = f'# {card.name}: a latent expert for {card.base["name"]}'
  summary = ('' if card.gains else '**No gain is shown on its own text.** ') + card.description
  facts = [
      ('address', f'`{card.address}`'),
      ('decoder', f'{card.base["name"]}, weights `{card.base["fingerprint"]}`'),
      ('latents', f'{latents.get("number")} {latents.get("form")}, by {latents.get("trainable")} '
                  f'with {_count(latents.get("parameters"))} trained weights'),
      ('licence', card.licence or 'not stated'),
      *((key, str(recipe[key])) for key in ('steps', 'seed', 'machine', 'git_commit', 'command')
        if recipe.get(key) not in (None, '')),
      *((label, _describe_text(recipe[key])) for key, label in (
          ('text', 'own text'), (GENERAL, 'general text'))
        if isinstance(recipe.get(key), Mapping))]
  if isinstance(start := recipe.get('starts_from'), Mapping) and start:
    facts.append((
        'starts from', f'{start.get("name")}, weights `{start.get("fingerprint")}`, whose '
        f'{_count(start.get("steps"))} steps are counted above. Constant soft tokens started anew. '
        'What the start has read is not known here'))
  seconds = recipe.get('seconds')
  if isinstance(seconds, Mapping):
    facts.append(('time', ', '.join(f'{name} {format_duration(value)}'
                                    for name, value in seconds.items()
                                    if isinstance(value, int | float) and 0 <= value < 2**53)))
  parts = [title, summary, _tables(card), *_changes(card), '## Facts',
           markdown_table(['what', 'value'], facts, '---'), '## Use it', _usage(card)]
  if card.keywords:
    parts += ['## Words of its text', ', '.join(card.keywords[:40])]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _count(value: Any) -> str:
  """Returns a number with commas; a card that nobody vouches for may have anything there."""
  return f'{value:,}' if isinstance(value, int) else '?'


def _describe_text(text: Mapping[str, Any]) -> str:
  return (f'{text.get("name")}, {text.get("rows")} rows to train on, {text.get("held_out")} held '
          f'out, fingerprint `{str(text.get("fingerprint"))[:16]}`')


def _tables(card: Card) -> str:
  """Returns a table of nats saved by text and arm, and its legend."""
  tables = {name: scores for name, scores in card.scores.items()
            if isinstance(scores, Mapping) and isinstance(scores.get('gain'), Mapping)}
  arms = [arm for arm in LABELS if any(arm in scores['gain'] for scores in tables.values())]
  rows = [[name, _count(scores.get('texts')), *(format_gain(scores, arm) for arm in arms)]
          for name, scores in tables.items()]
  if not rows:
    return 'Nothing was measured.'
  ahead = next(iter(tables.values())).get('num_ahead')
  return '\n\n'.join([
      markdown_table(['held-out text', 'texts', *(LABELS[arm] for arm in arms)], rows),
      f'Nats that latents save at a place, summed over the next {ahead} tokens, with 95% '
      'intervals (bootstrap over texts). Above zero is better. Another text\'s latents, zero '
      'latents and constant soft tokens are controls.'])


def _changes(card: Card) -> Iterator[str]:
  """Yields a table for each text: the change of perplexity by ahead position and arm."""
  for name, scores in card.scores.items():
    try:
      arms = [arm for arm in LABELS if arm in scores['gain']]
      rows = [[str(at), *('{:+.1f} [{:+.1f}, {:+.1f}]'.format(
          scores['all_positions'][arm]['change_pct'][at - 1],
          *scores['all_positions'][arm]['ci95'][at - 1]) for arm in arms)]
              for at in scores['positions']]
    except (KeyError, TypeError, ValueError, IndexError):  # a card may have anything there
      continue
    yield (f'Change of perplexity in percent on {name} text, with 95% intervals. Below zero is '
           'better.')
    yield markdown_table(['ahead position', *(LABELS[arm] for arm in arms)], rows)


def format_gain(scores: Mapping[str, Any] | None, arm: str = 'own') -> str:
  """Returns nats and interval as a cell of a table."""
  numbers = numbers_of(scores, arm)
  return format_estimate(numbers[0], gain_on(scores, arm) and numbers[1:]) if numbers else '-'


def _usage(card: Card) -> str:
  return '\n'.join([
      '```bash', f'python launch/experts.py add SOURCE/{card.address}',
      f'python launch/generate.py --decoder={shlex.quote(card.base["name"])} --expert={card.name} '
      '--compare',
      '```'])
