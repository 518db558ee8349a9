"""Continuous batching: one thread that reads, augments and decodes whatever texts arrive.

A text waits in a queue until a row of the batch is free. It is then read in a pass of its own. If
it asks for latents, they are made in another thread while the batch goes on, and the text joins the
batch when they are there, or when their time is over. Texts without latents overtake it meanwhile.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from absl import logging

from latent_deliberation.experts.attach import Choice
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.passes import State
from latent_deliberation.serving.decode_batch import STEPS, DecodeBatch, Step
from latent_deliberation.serving.expert_guard import Deliberation, ExpertGuard, Report
from latent_deliberation.serving.service_metrics import ServiceMetrics

# What may end a text, besides 'eos', 'stop' and 'length'.
TIME, SHUTDOWN, ERROR, CANCELLED = 'time', 'shutdown', 'error', 'cancelled'
_POLL_SECONDS = 0.002  # between two looks while nothing but experts is at work


class QueueFull(Exception):
  """More texts wait than the server allows."""


class Closed(Exception):
  """The server ends, and takes no more texts."""


@dataclasses.dataclass(frozen=True)
class TextRequest:
  """One text to decode.

  Attributes:
    ids: ids of the prompt.
    text: the prompt, for routers that read it.
    choices: what the text asks for; with a second one, the same tokens are scored with that, too.
    sampling, seed, max_tokens: see `session.DecodingOptions`.
    stop: given all decoded tokens after each one; True ends the text.
    wants_top: whether the likeliest tokens are needed.
  """
  ids: Sequence[int]
  text: str
  choices: tuple[Choice, ...]
  sampling: Sampling
  seed: int
  max_tokens: int
  stop: Callable[[Sequence[int]], bool] | None = None
  wants_top: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
  """A decoded token: its id, log-probability, that by the second choice, and the likeliest ones."""
  id: int
  logprob: float
  other_logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
  """News of a text.

  Attributes:
    tokens: tokens since the last update.
    reports: what became of the latents of each choice; before the first token alone.
    ended_by: what ended the text, see `session.Completion` and above; '' while it continues.
  """
  tokens: tuple[Token, ...] = ()
  reports: tuple[Report, ...] = ()
  ended_by: str = ''


class Job:
  """A text on its way through the server. Only `cancel` may be called by other threads.

  Attributes:
    rows: rows of the batch that it has: its own, and the one that scores with the second choice.
  """

  def __init__(self, request: TextRequest, emit: Callable[[Update], None], seconds: float):
    self.request, self.rows, self.state = request, [], None
    self.deliberations: list[Deliberation] = []
    self.tokens: list[int] = []
    self.begun = time.monotonic()
    self.deadline = self.begun + seconds
    self.cancelled = self.has_ended = False
    self._emit = emit

  def cancel(self) -> None:
    """Gives the text up, since nobody reads it any more."""
    self.cancelled = True

  def tell(self, update: Update) -> None:
    """Passes news on. Nobody is told after the end."""
    if not self.has_ended:
      self.has_ended = bool(update.ended_by)
      self._emit(update)


class Batcher:
  """The thread, its queue and its batch."""

  def __init__(self, guard: ExpertGuard, rows: int, eos: tuple[int, ...], num_ids: int | None, *,
               most_queued: int, seconds: float, metrics: ServiceMetrics):
    """Starts the thread.

    Args:
      guard: makes latents, on the engine of its experts.
      rows: rows of the batch.
      eos, num_ids: see `decode.decode`.
      most_queued: number of texts that may wait.
      seconds: time that a text may take, wait included.
      metrics: counts what happens.
    """
    self.guard, self.rows, self.metrics = guard, rows, metrics
    self._eos, self._num_ids = eos, num_ids
    self._most_queued, self._seconds = most_queued, seconds
    self._queue: collections.deque[Job] = collections.deque()
    self._deliberating: list[Job] = []
    self._left_alone: list[Deliberation] = []  # of texts that have ended; their threads work on
    self._ready: collections.deque[Job] = collections.deque()
    self._running: list[Job] = []
    self._changed = threading.Condition()
    self._closed, self._close_by = False, float('inf')
    self._batch = self._new_batch()
    metrics.rows.set(rows)
    self._thread = threading.Thread(target=self._run, daemon=True, name='batcher')
    self._thread.start()

  @property
  def queued(self) -> int:
    """Number of texts that wait to be read."""
    return len(self._queue)

  @property
  def running(self) -> int:
    """Number of texts that were read and have not ended."""
    return len(self._deliberating) + len(self._ready) + len(self._running)

  @property
  def is_open(self) -> bool:
    """Whether texts are taken."""
    return not self._closed and self._thread.is_alive()

  def submit(self, requests: Sequence[TextRequest],
             emits: Sequence[Callable[[Update], None]]) -> list[Job]:
    """Puts all of these texts into the queue, or none.

    Args:
      emits: for each, the function that the thread calls with its updates. It must be quick.

    Raises:
      Closed: the server ends.
      QueueFull: there is no room for all of them.
    """
    jobs = [Job(request, emit, self._seconds)
            for request, emit in zip(requests, emits, strict=True)]
    with self._changed:
      if not self.is_open:
        raise Closed
      if len(self._queue) + len(jobs) > self._most_queued:
        raise QueueFull
      self._queue.extend(jobs)
      self._changed.notify()
    return jobs

  def close(self, seconds: float) -> None:
    """Takes no more texts, lets those that are here end, and waits for that.

    Args:
      seconds: time after which the others end with the text that they have.
    """
    with self._changed:
      self._closed, self._close_by = True, time.monotonic() + seconds
      self._changed.notify()
    self._thread.join(seconds + 10)

  # --- What the thread does ---

  def _run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(
            lambda: self._queue or self.running or self._closed or self._left_alone)
        if self._closed and not self._queue and not self.running:
          return
      try:
        idle = not self._turn()
      except Exception:  # a bug, or no memory: the texts at hand are lost, later ones may not be
        logging.exception('The batch failed, and %d texts with it.', self.running)
        idle = False
        if not self._abandon():
          return
      if idle:
        time.sleep(_POLL_SECONDS)

  def _turn(self) -> bool:
    """Does what is to be done before the next step, and that step; False if there was nothing."""
    self._end_overdue()
    did = self._read_next() | self._join_ready()
    if self._running:
      self._decode()
      did = True
    self.metrics.queued.set(len(self._queue))
    self.metrics.running.set(self.rows - self._batch.free)
    return did

  def _end_overdue(self) -> None:
    """Ends the texts that nobody reads, or whose time is over."""
    now = time.monotonic()
    with self._changed:
      jobs = [*self._queue, *self._deliberating, *self._ready, *self._running]
    for job in jobs:
      if job.cancelled:
        self._end(job, CANCELLED)
      elif now >= job.deadline:
        self._end(job, TIME)
      elif now >= self._close_by:
        self._end(job, SHUTDOWN)

  def _read_next(self) -> bool:
    """Reads the next text of the queue if there is a row for it. One at a time, since all wait."""
    experts = self.guard.experts
    if self._batch.engine is not experts.engine:
      # The first expert was attached, and caches have room for latents from now on.
      if self.running:
        return False
      self._renew_batch()
    job = self._take_next()
    if job is None:
      return False
    request = job.request
    try:
      job.state = self._batch.engine.read([request.ids])
      self.metrics.prompt_tokens.inc(len(request.ids))
      job.deliberations = [
          self.guard.begin(choice, request.text, job.state, self._batch.engine)
          for choice in request.choices]
    except Exception:  # no memory for another cache, for instance
      logging.exception('A text could not be read.')
      self._end(job, ERROR)
      return True
    self._deliberating.append(job)
    return True

  def _take_next(self) -> Job | None:
    """Takes the next text that can be read now from the queue."""
    free = self._batch.free - sum(len(job.request.choices) for job in self._ready)
    # Each text that deliberates has a cache of its own. Plain texts pass by where these are many.
    only_plain = len(self._deliberating) + len(self._left_alone) >= self.rows
    with self._changed:
      for job in self._queue:
        choices = job.request.choices
        if not only_plain or not any(choices):
          if len(choices) > free:
            return None
          self._queue.remove(job)
          return job
    return None

  def _join_ready(self) -> bool:
    """Puts texts whose latents are there, or given up, into the batch, as far as rows are free."""
    for job in list(self._deliberating):
      if all(deliberation.is_ready for deliberation in job.deliberations):
        self._deliberating.remove(job)
        self._ready.append(job)
    for deliberation in [each for each in self._left_alone if each.is_ready]:
      deliberation.finish()  # notes an expert that hangs
      self._left_alone.remove(deliberation)
    did = False
    while self._ready and len(self._ready[0].request.choices) <= self._batch.free:
      self._join(self._ready.popleft())
      did = True
    return did

  def _join(self, job: Job) -> None:
    request, states = job.request, []
    self._running.append(job)  # first, so that it is told if the batch fails now
    for deliberation in job.deliberations:
      states.append(self._with_latents(job.state, deliberation))
    for state in states:
      leader = job.rows[0] if job.rows else None
      job.rows.append(self._batch.join(state, request.sampling, request.seed, leader,
                                       request.wants_top and leader is None))
    job.state = None
    job.tell(Update(reports=tuple(each.report for each in job.deliberations)))

  def _with_latents(self, state: State, deliberation: Deliberation) -> State:
    latents = deliberation.finish()
    if latents is not None:
      try:
        state = self._batch.engine.attach(state, latents)
      except Exception as error:  # no memory for another cache, for instance
        deliberation.fail(error)
    report = deliberation.report
    if report.asked is not None:
      outcome = report.kind or ('joined' if report.experts else 'none')
      self.metrics.latents.labels(outcome).inc()
    return state

  def _decode(self) -> None:
    """Decodes some tokens of all running texts, and tells who waits for them."""
    # Texts that wait for a row have nothing from shorter turns.
    waits = self._deliberating or self._batch.free and (self._queue or self._ready)
    left = min(job.request.max_tokens - len(job.tokens) for job in self._running)
    begun = time.perf_counter()
    steps = self._batch.decode(1 if waits else min(STEPS, left))
    seconds = (time.perf_counter() - begun) / max(1, len(steps))
    for _ in steps:
      self.metrics.token_seconds.observe(seconds)
    for job in list(self._running):
      self._deliver(job, steps)

  def _deliver(self, job: Job, steps: Sequence[Step]) -> None:
    tokens, ended_by = [], ''
    for step in steps:
      token = _token(step, job)
      tokens.append(token)
      job.tokens.append(token.id)
      ended_by = self._ended_by(job, token.id)
      if ended_by:
        break
    if len(job.tokens) == len(tokens):
      self.metrics.first_token.observe(time.monotonic() - job.begun)
    self.metrics.tokens.inc(len(tokens))
    if ended_by:
      self._end(job, ended_by, tuple(tokens))
    else:
      job.tell(Update(tuple(tokens)))

  def _ended_by(self, job: Job, token: int) -> str:
    if token in self._eos:
      return 'eos'
    if job.request.stop is not None and job.request.stop(job.tokens):
      return 'stop'
    return 'length' if len(job.tokens) == job.request.max_tokens else ''

  def _end(self, job: Job, ended_by: str, tokens: tuple[Token, ...] = ()) -> None:
    """Takes a text out of everything that it is in, and tells that it has ended."""
    for jobs in (self._deliberating, self._ready, self._running):
      if job in jobs:
        jobs.remove(job)
    with self._changed:
      if job in self._queue:
        self._queue.remove(job)
    for row in job.rows:
      self._batch.leave(row)
    for deliberation in job.deliberations:
      if deliberation.is_ready:
        deliberation.finish()  # notes an expert that hangs
      else:
        self._left_alone.append(deliberation)
    job.rows, job.state, job.deliberations = [], None, []
    self.metrics.texts.labels(ended_by).inc()
    self.metrics.whole_text.observe(time.monotonic() - job.begun)
    job.tell(Update(tokens, ended_by=ended_by))

  def _new_batch(self) -> DecodeBatch:
    return DecodeBatch(self.guard.experts.engine, self.rows, self._eos, self._num_ids)

  def _renew_batch(self) -> None:
    self._batch.release()  # else the caches of both take memory at once
    self._batch = self._new_batch()

  def _abandon(self) -> bool:
    """Ends all texts that were read, and begins again, since the cache of the batch may be gone.

    Without memory for a new batch it ends all texts, takes no more, and returns False.
    """
    for job in (*self._deliberating, *self._ready, *self._running):
      job.rows = []
      self._end(job, ERROR)
    try:
      self._renew_batch()
    except Exception:
      logging.exception('There is no new batch: this server takes no more texts.')
      with self._changed:
        self._closed, waiting = True, list(self._queue)
      for job in waiting:
        self._end(job, ERROR)
      return False
    return True


def _token(step: Step, job: Job) -> Token:
  row, *others = job.rows
  top = ()
  if job.request.wants_top:
    top = tuple(zip(step.top_tokens[row].tolist(), step.top_logprobs[row].tolist(), strict=True))
  return Token(int(step.tokens[row]), float(step.logprobs[row]),
               float(step.logprobs[others[0]]) if others else None, top)
