"""Answers to the requests of tasks, in several arms, each computed once.

The requests of a task come as text, once for each arm, since lm-evaluation-harness scores one model
after the other. The first time, all arms are scored in one pass. After that the ledger has them.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.deliberation.flops import (
  answer_flops,
  forward_flops,
  head_flops,
  latents_flops,
)
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.answer_contexts import Request, group
from latent_deliberation.evaluation.answer_texts import END, AnswerEncoder, EncodedCounts
from latent_deliberation.evaluation.arm_model import ArmModel, Writing, check_policy
from latent_deliberation.evaluation.ledger import Ledger, Score, prompt_key, request_key
from latent_deliberation.evaluation.perplexity import CONSTANT, FROZEN, MEAN, ZERO
from latent_deliberation.evaluation.shared_work import follow, lead
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.policy import ONCE, Policy
from latent_deliberation.inference.session import DecodingOptions
from latent_deliberation.progress import Progress, announced

MAX_TOKENS = 256  # of a text, where a task does not say how many
# Keys of lm-evaluation-harness's generation_kwargs.
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p')
_KNOWN = {'until', 'max_gen_toks', 'max_tokens', 'max_new_tokens', 'do_sample', *_SAMPLING}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How latents come, and what happens where they cannot.

  Attributes:
    place: place of the latents in a context; see AnswerEncoder.
    policy: when latents come; default: once, at `place`.
    plain_if_short: whether contexts without room for latents are scored and continued by the frozen
      decoder in every arm; otherwise they are refused.
    batch_size: largest number of texts that are decoded together; 0 for as many as fit 2 GiB of
      cache.
  """
  place: str = END
  policy: Policy = ONCE
  plain_if_short: bool = False
  batch_size: int = 0

  def __post_init__(self):
    check_integer('batch_size', self.batch_size, 0)
    if self.place != END and self.policy != ONCE:
      raise UserError(f'place = {self.place!r} with a policy (every, at, gate): a policy counts '
                      'tokens from the end of the context; give one of the two')


@dataclasses.dataclass
class Cost:
  """What the answers of an arm cost, if nothing else is computed.

  Attributes:
    tokens: number of tokens and latents that the decoder reads.
    flops: operations, those of the coprocessor included.
  """
  tokens: float = 0.0
  flops: float = 0.0


class TaskAnswers:
  """Scores and texts of several arms.

  Attributes:
    arms: names of `answers.ARMS`, scored together.
    model: the decoder and what makes its latents.
    counts: requests that were truncated or merged, by task.
    short: number of contexts without room for latents, by task.
    costs: cost of each arm, by task and arm.
  """

  def __init__(self, model: ArmModel, arms: Sequence[str], settings: Settings = Settings(),
               ledger: Ledger | None = None):
    self.model, self.arms, self._settings = model, tuple(arms), settings
    self._ledger = ledger or Ledger()
    self.counts: dict[str, EncodedCounts] = {}
    self.short: dict[str, int] = {}
    self.costs: dict[tuple[str, str], Cost] = {}
    # An arm that cannot be scored is refused before any task is loaded.
    check_policy(self.arms, settings.policy)
    model.scorer(self.arms)

  def frozen(self) -> 'TaskAnswers':
    """Returns the answers of the frozen decoder alone, which needs no room or place for latents."""
    return TaskAnswers(self.model, (FROZEN,), Settings(batch_size=self._settings.batch_size),
                       self._ledger)

  def score(self, task: str, pairs: Sequence[tuple[str, str]],
            items: Sequence[Hashable]) -> dict[str, list[Score]]:
    """Returns the scores of continuations after contexts, by arm.

    Args:
      task: name of the task.
      pairs: context and continuation of each request; all those of the task.
      items: question of each request.

    Raises:
      UserError: a request cannot be scored; see AnswerEncoder. Or a context has no room for
        latents, and is not to be scored without.
    """
    return self.score_requests(task, self._encode(task, pairs, items))

  def check(self, task: str, pairs: Sequence[tuple[str, str]], items: Sequence[Hashable]) -> None:
    """Raises the errors of `score` that need the tokenizer alone, and scores nothing."""
    self._check_room(task, self._encode(task, pairs, items))

  def check_prompts(self, task: str, prompts: Sequence[str],
                    generation: Mapping[str, Any]) -> None:
    """Raises the errors of `write` in any arm that need the tokenizer alone, and writes nothing."""
    for arm in self.arms:
      self.model.check_writer(arm)
    writing = _writing(generation, self._settings.batch_size)
    self._check_room(task, self._encode_prompts(task, prompts, writing))

  def score_windows(
      self, task: str,
      windows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, list[Score]]:
    """Returns the scores of continuations after contexts, both in ids, by arm; see `score`."""
    requests = [Request(tuple(context), tuple(continuation), len(context) - 1, number)
                for number, (context, continuation) in enumerate(windows)]
    return self.score_requests(task, requests)

  def score_requests(self, task: str, requests: Sequence[Request]) -> dict[str, list[Score]]:
    """Returns the scores of requests in ids, by arm; see `score`."""
    self._check_room(task, requests)
    keys = [request_key(request) for request in requests]
    skip = [number for number, key in enumerate(keys) if all(
        self._ledger.score(task, arm, key) is not None for arm in self.arms)]
    if len(skip) < len(requests):
      # The item is a number here, so that JSON carries it to other processes.
      numbers: dict[Hashable, int] = {}
      plain = [[request.context, request.continuation, request.anchor,
                numbers.setdefault(request.item, len(numbers))] for request in requests]
      lead('score', plain, skip)
      progress = Progress(f'scoring {task}', 'requests', len(requests) - len(skip))
      done = 0
      with announced(f'scoring {task}: the first batch'):
        batches = self._compute(plain, skip)
        scored = next(batches)
      while scored is not None:
        _check_finite(task, self.arms, scored.nats)
        self._ledger.add_scores(task, self.arms, [keys[number] for number in scored.numbers],
                                scored.nats, scored.greedy)
        done += len(scored.numbers)
        progress.update(done)
        scored = next(batches, None)
    self._count_costs(task, requests)
    return {arm: [self._ledger.score(task, arm, key) for key in keys] for arm in self.arms}

  def write(self, task: str, prompts: Sequence[str], generation: Mapping[str, Any],
            arm: str) -> list[str]:
    """Returns the texts after prompts in an arm.

    Args:
      task: name of the task.
      prompts: all prompts of the task that have these options.
      generation: options, under the names of lm-evaluation-harness.
      arm: name of an arm.

    Raises:
      UserError: an option is unknown or has a value that is not allowed; see `ArmModel.write`. Or
        a prompt has no room for latents, and is not to be continued without.
    """
    writing = _writing(generation, self._settings.batch_size)
    requests = self._encode_prompts(task, prompts, writing)
    self._check_room(task, requests)
    settings = [writing.options.max_tokens, list(writing.stop),
                dataclasses.asdict(writing.options.sampling)]
    # Greedy texts after the same prompt are the same. Drawn ones are not.
    drawn: collections.Counter[tuple[int, ...]] = collections.Counter()
    keys = []
    for request in requests:
      keys.append(prompt_key(request.context, settings, drawn[request.context]))
      drawn[request.context] += not writing.options.sampling.greedy
    has_room = self.model.scorer(self.arms).has_room
    authors = [self.model.same_as(arm) if has_room(request) else FROZEN for request in requests]
    for author in dict.fromkeys(authors):
      chosen = [number for number, each in enumerate(authors) if each == author]
      self._write_missing(task, author, [requests[number] for number in chosen],
                          [keys[number] for number in chosen], generation)
    cost = self.costs[task, arm] = Cost()
    texts = []
    for request, key, author in zip(requests, keys, authors, strict=True):
      text, tokens = self._ledger.text(task, author, key)
      texts.append(text)
      self._add_text_cost(cost, arm, request, max(tokens, 1))
    return texts

  def _encode(self, task: str, pairs: Sequence[tuple[str, str]],
              items: Sequence[Hashable]) -> list[Request]:
    encoder = self._encoder(task)
    return [encoder.encode(context, continuation, item)
            for (context, continuation), item in zip(pairs, items, strict=True)]

  def _encode_prompts(self, task: str, prompts: Sequence[str], writing: Writing) -> list[Request]:
    encoder = self._encoder(task)
    return [encoder.encode_prompt(prompt, writing.options.max_tokens, f'{task} {number}')
            for number, prompt in enumerate(prompts)]

  def _encoder(self, task: str) -> AnswerEncoder:
    """Returns an encoder, whose counts are those of the task."""
    encoder = AnswerEncoder(self.model.tokenizer, self.model.max_length, self._settings.place)
    self.counts[task] = encoder.counts
    return encoder

  def _write_missing(self, task: str, author: str, requests: Sequence[Request],
                     keys: Sequence[str], generation: Mapping[str, Any]) -> None:
    """Writes the texts of one author that the ledger does not have."""
    # A text that has the key of an earlier one is the same text.
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    skip = [number for number, key in enumerate(keys)
            if first[key] != number or self._ledger.text(task, author, key) is not None]
    if len(skip) == len(keys):
      return
    # Latents at the end of the prompts come by the policy.
    anchors = [] if self._settings.place == END else [request.anchor for request in requests]
    call = [request.context for request in requests], author, dict(generation), skip, anchors
    lead('write', *call)
    work, total = f'writing {task}, {author}', len(keys) - len(skip)
    progress = Progress(work, 'texts', total)
    batches, done = self._write(*call), 0
    while done < total:
      # A batch is written at once, which may take minutes.
      with announced(f'{work}: a batch after {done} of {total} texts'):
        written, _ = next(batches)
      self._ledger.add_texts(task, author, [keys[number] for number in written.numbers],
                             written.texts, written.tokens)
      done += len(written.numbers)
      progress.update(done)

  def follow(self) -> None:
    """Takes part in what process 0 computes, on the other processes, until it ends."""

    def exhaust(function: Any, *arguments: Any) -> None:
      for _ in function(*arguments):
        pass

    follow({'score': functools.partial(exhaust, self._compute),
            'write': functools.partial(exhaust, self._write)})

  def _compute(self, plain: Sequence[Sequence[Any]], skip: Sequence[int]):
    requests = [Request(tuple(context), tuple(continuation), anchor, item)
                for context, continuation, anchor, item in plain]
    for scored, _ in self.model.score(requests, self.arms, skip, self._settings.policy):
      yield scored

  def _write(self, ids: Sequence[Sequence[int]], arm: str, generation: Mapping[str, Any],
             skip: Sequence[int], anchors: Sequence[int]):
    writing = _writing(generation, self._settings.batch_size)
    yield from self.model.write(ids, arm, writing, skip, self._settings.policy, anchors)

  def _check_room(self, task: str, requests: Sequence[Request]) -> None:
    """Counts contexts that are too short for latents, and refuses them if they must be."""
    scorer = self.model.scorer(self.arms)
    short = {(request.context, request.anchor) for request in requests
             if not scorer.has_room(request)}
    self.short[task] = len(short)
    if short and not self._settings.plain_if_short:
      context, anchor = min(short, key=lambda each: (each[1], len(each[0])))
      raise UserError(
          f'{len(short)} contexts of task {task} are too short for the latents, which replace '
          f'{scorer.config.num_latents} tokens; the shortest has {anchor + 1} up to their place: '
          'score such contexts without latents (--plain_if_short), or choose another place')

  def _count_costs(self, task: str, requests: Sequence[Request]) -> None:
    """Counts what each arm alone takes for the requests of a task."""
    decoder = self.model.config
    for arm in self.arms:
      cost = self.costs[task, arm] = Cost()
      # By a policy, the engine reads each request alone.
      if self._settings.policy != ONCE:
        for request in requests:
          self._add_text_cost(cost, arm, request, len(request.continuation))
        continue
      for context in group(requests):
        config = self._config_of(arm, context.anchor)
        latents = config.num_latents if config else 0
        # Without latents, tokens between the anchor and the answer are read once.
        again = 0 if config else len(context.ids) - 1 - context.anchor
        trunk = len(context.ids)
        traces = [latents + len(trace) - again for trace in context.traces]
        cost.tokens += trunk + sum(traces)
        cost.flops += forward_flops(decoder, trunk) + len(context.targets) * head_flops(decoder)
        cost.flops += sum(forward_flops(decoder, size, trunk + 1) for size in traces if size)
        if config:
          # Every trace reads the latents, so the reading of the augmentation is counted already.
          cost.flops += latents_flops(decoder, config, context.anchor + 1)
          cost.flops -= forward_flops(decoder, latents, trunk + 1)

  def _add_text_cost(self, cost: Cost, arm: str, request: Request, tokens: int) -> None:
    """Adds what an arm takes for a prompt and `tokens` after it; latents of a gate do not count."""
    decoder, length = self.model.config, len(request.context)
    cost.tokens += length + tokens
    cost.flops += answer_flops(decoder, length, tokens)
    config = self._config_of(arm, request.anchor)
    places = list(_places(self._settings.policy, tokens)) if config else []
    for place in places:
      cost.tokens += config.num_latents
      cost.flops += latents_flops(decoder, config, request.anchor + 1 + place)
    # Latents are made of tokens alone, so those since the last latents are read again.
    for before, place in itertools.pairwise(places):
      cost.tokens += place - before
      cost.flops += forward_flops(decoder, place - before, length + before + 1)

  def _config_of(self, arm: str, anchor: int) -> Any:
    """Returns the config of an arm's latents after an anchor; None for the frozen decoder."""
    arm = self.model.same_as(arm)
    checkpoint = {FROZEN: None, CONSTANT: self.model.constant}.get(arm, self.model.own)
    if checkpoint is None or anchor < checkpoint.config.first_anchor:
      return None
    # An output of zero, or a mean that is known, takes no pass of the coprocessor.
    return dataclasses.replace(checkpoint.config, trainable='constant') if arm in (
        ZERO, MEAN) else checkpoint.config


def _places(policy: Policy, tokens: int) -> Iterator[int]:
  """Yields the set places of a policy in a text of some tokens, counted from its prompt."""
  place = policy.next_stop(0)
  while place is not None and place < tokens:
    yield place
    place = policy.next_stop(place + 1)


def _check_finite(task: str, arms: Sequence[str], nats: np.ndarray) -> None:
  """Raises UserError where a score is not finite; nats: [answers, arms]."""
  if not (finite := np.isfinite(nats)).all():
    answer, arm = np.argwhere(~finite)[0]
    raise UserError(f'task {task}: the arm {arms[arm]!r} gives an answer {nats[answer, arm]} nats, '
                    'so its latents, or the states of the decoder, are no numbers: leave the arm '
                    'out, or train its coprocessor again')


def _writing(generation: Mapping[str, Any], batch_size: int) -> Writing:
  unknown = sorted(set(generation) - _KNOWN)
  if unknown:
    raise UserError(f'generation_kwargs has {unknown}, which are not known here: give some of '
                    f'{sorted(_KNOWN)}')
  until = generation.get('until') or []
  stop = tuple(each for each in ([until] if isinstance(until, str) else until) if each)
  limit = next((generation[key] for key in ('max_gen_toks', 'max_new_tokens', 'max_tokens')
                if generation.get(key) is not None), MAX_TOKENS)
  sampled = {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
  # Greedy unless sampling is asked for, whatever the temperature says.
  if not generation.get('do_sample', bool(sampled.get('temperature'))):
    sampled = {}
  elif 'temperature' not in sampled:
    sampled['temperature'] = 1.0
  if sampled.get('top_k') == 0:
    del sampled['top_k']
  return Writing(DecodingOptions(int(limit), Sampling(**sampled)), stop, batch_size)


def mean_cost(tokens: float, flops: float, items: int) -> dict[str, float]:
  """Returns tokens and operations of an item, for JSON."""
  return {'tokens': round(tokens / items, 2), 'flops': flops / items}
