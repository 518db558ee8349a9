"""Reads a compiled program from XLA's text: its instructions, runs and estimated cycles."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from latent_deliberation.errors import UserError
from latent_deliberation.planning.topology import Chip

# Types whose names do not contain their number of bits.
ITEM_BYTES = {'pred': 1, 'token': 0}

_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'  (?:ROOT )?%?([\w.\-]+) = (.*)$')
_NAME = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]((?:\{[^}]*\})?)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COST = re.compile(r'"cost_estimate": ?\{"flops":"?(\d+)"?.*?"bytes_accessed":"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: its name, unique in the program.
    opcode: its operation, such as 'fusion'.
    shape: shape of its result, as printed: an array, or a tuple in parentheses.
    operands: names of the instructions that it reads.
    attributes: the rest of the line.
  """
  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def cycles(self) -> int | None:
    """Cycles of one run by the compiler's estimate; None without an estimate."""
    found = _CYCLES.search(self.attributes)
    return int(found[1]) if found else None

  @property
  def op_name(self) -> str:
    """Name in our code that XLA keeps with the instruction; '' if it keeps none."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ''

  @property
  def kernel_cost(self) -> tuple[int, int] | None:
    """(operations, bytes) that a kernel states as its cost; None if it states none."""
    found = _COST.search(self.attributes)
    return (int(found[1]), int(found[2])) if found else None

  def called(self, attribute: str) -> tuple[str, ...]:
    """Returns the names of computations in an attribute such as 'calls' or 'body'."""
    found = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes)
    return tuple(_NAME.findall(found[1])) if found else ()


def operation_seconds(instruction: Instruction, chip: Chip) -> float:
  """Returns the seconds of one run, by the compiler's cycles or by the cost that a kernel states.

  They are 0 without either.
  """
  if instruction.cycles is not None:
    return instruction.cycles / chip.clock
  if instruction.opcode == 'custom-call' and instruction.kernel_cost:
    flops, moved = instruction.kernel_cost
    return max(flops / chip.flops, moved / chip.hbm_bandwidth)
  return 0.0


@dataclasses.dataclass(frozen=True)
class Program:
  """An optimised HLO module.

  Attributes:
    computations: name -> instructions, in the order of the schedule.
    entry: name of the computation that runs first.
  """
  computations: Mapping[str, Sequence[Instruction]]
  entry: str

  @functools.cached_property
  def runs(self) -> Mapping[str, int]:
    """Number of runs of each computation in a step. Those inside fusions are left out."""
    runs = collections.Counter()
    todo = [(self.entry, 1)]
    while todo:
      name, times = todo.pop()
      runs[name] += times
      for instruction in self.computations[name]:
        if instruction.opcode == 'while':
          todo += [(body, times * (self.trips(instruction) or 1))
                   for body in instruction.called('body')]
        elif instruction.opcode == 'conditional':
          todo += [(branch, times) for kind in (
              'branch_computations', 'true_computation', 'false_computation')
              for branch in instruction.called(kind)]
        elif instruction.opcode == 'call':
          todo += [(callee, times) for callee in instruction.called('to_apply')]
    return runs

  def trips(self, loop: Instruction) -> int | None:
    """Returns the number of runs of a loop's body, or None if it is unknown.

    XLA may know it. Otherwise it is the bound of the loop's counter, since a scan counts from 0 in
    steps of 1.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
      return int(known[1])
    condition, = loop.called('condition')
    bounds = [instruction for instruction in self.computations[condition]
              if instruction.opcode == 'constant' and instruction.shape.startswith('s32[]')]
    if len(bounds) != 1:
      return None
    return int(re.match(r'-?\d+', bounds[0].attributes)[0])

  @property
  def loops_of_unknown_length(self) -> tuple[str, ...]:
    """Names of loops of unknown length, whose body counts as one run."""
    return tuple(instruction.name for instruction, _ in self
                 if instruction.opcode == 'while' and self.trips(instruction) is None)

  def __iter__(self) -> Iterator[tuple[Instruction, int]]:
    """Yields each instruction that runs, with its number of runs."""
    for name, times in self.runs.items():
      for instruction in self.computations[name]:
        yield instruction, times


def parse(text: str) -> Program:
  """Reads the text of an optimised HLO module.

  Raises:
    UserError: the text is not an HLO module.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
    elif line == '}':
      current = None
    elif _LINE.match(line):
      current.append(line)
    elif current:  # a kernel's metadata spans several lines
      current[-1] += line
  if entry is None:
    raise UserError(f'not an HLO module, since it has no ENTRY: {text[:60]!r}')
  return Program({name: [_parse_instruction(*_LINE.match(line).groups()) for line in lines]
                  for name, lines in computations.items()}, entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
  """Splits 'SHAPE OPCODE(OPERANDS), ATTRIBUTES'; a constant's value is its attributes."""
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  opcode, inside = rest[:opening], rest[opening + 1:closing]
  attributes = rest[closing + 1:].removeprefix(', ')
  if opcode == 'constant':
    attributes = inside
  return Instruction(name, opcode, shape, tuple(_NAME.findall(inside)), attributes)


def _closing(text: str, opening: int) -> int:
  """Returns the index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for index in range(opening, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if depth == 0:
      return index
  raise UserError(f'not an HLO module, since a parenthesis is never closed: {text[:80]!r}')


def array_bytes(shape: str, hbm_only: bool = False) -> list[int]:
  """Returns the bytes of each array of a shape, without the padding of partly filled tiles.

  Args:
    shape: shape of an array or a tuple, as printed.
    hbm_only: whether an array in one of a TPU's inner memories counts as 0 bytes.
  """
  sizes = []
  for kind, dimensions, layout in _ARRAY.findall(shape):
    elements = math.prod(int(size) for size in dimensions.split(',') if size)
    bits = 8 * ITEM_BYTES[kind] if kind in ITEM_BYTES else int(re.search(r'\d+', kind)[0])
    is_inside = hbm_only and re.search(r'S\(\d+\)', layout)
    sizes.append(0 if is_inside else math.ceil(elements * bits / 8))
  return sizes
