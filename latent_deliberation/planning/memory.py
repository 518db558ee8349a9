"""What lies in a chip's memory: arguments by what they are, activations, temporaries."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax

from latent_deliberation.array_types import PyTree
from latent_deliberation.planning.program import Instruction, Program, array_bytes

_INDEX = re.compile(r'index=(\d+)')
# What gives its operand another name, or writes into it.
_IN_PLACE = ('bitcast', 'optimization-barrier', 'dynamic-update-slice', 'while')


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  Attributes:
    frozen, trainable, optimizer, batch: arguments of the step, which lie there all the time.
    activations: alive where the backward pass begins, beside the arguments.
    temporary: the rest of the peak.
    peak: most that there is at a time, as the compiler allocates it.
  """
  frozen: int
  trainable: int
  optimizer: int
  batch: int
  activations: int
  temporary: int
  peak: int

  @property
  def state(self) -> int:
    """What lies there whatever the batch: weights, and what the optimiser remembers."""
    return self.frozen + self.trainable + self.optimizer

  @property
  def largest(self) -> str:
    """Name of the largest part."""
    parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    del parts['peak']
    return max(parts, key=parts.__getitem__)


def shard_bytes(tree: PyTree) -> int:
  """Of the shards of arrays, or of shapes with shardings, that one device holds."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def measure(compiled: jax.stages.Compiled, program: Program,
            arguments: Mapping[str, int]) -> Memory:
  """The parts of a compiled step's memory.

  Args:
    compiled: the step.
    program: the same, parsed.
    arguments: bytes on a chip of 'frozen', 'trainable', 'optimizer' and 'batch'.
  """
  peak = compiled.memory_analysis().peak_memory_in_bytes
  rest = max(peak - sum(arguments.values()), 0)
  activations = min(activation_bytes(program), rest)
  return Memory(**arguments, activations=activations, temporary=rest - activations, peak=peak)


def activation_bytes(program: Program) -> int:
  """Bytes alive in HBM where the first loop of the backward pass begins; 0 without such a loop.

  Buffers are followed through tuples and loops, which pass them on without copying. The schedule
  that XLA prints is the one that is run.
  """
  most = 0
  for name in program.runs:
    instructions = program.computations[name]
    for place, instruction in enumerate(instructions):
      if instruction.opcode == 'while' and 'transpose(' in instruction.op_name:
        most = max(most, _alive_bytes(instructions, place))
        break
  return most


def _alive_bytes(instructions: list[Instruction], place: int) -> int:
  """Bytes of buffers that are written before `place` and read there or later."""
  # For each instruction, the buffers of its result: (name, number in the tuple).
  buffers: dict[str, list[tuple[str, int]]] = {}
  sizes: dict[tuple[str, int], int] = {}
  alive = set()
  for index, instruction in enumerate(instructions):
    operands = [buffers[name] for name in instruction.operands if name in buffers]
    if index >= place:
      alive.update(buffer for operand in operands for buffer in operand if buffer in sizes)
    made = array_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode == 'parameter':
      buffers[instruction.name] = [(instruction.name, number) for number in range(len(made))]
      continue  # arguments, which are counted as such
    if instruction.opcode == 'get-tuple-element':
      buffers[instruction.name] = [
          operands[0][int(_INDEX.search(instruction.attributes)[1])]] if operands else []
    elif instruction.opcode == 'tuple':
      buffers[instruction.name] = [operand[0] for operand in operands if operand]
    elif instruction.opcode in _IN_PLACE and operands:
      buffers[instruction.name] = operands[0]
    elif instruction.opcode == 'copy-done':
      buffers[instruction.name] = operands[0][:1]  # of (target, source, ...)
    else:
      buffers[instruction.name] = [(instruction.name, number) for number in range(len(made))]
      if index < place:
        sizes |= zip(buffers[instruction.name], made, strict=True)
  return sum(sizes[buffer] for buffer in alive)
