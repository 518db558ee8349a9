"""Text behind prompts, plain or with latents, for a terminal or as JSON."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.files import read_text
from latent_deliberation.inference import tokenizer as tokenizers
from latent_deliberation.inference.generator import NONE, Generator
from latent_deliberation.inference.passes import Prompts, State
from latent_deliberation.inference.policy import NEVER
from latent_deliberation.inference.prefix_cache import Context, read_behind
from latent_deliberation.inference.session import Completion, DecodingOptions, generate, stream
from latent_deliberation.inference.tokenizer import Tokenizer

_COLUMN = 46


def check_coprocessor(coprocessor: str, **flags: object) -> bool:
  """Whether there is one to make latents; '' is none, and so is an explicit 'none'.

  Raises:
    UserError: there is not, and flags say when latents come.
  """
  given = [f'--{name}' for name, value in flags.items() if value]
  if given and not coprocessor:
    raise UserError(f'{", ".join(given)} without a --coprocessor, which makes the latents: give '
                     'one, or leave the rest out')
  return coprocessor not in ('', NONE)


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for; all that can be wrong with it is, before a decoder is loaded.

  Attributes:
    options: what to do; its `stop` and `eos` are set from what follows and from the tokenizer.
    stop: strings that end a text and are not part of it.
    seed: of the first prompt; the others count on.
    as_json: print a line of JSON for each prompt.
    streamed: print text as it comes.
    compared: write plainly, and with latents beside it.
    cache: directory of launch/augment.py, behind whose text prompts go on; '' for none.
  """
  options: DecodingOptions
  stop: tuple[str, ...] = ()
  seed: int = 0
  as_json: bool = False
  streamed: bool = False
  compared: bool = False
  cache: str = ''

  def __post_init__(self):
    tokenizers.check_stops(self.stop)
    if not 0 <= self.seed < 2**32:
      raise UserError(f'seed = {self.seed}: give one between 0 and 2**32 - 1')
    if self.streamed and (self.as_json or self.compared):
      raise UserError('--stream prints text as it comes, --json and --compare print it when it is '
                       'there: choose one of them')
    if self.cache and self.options.policy != NEVER:
      raise UserError(f'--cache={self.cache} brings its latents with it, and --at, --every or '
                       '--gate ask for more, which would have to be made from a cache without: '
                       'choose one of them')
    if self.cache and self.options.timing != DecodingOptions.timing:
      raise UserError(f'--cache={self.cache} brings its latents with it, and --background is for '
                       'latents that are yet to be made: leave one of them out')
    if self.compared and self.options.policy == NEVER and not self.cache:
      raise UserError('--compare shows text with latents beside plain text, and none are asked '
                       'for: give a --coprocessor, or leave --compare out')


@dataclasses.dataclass(frozen=True)
class Writer:
  """What turns prompts into text.

  Attributes:
    generator: the decoder, with a coprocessor or without.
    tokenizer: of the decoder.
    request: what is asked for.
    context: the cache that the request names, opened.
  """
  generator: Generator
  tokenizer: Tokenizer
  request: Request
  context: Context | None = None

  def write(self, prompts: Sequence[str], plain: bool = False) -> list[dict[str, Any]]:
    """For each prompt: its text, tokens, log-probabilities, and how it ended."""
    completions = generate(self.generator, self._texts(prompts, plain), self._decoding(plain),
                           self._seeds(len(prompts)))
    return [{'prompt': prompt, 'text': self._text(completion), **dataclasses.asdict(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)]

  def write_slowly(self, prompt: str) -> Iterator[str]:
    """The text behind one prompt in pieces, as it is decoded."""
    said = ''
    for completion, in stream(self.generator, self._texts([prompt]), self._decoding(),
                              self._seeds(1)):
      text = self._text(completion)
      if not completion.finish_reason:
        # What may yet become another character, or the beginning of a stop string, is held back.
        text = text.rstrip('\ufffd')
        text = text[:max(0, len(text) - max(map(len, self.request.stop), default=1) + 1)]
      yield text[len(said):]
      said = max(said, text, key=len)

  def compare(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """For each prompt, what is written plainly and what with latents."""
    plain = self.write(prompts, plain=True)
    augmented = self.write(prompts)
    return [{'prompt': prompt, 'plain': one, 'augmented': other}
            for prompt, one, other in zip(prompts, plain, augmented, strict=True)]

  def _texts(self, prompts: Sequence[str], plain: bool = False) -> Prompts | State:
    ids = [self.tokenizer.encode(prompt) for prompt in prompts]
    if self.context is None:
      return ids
    # Without the token that begins a text, which the context has.
    return read_behind(self.generator, self.context, [more[1:] for more in ids], plain)

  def _decoding(self, plain: bool = False) -> DecodingOptions:
    options, strings = self.request.options, self.request.stop
    stop = tokenizers.stop_at(self.tokenizer, strings) if strings else None
    return dataclasses.replace(options, eos=self.tokenizer.eos, stop=stop,
                               policy=NEVER if plain else options.policy)

  def _seeds(self, count: int) -> list[int]:
    return [(self.request.seed + number) % 2**32 for number in range(count)]

  def _text(self, completion: Completion) -> str:
    text = self.tokenizer.decode(completion.tokens)
    ends = [text.find(string) for string in self.request.stop if string in text]
    return text[:min(ends)] if completion.finish_reason == 'stop' and ends else text


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
  """Prompts of the command line and of a file, one a line, or of .jsonl under 'prompt'.

  Raises:
    UserError: there is no such file.
    UserError: the file has no prompt, a line of .jsonl has none, or one is empty or no Unicode.
  """
  prompts = [*prompts, *(_read_lines(Path(file)) if file else ())]
  for number, prompt in enumerate(prompts):
    if not prompt:
      raise UserError(f'prompt {number} is empty: write something, or leave the line out')
    _check_unicode(prompt, f'prompt {number}')
  return prompts


def _read_lines(path: Path) -> list[str]:
  text = read_text(path, 'a prompt a line')
  # Not splitlines, which takes some characters inside of a text for ends of lines.
  lines = text.removesuffix('\n').split('\n') if text else []
  if not lines:
    raise UserError(f'{path} is empty: write a prompt a line, or leave --prompts_file out')
  if path.suffix == '.jsonl':
    lines = [_read_object(line, f'{path}, line {number}') for number, line in enumerate(lines, 1)]
  return lines


def _read_object(line: str, name: str) -> str:
  try:
    prompt = json.loads(line)['prompt']
    if not isinstance(prompt, str):
      raise TypeError(f'it is {prompt!r}')
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{name}: every line must be an object with a text as "prompt" '
                     f'({type(error).__name__}: {error})') from error
  return prompt


def _check_unicode(text: str, name: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{name} is {text!r}, which is no Unicode ({error.reason}): give UTF-8'
                     ) from error


def answer(writer: Writer, prompts: Sequence[str]) -> None:
  """Prints what is written behind prompts; without any, asks for one after the other.

  Raises:
    UserError: a prompt is bad; where they are asked for, this is said of each and does not end it.
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

  if request.options.timing.delay is None and request.options.policy != NEVER:
    logging.info('compiling the coprocessor')  # else latents would come too late for short texts
    writer.generator.warm_up(1 if request.streamed or not prompts else len(prompts))
  if prompts:
    show(prompts)
  for prompt in () if prompts else _ask():
    try:
      _check_unicode(prompt, 'the prompt')
      show([prompt])
    except ValueError as error:  # of this prompt; the next may be better
      print(error, file=sys.stderr)
  if writer.generator.stats.begun:
    logging.info('latents: %s', writer.generator.stats)


def _ask() -> Iterator[str]:
  """Lines that someone types, until the end of the input."""
  while True:
    if sys.stdin.isatty():
      print('prompt> ', end='', flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.rstrip('\n')


def _side_by_side(result: dict[str, Any]) -> str:
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
