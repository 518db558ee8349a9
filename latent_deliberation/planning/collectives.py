"""Collectives of a compiled step: mesh axis, bytes, seconds, and how many of them are exposed.

A collective is an exchange between chips. Its seconds are exposed where no computation hides them.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from latent_deliberation.errors import UserError
from latent_deliberation.planning.program import (
  Instruction,
  Program,
  array_bytes,
  operation_seconds,
)
from latent_deliberation.planning.topology import Topology

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
HOP_SECONDS = 1e-6  # of a message from a chip to its neighbour

# The three ways in which XLA writes groups of devices.
_LISTED = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]"
                    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}')
_SCALAR = re.compile(r'\b[us]\d+\[\](?:\{[^}]*\})?')
_CHANNEL = re.compile(r'channel_id=(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between chips, which a step runs once or more.

  Attributes:
    kind: one of KINDS.
    axis: mesh axes that it goes along, joined by '+'.
    bytes: size of the whole array that a chip ends with, or begins with (reduce-scatter), each
      time.
    count: runs in a step.
    overlapped: whether computation continues meanwhile.
    seconds: time of all runs; None if the links are unknown.
    exposed_seconds: part of `seconds` in which the chip computes nothing.
    op_name: name in our code that XLA keeps with it.
  """
  kind: str
  axis: str
  bytes: int
  count: int
  overlapped: bool
  seconds: float | None
  exposed_seconds: float | None
  op_name: str


@dataclasses.dataclass(frozen=True)
class _Part:
  """One of the instructions that make up a collective.

  Attributes:
    place: index of the instruction in the schedule.
    kind: one of KINDS.
    is_async: whether computation continues meanwhile.
    collective: the collective itself, which may be fused into the instruction.
  """
  place: int
  kind: str
  is_async: bool
  collective: Instruction


def find_collectives(program: Program, mesh: Mesh, topology: Topology) -> list[Collective]:
  """Returns all collectives of a step, longest first.

  An asynchronous collective is a series of fusions with one channel, or a start and a done. The
  instructions scheduled from its first to its last hide it, for as long as they take. Each
  collective is assumed to have the links to itself.
  """
  found = []
  for name, times in program.runs.items():
    instructions = program.computations[name]
    for parts in _by_channel(program, instructions).values():
      meanwhile = instructions[parts[0].place:parts[-1].place]
      found.append(_describe(parts, meanwhile, times, mesh, topology))
  return sorted(found, key=lambda row: (row.seconds or 0, row.count * row.bytes), reverse=True)


def _by_channel(program: Program, instructions: Sequence[Instruction]
                ) -> Mapping[str, list[_Part]]:
  """Groups the instructions of each collective, in the order of the schedule."""
  channels = collections.defaultdict(list)
  starts = {}
  for place, instruction in enumerate(instructions):
    # A done belongs to the start that it reads.
    begun = instruction.operands[0] if instruction.operands else ''
    if instruction.opcode.endswith('-done') and begun in starts:
      key = starts[begun]
      channels[key].append(dataclasses.replace(channels[key][0], place=place))
      continue
    for collective, kind, is_async in _collectives_in(program, instruction):
      channel = _CHANNEL.search(collective.attributes)
      key = channel[1] if channel else collective.name
      starts[instruction.name] = key
      channels[key].append(_Part(place, kind, is_async, collective))
  return channels


def _collectives_in(program: Program, instruction: Instruction
                    ) -> Iterator[tuple[Instruction, str, bool]]:
  """Yields (collective, kind, is asynchronous) of an instruction and of those fused into it."""
  callees = () if instruction.opcode == 'call' else instruction.called('calls')
  inside = [instruction, *(part for callee in callees for part in program.computations[callee])]
  is_async = instruction.opcode.startswith('async') or any(
      'AsyncCollective' in part.attributes for part in inside)
  for part in inside:
    kind = part.opcode.removesuffix('-start')
    if kind in KINDS:
      scatters = any(callee.startswith('all-reduce-scatter') for callee in callees)
      yield part, 'reduce-scatter' if scatters else kind, is_async or kind != part.opcode


def _describe(parts: Sequence[_Part], meanwhile: Sequence[Instruction], times: int, mesh: Mesh,
              topology: Topology) -> Collective:
  """Returns one collective; `meanwhile` is what is scheduled between its parts."""
  first, is_async = parts[0], any(part.is_async for part in parts)
  collective = first.collective
  groups = read_groups(collective.attributes, mesh.size)
  whole = _whole_bytes(collective)
  if collective.opcode == 'reduce-scatter':
    whole *= len(groups[0])
  seconds = exposed = None
  if topology.chip:
    once = _seconds(first.kind, whole, groups[0], mesh, topology)
    hidden = sum(operation_seconds(part, topology.chip) for part in meanwhile) if is_async else 0.0
    seconds, exposed = times * once, times * max(once - hidden, 0.0)
  return Collective(kind=first.kind, axis='+'.join(_axes_of(groups, mesh)), bytes=whole,
                    count=times, overlapped=is_async, seconds=seconds, exposed_seconds=exposed,
                    op_name=collective.op_name)


def _whole_bytes(collective: Instruction) -> int:
  """Returns the bytes of all arrays that a collective makes, where XLA has combined several."""
  if collective.opcode in ('all-reduce-start', *KINDS):
    return sum(array_bytes(collective.shape))
  # Any other start has operands, then results, and perhaps contexts, which are scalars.
  sizes = array_bytes(_SCALAR.sub('', collective.shape))
  if collective.opcode == 'all-gather-start':
    return sum(sizes[len(sizes) // 2:])
  return max(sizes)


def read_groups(attributes: str, num_devices: int) -> np.ndarray:
  """Returns groups of devices that exchange with each other, as int [groups, devices].

  A device is its index in the mesh. For a collective-permute these are (source, target) pairs.

  Args:
    attributes: attributes of the instruction, as XLA prints them.
    num_devices: devices of the mesh.

  Raises:
    UserError: the groups are written in an unknown form.
  """
  listed, iota, named = (form.search(attributes) for form in (_LISTED, _IOTA, _NAMED))
  if listed:
    rows = re.findall(r'\{([\d,]+)\}', listed[1])
    return np.array([[int(device) for device in row.split(',')] for row in rows])
  if iota:
    return _iota(iota[2], iota[3]).reshape(_integers(iota[1]))
  if named:
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    devices = _iota(named[2] or str(num_devices), named[3]).reshape(tuple(sizes.values()))
    inside = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[4])]
    devices = np.moveaxis(devices, inside, range(-len(inside), 0))
    return devices.reshape(-1, int(np.prod(devices.shape[-len(inside):])))
  if 'replica_groups={}' in attributes:
    return np.arange(num_devices)[None]
  raise UserError(f'replica groups are written in an unknown form in {attributes[:200]!r}. The '
                  'planner reads programs of jax 0.10: install that version.')


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))


def _iota(shape: str, order: str | None) -> np.ndarray:
  devices = np.arange(np.prod(_integers(shape))).reshape(_integers(shape))
  return devices.transpose(_integers(order)) if order else devices


def _axes_of(groups: np.ndarray, mesh: Mesh) -> list[str]:
  """Returns the mesh axes along which the devices of some group differ."""
  places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))
  differ = (places != places[..., :1]).any(axis=(1, 2))
  return [axis for axis, differs in zip(mesh.axis_names, differ, strict=True) if differs]


def _seconds(kind: str, whole: int, group: np.ndarray, mesh: Mesh, topology: Topology) -> float:
  """Returns the time of one run, over all physical axes that a group spans at once.

  Each chip of a ring sends both ways. An open row takes twice as long, since the share of its last
  chip passes every link. Formulas: https://jax-ml.github.io/scaling-book/sharding.
  """
  chip = topology.chip

  # Chips of the group along each physical axis, and whether these close to a ring.
  places = np.array([mesh.devices.flat[device].coords for device in group])[:, :len(topology.shape)]
  lengths = [len(np.unique(column)) for column in places.T]
  spanned = [axis for axis, length in enumerate(lengths) if length > 1]
  if not spanned:
    return 0.0
  # A slice in three dimensions closes along all axes or none: https://cloud.google.com/tpu/docs/v5p.
  lone = len(topology.shape) == 3 and any(length % chip.ring for length in topology.shape)
  closed = [not lone and lengths[axis] == topology.shape[axis] and lengths[axis] % chip.ring == 0
            for axis in spanned]
  if kind == 'collective-permute':
    return max(HOP_SECONDS, whole / chip.link_bandwidth)

  # Whatever takes longer: the hops of a small message, or the bytes of a large one.
  hops = sum(lengths[axis] // (2 if ring else 1)
             for axis, ring in zip(spanned, closed, strict=True))
  bandwidth = sum(chip.link_bandwidth * (2 if ring else 1) for ring in closed)
  share = (len(group) - 1) / len(group)
  sent = {'all-gather': whole * share, 'reduce-scatter': whole * share,
          'all-reduce': 2 * whole * share, 'all-to-all': whole * len(group) / 4}[kind]
  return max(hops * HOP_SECONDS, sent / bandwidth)
