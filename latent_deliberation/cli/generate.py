"""Continues prompts, plain or with latents, for a terminal or as JSON."""

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.files import JSON_LINES, read_text
from latent_deliberation.inference.engine import NONE, Engine
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import NEVER
from latent_deliberation.inference.prefix_cache import Context, read_after
from latent_deliberation.inference.session import (
  DecodingOptions,
  generate,
  stream,
  text_of,
  with_ends,
)
from latent_deliberation.inference.tokenizer import Prompts, Tokenizer, check_stops

_COLUMN = 46


def check_coprocessor(coprocessor: str, **flags: object) -> bool:
  """Returns whether there is a coprocessor; '' and 'none' are none.

  Args:
    coprocessor: value of --coprocessor.
    flags: values of the flags that say when latents are made.

  Raises:
    UserError: --coprocessor is absent, and one of the flags is given.
  """
  given = [f'--{name}' for name, value in flags.items() if value]
  if given and not coprocessor:
    raise UserError(f'{", ".join(given)} without a --coprocessor, which makes the latents: give '
                    'one, or leave the others out')
  return coprocessor not in ('', NONE)


@dataclasses.dataclass(frozen=True)
class Request:
  """One request of the command line, checked before a decoder is loaded.

  Attributes:
    options: options of decoding. `stop` and `eos` are set later; see `with_ends`.
    stop: strings that end a text and are not part of it.
    seed: seed of the first prompt; each next prompt adds 1.
    as_json: print a line of JSON for each prompt.
    streamed: print text while it is decoded.
    compared: print plain and augmented text side by side.
    cache: directory that launch/augment.py wrote, whose text prompts continue; '' for none.
  """
  options: DecodingOptions
  stop: tuple[str, ...] = ()
  seed: int = 0
  as_json: bool = False
  streamed: bool = False
  compared: bool = False
  cache: str = ''

  def __post_init__(self):
    check_stops(self.stop)
    if not 0 <= self.seed < 2**32:
      raise UserError(f'seed = {self.seed}: give one between 0 and 2**32 - 1')
    if self.streamed and (self.as_json or self.compared):
      raise UserError('--stream prints text while it is decoded, --json and --compare print it at '
                      'the end: choose one of them')
    if self.cache and self.options.policy != NEVER:
      raise UserError(f'--cache={self.cache} has latents, and more of them (--at, --every, --gate) '
                      'are made only from a cache without: choose one of them')
    if self.cache and self.options.timing != DecodingOptions.timing:
      raise UserError(f'--cache={self.cache} has latents, and --background is for latents that are '
                      'still to be made: leave one of them out')
    if self.compared and self.options.policy == NEVER and not self.cache:
      raise UserError('--compare shows plain text and text with latents, and there are no latents: '
                      'give a --coprocessor, or leave --compare out')


@dataclasses.dataclass(frozen=True)
class Writer:
  """Continues prompts as a request says.

  Attributes:
    engine: the decoder, with a coprocessor or without.
    tokenizer: tokenizer of the decoder.
    request: the request.
    context: the cache that the request names, opened.
  """
  engine: Engine
  tokenizer: Tokenizer
  request: Request
  context: Context | None = None

  def write(self, prompts: Sequence[str], plain: bool = False) -> list[dict[str, Any]]:
    """Returns prompt, text, tokens, logprobs, finish_reason and latents_at for each prompt."""
    completions = generate(self.engine, self._texts(prompts, plain), self._decoding(plain),
                           self._seeds(len(prompts)))
    return [{'prompt': prompt, 'text': text_of(completion, self.tokenizer, self.request.stop),
             **dataclasses.asdict(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)]

  def write_slowly(self, prompt: str) -> Iterator[str]:
    """Yields the continuation of one prompt in pieces, while it is decoded."""
    said = ''
    for completion, in stream(self.engine, self._texts([prompt]), self._decoding(),
                              self._seeds(1)):
      text = text_of(completion, self.tokenizer, self.request.stop)
      if not completion.finish_reason:
        # The end may yet become another character, or be the beginning of a stop string.
        text = text.rstrip('\ufffd')
        text = text[:max(0, len(text) - max(map(len, self.request.stop), default=1) + 1)]
      yield text[len(said):]
      said = max(said, text, key=len)

  def compare(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, for each prompt, what is written plainly and what is written with latents."""
    plain = self.write(prompts, plain=True)
    augmented = self.write(prompts)
    return [{'prompt': prompt, 'plain': one, 'augmented': other}
            for prompt, one, other in zip(prompts, plain, augmented, strict=True)]

  def _texts(self, prompts: Sequence[str], plain: bool = False) -> Prompts | State:
    ids = [self.tokenizer.encode(prompt) for prompt in prompts]
    if self.context is None:
      return ids
    # The context has the token that begins a text already.
    return read_after(self.engine, self.context, [more[1:] for more in ids], plain)

  def _decoding(self, plain: bool = False) -> DecodingOptions:
    options = with_ends(self.request.options, self.tokenizer, self.request.stop)
    return dataclasses.replace(options, policy=NEVER) if plain else options

  def _seeds(self, count: int) -> list[int]:
    return [(self.request.seed + number) % 2**32 for number in range(count)]


def read_stop(written: str) -> str:
  r"""Returns a stop string as it was meant in a shell: \n, \t and \\ stand for one character."""
  meanings = {'n': '\n', 't': '\t', '\\': '\\'}
  return re.sub(r'\\([nt\\])', lambda found: meanings[found[1]], written)


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
  """Returns the prompts of the command line, then those of a file.

  Args:
    file: path of a file with a prompt on each line, or of JSON lines with a key 'prompt'; '' for
      none.

  Raises:
    UserError: the file is absent or has no prompt, a line of a .jsonl has none, or a prompt is
      empty or not Unicode.
  """
  prompts = [*prompts, *(_read_lines(Path(file)) if file else ())]
  for number, prompt in enumerate(prompts):
    if not prompt:
      raise UserError(f'prompt {number} is empty: write something, or leave the line out')
    _check_unicode(prompt, f'prompt {number}')
  return prompts


def _read_lines(path: Path) -> list[str]:
  text = read_text(path, 'a prompt on each line')
  # Not splitlines, which also splits at some characters within a text.
  lines = text.removesuffix('\n').split('\n') if text else []
  if not lines:
    raise UserError(f'{path} is empty: write a prompt on each line, or leave --prompts_file out')
  if path.suffix.lower() in JSON_LINES:
    lines = [_read_object(line, f'{path}, line {number}') for number, line in enumerate(lines, 1)]
  return lines


def _read_object(line: str, name: str) -> str:
  try:
    prompt = json.loads(line)['prompt']
    if not isinstance(prompt, str):
      raise TypeError(f'it is {prompt!r}')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{name}: every line must be an object with a text as "prompt" '
                    f'({type(error).__name__}: {error})') from error
  return prompt


def _check_unicode(text: str, name: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{name} is {text!r}, which is not Unicode ({error.reason}): give UTF-8'
                    ) from error


def answer(writer: Writer, prompts: Sequence[str]) -> None:
  """Prints the continuations of prompts; without any, asks for one after the other.

  Raises:
    UserError: a prompt is bad. If it was typed, the error is printed and the next one follows.
  """
  request = writer.request

  def show(batch: Sequence[str]) -> None:
    if request.streamed:
      for prompt in batch:
        print(prompt, end='', flush=True)
        for piece in writer.write_slowly(prompt):
          print(piece, end='', flush=True)
        print()
      return
    for result in writer.compare(batch) if request.compared else writer.write(batch):
      if request.as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
      else:
        print(_side_by_side(result) if request.compared else result['prompt'] + result['text'],
              flush=True)

  # In the background, latents would otherwise come too late for short texts.
  if request.options.timing.delay is None and request.options.policy != NEVER:
    logging.info('compiling the coprocessor')
    writer.engine.warm_up(1 if request.streamed or not prompts else len(prompts))
  if prompts:
    show(prompts)
  for prompt in () if prompts else _ask():
    try:
      _check_unicode(prompt, 'the prompt')
      show([prompt])
    except UserError as error:  # this prompt is bad; the next one may be better
      print(error, file=sys.stderr)
  if writer.engine.stats.begun:
    logging.info('latents: %s', writer.engine.stats)


def _ask() -> Iterator[str]:
  """Yields the lines that someone types, until the end of the input."""
  while True:
    if sys.stdin.isatty():
      print('prompt> ', end='', flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.rstrip('\n')


def _side_by_side(result: dict[str, Any]) -> str:
  """Formats a result of `Writer.compare` as two columns, plain and with latents."""
  columns = []
  for name, title in (('plain', 'plain'), ('augmented', 'with latents')):
    found = result[name]
    total = sum(found['logprobs'])
    head = f'{title}: {total:.2f} nats, {total / len(found["tokens"]):.3f} a token'
    columns.append([head, *textwrap.wrap(found['text'], _COLUMN, replace_whitespace=False,
                                         drop_whitespace=False)])
  columns = [[line for part in column for line in part.split('\n')] for column in columns]
  height = max(map(len, columns))
  left, right = (column + [''] * (height - len(column)) for column in columns)
  lines = [f'{one:{_COLUMN}} | {other}'.rstrip() for one, other in zip(left, right, strict=True)]
  return '\n'.join([result['prompt'], *lines, ''])
