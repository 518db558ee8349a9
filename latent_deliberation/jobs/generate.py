"""Text behind prompts, plain or with latents, for a terminal or as JSON."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.inference import tokenizer as tokenizers
from latent_deliberation.inference.generate import Completion, Decoding, generate, stream
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.policy import NEVER
from latent_deliberation.inference.tokenizer import Tokenizer

_COLUMN = 46


@dataclasses.dataclass(frozen=True)
class Writer:
  """What turns prompts into text.

  Attributes:
    generator: the decoder, with a coprocessor or without.
    tokenizer: of the decoder.
    how: what to do; its `stop` and `eos` are set from what follows and from the tokenizer.
    stop: strings that end a text and are not part of it.
    seed: of the first prompt; the others count on.
  """
  generator: Generator
  tokenizer: Tokenizer
  how: Decoding
  stop: tuple[str, ...] = ()
  seed: int = 0

  def write(self, prompts: Sequence[str], how: Decoding | None = None) -> list[dict[str, Any]]:
    """For each prompt: its text, tokens, log-probabilities, and how it ended."""
    ids = [self.tokenizer.encode(prompt) for prompt in prompts]
    seeds = range(self.seed, self.seed + len(ids))
    completions = generate(self.generator, ids, self._complete(how or self.how), seeds)
    return [{'prompt': prompt, 'text': self._text(completion), **dataclasses.asdict(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)]

  def write_slowly(self, prompt: str) -> Iterator[str]:
    """The text behind one prompt in pieces, as it is decoded."""
    said = ''
    for completion, in stream(self.generator, [self.tokenizer.encode(prompt)],
                              self._complete(self.how), [self.seed]):
      text = self._text(completion)
      if not completion.ended:
        # What may yet become another character, or the beginning of a stop string, is held back.
        text = text.rstrip('\ufffd')
        text = text[:len(text) - max(map(len, self.stop), default=1) + 1]
      yield text[len(said):]
      said = max(said, text, key=len)

  def compare(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """For each prompt, what is written plainly and what with latents."""
    plain = self.write(prompts, dataclasses.replace(self.how, policy=NEVER))
    augmented = self.write(prompts)
    return [{'prompt': prompt, 'plain': one, 'augmented': other}
            for prompt, one, other in zip(prompts, plain, augmented, strict=True)]

  def _complete(self, how: Decoding) -> Decoding:
    stop = tokenizers.stop_at(self.tokenizer, self.stop) if self.stop else None
    return dataclasses.replace(how, eos=self.tokenizer.eos, stop=stop)

  def _text(self, completion: Completion) -> str:
    text = self.tokenizer.decode(completion.tokens)
    ends = [text.find(string) for string in self.stop if string in text]
    return text[:min(ends)] if completion.ended == 'stop' and ends else text


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
  """Prompts of the command line and of a file, one a line, or of .jsonl under 'prompt'.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line of .jsonl has no prompt, or a prompt is empty.
  """
  prompts = list(prompts)
  if file:
    path = Path(file)
    if not path.is_file():
      raise FileNotFoundError(f'no file {path}: give one with a prompt a line')
    lines = path.read_text().splitlines()
    if path.suffix == '.jsonl':
      try:
        lines = [json.loads(line)['prompt'] for line in lines]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: every line must be an object with a "prompt" '
                         f'({type(error).__name__}: {error})') from error
    prompts += lines
  for number, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f'prompt {number} is empty: write something, or leave the line out')
  return prompts


def answer(writer: Writer, prompts: Sequence[str], as_json: bool = False, streamed: bool = False,
           compared: bool = False) -> None:
  """Prints what is written behind prompts; without any, asks for one after the other.

  Raises:
    ValueError: two ways of printing are asked for at once, or a prompt is bad.
  """
  if streamed and (as_json or compared):
    raise ValueError('--stream prints text as it comes, --json and --compare print it when it is '
                     'there: choose one of them')
  def show(batch: Sequence[str]) -> None:
    if streamed:
      for prompt in batch:
        print(prompt, end='', flush=True)
        for piece in writer.write_slowly(prompt):
          print(piece, end='', flush=True)
        print()
      return
    for result in writer.compare(batch) if compared else writer.write(batch):
      if as_json:
        print(json.dumps(result, ensure_ascii=False))
      else:
        print(_side_by_side(result) if compared else result['prompt'] + result['text'])

  if writer.how.arrival.delay is None and writer.how.policy != NEVER:
    logging.info('compiling the coprocessor')  # else latents would come too late for short texts
    writer.generator.warm_up(1 if streamed or not prompts else len(prompts))
  if prompts:
    show(prompts)
  for prompt in () if prompts else _ask():
    try:
      show([prompt])
    except ValueError as error:  # of this prompt; the next may be better
      print(f'{error}')
  if writer.generator.counts.begun:
    logging.info('latents: %s', writer.generator.counts)


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
    total = sum(found['log_probabilities'])
    head = f'{title}: {total:.2f} nats, {total / len(found["tokens"]):.3f} a token'
    columns.append([head, *textwrap.wrap(found['text'], _COLUMN, replace_whitespace=False,
                                         drop_whitespace=False)])
  columns = [[line for part in column for line in part.split('\n')] for column in columns]
  height = max(map(len, columns))
  left, right = (column + [''] * (height - len(column)) for column in columns)
  lines = [f'{one:{_COLUMN}} | {other}'.rstrip() for one, other in zip(left, right, strict=True)]
  return '\n'.join([result['prompt'], *lines, ''])
