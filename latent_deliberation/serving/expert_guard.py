"""Latents for one text, made in a thread, or the reason why there are none.

Whatever an expert does, the plain text goes on: an expert that raises, hangs, was removed meanwhile
or gives numbers that are not finite costs its own text its latents and nothing else. An expert that
hangs is not asked again until its thread has ended, since a thread cannot be killed.
"""

import dataclasses
import threading
from collections.abc import Mapping

import numpy as np
from absl import logging

from latent_deliberation.experts.attach import Choice, Experts, Mix
from latent_deliberation.experts.card import AUTO
from latent_deliberation.experts.routing import Query, choose
from latent_deliberation.inference.background import BackgroundAugmentation
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.passes import Augmentation, State

# Kinds of faults, for counts. 'busy' stands for an expert that still hangs.
FAILED, HANGS, BUSY, REMOVED, NOT_FINITE = 'failed', 'hangs', 'busy', 'removed', 'not_finite'


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the latents that a text asked for.

  Attributes:
    asked: what it asked for; see `experts.attach`.
    experts: weight by name of the experts whose latents it has; empty for the plain text.
    scores: score by expert, where a router chose.
    kind: one of the kinds above; '' for no fault.
    fault: the fault in words, for the response.
  """
  asked: Choice
  experts: Mix = dataclasses.field(default_factory=dict)
  scores: Mapping[str, float] | None = None
  kind: str = ''
  fault: str = ''


class _StillHangs(Exception):
  """A router has chosen an expert that hangs in an earlier text."""


class ExpertGuard:
  """Starts the deliberations of a server, and remembers experts that hang."""

  def __init__(self, experts: Experts, timeout: float):
    """Guards these experts.

    Args:
      timeout: seconds after which a text goes on without the latents that it waits for.
    """
    self.experts, self.timeout = experts, timeout
    self._hanging: dict[str, BackgroundAugmentation] = {}
    self._lock = threading.Lock()  # texts ask from their own threads, too

  def begin(self, choice: Choice, text: str, state: State,
            engine: Engine | None = None) -> 'Deliberation':
    """Starts to make latents for the end of the one text of a state, which stays as it is.

    Args:
      choice: what the text asks for: a mix, a name, 'auto' or None.
      text: the prompt, for routers that read it.
      engine: what has read the text; default is that of the experts.
    """
    return Deliberation(self, choice, text, state, engine or self.experts.engine)

  def hanging(self, names: Mix) -> str:
    """Returns the first of the names whose thread still hangs; '' for none."""
    with self._lock:
      self._hanging = {name: thread for name, thread in self._hanging.items()
                       if not thread.has_ended}
      return next((name for name in names if name in self._hanging), '')

  def note(self, names: Mix, thread: BackgroundAugmentation) -> None:
    """Notes that these experts hang in a thread."""
    with self._lock:
      self._hanging |= dict.fromkeys(names, thread)


class Deliberation:
  """The latents of one text in the making.

  Attributes:
    report: what became of them; complete once `finish` was called.
  """

  def __init__(self, guard: ExpertGuard, choice: Choice, text: str, state: State, engine: Engine):
    self._guard, self._experts, self._text, self._engine = guard, guard.experts, text, engine
    self.report = Report(choice)
    # What the thread works on: what it should route, and then the experts that were chosen.
    # `Experts.mix` checked it when it was asked for. Experts may have been removed since.
    self._mix: Mix = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
    self._scores: Mapping[str, float] | None = None
    self._lock = threading.Lock()
    self._thread: BackgroundAugmentation | None = None
    name = guard.hanging(self._mix)
    if name:
      self._fail_busy(name)
    elif self._mix:
      self._thread = BackgroundAugmentation(self._work, state, guard.timeout)

  @property
  def is_ready(self) -> bool:
    """Whether `finish` returns without waiting."""
    return self._thread is None or self._thread.is_ready()

  def finish(self) -> Augmentation | None:
    """Returns the latents, after waiting for them; None where the text goes on without."""
    thread = self._thread
    if thread is None:
      return None
    self._thread = None
    try:
      latents = thread.result()  # None where a router chose none
    except RuntimeError as error:
      self._explain(thread, error.__cause__)
      return None
    mix, scores = self._chosen()
    if latents is None:
      self.report = dataclasses.replace(self.report, scores=scores)
      return None
    if self._experts.engine is not self._engine:
      # Latents of another number have no room in the cache that has read the text.
      self._fail(REMOVED, f'{_titles(mix)} came or changed after the text was read')
      return None
    try:
      is_finite = np.asarray(latents.finite).all()
    except Exception as error:  # the device that computed them failed
      self.fail(error)
      return None
    if not is_finite:
      self._fail(NOT_FINITE, f'the latents of {_titles(mix)} are not finite')
      return None
    self.report = dataclasses.replace(self.report, experts=mix, scores=scores)
    return latents

  def fail(self, error: Exception) -> None:
    """Notes that the latents which `finish` returned could not join the text."""
    mix, _ = self._chosen()
    logging.error('The latents of %s could not join: %s', _titles(mix), error, exc_info=error)
    self.report = dataclasses.replace(self.report, experts={})
    self._fail(FAILED, f'the latents of {_titles(mix)} could not join ({type(error).__name__})')

  def _work(self, state: State) -> Augmentation | None:
    if self.report.asked == AUTO:
      router = self._experts.router()
      scores = router.scores(Query([self._text], np.asarray(state.hidden), state))
      name, = choose(router, scores)
      mix = {} if name is None else {name: 1.0}
      # Minus infinity stands for an expert that a router knows nothing of; JSON has no such number.
      known = {name: float(score) for name, score in zip(router.names, scores[0], strict=True)
               if np.isfinite(score)}
      with self._lock:
        self._mix, self._scores = mix, known
      if self._guard.hanging(mix):
        raise _StillHangs
    mix, _ = self._chosen()
    if not mix or int(state.lengths[0]) <= self._experts.first_anchor:
      return None
    return self._experts.augment(state, [mix])

  def _chosen(self) -> tuple[Mix, Mapping[str, float] | None]:
    with self._lock:
      return self._mix, self._scores

  def _explain(self, thread: BackgroundAugmentation, cause: BaseException | None) -> None:
    """Notes why a thread has no result. Details go to the log alone, since they may name paths."""
    mix, _ = self._chosen()
    gone = [name for name in mix if name not in (AUTO, *self._experts.names)]
    if isinstance(cause, _StillHangs):
      self._fail_busy(next(iter(mix)))
    elif gone:
      self._fail(REMOVED, f'{_title(gone[0])} was removed')
    elif not thread.has_ended:
      self._guard.note(mix, thread)
      self._fail(HANGS, f'{_titles(mix)} took longer than {self._guard.timeout:g} s')
    else:
      logging.error('No latents of %s: %s', _titles(mix), cause,
                    exc_info=cause if isinstance(cause, Exception) else None)
      self._fail(FAILED, f'{_titles(mix)} failed ({type(cause).__name__})')

  def _fail_busy(self, name: str) -> None:
    self._fail(BUSY, f'{_title(name)} still hangs in an earlier text')

  def _fail(self, kind: str, fault: str) -> None:
    _, scores = self._chosen()
    self.report = dataclasses.replace(self.report, scores=scores, kind=kind, fault=fault)


def _title(name: str) -> str:
  return 'the router' if name == AUTO else f'the expert {name!r}'


def _titles(mix: Mix) -> str:
  return ', '.join(map(_title, mix))
