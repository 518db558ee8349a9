"""The plan of a train step on one mesh: whether it fits, its estimated time, and the reasons."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from latent_deliberation.planning.collectives import Collective
from latent_deliberation.planning.memory import Memory
from latent_deliberation.planning.program import Instruction, Program, operation_seconds
from latent_deliberation.planning.topology import Chip

ESTIMATE = (
    "An estimate; nothing was run. Compute is the compiler's cycles over the clock, with every "
    'run of a loop. Our kernels count by the operations and bytes that they state. Exposed '
    'collectives count by their bytes over the links. Left out: contention of collectives with '
    'each other and with memory, operations without cycles, host input, checkpoints, evaluation.')
NO_ESTIMATE = ('Virtual CPU devices have no clock and no links: only a TPU topology gives seconds. '
               "Memory is that of the CPU's program, whose temporaries differ from a TPU's.")
DOES_NOT_FIT = 'No seconds: the compiler for TPUs gives no program for a step that does not fit.'
ONE_SLICE = (' All chips are assumed to be in one slice. The network between slices is slower than '
             'its links, so collectives over replica will take longer.')
NUM_OPERATIONS = 16  # largest ones that a plan lists
MOST_TIMES = 64  # largest factor on the chips that is advised
REMATS = ('none', 'dots', 'mid', 'full')  # the one that keeps most first
# Parts of an op_name that are not modules of the model.
_UNTOLD = ('jit(step)', 'while', 'body', 'closed_call', 'checkpoint', 'transformer', 'blocks')


@dataclasses.dataclass(frozen=True)
class Operation:
  """A part of the model, or a kind of instruction, with its time.

  Attributes:
    what: name of the part.
    seconds: time of all runs in a step.
    count: runs in a step.
  """
  what: str
  seconds: float
  count: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of one train step on one mesh.

  Attributes:
    topology: name of the topology.
    mesh: devices along each axis.
    rules: logical axis -> mesh axes.
    settings: keys of the experiment that change time or memory, with their values.
    fits: whether the step fits into the memory of the chip; None if that is unknown.
    hbm_bytes_per_chip: largest memory of a step at one time.
    hbm_capacity: memory of the chip; None if unknown.
    memory: hbm_bytes_per_chip by purpose.
    remedy: changes that would make the step fit; '' if it fits.
    model_flops_per_chip: operations of the architecture in a step; recomputation does not count.
    estimated_step_seconds: compute_seconds and exposed_seconds.
    compute_seconds: time of computation.
    exposed_seconds: time of collectives that no computation hides.
    overlapped_seconds: time of collectives that computation hides.
    mfu: model FLOPs over the FLOPs that the chip could do in the estimated time.
    mfu_without_collectives: the same for compute_seconds.
    estimate: explanation of the seconds, or the reason why there are none.
    collectives: collectives of a step, longest first.
    operations: operations that take longest.
    unknown_loops: loops of unknown length, which count as one run.
    compile_seconds: time of the compilation on this machine.
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
  """The times of a plan; see the attributes of the same names of `Plan`."""
  estimated_step_seconds: float | None = None
  compute_seconds: float | None = None
  exposed_seconds: float | None = None
  overlapped_seconds: float | None = None
  mfu: float | None = None
  mfu_without_collectives: float | None = None


def estimate_times(program: Program, found: Sequence[Collective], chip: Chip,
                   model_flops: float) -> Times:
  """Returns the estimated times of a step on a chip.

  Args:
    program: the compiled step.
    found: collectives of the step.
    chip: the chip.
    model_flops: operations of the architecture for one chip and step.
  """
  compute = sum(times * operation_seconds(instruction, chip) for instruction, times in program)
  exposed = sum(row.exposed_seconds for row in found)
  return Times(
      estimated_step_seconds=compute + exposed, compute_seconds=compute, exposed_seconds=exposed,
      overlapped_seconds=sum(row.seconds for row in found) - exposed,
      mfu=model_flops / (chip.flops * (compute + exposed)),
      mfu_without_collectives=model_flops / (chip.flops * compute))


def largest_operations(program: Program, chip: Chip) -> list[Operation]:
  """Returns the parts of the model that take longest, each with all of its instructions."""
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
  """Returns module and pass of an instruction: its op_name without loops and calls."""
  parts = [part for part in instruction.op_name.split('/')[:-1] if part not in _UNTOLD]
  return '/'.join(parts) or instruction.op_name or instruction.opcode


def advise(memory: Memory, capacity: float, remat: str, accumulation: int, texts_per_chip: int,
           replicates: bool = False) -> str:
  """Returns the largest part of a step that does not fit, and settings that would help, or ''.

  Args:
    memory: memory of the step as planned.
    capacity: bytes of a chip.
    remat: `computation.remat` of the plan.
    accumulation: `training.accumulation` of the plan.
    texts_per_chip: texts of a microbatch on a chip.
    replicates: `computation.replicate_frozen` of the plan.
  """
  if memory.peak <= capacity:
    return ''
  over = (f'{memory.peak / 1e9:.1f} GB do not fit into {capacity / 1e9:.1f} GB; the largest part '
          f'is {memory.largest} ({getattr(memory, memory.largest) / 1e9:.1f} GB).')
  # More shards divide no weights that each chip has whole.
  if replicates:
    return (f'{over} Every chip has all frozen weights ({memory.frozen / 1e9:.1f} GB): set '
            'computation.replicate_frozen=False and plan again.')
  if memory.state > capacity:
    factor = -(-memory.state // int(capacity))
    return (f'{over} Weights and optimizer alone need {memory.state / 1e9:.1f} GB. Neither remat '
            f'nor accumulation helps. Use {factor} times as many shards: more chips, or a larger '
            'mesh.fsdp or mesh.tensor.')

  # Remat keeps less; accumulation divides what a microbatch needs.
  work = memory.peak - memory.state
  less = REMATS[REMATS.index(remat) + 1:]
  ways = [f'computation.remat={" or ".join(less)} keeps less of a block'] if less else []
  # With accumulation, summed gradients live from one microbatch to the next.
  room = capacity - memory.state - memory.trainable
  factors = [factor for factor in range(2, texts_per_chip + 1) if texts_per_chip % factor == 0
             and work / factor <= room]
  if factors:
    ways.append(f'training.accumulation={accumulation * factors[0]} divides what a microbatch '
                f'needs by {factors[0]}')

  # A larger fsdp divides weights, and the texts of a microbatch if there are several.
  more = next((factor for factor in range(2, MOST_TIMES + 1)
               if memory.state / factor + work / math.gcd(factor, texts_per_chip) <= capacity), 0)
  if more:
    ways.append(f'{more} times as many chips in mesh.fsdp, with the same batch')
  if not ways:
    return (f'{over} Neither remat, accumulation nor more chips would help. Lower data.length, '
            'deliberation.num_traces or deliberation.num_latents.')
  return f'{over} Any of these would help, by arithmetic: ' + '; '.join(ways) + '.'
