"""The optimised program as XLA prints it: what runs, how often, with the compiler's estimates."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from latent_deliberation.errors import UserError

# Where the digits in a type's name are not its bits.
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
    name, opcode: of the instruction.
    shape: of its result, as printed: an array, or a tuple in parentheses.
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
    """The compiler's estimate, None where it makes none."""
    found = _CYCLES.search(self.attributes)
    return int(found[1]) if found else None

  @property
  def op_name(self) -> str:
    """The call of ours that it comes from; '' where XLA does not say."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ''

  @property
  def kernel_cost(self) -> tuple[int, int] | None:
    """(operations, bytes) that the author of a kernel gave with it."""
    found = _COST.search(self.attributes)
    return (int(found[1]), int(found[2])) if found else None

  def called(self, attribute: str) -> tuple[str, ...]:
    """Names of the computations that an attribute such as 'calls' or 'body' holds."""
    found = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes)
    return tuple(_NAME.findall(found[1])) if found else ()


@dataclasses.dataclass(frozen=True)
class Program:
  """Attributes:
    computations: instructions of each, in the order in which they are scheduled.
    entry: name of the one that runs first.
  """
  computations: Mapping[str, Sequence[Instruction]]
  entry: str

  @functools.cached_property
  def runs(self) -> Mapping[str, int]:
    """How often each computation runs in a step; those inside of fusions are left out."""
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
    """How often a loop's body runs: what XLA knows, or the bound that its counter is compared with.

    A scan counts from 0 in steps of 1. None where neither is there.
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
    """Loops whose body is counted as one run."""
    return tuple(instruction.name for instruction, _ in self
                 if instruction.opcode == 'while' and self.trips(instruction) is None)

  def __iter__(self) -> Iterator[tuple[Instruction, int]]:
    """Each instruction that runs, with how often it does."""
    for name, times in self.runs.items():
      for instruction in self.computations[name]:
        yield instruction, times


def parse(text: str) -> Program:
  """Reads the text of an optimised HLO module.

  Raises:
    UserError: it is none.
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
    elif current:  # the metadata of a kernel spans several lines, braces among them
      current[-1] += line
  if entry is None:
    raise UserError(f'this is no HLO module, for it has no ENTRY: {text[:60]!r}')
  return Program({name: [_parse_instruction(*_LINE.match(line).groups()) for line in lines]
                  for name, lines in computations.items()}, entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
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
  """Index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for index in range(opening, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if depth == 0:
      return index
  raise UserError(f'a parenthesis is never closed: {text[:80]!r}')


def array_bytes(shape: str, hbm_only: bool = False) -> list[int]:
  """Bytes of each array of a shape, without the padding of tiles that are not full.

  Args:
    shape: as printed, of an array or a tuple.
    hbm_only: what lies in one of a TPU's inner memories counts 0.
  """
  sizes = []
  for kind, dimensions, layout in _ARRAY.findall(shape):
    elements = math.prod(int(size) for size in dimensions.split(',') if size)
    bits = 8 * ITEM_BYTES[kind] if kind in ITEM_BYTES else int(re.search(r'\d+', kind)[0])
    is_inside = hbm_only and re.search(r'S\(\d+\)', layout)
    sizes.append(0 if is_inside else math.ceil(elements * bits / 8))
  return sizes
