"""A decoder with its coprocessor and controls, which scores answers and writes text in every arm.

`ArmModel.score` takes answers through the packed scorer. Where latents come by a policy, as after
every 16 tokens, answers and texts go through the engine of inference.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Params
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import SHARED, Request
from latent_deliberation.evaluation.answers import AnswerScorer, Scored, Source
from latent_deliberation.evaluation.perplexity import CONSTANT, FROZEN, MEAN, OWN, SHUFFLED, ZERO
from latent_deliberation.evaluation.shared_work import of_all
from latent_deliberation.experiment import Computation
from latent_deliberation.inference import passes, session
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import NEVER, ONCE, Policy
from latent_deliberation.inference.session import DecodingOptions, Session
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh

_SIZE_STEP = 8  # batches of written texts have multiples of it, and a row more
_LENGTH_STEP = 128  # their caches have multiples of it


@dataclasses.dataclass(frozen=True)
class ControlledCoprocessor(Coprocessor):
  """A coprocessor whose outputs are replaced by a control's, before they become latents.

  Attributes:
    control: 'shuffled' takes those of the text before in the batch, 'zero' has zeros.
  """
  control: str = OWN

  def compose(self, params: Params, outputs: Array, base: Array) -> Array:
    """See Coprocessor."""
    if self.control == SHUFFLED:
      outputs = jnp.roll(outputs, 1, axis=0)
    elif self.control == ZERO:
      outputs = jnp.zeros_like(outputs)
    return super().compose(params, outputs, base)


@dataclasses.dataclass(frozen=True)
class Writing:
  """How texts are written.

  Attributes:
    options: options of decoding, without the policy.
    stop: strings that end a text and are not part of it.
    batch_size: largest number of texts that are decoded together; 0 for as many as fit 2 GiB of
      cache.
  """
  options: DecodingOptions
  stop: tuple[str, ...] = ()
  batch_size: int = 0


@dataclasses.dataclass(frozen=True)
class Written:
  """Texts that were written.

  Attributes:
    numbers: number of each prompt.
    texts: the texts, without what ended them.
    tokens: number of tokens of each, with the one that ended it.
  """
  numbers: tuple[int, ...]
  texts: tuple[str, ...]
  tokens: tuple[int, ...]


class ArmModel:
  """A frozen decoder, a coprocessor, and constant soft tokens; the last two may be absent.

  Attributes:
    config: architecture of the decoder.
    fingerprint: fingerprint of its weights.
    tokenizer: its tokenizer.
    own: the coprocessor; None without one.
    constant: trained constant soft tokens; None without any.
    dtype: dtype of the computation.
    max_length: largest number of tokens that the decoder reads of a text.
  """

  def __init__(self, config: TransformerConfig, params: Params, decoder_fingerprint: str,
               tokenizer: Tokenizer, *, own: CoprocessorCheckpoint | None = None,
               constant: CoprocessorCheckpoint | None = None, dtype: str = 'float32',
               max_length: int = 2048, mesh: Mesh | None = None):
    """Takes weights that are loaded, stacked, on the devices of `mesh`."""
    self.config, self.fingerprint, self.tokenizer = config, decoder_fingerprint, tokenizer
    self.own, self.constant, self.max_length = own, constant, max_length
    self.params, self._mesh = params, mesh or make_mesh(MeshConfig())
    computation = Computation(dtype=dtype, attention='auto').on(jax.default_backend())
    self.dtype = computation.dtype
    self._options = {
        'dtype': computation.dtype, 'attention': computation.attention,
        'activations': None if computation.activations == computation.dtype
                       else computation.activations}
    self._scorers: dict[tuple[str, ...], AnswerScorer] = {}
    self._engines: dict[str, Engine] = {}  # the newest of each arm
    self._unstacked: Params | None = None

  def scorer(self, arms: Sequence[str]) -> AnswerScorer:
    """Returns the scorer of these arms, which keeps its compiled programs."""
    key = tuple(arms)
    if key not in self._scorers:
      sources = {name: self._source(checkpoint) for name, checkpoint in (
          (OWN, self.own if set(arms) - {FROZEN, CONSTANT} else None),
          (CONSTANT, self.constant if CONSTANT in arms else None)) if checkpoint is not None}
      self._scorers[key] = AnswerScorer(
          Decoder(self.config, **self._options), self.params, arms, mesh=self._mesh,
          rules=DEFAULT_RULES, own=sources.get(OWN), constant=sources.get(CONSTANT))
    return self._scorers[key]

  def _source(self, checkpoint: CoprocessorCheckpoint) -> Source:
    return Source(Coprocessor(self.config, checkpoint.config, **self._options), checkpoint.params)

  def score(self, requests: Sequence[Request], arms: Sequence[str], skip: Collection[int] = (),
            policy: Policy = ONCE) -> Iterator[tuple[Scored, int]]:
    """Yields the scores of some requests, and the number of calls that are left.

    Args:
      requests: all requests of a task.
      arms: names of `answers.ARMS`.
      skip: numbers of requests that need no score.
      policy: places of the latents. Once, where each request says, is the packed scorer's. Any
        other is scored token by token, with its places counted from the end of the context.

    Raises:
      UserError: an arm or a request cannot be scored; see AnswerScorer.
    """
    if policy == ONCE:
      yield from self.scorer(arms).score(requests, skip)
      return
    check_policy(arms, policy)
    yield from self._score_by_policy(requests, arms, set(skip), policy)

  def _score_by_policy(self, requests: Sequence[Request], arms: Sequence[str], skip: set[int],
                       policy: Policy) -> Iterator[tuple[Scored, int]]:
    has_room = list(map(self.scorer(arms).has_room, requests))
    left = [number for number in range(len(requests)) if number not in skip]
    left.sort(key=lambda number: (len(requests[number].context), number))
    # A batch may hold the longest context and the longest answer.
    longest = (max((len(request.context) for request in requests), default=1)
               + max((len(request.continuation) for request in requests), default=1))
    engines = {author: self.engine(author, longest)
               for author in {FROZEN, *map(self.same_as, arms)}}
    size = min(engine.batch_size for engine in engines.values())
    calls = [(fits, batch) for fits in (False, True) for batch in _batches(
        requests, [number for number in left if has_room[number] == fits], size,
        self.max_length + 1)]
    for done, (fits, numbers) in enumerate(calls, start=1):
      authors = [self.same_as(arm) if fits else FROZEN for arm in arms]
      batch = [requests[number] for number in numbers]
      scores = {author: _score_batch(engines[author], author, batch, policy)
                for author in dict.fromkeys(authors)}
      nats, greedy = (np.array(each).T for each in zip(*map(scores.get, authors), strict=True))
      yield Scored(np.array(numbers), nats, greedy), len(calls) - done

  def same_as(self, arm: str) -> str:
    """Returns the arm whose texts an arm has: refining latents of zero are the frozen decoder."""
    refines = self.own is not None and self.own.config.latents == 'refining'
    return FROZEN if arm == ZERO and refines else arm

  def check_writer(self, arm: str) -> CoprocessorCheckpoint | None:
    """Returns what makes the latents of an arm that writes text; None for the frozen decoder.

    Raises:
      UserError: the arm has no latents in text that is written, or lacks what makes them.
    """
    checkpoint = {FROZEN: None, CONSTANT: self.constant}.get(arm, self.own)
    if arm == MEAN or arm != FROZEN and checkpoint is None:
      raise UserError(f'arm {arm!r} cannot write text: give {FROZEN!r}; {OWN!r}, {SHUFFLED!r} or '
                      f'{ZERO!r} with a coprocessor; or {CONSTANT!r} with constant soft tokens. Or '
                      'leave out the tasks whose answers are written')
    return checkpoint

  def engine(self, arm: str, longest: int | None = None) -> Engine:
    """Returns the engine that writes text in an arm.

    Args:
      longest: number of tokens of the longest text, prompt included; default is all that the
        decoder reads. The cache has slots for few more, since a step reads every slot, and more
        texts of a small cache are decoded together.

    Raises:
      UserError: see `check_writer`.
    """
    # It reads the last token of an answer, too, which the packed scorer only predicts.
    length = self.max_length + 1
    if longest is not None:
      length = min(length, longest + -longest % _LENGTH_STEP)
    if arm not in self._engines or self._engines[arm].model.plan.global_slots != length:
      checkpoint = self.check_writer(arm)
      self._engines.pop(arm, None)  # its memory is free before the next one is made
      # All engines share the decoder's unstacked weights.
      if self._unstacked is None:
        params = self._local(self.params)
        self._unstacked = {**params, 'transformer': passes.unstack(params['transformer'])}
      several = self._mesh.size > 1 and jax.process_count() == 1
      engine = Engine(
          self.config, self._unstacked, length=length, dtype=self._options['dtype'],
          coprocessor=checkpoint and (checkpoint.config, self._local(checkpoint.params)),
          mesh=self._mesh if several else None, decoder_fingerprint=self.fingerprint)
      if arm in (SHUFFLED, ZERO):
        plain = engine.model.coprocessor
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        engine.model = dataclasses.replace(
            engine.model, coprocessor=ControlledCoprocessor(**fields, control=arm))
      self._engines[arm] = engine
    return self._engines[arm]

  def _local(self, params: Params) -> Params:
    """Returns the weights on a device of this process, where several write texts of their own."""
    if jax.process_count() == 1:
      return params
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
      raise UserError(f'mesh {dict(self._mesh.shape)}: with several processes each writes texts of '
                      'its own, which needs whole weights on a device: leave --mesh out')
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)

  def write(self, prompts: Sequence[Sequence[int]], arm: str, writing: Writing,
            skip: Collection[int] = (), policy: Policy = ONCE,
            anchors: Sequence[int] = ()) -> Iterator[tuple[Written, int]]:
    """Yields the texts after some prompts, and the number of batches that are left.

    Prompts of similar lengths are decoded together. What all of them begin with is read once. With
    several processes, each writes one batch in turn, and all get all texts.

    Args:
      prompts: ids of all prompts of a task. Another example's latents come from these.
      arm: name of an arm, but not 'mean'.
      writing: options.
      skip: numbers of prompts that need no text.
      policy: places of the latents.
      anchors: index in each prompt of the last token before the latents, where they come once and
        before its end, whatever the policy; default is the policy alone.

    Raises:
      UserError: see `engine`; or a prompt is too long or too short.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    engine = self.engine(arm, int(lengths.max(initial=0)) + writing.options.max_tokens)
    anchors = () if arm == FROZEN else anchors
    heads = [prompt[:anchor + 1] for prompt, anchor in zip(prompts, anchors, strict=True)
             ] if anchors else prompts
    options = dataclasses.replace(
        session.with_ends(writing.options, self.tokenizer, writing.stop),
        policy=NEVER if arm == FROZEN or anchors else policy)
    session.check_lengths(engine, lengths, options)
    # Texts that repeat an earlier one come last, since neighbours lend each other their latents.
    times, seen = [], collections.Counter()
    for head in map(tuple, heads):
      times.append(seen[head])
      seen[head] += 1
    order = sorted(range(len(prompts)), key=lambda number: (times[number], lengths[number], number))
    shared = _read_shared(engine, heads)
    skip = set(skip)
    left = [place for place in range(len(order)) if order[place] not in skip]
    if not left:
      return
    # Batches of about equal size, shared by the processes: a row without a text costs as much as
    # one with a text. Each size is compiled, so there are few.
    turns = jax.process_count()
    most = writing.batch_size or max(1, engine.batch_size - 1)
    rounds = math.ceil(len(left) / (most * turns))
    even = math.ceil(len(left) / (rounds * turns))
    # A batch has one more row for another example's latents.
    size = min(most, even + -even % _SIZE_STEP) + 1
    size += -size % engine.shards
    # The latents of another example are those of the prompt before, so no batch skips that one.
    parts = _runs(left) if arm == SHUFFLED else [left]
    batches = [part[first:first + size - 1] for part in parts
               for first in range(0, len(part), size - 1)]

    def write_batch(places: Sequence[int]) -> tuple[list[int], list[str], list[int]]:
      # The row before the first, around the end, is of the prompt before it in the order.
      before = order[places[0] - 1] if places[0] else order[min(1, len(order) - 1)]
      numbers = [order[place] for place in places]
      rows = [*numbers, *[before] * (size - len(numbers))]
      state = _read_rows(engine, shared, [heads[number] for number in rows])
      if anchors:
        latents = engine.augment(state)
        _check_made(arm, bool(np.asarray(latents.finite).all()))
        state = engine.attach(state, latents)
        state = engine.read_on(state, [prompts[number][anchors[number] + 1:] for number in rows])
      *_, completions = Session(engine, state, options, numbers).run()
      _check_made(arm, not engine.stats.failed)
      texts = [session.text_of(completion, self.tokenizer, writing.stop, prompts[number])
               for completion, number in zip(completions, numbers, strict=True)]
      return numbers, texts, [len(completion.tokens) for completion in completions]

    for first in range(0, len(batches), turns):
      own = batches[first + jax.process_index():][:1]
      written = of_all([write_batch(places) for places in own])
      for numbers, texts, tokens in itertools.chain.from_iterable(written):
        yield Written(tuple(numbers), tuple(texts), tuple(tokens)), max(
            len(batches) - first - turns, 0)


def _score_batch(engine: Engine, arm: str, requests: Sequence[Request],
                 policy: Policy) -> tuple[list[float], list[bool]]:
  """Returns nats of continuations that are read token by token, and whether they are greedy."""
  policy = NEVER if arm == FROZEN else policy
  contexts = [request.context for request in requests]
  answers = [list(request.continuation) for request in requests]
  scored = session.score(engine, contexts, answers, DecodingOptions(1, policy=policy))
  # The engine does not tell which tokens are the likeliest, so it writes until it departs.
  written = session.generate(engine, contexts, DecodingOptions(
      max(map(len, answers)), policy=policy,
      stop=lambda tokens: all(answer[:len(tokens)] != tokens for answer in answers)))
  _check_made(arm, not engine.stats.failed)
  return ([-sum(completion.logprobs) for completion in scored],
          [completion.tokens[:len(answer)] == answer
           for completion, answer in zip(written, answers, strict=True)])


def _check_made(arm: str, made: bool) -> None:
  """Raises UserError where latents were not made: an arm's text would be the frozen decoder's."""
  if not made:
    raise UserError(f'arm {arm!r}: the coprocessor failed, or its latents are not finite. Lower '
                    '--batch_size if memory ran out, train the coprocessor again, or leave the arm '
                    'out')


def check_policy(arms: Sequence[str], policy: Policy) -> None:
  """Raises UserError where an arm has no latents at the places of a policy."""
  unable = sorted({SHUFFLED, MEAN} & set(arms))
  if policy != ONCE and unable:
    raise UserError(f'arms {unable} have latents once in a context, and by no policy: leave the '
                    'policy (every, at, gate) out, or the arms')


def _runs(places: Sequence[int]) -> list[list[int]]:
  """Cuts ascending numbers into runs of successive ones."""
  return [[place for _, place in run] for _, run in itertools.groupby(
      enumerate(places), lambda each: each[1] - each[0])]


def _batches(requests: Sequence[Request], numbers: Sequence[int], size: int,
             length: int) -> Iterator[list[int]]:
  """Yields batches of up to `size` requests, where any context and any answer fit `length`.

  The numbers come in the order of the lengths of contexts.
  """
  batch: list[int] = []
  longest = 0  # answer of the batch
  for number in numbers:
    answer = len(requests[number].continuation)
    longest = max(longest, answer)
    if batch and (len(batch) == size or len(requests[number].context) + longest > length):
      yield batch
      batch, longest = [], answer
    batch.append(number)
  if batch:
    yield batch


def _read_shared(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[int, State | None]:
  """Reads what all prompts begin with; returns its number of tokens, 0 if it is too short."""
  first, last, shortest = min(prompts), max(prompts), min(map(len, prompts))
  shared = next((at for at in range(shortest - 1) if first[at] != last[at]), shortest - 1)
  if shared < SHARED or len(prompts) < 2:
    return 0, None
  # A mesh divides texts, so each of its shards reads the same one.
  return shared, engine.read([first[:shared]] * engine.shards)


def _read_rows(engine: Engine, shared: tuple[int, State | None],
               prompts: Sequence[Sequence[int]]) -> State:
  count, state = shared
  if state is None:
    return engine.read(prompts)
  copies = len(prompts) // engine.shards
  repeated = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, copies, axis=0) if leaf.ndim else leaf, state)
  return engine.read_on(repeated, [prompt[count:] for prompt in prompts])
