"""The coprocessor runs in the background while the decoder continues.

If the coprocessor fails, the decoder's output is bit for bit what it would be without latents. One
warning is logged, and the failure is counted.
"""

import atexit
import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.inference.passes import Augmentation, State

BACKGROUND_SECONDS = 60.0  # for latents beside which a command decodes
EXIT_SECONDS = 60.0  # for threads that still compute when Python ends


class LatentSource(Protocol):
  """Makes latents for the texts of a session: an engine, or experts that are chosen by text."""

  def wants(self, state: State) -> np.ndarray:
    """Returns the texts of a plain state that may get latents, bool [B]."""

  def augment(self, state: State) -> Augmentation:
    """Makes latents for the end of every text of a state, which stays as it is."""


@dataclasses.dataclass
class AugmentationStats:
  """Counts of augmentations by their outcome.

  Attributes:
    begun: requested.
    joined: joined the cache.
    failed: raised, took too long, ended without a result, or were not finite.
    late: not ready before their texts ended.
  """
  begun: int = 0
  joined: int = 0
  failed: int = 0
  late: int = 0


@dataclasses.dataclass(frozen=True)
class LatentTiming:
  """The time at which latents join the cache.

  Attributes:
    delay: number of decoded tokens after which they join. The decoder waits for them there, so 0
      is synchronous. None: in the background, at the first token before which they are ready.
    timeout: seconds after which they are given up, compiling included; infinite for no limit.
  """
  delay: int | None = 0
  timeout: float = math.inf

  def __post_init__(self):
    if self.delay is not None:
      check_integer('delay', self.delay, 0)
    if not self.timeout > 0:
      raise UserError(f'timeout = {self.timeout} s: it must be above 0')


_running: 'weakref.WeakSet[BackgroundAugmentation]' = weakref.WeakSet()


@atexit.register
def _wait() -> None:
  """Waits a while for threads that still compute; else Python would abort at exit."""
  latest = time.monotonic() + EXIT_SECONDS
  for background in list(_running):
    background.wait(latest)


class BackgroundAugmentation:
  """One augmentation, which starts in a thread of its own as soon as it is made."""

  def __init__(self, augment: Callable[[State], Augmentation | None], state: State,
               timeout: float):
    """Starts to augment a state, which must not be donated before this has ended.

    Args:
      augment: makes the latents; None for a text that gets none.
      state: the texts.
      timeout: seconds after which the latents are given up.
    """
    self._deadline = time.monotonic() + timeout
    self._timeout = timeout
    self._result: Augmentation | None = None
    self._is_done = False
    self._error: BaseException | None = None
    # Not Thread.join: after Ctrl-C has interrupted it, it forgets a thread that still computes.
    self._ended = threading.Event()
    # A daemon, since a coprocessor that hangs must not keep the process from ending.
    thread = threading.Thread(target=self._work, args=(augment, state), daemon=True)
    _running.add(self)
    try:
      thread.start()
    except RuntimeError as error:  # there are too many threads
      self._error = error
      self._ended.set()

  def _work(self, augment: Callable[[State], Augmentation | None], state: State) -> None:
    try:
      self._result = jax.block_until_ready(augment(state))
      self._is_done = True
    except BaseException as error:  # whatever it is, it must not stop the decoder
      self._error = error
    finally:
      self._ended.set()

  @property
  def has_ended(self) -> bool:
    """Whether the thread has ended. One that hangs never does."""
    return self._ended.is_set()

  def is_ready(self) -> bool:
    """Whether `result` returns, or raises, without waiting."""
    return self._ended.is_set() or time.monotonic() >= self._deadline

  def wait(self, latest: float = math.inf) -> None:
    """Waits until the augmentation has ended, its time is over, or the clock shows `latest`."""
    left = min(self._deadline, latest) - time.monotonic()
    self._ended.wait(min(max(0.0, left), threading.TIMEOUT_MAX))

  def result(self) -> Augmentation | None:
    """Returns what `augment` returned, after waiting for it.

    Raises:
      RuntimeError: it failed, or takes too long; the message says why.
    """
    # Latents that arrive after their time are still taken, if they are there now.
    self.wait()
    if self._is_done:
      return self._result
    if self._error is not None:
      raise RuntimeError(f'it raised {type(self._error).__name__}: {self._error}') from self._error
    raise RuntimeError(f'it took longer than {self._timeout:g} s')
