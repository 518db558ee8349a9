"""A stream of tokens, in blocks: when to deliberate, when latents join, where texts end."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.inference.background import BackgroundAugmentation, LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.generator import Generator, copied
from latent_deliberation.inference.passes import (
  Prompts,
  State,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.policy import NEVER, Policy


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """What is to be done behind the prompts.

  Attributes:
    max_tokens: decoded for every prompt, unless its text ends before.
    sampling: how a token is chosen.
    eos: id that ends a text; None for none.
    stop: given all that was decoded for a prompt, after every token; True ends the text.
    policy: when to deliberate.
    arrival: when the latents join.
  """
  max_tokens: int
  sampling: Sampling = Sampling()
  eos: int | None = None
  stop: Callable[[Sequence[int]], bool] | None = None
  policy: Policy = NEVER
  timing: LatentTiming = LatentTiming()

  def __post_init__(self):
    if self.max_tokens < 1:
      raise UserError(f'max_tokens = {self.max_tokens}: at least 1 must be decoded')


@dataclasses.dataclass
class Completion:
  """What was decoded for a prompt.

  Attributes:
    tokens: ids, that which ended the text included.
    logprobs: of the tokens under the model itself, nats, before any filter.
    ended: by 'eos', 'stop' or 'length'; '' while the text goes on.
    latents_at: numbers of tokens after which latents joined.
  """
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish_reason: str = ''
  latents_at: list[int] = dataclasses.field(default_factory=list)


BLOCK = 16  # tokens of a text between two looks of the host


class Session:
  """Texts that are decoded together, each to its own end; it is run once.

  Latents are always made from a plain cache, as in training. Texts that hold latents and are to
  deliberate once more are therefore read again, plainly, from where they last deliberated.

  Attributes:
    state: what is decoded from; its keys and values are overwritten, so it shares them with none.
    base: the plain state that latents were last made from, after `base_count` decoded tokens.
    attached: bool [B] texts that hold latents.
    asked: bool [B] texts whose latents are awaited.
    opened: bool [B] texts whose gate opens at their next token.
    active: bool [B] texts that go on.
    count: tokens decoded so far.
    gate_from: int32 [B] number of tokens before which a text's gate stays closed.
    attempt: the coprocessor at work on `base`; None where it is not.
    completions: what was decoded, by text.
  """

  def __init__(self, generator: Generator, state: State, options: DecodingOptions, seeds: list[int]):
    """Begins from a state, which is overwritten.

    Args:
      seeds: of the texts; rows of the state behind those are filler.
    """
    self.generator, self.options, self.state, self.policy = generator, options, state, options.policy
    if generator.model.coprocessor is None and self.policy != NEVER:
      generator.stats.begun += 1
      self._fail('there is no coprocessor')
      self.policy = NEVER
    batch = len(state.position)
    self.completions = [Completion() for _ in seeds]
    self.active = np.arange(batch) < len(seeds)
    seeds = np.array(seeds + [0] * (batch - len(seeds)), np.uint32)
    self.keys = jax.vmap(jax.random.key)(generator.place(seeds))
    self.count = 0
    self.base, self.base_count, self.augmentation = None, 0, None
    self.attached, self.asked, self.opened = np.zeros((3, batch), bool)
    self.gate_from = np.zeros(batch, np.int32)

  def run(self) -> Iterator[list[Completion]]:
    """Decodes to the end."""
    while self.active.any():
      if not self.asked.any():
        self._ask()
      if self.asked.any() and self._is_time():
        self._join()
      if self._decode():
        yield self.completions
      if self.asked.any() and self.augmentation is None:
        self._begin()  # after a token, which does not have to wait for the coprocessor to start
    if self.asked.any():
      self.generator.stats.late += 1

  def _ask(self) -> None:
    """Takes the plain states of the texts that are to deliberate now, if there are any."""
    everywhere = self.policy.next_stop(self.count) == self.count
    self.asked = self.active & (everywhere | self.opened)
    if not self.asked.any():
      return
    self.generator.stats.begun += 1
    try:
      self._part()
    except RuntimeError as error:  # as where there is no memory for another cache
      self._fail(f'there is no plain cache to make them from: {error}')
      self._settle()
      return
    if self.options.timing.delay == 0:
      self._begin()

  def _part(self) -> None:
    """Parts the plain state, which latents are made from, from the state that is decoded from."""
    plain, state, again = self.state, self.state, self.attached & self.asked
    if self.attached.any():
      since = [completion.tokens[self.base_count:] for completion in self.completions]
      since += [[]] * (len(self.active) - len(since))
      plain = self.generator.choose(
          self.attached, self.generator.read_on(self.base, since), state)
      state = self.generator.choose(again, plain, state)
    elif self.options.timing.delay != 0:
      state = copied(plain)
    self.state, self.attached = state, self.attached & ~again
    self.base, self.base_count = plain, self.count

  def _begin(self) -> None:
    self.augmentation = BackgroundAugmentation(self.generator.augment, self.base, self.options.timing.timeout)

  def _is_time(self) -> bool:
    if self.augmentation is None:
      return False
    delay = self.options.timing.delay
    return self.augmentation.is_ready() if delay is None else self.count >= self.base_count + delay

  def _join(self) -> None:
    """Attaches the latents that were awaited, or goes on without."""
    try:
      augmentation = self.augmentation.result()
      rows = self.asked & self.active & np.asarray(augmentation.finite)
      if rows.any():
        self.state = self.generator.attach(self.state, augmentation, rows)
    except RuntimeError as error:
      self._fail(f'the coprocessor failed: {error}')
    else:
      if (self.asked & self.active & ~rows).any():
        self._fail('some are not finite')
      else:
        self.generator.stats.joined += 1
      self.attached = self.attached | rows
      for completion, joins in zip(self.completions, rows, strict=False):
        completion.latents_at += [self.count] * bool(joins)
    self._settle()

  def _settle(self) -> None:
    """Awaits nothing more."""
    if not (self.policy.repeats and self.attached.any()):
      self.base = None
    self.gate_from[self.asked] = self.count + self.policy.apart
    self.asked, self.augmentation = np.zeros_like(self.asked), None

  def _fail(self, reason: str) -> None:
    self.generator.stats.failed += 1
    self.generator.warn(reason)

  def _limit(self) -> int:
    """Tokens until the host must look again."""
    stops = [BLOCK, self.options.max_tokens - self.count]
    following = self.policy.next_stop(self.count + 1)
    if following is not None:
      stops.append(following - self.count)
    if not self.count or (self.asked.any() and self.augmentation is None):
      stops.append(1)
    elif self.asked.any():
      delay = self.options.timing.delay
      stops.append(1 if delay is None else self.base_count + delay - self.count)
    return min(stops)

  def _decode(self) -> int:
    """Decodes a block for the active texts; returns the number of tokens of each."""
    threshold = self.policy.threshold
    if threshold is not None:
      threshold = np.float32(math.inf if self.asked.any() else threshold)
    self.state, decoded = self.generator.decode(
        self.state, self.keys, np.int32(self.count), self.generator.place(self.active),
        np.int32(self._limit()), threshold, self.policy.gate,
        self.generator.place(self.gate_from), sampling=self.options.sampling, size=BLOCK,
        eos=self.options.eos)
    decoded = jax.device_get(decoded)
    self.count += int(decoded.steps)
    self.opened = decoded.opened
    for number, completion in enumerate(self.completions):
      for step in range(decoded.steps):
        if completion.finish_reason:
          break
        self._add(completion, int(decoded.tokens[step, number]),
                  float(decoded.logprobs[step, number]))
      self.active[number] = not completion.finish_reason
    return int(decoded.steps)

  def _add(self, completion: Completion, token: int, logprob: float) -> None:
    completion.tokens.append(token)
    completion.logprobs.append(logprob)
    if token == self.options.eos:
      completion.finish_reason = 'eos'
    elif self.options.stop is not None and self.options.stop(completion.tokens):
      completion.finish_reason = 'stop'
    elif len(completion.tokens) == self.options.max_tokens:
      completion.finish_reason = 'length'


def generate(generator: Generator, texts: Prompts | State, options: DecodingOptions,
             seeds: Sequence[int] | None = None) -> list[Completion]:
  """Decodes to the end; see `stream`."""
  *_, completions = stream(generator, texts, options, seeds)
  return completions


def stream(generator: Generator, texts: Prompts | State, options: DecodingOptions,
           seeds: Sequence[int] | None = None) -> Iterator[list[Completion]]:
  """Checks everything, then decodes a block of tokens at a time.

  Args:
    generator: the decoder.
    texts: prompts; or a state, which stays as it is.
    options: what to do.
    seeds: of the texts; default 0, 1, 2, ... A text is drawn by its own seed, whatever the others.

  Returns: an iterator over the same growing completions; the first has one token.

  Raises:
    UserError: a prompt is bad (see `Generator.read`), too short for latents, or too long for what
      is to be decoded; the gate is of another width; or there is not one seed for each.
  """
  given = isinstance(texts, State)
  lengths = np.asarray(texts.lengths) if given else np.array([len(prompt) for prompt in texts])
  if not given:
    check_prompts(texts, np.zeros(len(texts)), generator.model.decoder.config.vocab_size)
  check_room(lengths, options.max_tokens, generator.model.plan.global_slots)
  if generator.model.coprocessor is not None and options.policy != NEVER:
    check_anchors(lengths, generator.model.coprocessor.config.first_anchor)
  width, gate = generator.model.decoder.config.embed_dim, options.policy.gate
  if gate is not None and gate.weight.shape != (width,):
    raise UserError(f'the weight of the gate has shape {gate.weight.shape}, the decoder asks for '
                     f'{(width,)}: give a gate that was fitted on this decoder')
  seeds = list(range(len(lengths))) if seeds is None else list(seeds)
  if len(seeds) != len(lengths) or not all(0 <= seed < 2**32 for seed in seeds):
    raise UserError(f'{len(seeds)} seeds {seeds[:4]} for {len(lengths)} texts: give one for each, '
                     'between 0 and 2**32 - 1')
  if given:
    return Session(generator, copied(texts), options, seeds).run()
  filler = [texts[0]] * (-len(texts) % generator.shards)
  return Session(generator, generator.read([*texts, *filler]), options, seeds).run()
