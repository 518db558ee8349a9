"""Speed of a run, and where its time goes: operations, memory, seconds by kind, goodput.

Every written line of metrics.jsonl holds the seconds since the line before, by kind. So the file
alone tells what all launches of a run spent, also those that were killed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from latent_deliberation.host_memory import peak_memory_bytes
from latent_deliberation.progress import format_duration

# Dense bfloat16 operations a second of one device of jax, as published, by the beginning of its
# `device_kind`. The first that fits counts. A TPU v2 or v3 is two devices, each half of a chip.
# https://cloud.google.com/tpu/docs, and the data sheets of NVIDIA. CPUs have no published peak.
PEAK_FLOPS = {
    'TPU v2': 22.5e12, 'TPU v3': 61.5e12, 'TPU v4 lite': 138e12, 'TPU v4': 275e12,
    'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12,
    'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
    'NVIDIA A100': 312e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100 NVL': 835e12,
    'NVIDIA H100': 989e12, 'NVIDIA H200 NVL': 835e12, 'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12,
    'NVIDIA L40S': 362e12, 'NVIDIA L40': 181e12, 'NVIDIA L4': 121e12,
}

# What the time of a launch is spent on. Every moment counts for exactly one of these.
START, DATA, COMPILE, STEP, SAVE, EVALUATION = SPENT = (
    'start', 'data', 'compile', 'step', 'save', 'evaluation')
_FROM = 'time/from'


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 operations a second of a kind of device; None where they are unknown."""
  return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def memory_gib() -> float:
  """Returns the most memory of a device of this process so far, in GiB.

  Devices that keep no count, such as CPUs, have that of the process.
  """
  counts = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [count['peak_bytes_in_use'] for count in counts if 'peak_bytes_in_use' in count]
  return max(peaks, default=peak_memory_bytes()) / 2**30


class TimeLedger:
  """Books every moment of a launch on one kind of SPENT.

  Args:
    begun: time of `clock` at which the launch began; default is now.
    clock: a clock in seconds that never jumps.
  """

  def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.monotonic):
    self._clock, self._booked = clock, clock() if begun is None else begun
    self._seconds: dict[str, float] = {}
    self._from = 0

  def begin(self, step: int) -> None:
    """Books the time so far as the start of a launch at `step`."""
    self._from = step
    self.book(START)

  def book(self, kind: str) -> None:
    """Books the time since the last call."""
    now = self._clock()
    self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._booked
    self._booked = now

  def describe(self) -> str:
    """Returns what was booked since the last `take`: 'data 0.2s step 9.1s'."""
    return ' '.join(f'{kind} {self._seconds[kind]:.1f}s' for kind in SPENT
                    if self._seconds.get(kind, 0.0) >= 0.05)

  def take(self, step: int) -> dict[str, float]:
    """Returns what was booked since the last call, as metrics of the steps since then."""
    metrics = {_FROM: self._from, **{
        f'time/{kind}': round(self._seconds[kind], 3) for kind in SPENT if kind in self._seconds}}
    self._from, self._seconds = step, {}
    return metrics


class Pace:
  """Measures speed and predicts the end of a run.

  Speed covers the current window, which begins at the last `start`. The ETA uses the mean time of a
  step since the first `start`, including pauses. Call `start` after the first step, to leave out
  compilation, and after every pause.

  Args:
    num_steps: length of the run.
    tokens_per_step: tokens of a global batch.
    step_flops: operations of a step on each device; 0 where they are not counted.
    peak: bfloat16 operations a second of a device; None where they are unknown.
    clock: a clock in seconds.
  """

  def __init__(self, num_steps: int, tokens_per_step: int, step_flops: float = 0.0,
               peak: float | None = None, clock: Callable[[], float] = time.perf_counter):
    self._num_steps, self._tokens_per_step, self._clock = num_steps, tokens_per_step, clock
    self._step_flops, self._peak = step_flops, peak
    self._first: tuple[int, float] | None = None
    self._window: tuple[int, float] | None = None

  def start(self, step: int) -> None:
    """Begins a window at `step`, the number of finished steps."""
    self._window = (step, self._clock())
    self._first = self._first or self._window

  def measure(self, step: int) -> dict[str, float]:
    """Returns the speeds since the window began; none before anything was measured."""
    seconds = self._mean(self._window, step)
    if not seconds:
      return {}
    speeds = {'tokens_per_second': self._tokens_per_step / seconds}
    if self._step_flops:
      speeds['teraflops_per_device'] = self._step_flops / seconds / 1e12
      if self._peak:
        speeds['mfu'] = self._step_flops / seconds / self._peak
    return speeds

  def describe(self, step: int) -> str:
    """Returns '5,210 tokens/s  0.42 TFLOP/s  MFU 41.2%', as far as it is known."""
    speeds = self.measure(step)
    parts = [f'{speeds["tokens_per_second"]:,.0f} tokens/s' if speeds else '- tokens/s']
    if 'teraflops_per_device' in speeds:
      parts.append(f'{speeds["teraflops_per_device"]:.3g} TFLOP/s')
    if 'mfu' in speeds:
      parts.append(f'MFU {100 * speeds["mfu"]:.1f}%')
    return '  '.join(parts)

  def eta(self, step: int) -> str:
    """Returns the time that is left, such as '3m12s'; '-' before anything was measured."""
    mean = self._mean(self._first, step)
    return '-' if mean is None else format_duration(mean * (self._num_steps - step))

  def _mean(self, since: tuple[int, float] | None, step: int) -> float | None:
    """Seconds per step since `since`; None when no step was measured."""
    if since is None or step == since[0]:
      return None
    return (self._clock() - since[1]) / (step - since[0])


@dataclasses.dataclass(frozen=True)
class Goodput:
  """What all launches of a run spent their time on.

  Attributes:
    seconds: seconds of each kind of SPENT.
    repeated: seconds of steps that a later launch made again, since they were not saved.
    away: seconds between launches by the clock on the wall. They hold what a killed launch did
      after its last line.
    launches: number of launches.
  """
  seconds: Mapping[str, float]
  repeated: float
  away: float
  launches: int

  @property
  def total(self) -> float:
    """Seconds from the first launch to the last line."""
    return sum(self.seconds.values()) + self.away

  @property
  def share(self) -> float:
    """Part of `total` that went into steps which count, 0 to 1."""
    useful = self.seconds.get(STEP, 0.0) - self.repeated
    return useful / self.total if self.total else 0.0

  def describe(self) -> str:
    """Returns 'goodput 83.1% of 14m02s in 2 launches: step 11m40s ...'."""
    spent = ', '.join(f'{kind} {format_duration(self.seconds[kind])}' for kind in SPENT
                      if round(self.seconds.get(kind, 0.0)))
    launches = '1 launch' if self.launches == 1 else f'{self.launches} launches'
    return (f'goodput {100 * self.share:.1f}% of {format_duration(self.total)} in {launches}'
            + (f': {spent}' if spent else '')
            + (f'; steps made again {format_duration(self.repeated)}' if self.repeated else '')
            + (f'; between launches {format_duration(self.away)}' if self.launches > 1 else ''))


def measure_goodput(lines: Iterable[Mapping[str, Any]]) -> Goodput | None:
  """Returns what a run's time went into, or None where no line says it.

  Args:
    lines: lines of metrics.jsonl in the order in which they were written.
  """
  seconds, repeated, away, launches = dict.fromkeys(SPENT, 0.0), 0.0, 0.0, 0
  intervals: list[tuple[int, int, float]] = []  # (from, to, seconds of its steps) that count
  last = None  # time on the wall of the line before
  for line in lines:
    if _FROM not in line:
      continue
    spent = {kind: line.get(f'time/{kind}', 0.0) for kind in SPENT}
    begin, end = line[_FROM], line['step']
    if f'time/{START}' in line:  # the first line of a launch
      launches += 1
      # A clock that was set back must not give time away.
      if last is not None:
        away += max(0.0, line['seconds'] - sum(spent.values()) - last)
      # Steps after the checkpoint that was resumed did not count, in proportion of an interval.
      kept = [(first, min(to, begin), of * (min(to, begin) - first) / (to - first))
              for first, to, of in intervals if first < begin]
      repeated += sum(of for *_, of in intervals) - sum(of for *_, of in kept)
      intervals = kept
    for kind, value in spent.items():
      seconds[kind] += value
    if end > begin:
      intervals.append((begin, end, spent[STEP]))
    last = line['seconds']
  return Goodput(seconds, repeated, away, launches) if launches else None
