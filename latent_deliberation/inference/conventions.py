"""What the files of a decoder say beside its vocabulary: ends of a text, added pieces, and chat.

Hugging Face's directories have them as JSON, and a template of Jinja for conversations. GGUF files
have them as metadata. jinja2 is an extra, and is imported where a template is rendered.
"""

import dataclasses
import datetime
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from latent_deliberation.data.tokenizer_json import piece_of
from latent_deliberation.errors import UserError
from latent_deliberation.files import read_text
from latent_deliberation.model.checkpoints.hugging_face_config import (
  ADDED,
  CONFIG,
  GENERATION,
  PROCESSOR,
  TEMPLATE,
)
from latent_deliberation.model.weights import Checkpoint
from latent_deliberation.paths import TOKENIZER_CONFIG

_GGUF_ENDS = ('eos', 'eot', 'eom')  # of a text, a turn, and a message

Message = Mapping[str, str]  # 'role' and 'content'


@dataclasses.dataclass(frozen=True)
class Conventions:
  """What a decoder's files say of its texts; nothing, by default.

  Attributes:
    directory: place of the files, for errors.
    ends: ids that end a text, such as those of Gemma's <eos> and <end_of_turn>.
    special: pieces that stand for control ids, with the ids.
    added: further pieces that the vocabulary may lack, with their ids.
    bos, eos: pieces that begin and end a text; '' for those of the vocabulary.
    chat_template: Jinja template that turns a conversation into a prompt; '' for none.
  """
  directory: Path = Path()
  ends: tuple[int, ...] = ()
  special: Mapping[str, int] = dataclasses.field(default_factory=dict)
  added: Mapping[str, int] = dataclasses.field(default_factory=dict)
  bos: str = ''
  eos: str = ''
  chat_template: str = ''

  def render(self, messages: Sequence[Message], bos: str, eos: str) -> str:
    """Returns the prompt for the next turn of a conversation, with control pieces written out.

    Args:
      messages: turns so far, with the role 'user' or 'assistant'.
      bos, eos: pieces of the vocabulary, where the files name none.

    Raises:
      UserError: there is no template, jinja2 is not installed, or the template fails.
    """
    if not self.chat_template:
      raise UserError(f'the decoder in {self.directory} has no chat template, neither {TEMPLATE} '
                      f'nor a chat_template in {TOKENIZER_CONFIG}: put the one of its model '
                      'there, or leave --chat out')
    try:
      jinja = importlib.import_module('jinja2.sandbox')
    except ImportError as error:
      raise UserError(f'the chat template of {self.directory} needs jinja2: '
                      "pip install -e '.[chat]'") from error
    # A template comes with the weights, so it runs where it can reach nothing else.
    environment = jinja.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
      return environment.from_string(self.chat_template).render(
          messages=list(messages), add_generation_prompt=True, bos_token=self.bos or bos,
          eos_token=self.eos or eos)
    except Exception as error:  # whatever the code of a template raises
      raise UserError(f'the chat template of {self.directory} refuses a conversation of '
                      f'{len(messages)} turns ({type(error).__name__}: {error}): change the '
                      'conversation, or leave --chat out') from error


NO_CONVENTIONS = Conventions()


def _refuse(message: str) -> NoReturn:
  raise ValueError(message)


def read_conventions(checkpoint: Checkpoint) -> Conventions:
  """Reads what the files of a decoder say of its texts.

  Raises:
    UserError: one of the files is damaged.
  """
  if checkpoint.format == 'gguf':
    return _read_gguf(checkpoint)
  directory = checkpoint.directory
  generation, config, tokenizer, added, processor = (
      _read(directory / name) for name in (GENERATION, CONFIG, TOKENIZER_CONFIG, ADDED, PROCESSOR))
  # Gemma 3 has the part of its config that is about text in a part of its own.
  of_text = config.get('text_config') or {}
  if not isinstance(of_text, dict):
    raise UserError(f'{directory / CONFIG}: text_config = {of_text!r:.40}, and an object is '
                    'expected: download it again')
  ends = [found for each in (generation, config, of_text)
          for found in _ids(directory, each.get('eos_token_id'))]
  try:
    special = {}
    for number, token in (tokenizer.get('added_tokens_decoder') or {}).items():
      if not isinstance(token['content'], str):
        _refuse(f'content = {token["content"]!r:.40}')
      (special if token.get('special') else added)[token['content']] = int(number)
    bos, eos = (piece_of(tokenizer.get(name)) for name in ('bos_token', 'eos_token'))
    return _known(checkpoint, Conventions(
        directory, tuple(ends), special, added, bos, eos,
        _template(directory, tokenizer, processor)))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{directory / TOKENIZER_CONFIG} or {ADDED} has something of another form '
                    f'({type(error).__name__}: {error}): download it again') from error


def _read_gguf(checkpoint: Checkpoint) -> Conventions:
  get = checkpoint.source.get
  ends = [found for name in _GGUF_ENDS
          for found in _ids(checkpoint.directory, get(f'tokenizer.ggml.{name}_token_id'))]
  return _known(checkpoint, Conventions(
      checkpoint.directory, tuple(ends), chat_template=get('tokenizer.chat_template', '')))


def _known(checkpoint: Checkpoint, found: Conventions) -> Conventions:
  """Returns the conventions without empty pieces, and ids that the decoder has no embedding for."""
  size = checkpoint.config.vocab_size
  special, added = ({piece: number for piece, number in pieces.items()
                     if piece and 0 <= number < size}
                    for pieces in (found.special, found.added))
  ends = tuple(dict.fromkeys(number for number in found.ends if 0 <= number < size))
  return dataclasses.replace(found, ends=ends, special=special, added=added)


def _read(path: Path) -> dict[str, Any]:
  """Returns the content of a JSON file; {} if there is no such file."""
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} cannot be read ({error}): download it again') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} holds {content!r:.40}, and an object is expected: download it again')
  return content


def _ids(directory: Path, value: Any) -> list[int]:
  """Returns the ids of an eos_token_id: null, a number, or a list of numbers."""
  numbers = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(number, int) for number in numbers):
    raise UserError(f'{directory}: eos_token_id = {value!r}, and an integer or a list of them is '
                    'expected: download it again')
  return numbers


def _template(directory: Path, tokenizer: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
  """Returns the chat template, from a file of its own or from JSON."""
  if (directory / TEMPLATE).is_file():
    return read_text(directory / TEMPLATE, 'a chat template')
  template = tokenizer.get('chat_template') or processor.get('chat_template') or ''
  if isinstance(template, str):
    return template
  # Several templates, by name. One is for plain conversations.
  return {each['name']: each['template'] for each in template}.get('default', '')
