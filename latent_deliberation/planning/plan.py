"""A plan of one training step on one mesh: does it fit, how long does it take, and why."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from latent_deliberation.planning.collectives import Collective
from latent_deliberation.planning.memory import Memory
from latent_deliberation.planning.program import Instruction, Program
from latent_deliberation.planning.topology import Chip

ESTIMATE = (
    "The compiler's cycles, loops multiplied out, over the clock (a kernel of ours counts by the "
    'operations and bytes that it states), and the collectives that no computation hides, by their '
    'bytes over the links. Left out: contention of collectives with each other and with memory, '
    'operations that the compiler gives no cycles, host input, checkpoints, evaluation. Nothing '
    'was run.')
NO_ESTIMATE = ('Virtual CPU devices have no clock, no links and no memory of their own: only a TPU '
               'topology gives seconds.')
DOES_NOT_FIT = "TPU's compiler gives no program for what does not fit, and so no seconds."
ONE_SLICE = (' All chips are taken to lie in one slice: collectives over replica count at the '
             'speed of its links, and the network between slices is slower.')
NUM_OPERATIONS = 16
MOST_TIMES = 64  # as many chips that are still advised
REMATS = ('none', 'dots', 'mid', 'full')  # by what they keep, most first
# Parts of an op_name that tell nothing of the model.
_UNTOLD = ('jit(step)', 'while', 'body', 'closed_call', 'checkpoint', 'transformer', 'blocks')


@dataclasses.dataclass(frozen=True)
class Operation:
  """Attributes: what: part of the model; seconds: all runs together; count: runs in a step."""
  what: str
  seconds: float
  count: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Attributes:
    topology: its name.
    mesh: devices along each axis.
    rules: logical axis -> mesh axes.
    settings: keys of the experiment that change time or memory, with their values.
    fits: into the memory of the chip; None where that is unknown.
    hbm_bytes_per_chip: most that a step holds at a time.
    hbm_capacity: of the chip.
    memory: the same bytes by what they are.
    remedy: what would make it fit; '' where it does.
    model_flops_per_chip: of the architecture, one step; nothing computed twice counts twice.
    estimated_step_seconds: compute and exposed collectives; see `estimate`.
    compute_seconds, exposed_seconds, overlapped_seconds: of computation, and of collectives.
    mfu: model FLOPs over what the chip could do in the estimated time.
    mfu_without_collectives: the same over compute_seconds.
    estimate: what the seconds are, or why there are none.
    collectives: those of a step, longest first.
    operations: those that take longest.
    unknown_loops: loops of unknown length, counted as one run.
    compile_seconds: on this machine.
  """
  topology: str
  mesh: Mapping[str, int]
  rules: Mapping[str, Sequence[str]]
  settings: Mapping[str, Any]
  fits: bool | None
  hbm_bytes_per_chip: int
  hbm_capacity: float | None
  memory: Memory
  remedy: str
  model_flops_per_chip: float
  estimated_step_seconds: float | None
  compute_seconds: float | None
  exposed_seconds: float | None
  overlapped_seconds: float | None
  mfu: float | None
  mfu_without_collectives: float | None
  estimate: str
  collectives: Sequence[Collective]
  operations: Sequence[Operation]
  unknown_loops: Sequence[str]
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Times:
  """Attributes: see the attributes of the same names of `Plan`."""
  estimated_step_seconds: float | None = None
  compute_seconds: float | None = None
  exposed_seconds: float | None = None
  overlapped_seconds: float | None = None
  mfu: float | None = None
  mfu_without_collectives: float | None = None


def estimate_times(program: Program, found: Sequence[Collective], chip: Chip,
                   model_flops: float) -> Times:
  """What a step takes on a chip.

  Args:
    model_flops: of one chip and step.
  """
  compute = sum(times * operation_seconds(instruction, chip) for instruction, times in program)
  exposed = sum(row.exposed_seconds for row in found)
  return Times(
      estimated_step_seconds=compute + exposed, compute_seconds=compute, exposed_seconds=exposed,
      overlapped_seconds=sum(row.seconds for row in found) - exposed,
      mfu=model_flops / (chip.flops * (compute + exposed)),
      mfu_without_collectives=model_flops / (chip.flops * compute))


def operation_seconds(instruction: Instruction, chip: Chip) -> float:
  """Of one run: by the compiler's cycles, or by what a kernel's author states; 0 without either."""
  if instruction.cycles is not None:
    return instruction.cycles / chip.clock
  if instruction.opcode == 'custom-call' and instruction.kernel_cost:
    flops, moved = instruction.kernel_cost
    return max(flops / chip.flops, moved / chip.hbm_bandwidth)
  return 0.0


def largest_operations(program: Program, chip: Chip) -> list[Operation]:
  """The parts of the model that take longest, all of their instructions together."""
  seconds, counts = collections.Counter(), collections.Counter()
  for instruction, times in program:
    once = operation_seconds(instruction, chip)
    if once:
      what = _name_part(instruction)
      seconds[what] += times * once
      counts[what] += times
  return [Operation(what, total, counts[what])
          for what, total in seconds.most_common(NUM_OPERATIONS)]


def _name_part(instruction: Instruction) -> str:
  """The module and the pass that an instruction belongs to: its op_name without loops and calls."""
  parts = [part for part in instruction.op_name.split('/')[:-1] if part not in _UNTOLD]
  return '/'.join(parts) or instruction.op_name or instruction.opcode


def advise(memory: Memory, capacity: float, remat: str, accumulation: int,
           texts_per_chip: int) -> str:
  """What is too large, and which settings would make it fit, by arithmetic; '' where it fits.

  Args:
    memory: of the step as it is.
    capacity: bytes of a chip.
    remat, accumulation: as they are set.
    texts_per_chip: of a microbatch.
  """
  if memory.peak <= capacity:
    return ''
  over = (f'{memory.peak / 1e9:.1f} GB do not fit into {capacity / 1e9:.1f} GB; the largest part '
          f'is {memory.largest} ({getattr(memory, memory.largest) / 1e9:.1f} GB).')
  if memory.state > capacity:
    factor = -(-memory.state // int(capacity))
    return (f'{over} Weights and optimiser alone need {memory.state / 1e9:.1f} GB: remat and '
            f'accumulation do not help; shard them {factor} times as far, over more chips or by a '
            'larger mesh.fsdp or mesh.tensor.')
  work = memory.peak - memory.state
  less = REMATS[REMATS.index(remat) + 1:]
  ways = [f'computation.remat={" or ".join(less)} keeps less of a block'] if less else []
  # Summed gradients live from one microbatch to the next.
  room = capacity - memory.state - memory.trainable
  factors = [factor for factor in range(2, texts_per_chip + 1) if texts_per_chip % factor == 0
             and work / factor <= room]
  if factors:
    ways.append(f'training.accumulation={accumulation * factors[0]} divides what a microbatch '
                f'needs by {factors[0]}')
  # A larger fsdp divides weights, and the texts of a microbatch as far as there are several.
  more = next((factor for factor in range(2, MOST_TIMES + 1)
               if memory.state / factor + work / math.gcd(factor, texts_per_chip) <= capacity), 0)
  if more:
    ways.append(f'{more} times as many chips in mesh.fsdp, with the same batch')
  if not ways:
    return (f'{over} Neither remat, accumulation nor more chips would help: lower data.length, '
            'deliberation.num_traces or num_latents.')
  return f'{over} These would help, by arithmetic: ' + '; '.join(ways) + '.'
