"""Memory of a chip during a step, by purpose: arguments, activations and temporaries."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax

from latent_deliberation.array_types import PyTree
from latent_deliberation.planning.program import Instruction, Program, array_bytes

_INDEX = re.compile(r'index=(\d+)')
# Instructions whose result is the buffer of their operand.
_IN_PLACE = ('bitcast', 'optimization-barrier', 'dynamic-update-slice', 'while')


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  Attributes:
    frozen, trainable, optimizer, batch: arguments of the step, which are there all the time.
    activations: buffers alive when the backward pass begins, without the arguments.
    temporary: the rest of the peak.
    peak: largest memory at one time; see `peak_bytes`.
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
    """Bytes that do not depend on the batch: weights and the optimizer's state."""
    return self.frozen + self.trainable + self.optimizer

  @property
  def largest(self) -> str:
    """Name of the largest part."""
    parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    del parts['peak']
    return max(parts, key=parts.__getitem__)


def shard_bytes(tree: PyTree) -> int:
  """Returns the bytes that one device holds of a tree of arrays, or of shapes with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def peak_bytes(compiled: jax.stages.Compiled, on_cpu: bool) -> int:
  """Returns the largest memory that a compiled step has at one time, as the compiler allocates it.

  Args:
    compiled: the compiled step.
    on_cpu: whether it is compiled for CPU devices. Their compiler leaves temporaries out of its
      peak, so they are added here to arguments and results.
  """
  sizes = compiled.memory_analysis()
  if not on_cpu:
    return sizes.peak_memory_in_bytes
  # Donated arguments are results too, and count once.
  return (sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
          - sizes.alias_size_in_bytes)


def divide_memory(peak: int, program: Program, arguments: Mapping[str, int]) -> Memory:
  """Returns the parts of a compiled step's memory.

  Args:
    peak: largest memory of the step; see `peak_bytes`.
    program: the compiled step, parsed.
    arguments: bytes on a chip of 'frozen', 'trainable', 'optimizer' and 'batch'.
  """
  others = max(peak - sum(arguments.values()), 0)
  activations = min(activation_bytes(program), others)
  return Memory(**arguments, activations=activations, temporary=others - activations, peak=peak)


def activation_bytes(program: Program) -> int:
  """Returns the bytes alive in HBM when the first loop of the backward pass begins.

  It is 0 without such a loop. Tuples and loops pass buffers on without copying, so buffers are
  followed through them. XLA prints instructions in the order in which they run.
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
  """Returns the bytes of buffers that are written before `place` and read there or later."""
  # Instruction -> buffers of its result, each as (name, index in the tuple).
  buffers: dict[str, list[tuple[str, int]]] = {}
  sizes: dict[tuple[str, int], int] = {}
  alive = set()
  for index, instruction in enumerate(instructions):
    operands = [buffers[name] for name in instruction.operands if name in buffers]
    if index >= place:
      alive.update(buffer for operand in operands for buffer in operand if buffer in sizes)

    # The buffers of its result: other instructions' buffers, or new ones.
    made = array_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode == 'parameter':
      buffers[instruction.name] = [(instruction.name, number) for number in range(len(made))]
      continue  # they are arguments, and are not activations
    if instruction.opcode == 'get-tuple-element':
      buffers[instruction.name] = [
          operands[0][int(_INDEX.search(instruction.attributes)[1])]] if operands else []
    elif instruction.opcode == 'tuple':
      buffers[instruction.name] = [operand[0] for operand in operands if operand]
    elif instruction.opcode in _IN_PLACE and operands:
      buffers[instruction.name] = operands[0]
    elif instruction.opcode == 'copy-done':
      buffers[instruction.name] = operands[0][:1]  # the first of (target, source, ...)
    else:
      buffers[instruction.name] = [(instruction.name, number) for number in range(len(made))]
      if index < place:
        sizes |= zip(buffers[instruction.name], made, strict=True)
  return sum(sizes[buffer] for buffer in alive)
