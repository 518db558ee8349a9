"""Continues prompts, plain or with latents, for a terminal or as JSON."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from latent_deliberation.cli.prompts import WELCOME, Prompt, ask
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.files import as_path
from latent_deliberation.inference.background import LatentSource
from latent_deliberation.inference.conventions import Message
from latent_deliberation.inference.engine import NONE, Engine, open_engine
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import NEVER, FittedGate
from latent_deliberation.inference.prefix_cache import Context, open_context, read_after
from latent_deliberation.inference.prompt_arrays import Prompts
from latent_deliberation.inference.session import (
  Completion,
  DecodingOptions,
  batches,
  check_lengths,
  generate,
  score,
  stream,
  text_of,
  with_ends,
)
from latent_deliberation.inference.tokenizer import (
  Tokenizer,
  check_stops,
  check_unicode,
  encode_chat,
  typed_control,
)
from latent_deliberation.progress import Progress, announced

_COLUMN = 46
_NAMES = {'plain': 'plain text', 'augmented': 'text with latents'}


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


def open_writer(request: 'Request', decoder: str, coprocessor: str, expert: str, strict: bool,
                vocabulary: str, length: int, gate: FittedGate | None,
                dtype: str = 'float32') -> 'Writer':
  """Opens decoder, coprocessor or experts, and the cache that a request names; see `open_engine`.

  Args:
    expert: value of --expert; '' for none.
    strict: whether an expert that cannot be attached is an error.
  """
  if expert:
    # Imported by name, since most prompts have no experts.
    attached = importlib.import_module('latent_deliberation.cli.attached')
    return attached.open_writer(request, decoder, coprocessor, expert, strict, vocabulary, length,
                                gate, dtype)
  engine, tokenizer = open_engine(as_path(decoder), coprocessor, vocabulary, length, gate, dtype)
  context = open_context(as_path(request.cache), engine) if request.cache else None
  return Writer(engine, tokenizer, request, context)


@dataclasses.dataclass(frozen=True)
class Request:
  """One request of the command line, checked before a decoder is loaded.

  Attributes:
    options: options of decoding. `stop`, `eos` and `num_ids` are set later; see `with_ends`.
    stop: strings that end a text and are not part of it.
    seed: seed of the first prompt; each next prompt adds 1.
    as_json: print a line of JSON for each prompt.
    streamed: print text while it is decoded.
    compared: print plain and augmented text side by side, each scored both ways.
    cache: directory that launch/augment.py wrote, whose text prompts continue; '' for none.
    chat: put prompts into the decoder's chat template.
    batch_size: prompts that are decoded together; 0 for as many as fit.
  """
  options: DecodingOptions
  stop: tuple[str, ...] = ()
  seed: int = 0
  as_json: bool = False
  streamed: bool = False
  compared: bool = False
  cache: str = ''
  chat: bool = False
  batch_size: int = 0

  def __post_init__(self):
    check_stops(self.stop)
    check_integer('seed', self.seed, 0, 2**32 - 1)
    check_integer('batch_size', self.batch_size, 0)
    if self.streamed and (self.as_json or self.compared):
      raise UserError('--stream prints text while it is decoded, --json and --compare print it at '
                      'the end: choose one of them')
    if self.cache and self.options.policy != NEVER:
      raise UserError(f'--cache={self.cache} has latents, and more of them (--at, --every, --gate) '
                      'are made only from a cache without: choose one of them')
    if self.cache and self.options.timing != DecodingOptions.timing:
      raise UserError(f'--cache={self.cache} has latents, and --background is for latents that are '
                      'still to be made: leave one of them out')
    if self.cache and self.chat:
      raise UserError(f'--cache={self.cache} holds the beginning of a text, and --chat begins a '
                      'conversation: choose one of them')
    if self.compared and self.options.policy == NEVER and not self.cache:
      raise UserError('--compare shows plain text and text with latents, and there are no latents: '
                      'give a --coprocessor, or leave --compare out')
    self._check_places()

  def _check_places(self) -> None:
    """Raises UserError where --at names places that no text reaches."""
    policy, size = self.options.policy, self.options.max_tokens
    late = [stop for stop in policy.at if stop >= size]
    if late:
      raise UserError(f'--at={late[0]} with --max_tokens={size}: no latents come there, since a '
                      f'text ends first. Give a place up to {size - 1}, or raise --max_tokens')


@dataclasses.dataclass(frozen=True)
class Writer:
  """Continues prompts as a request says.

  Attributes:
    engine: the decoder, with a coprocessor or without.
    tokenizer: tokenizer of the decoder.
    request: the request.
    context: the cache that the request names, opened.
    history: turns of a conversation before the prompt.
    sources: gives prompts, as text, their experts; None where there are no experts.
    check_experts: raises UserError where a text, by its number of tokens and name, is too short for
      the latents of its expert; None where there are no experts.
  """
  engine: Engine
  tokenizer: Tokenizer
  request: Request
  context: Context | None = None
  history: list[Message] = dataclasses.field(default_factory=list)
  sources: Callable[[Sequence[str]], LatentSource] | None = None
  check_experts: Callable[[np.ndarray, Sequence[str]], None] | None = None

  def check(self, prompts: Sequence[Prompt]) -> None:
    """Checks all prompts before the first one is decoded, and warns of typed control pieces.

    Raises:
      UserError: a prompt is too long for the cache, too short for latents, or refused by the chat
        template.
    """
    before = 0 if self.context is None else int(self.context.plain.lengths[0])
    lengths = np.array([before + len(self._encode(prompt.text)) for prompt in prompts])
    names = [prompt.name for prompt in prompts]
    check_lengths(self.engine, lengths, self._decoding(), names)
    if self.check_experts is not None:
      self.check_experts(lengths, names)
    for prompt in () if self.request.chat else prompts:
      typed = typed_control(self.tokenizer, prompt.text)
      if typed:
        logging.warning('%s has %s, read as plain characters. --chat puts a prompt into the chat '
                        'template of its model. This is logged once.', prompt.name, typed)
        return

  def write(self, prompts: Sequence[str], plain: bool = False,
            first: int = 0) -> list[dict[str, Any]]:
    """Returns prompt, text, tokens, logprobs, finish_reason, latents_at and experts of each prompt.

    Args:
      prompts: prompts to decode together.
      plain: leave latents out.
      first: number of the first prompt among all, from 0, which decides the seeds.
    """
    ids, source = list(map(self._encode, prompts)), self._source(prompts, plain)
    completions = generate(self.engine, self._texts(ids, plain), self._decoding(plain),
                           self._seeds(first, len(prompts)), source)
    results = [self._result(*each) for each in zip(prompts, ids, completions, strict=True)]
    if source is None:
      return results
    return [result | {'experts': mix if result['latents_at'] else {}}
            for result, mix in zip(results, source.mixes, strict=True)]

  def write_slowly(self, prompt: str, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the result of one prompt while it is decoded, with the text that will not change."""
    ids, said = self._encode(prompt), ''
    longest = max(map(len, self.request.stop), default=1)
    for completion, in stream(self.engine, self._texts([ids]), self._decoding(),
                              self._seeds(first, 1), source=self._source([prompt])):
      result = self._result(prompt, ids, completion)
      if not completion.finish_reason:
        # The end may yet become another character, or be the beginning of a stop string.
        text = result['text'].rstrip('\ufffd')
        text = text[:max(0, len(text) - longest + 1)]
        result['text'] = said = max(said, text, key=len)
      yield result

  def compare(self, prompts: Sequence[str], first: int = 0) -> list[dict[str, Any]]:
    """Returns the plain and the augmented result of each prompt, and scores each text both ways.

    'nats' of a result holds the log-probability of its tokens, by the plain decoder and with
    latents.
    """
    ids = list(map(self._encode, prompts))
    results = {name: self.write(prompts, plain, first)
               for name, plain in (('plain', True), ('augmented', False))}
    for found in results.values():
      tokens = [result['tokens'] for result in found]
      for name, plain in (('plain', True), ('augmented', False)):
        scored = score(self.engine, self._texts(ids, plain), tokens, self._decoding(plain),
                       self._source(prompts, plain))
        for result, completion in zip(found, scored, strict=True):
          result.setdefault('nats', {})[name] = sum(completion.logprobs)
    return [{'prompt': prompt, 'plain': one, 'augmented': other}
            for prompt, one, other in zip(prompts, *results.values(), strict=True)]

  def _source(self, prompts: Sequence[str], plain: bool = False) -> LatentSource | None:
    return None if plain or self.sources is None else self.sources(prompts)

  def _encode(self, prompt: str) -> list[int]:
    if self.request.chat:
      return encode_chat(self.tokenizer, [*self.history, {'role': 'user', 'content': prompt}])
    # The text of a context has begun already.
    if self.context is not None:
      return self.tokenizer.encode_more(prompt)
    return self.tokenizer.encode(prompt)

  def _texts(self, ids: Prompts, plain: bool = False) -> Prompts | State:
    return ids if self.context is None else read_after(self.engine, self.context, ids, plain)

  def _decoding(self, plain: bool = False) -> DecodingOptions:
    options = with_ends(self.request.options, self.tokenizer, self.request.stop)
    return dataclasses.replace(options, policy=NEVER) if plain else options

  def _seeds(self, first: int, count: int) -> list[int]:
    return [(self.request.seed + first + number) % 2**32 for number in range(count)]

  def _result(self, prompt: str, ids: Sequence[int], completion: Completion) -> dict[str, Any]:
    before = ids if self.context is None else [*self.context.end, *ids]
    text = text_of(completion, self.tokenizer, self.request.stop, before)
    return {'prompt': prompt, 'text': text, **dataclasses.asdict(completion)}


def answer(writer: Writer, prompts: Sequence[Prompt]) -> None:
  """Prints the continuations of prompts; without any, asks for one after the other.

  Raises:
    UserError: a prompt is bad. If it was typed, the error is printed and the next one follows.
  """
  engine, request = writer.engine, writer.request
  if prompts:
    writer.check(prompts)
  parts = list(batches(engine, len(prompts), 1 if request.streamed else request.batch_size))
  # In the background, latents would otherwise come too late for short texts.
  if (request.options.timing.delay is None and request.options.policy != NEVER
      and writer.sources is None):
    logging.info('compiling the coprocessor')
    engine.warm_up(len(prompts[parts[0]]) if prompts else 1)
  if not prompts:
    _converse(writer)
    return
  progress, results = Progress('generating', 'prompts', len(prompts)), []
  for part in parts:
    results += _show(writer, prompts[part], part.start, headed=len(prompts) > 1)
    if part.stop < len(prompts):
      progress.update(part.stop)
  _log_latents(writer, results)


def _show(writer: Writer, prompts: Sequence[Prompt], first: int, headed: bool,
          typed: bool = False) -> list[dict[str, Any]]:
  """Decodes prompts together and prints them; returns the results, with latents if compared.

  Args:
    first: number of the first prompt, from 0.
    headed: print the name of a prompt above its text.
    typed: Ctrl-C ends a text, and not the program.
  """
  request, texts = writer.request, [prompt.text for prompt in prompts]
  if not request.compared and (request.streamed or typed):
    results = [_follow(writer, prompt, first, headed, typed) for prompt in prompts]
  else:
    # The first texts wait for the compiler.
    with contextlib.nullcontext() if first else announced('compiling and decoding'):
      results = (writer.compare if request.compared else writer.write)(texts, first=first)
  for prompt, result in zip(prompts, results, strict=True):
    if request.as_json:
      line = {} if prompt.line is None else {'line': prompt.line}
      print(json.dumps({**line, **result}, ensure_ascii=False), flush=True)
    elif not request.streamed:
      whole = _side_by_side(result) if request.compared else _shown(writer, prompt) + result['text']
      print(_heading(prompt, headed) + whole, flush=True)
  return [result['augmented'] for result in results] if request.compared else results


def _follow(writer: Writer, prompt: Prompt, first: int, headed: bool, typed: bool,
            ) -> dict[str, Any]:
  """Decodes one prompt, and prints the text meanwhile if it is streamed; returns the result."""
  streamed, said, result = writer.request.streamed, '', {}
  try:
    results = writer.write_slowly(prompt.text, first)
    with announced('compiling and decoding the first token'):
      first_result = next(results)
    if streamed:  # only now, since the log would run into the prompt
      print(_heading(prompt, headed) + _shown(writer, prompt), end='', flush=True)
    for result in itertools.chain([first_result], results):
      if streamed:
        print(result['text'][len(said):], end='', flush=True)
      said = result['text']
  except KeyboardInterrupt:
    if not typed or not result:
      raise
    print('\nThe text was ended.', file=sys.stderr)
  if streamed:
    print(flush=True)
  return result


def _heading(prompt: Prompt, headed: bool) -> str:
  return f'==> {prompt.name} <==\n' if headed else ''


def _shown(writer: Writer, prompt: Prompt) -> str:
  """Returns what is printed before a text: its prompt, unless it is a turn of a conversation."""
  return '' if writer.request.chat else prompt.text


def _converse(writer: Writer) -> None:
  """Answers what someone types, until the end of the input."""
  terminal = sys.stdin.isatty()
  if terminal:
    print(WELCOME, file=sys.stderr)
  for number, text in enumerate(ask(terminal)):
    prompt = Prompt(text, 'the prompt')
    try:
      check_unicode(text, prompt.name)
      writer.check([prompt])
      result, = _show(writer, [prompt], number, headed=False, typed=terminal)
      _log_latents(writer, [result])
    except UserError as error:  # this prompt is bad; the next one may be better
      print(error, file=sys.stderr)
      continue
    except KeyboardInterrupt:
      if not terminal:
        raise
      print('\nThe text was ended before its first token. Ctrl-D leaves.', file=sys.stderr)
      continue
    if writer.request.chat:
      writer.history.extend([{'role': 'user', 'content': text},
                             {'role': 'assistant', 'content': result['text']}])


def _log_latents(writer: Writer, results: Sequence[Mapping[str, Any]]) -> None:
  """Logs where texts got latents, unless none were requested."""
  stats = writer.engine.stats
  if writer.context is not None:
    logging.info('latents came with the cache, before the prompt')
  if writer.request.options.policy == NEVER:
    return
  places = [result['latents_at'] for result in results]
  tokens = sum(len(result['tokens']) for result in results)
  if len(results) == 1 and places[0]:
    plural = 's' if len(places[0]) > 1 else ''
    said = f'latents were added at token{plural} {", ".join(map(str, places[0]))} of {tokens:,}'
  elif any(places):
    said = (f'latents were added {sum(map(len, places)):,} times in {tokens:,} tokens, to '
            f'{sum(map(bool, places)):,} of {len(places):,} texts')
  else:
    said = f'no latents were added in {tokens:,} tokens'
  if stats.failed:
    said += f'; the coprocessor failed {stats.failed} times so far'
  if stats.late:
    said += f'; texts ended before latents were ready {stats.late} times so far'
  logging.info(said)


def _side_by_side(result: Mapping[str, Any]) -> str:
  """Formats a result of `Writer.compare`: two columns of text, and a table of scores."""
  columns = []
  for name, title in _NAMES.items():
    # Lines of the text stay lines; only long ones are cut.
    lines = (part for line in result[name]['text'].split('\n')
             for part in textwrap.wrap(line, _COLUMN, drop_whitespace=False) or [''])
    columns.append([title, '-' * len(title), *lines])
  height = max(map(len, columns))
  left, right = (column + [''] * (height - len(column)) for column in columns)
  lines = [f'{one:{_COLUMN}} | {other}'.rstrip() for one, other in zip(left, right, strict=True)]
  # Both texts are scored both ways, since scores of two different texts say little.
  table = [f'{"nats (a token)":30}{"by the plain decoder":>22}{"with latents":>22}']
  for name, title in _NAMES.items():
    nats, size = result[name]['nats'], len(result[name]['tokens'])
    cells = [f'{nats[way]:.2f} ({nats[way] / size:.3f})' for way in _NAMES]
    table.append(f'{title + f", {size} tokens":30}{cells[0]:>22}{cells[1]:>22}')
  return '\n'.join([result['prompt'], *lines, '', *table, ''])
