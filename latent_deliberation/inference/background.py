"""The coprocessor at work while the decoder goes on, and what may go wrong with it.

Whatever does go wrong, the decoder's own output goes on, bit for bit as it would have been: there
are no latents, one warning, and a count.
"""

import atexit
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable

import jax

from latent_deliberation.errors import UserError
from latent_deliberation.inference.passes import Augmentation, State


@dataclasses.dataclass
class AugmentationStats:
  """What became of the augmentations that were asked for.

  Attributes:
    begun: asked for.
    joined: joined the cache.
    failed: raised, took too long, ended without a result, or were not finite.
    late: not ready when the last token was decoded.
  """
  begun: int = 0
  joined: int = 0
  failed: int = 0
  late: int = 0


@dataclasses.dataclass(frozen=True)
class LatentTiming:
  """When latents join.

  Attributes:
    delay: decoded tokens after which they join, waited for if need be; 0 is synchronous. None: in
      the background, at the first token before which they are ready.
    timeout: seconds after which they are given up.
  """
  delay: int | None = 0
  timeout: float = 60.0

  def __post_init__(self):
    if self.delay is not None and self.delay < 0:
      raise UserError(f'delay = {self.delay}: latents join after 0 tokens or more')
    if not self.timeout > 0:
      raise UserError(f'timeout = {self.timeout} s: it must be above 0')


_running: 'weakref.WeakSet[BackgroundAugmentation]' = weakref.WeakSet()


@atexit.register
def _wait() -> None:
  """Waits, within their time, for threads that still compute: Python would abort at its end."""
  for attempt in list(_running):
    attempt.wait()


class BackgroundAugmentation:
  """One augmentation in a thread of its own, from the moment on at which it is made."""

  def __init__(self, augment: Callable[[State], Augmentation], state: State, timeout: float):
    """Starts to augment a state, which must not be donated as long as this has not ended."""
    self._deadline = time.monotonic() + timeout
    self._timeout = timeout
    self._result: Augmentation | None = None
    self._error: BaseException | None = None
    # Not Thread.join, which forgets a thread that still computes when Ctrl-C interrupts it.
    self._ended = threading.Event()
    # A daemon: a coprocessor that hangs must not keep the process from ending.
    thread = threading.Thread(target=self._work, args=(augment, state), daemon=True)
    _running.add(self)
    try:
      thread.start()
    except RuntimeError as error:  # there are too many threads
      self._error = error
      self._ended.set()

  def _work(self, augment: Callable[[State], Augmentation], state: State) -> None:
    try:
      self._run(augment, state)
    finally:
      self._ended.set()

  def _run(self, augment: Callable[[State], Augmentation], state: State) -> None:
    try:
      self._result = jax.block_until_ready(augment(state))
    except BaseException as error:  # whatever it is, it must not stop the decoder
      self._error = error

  def is_ready(self) -> bool:
    """Whether `result` will not wait."""
    return self._ended.is_set() or time.monotonic() >= self._deadline

  def wait(self) -> None:
    """Waits until it has ended or its time is over."""
    self._ended.wait(max(0.0, self._deadline - time.monotonic()))

  def result(self) -> Augmentation:
    """The latents.

    Raises:
      UserError: there are none; says why.
    """
    self.wait()
    if self._result is not None:
      return self._result
    if self._error is not None:
      raise RuntimeError(f'it raised {type(self._error).__name__}: {self._error}') from self._error
    if self._ended.is_set():
      raise RuntimeError('its thread ended without a result')
    raise RuntimeError(f'it took longer than {self._timeout:g} s')
