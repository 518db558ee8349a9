"""Decodes texts block by block: options, completions, and the session that joins latents.

`generate`, `stream` and `score` are the entry points. A `Session` decides on the host, between two
blocks of tokens, when to deliberate, when latents join, and where texts end.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.inference.background import (
  BackgroundAugmentation,
  LatentSource,
  LatentTiming,
)
from latent_deliberation.inference.decode import Sampling, check_seeds
from latent_deliberation.inference.engine import Engine, copied
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import NEVER, Policy
from latent_deliberation.inference.prompt_arrays import (
  Prompts,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.tokenizer import Tokenizer, stop_at


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """Options of decoding after the prompts.

  Attributes:
    max_tokens: largest number of tokens to decode for a prompt.
    sampling: temperature and filters of the draw of a token.
    eos: ids that end a text.
    num_ids: ids from here on are never drawn, unless they end a text; None for no such ids.
    stop: function that is given all tokens of a prompt's completion, after every token. True ends
      the text.
    policy: places where texts deliberate.
    timing: time at which latents join.
  """
  max_tokens: int
  sampling: Sampling = Sampling()
  eos: tuple[int, ...] = ()
  num_ids: int | None = None
  stop: Callable[[Sequence[int]], bool] | None = None
  policy: Policy = NEVER
  timing: LatentTiming = LatentTiming()

  def __post_init__(self):
    check_integer('max_tokens', self.max_tokens, 1)


@dataclasses.dataclass
class Completion:
  """Tokens decoded for a prompt.

  Attributes:
    tokens: ids, with the one that ended the text.
    logprobs: log-probabilities of the tokens under the model, before any filter, nats.
    finish_reason: 'eos', 'stop' or 'length'; '' while the text continues.
    latents_at: numbers of tokens after which latents joined.
  """
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish_reason: str = ''
  latents_at: list[int] = dataclasses.field(default_factory=list)


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the ids that end a text of the tokenizer's decoder."""
  return tuple(dict.fromkeys((tokenizer.eos, *tokenizer.conventions.ends)))


def with_ends(options: DecodingOptions, tokenizer: Tokenizer,
              stop: Sequence[str]) -> DecodingOptions:
  """Returns options that end a text where its decoder does, or at one of the strings `stop`.

  Only ids of the tokenizer are drawn, since no other has a text.
  """
  return dataclasses.replace(options, eos=ends_of(tokenizer), num_ids=tokenizer.size,
                             stop=stop_at(tokenizer, stop))


def text_of(completion: Completion, tokenizer: Tokenizer, stop: Sequence[str],
            before: Sequence[int]) -> str:
  """Returns the text that a completion adds to its prompt, without what ended it.

  Args:
    before: ids before the completion, or the last of them.
  """
  ended = completion.finish_reason == 'eos'
  text = tokenizer.decode(completion.tokens[:-1] if ended else completion.tokens, before)
  ends = [text.find(string) for string in stop if string in text]
  return text[:min(ends)] if completion.finish_reason == 'stop' and ends else text


BLOCK = 16  # tokens that a text decodes between two looks of the host


class Session:
  """Texts that are decoded together, each to its own end. It runs once.

  Latents are always made from a plain cache, as in training. A text that holds latents may
  deliberate again. It is then read again first, without latents, from where it last deliberated.

  Attributes:
    state: state to decode from. Its keys and values are overwritten, so they are its own.
    base: plain state that latents were last made from, after `base_count` decoded tokens; None
      where it is not needed any more.
    augmentation: the coprocessor at work on `base`; None where it is not.
    attached: bool [B], texts that hold latents.
    waiting: bool [B], texts that wait for latents.
    opened: bool [B], texts whose gate opens at their next token.
    active: bool [B], texts that have not ended.
    count: number of tokens decoded so far.
    gate_from: int32 [B], number of tokens before which a text's gate stays closed.
    completions: completion of each text.
  """

  def __init__(self, engine: Engine, state: State, options: DecodingOptions, seeds: list[int],
               forced: Prompts | None = None, source: LatentSource | None = None):
    """Begins from a state, which is overwritten.

    Args:
      seeds: seeds of the texts. Further rows of the state are filler.
      forced: tokens of each text to take instead of drawn ones; None to draw.
      source: what makes the latents; None for the coprocessor of the engine.
    """
    self.engine, self.options, self.state, self.policy = engine, options, state, options.policy
    self.source = source or engine
    # Without a coprocessor the plain decoder continues, with one warning.
    if source is None and engine.model.coprocessor is None and self.policy != NEVER:
      engine.stats.begun += 1
      self._fail('there is no coprocessor')
      self.policy = NEVER
    # Rows past the seeds are filler, which is never active.
    batch = len(state.position)
    self.completions = [Completion() for _ in seeds]
    self.active = np.arange(batch) < len(seeds)
    seeds = np.array(seeds + [0] * (batch - len(seeds)), np.uint32)
    self.keys = jax.vmap(jax.random.key)(engine.place(seeds))
    self.count = 0
    self.base, self.base_count, self.augmentation = None, 0, None
    self.attached, self.waiting, self.opened = np.zeros((3, batch), bool)
    self.gate_from = np.zeros(batch, np.int32)
    # Number of tokens of each text, and given tokens, with some of a block after the last one.
    self.sizes = [options.max_tokens] * len(self.completions)
    self.forced = None
    if forced is not None:
      self.sizes = [len(tokens) for tokens in forced]
      self.forced = np.zeros((batch, max(self.sizes) + BLOCK), np.int32)
      for row, tokens in zip(self.forced, forced, strict=False):
        row[:len(tokens)] = tokens

  def run(self) -> Iterator[list[Completion]]:
    """Decodes to the end."""
    while self.active.any():
      # Latents first: those that are due now, then those that are ready.
      if not self.waiting.any():
        self._request()
      if self.waiting.any() and self._is_due():
        self._join()
      if self._decode():
        yield self.completions
      # In the background, the coprocessor starts after a token, which then need not wait for it.
      if self.waiting.any() and self.augmentation is None:
        self._begin()
    if self.waiting.any():
      self.engine.stats.late += 1

  def _request(self) -> None:
    """Sets a plain state aside for the texts that deliberate now, if there are any."""
    everywhere = self.policy.next_stop(self.count) == self.count
    self.waiting = self.active & (everywhere | self.opened)
    if not self.waiting.any():
      return
    # A gate stays closed in texts that get no latents.
    wants = self.source.wants(self.state)
    self.waiting, self.gate_from[~wants] = self.waiting & wants, np.iinfo(np.int32).max
    if not self.waiting.any():
      return
    self.engine.stats.begun += 1
    try:
      self._split()
    except RuntimeError as error:  # no memory for another cache, for instance
      self._fail(f'there is no plain cache to make them from: {error}')
      self._settle()
      return
    # Latents that must join here start now. Others start after the next token, see `run`.
    if self.options.timing.delay == 0:
      self._begin()

  def _split(self) -> None:
    """Splits the plain state, which latents are made from, from the state to decode from."""
    plain, state, again = self.state, self.state, self.attached & self.waiting
    if self.attached.any():
      # Texts with latents are read again without them. Those that deliberate now continue there.
      since = [completion.tokens[self.base_count:] for completion in self.completions]
      since += [[]] * (len(self.active) - len(since))
      plain = self.engine.choose(self.attached, self.engine.read_on(self.base, since), state)
      state = self.engine.choose(again, plain, state)
    elif self.options.timing.delay != 0:
      # Decoding continues before latents join, and overwrites its keys and values.
      state = copied(plain)
    self.state, self.attached = state, self.attached & ~again
    self.base, self.base_count = plain, self.count

  def _begin(self) -> None:
    self.augmentation = BackgroundAugmentation(self.source.augment, self.base,
                                               self.options.timing.timeout)

  def _is_due(self) -> bool:
    if self.augmentation is None:
      return False
    delay = self.options.timing.delay
    return self.augmentation.is_ready() if delay is None else self.count >= self.base_count + delay

  def _join(self) -> None:
    """Attaches the latents that texts wait for, or continues without."""
    try:
      augmentation = self.augmentation.result()
      if augmentation is None:
        raise RuntimeError('it made no latents')
      # Texts that ended while they waited get no latents.
      rows = self.waiting & self.active & np.asarray(augmentation.finite)
      if rows.any():
        self.state = self.engine.attach(self.state, augmentation, rows)
    except RuntimeError as error:
      self._fail(f'the coprocessor failed: {error}')
    else:
      # One bad text counts as a failure, but the others still join.
      if (self.waiting & self.active & ~rows).any():
        self._fail('some are not finite')
      elif rows.any():
        self.engine.stats.joined += 1
      else:
        self.engine.stats.late += 1
      self.attached = self.attached | rows
      for completion, joins in zip(self.completions, rows, strict=False):
        completion.latents_at += [self.count] * bool(joins)
    self._settle()

  def _settle(self) -> None:
    """Ends the wait for latents."""
    # The plain state is needed again only if texts with latents may deliberate again.
    if not (self.policy.repeats and self.attached.any()):
      self.base = None
    self.gate_from[self.waiting] = self.count + self.policy.min_gap
    self.waiting, self.augmentation = np.zeros_like(self.waiting), None

  def _fail(self, reason: str) -> None:
    self.engine.stats.failed += 1
    self.engine.warn(reason)

  def _limit(self) -> int:
    """Returns the number of tokens until the host must look again."""
    # The host must look at the end of a block or a text, and wherever latents are due.
    stops = [BLOCK, self.options.max_tokens - self.count]
    following = self.policy.next_stop(self.count + 1)
    if following is not None:
      stops.append(following - self.count)
    # The first token is given out alone, and a coprocessor that waits to start needs only one.
    if not self.count or (self.waiting.any() and self.augmentation is None):
      stops.append(1)
    elif self.waiting.any():
      delay = self.options.timing.delay
      stops.append(1 if delay is None else self.base_count + delay - self.count)
    return min(stops)

  def _decode(self) -> int:
    """Decodes a block for the active texts; returns the number of tokens of each."""
    threshold = self.policy.threshold
    if threshold is not None and self.waiting.any():
      threshold = math.inf  # no gate opens while texts wait for latents
    forced = None if self.forced is None else self.forced[:, self.count:self.count + BLOCK]
    self.state, decoded = self.engine.decode(
        self.state, self.keys, count=self.count, active=self.active, limit=self._limit(),
        size=BLOCK, sampling=self.options.sampling, eos=self.options.eos,
        num_ids=self.options.num_ids, threshold=threshold, gate=self.policy.gate,
        gate_from=self.gate_from, forced=forced)
    decoded = jax.device_get(decoded)
    self.count += int(decoded.steps)
    self.opened = decoded.opened
    # Tokens after the end of a text are dropped.
    for number, completion in enumerate(self.completions):
      for step in range(decoded.steps):
        if completion.finish_reason:
          break
        self._add(completion, int(decoded.tokens[step, number]),
                  float(decoded.logprobs[step, number]), self.sizes[number])
      self.active[number] = not completion.finish_reason
    return int(decoded.steps)

  def _add(self, completion: Completion, token: int, logprob: float, size: int) -> None:
    completion.tokens.append(token)
    completion.logprobs.append(logprob)
    if token in self.options.eos:
      completion.finish_reason = 'eos'
    elif self.options.stop is not None and self.options.stop(completion.tokens):
      completion.finish_reason = 'stop'
    elif len(completion.tokens) == size:
      completion.finish_reason = 'length'


def generate(engine: Engine, texts: Prompts | State, options: DecodingOptions,
             seeds: Sequence[int] | None = None,
             source: LatentSource | None = None) -> list[Completion]:
  """Decodes to the end; see `stream`."""
  *_, completions = stream(engine, texts, options, seeds, source=source)
  return completions


def score(engine: Engine, texts: Prompts | State, continuations: Prompts,
          options: DecodingOptions, source: LatentSource | None = None) -> list[Completion]:
  """Decodes given continuations, with latents where the policy would make them; see `stream`.

  The completions hold the given tokens, and their log-probabilities.

  Args:
    continuations: ids of each text, one or more.
    options: options of decoding, of which the policy and the timing are used.
    source: see `stream`.
  """
  if not all(continuations):
    raise UserError(f'continuation {list(map(len, continuations)).index(0)} is empty: there is '
                    'nothing to score')
  options = dataclasses.replace(options, max_tokens=max(map(len, continuations)), eos=(),
                                stop=None, num_ids=None)
  *_, completions = stream(engine, texts, options, forced=continuations, source=source)
  return completions


def stream(engine: Engine, texts: Prompts | State, options: DecodingOptions,
           seeds: Sequence[int] | None = None, forced: Prompts | None = None,
           source: LatentSource | None = None) -> Iterator[list[Completion]]:
  """Checks everything, then decodes a block of tokens at a time.

  Args:
    engine: the decoder.
    texts: prompts; or a state, which stays as it is.
    options: options of decoding.
    seeds: seeds of the texts; default 0, 1, 2, ... Each text is drawn by its own seed, whatever
      the others are.
    forced: tokens of each text to take instead of drawn ones; None to draw.
    source: what makes the latents of these texts; None for the coprocessor of the engine.

  Returns: an iterator over the same growing completions; the first has one token.

  Raises:
    UserError: a prompt is bad (see `Engine.read`), too short for latents, or too long for the
      requested tokens; the gate has another width; or there is not one seed for each text.
  """
  # Check everything before the prompts are read.
  given = isinstance(texts, State)
  lengths = np.asarray(texts.lengths) if given else np.array([len(prompt) for prompt in texts])
  if not given:
    check_prompts(texts, np.zeros(len(texts)), engine.model.decoder.config.vocab_size)
  check_lengths(engine, lengths, options)
  width, gate = engine.model.decoder.config.embed_dim, options.policy.gate
  if gate is not None and gate.weight.shape != (width,):
    raise UserError(f'the weight of the gate has shape {gate.weight.shape}, but the decoder needs '
                    f'{(width,)}: give a gate that was fitted on this decoder')
  seeds = check_seeds(seeds, len(lengths))
  # A given state is copied, because decoding overwrites its cache.
  if given:
    return Session(engine, copied(texts), options, seeds, forced, source).run()
  # The mesh divides the texts evenly, so the first prompt fills up the last shards.
  filler = [texts[0]] * (-len(texts) % engine.shards)
  return Session(engine, engine.read([*texts, *filler]), options, seeds, forced, source).run()


def check_lengths(engine: Engine, lengths: np.ndarray, options: DecodingOptions,
                  names: Sequence[str] = ()) -> None:
  """Raises UserError where texts of `lengths` [B] tokens cannot be decoded as the options say.

  Args:
    names: see `check_room`.
  """
  check_room(lengths, options.max_tokens, engine.model.plan.global_slots, names)
  if engine.model.coprocessor is not None and options.policy != NEVER:
    check_anchors(lengths, engine.model.coprocessor.config.first_anchor, names)


def batches(engine: Engine, count: int, batch_size: int = 0) -> Iterator[slice]:
  """Yields the texts that are decoded together, of `count` texts.

  Args:
    batch_size: number of texts; 0 for as many as `Engine.batch_size` says.
  """
  check_integer('batch_size', batch_size, 0)
  size = batch_size or engine.batch_size
  for first in range(0, count, size):
    yield slice(first, min(first + size, count))
