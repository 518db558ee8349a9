"""Machines to plan for: TPU slices, which need not exist here, and virtual CPU devices."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from latent_deliberation.errors import UserError
from latent_deliberation.training.utilisation import PEAK_FLOPS

_CPU = 'cpu'
_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBIC = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16',
          '8x16x16', '16x16x16')


@dataclasses.dataclass(frozen=True)
class Chip:
  """The limits of a chip, as published or as its compiler reports them.

  Attributes:
    flops: bfloat16 operations a second.
    hbm_bytes: memory for a program; the compiler refuses a program that needs more.
    hbm_bandwidth: bytes a second from its memory.
    clock: cycles a second; the compiler's estimates are in cycles.
    link_bandwidth: bytes a second over one link to a neighbour, one way.
    ring: an axis of a slice closes to a ring if its number of chips is a multiple of this; in three
      dimensions if all of its axes are.
    shapes: shapes of the slices that are offered.
  """
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  clock: float
  link_bandwidth: float
  ring: int
  shapes: tuple[str, ...]


# Memory bandwidth: https://cloud.google.com/tpu/docs (v5e, v5p, v6e). Bytes: what
# libtpu 0.0.42 reports as available when it refuses a program. Links, one way:
# https://jax-ml.github.io/scaling-book/tpus, a little below the published bandwidth. Clocks: those
# at which all multipliers of a chip reach its published peak.
CHIPS = {
    'v5e': Chip(PEAK_FLOPS['TPU v5e'], 15.75 * 2**30, 819e9, 1.5e9, 45e9, 16, _FLAT),
    'v5p': Chip(PEAK_FLOPS['TPU v5'], 95.74 * 2**30, 2765e9, 1.75e9, 90e9, 4, _CUBIC),
    'v6e': Chip(PEAK_FLOPS['TPU v6e'], 31.25 * 2**30, 1638e9, 1.75e9, 90e9, 16, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine to plan for.

  Attributes:
    name: name that the user gave, such as 'v5e:16x16'.
    devices: devices to compile for: abstract ones of a TPU slice, or virtual ones of this CPU.
    chip: limits of its chips; None for virtual devices.
  """
  name: str
  devices: Sequence[Any]
  chip: Chip | None

  @property
  def shape(self) -> tuple[int, ...]:
    """Chips along each physical axis; (N,) for virtual devices, which have no links."""
    if self.chip is None:
      return (len(self.devices),)
    return tuple(int(size) for size in re.findall(r'\d+', self.name.split(':')[1]))


def prepare(name: str, recipe: Path) -> None:
  """Sets what jax and libtpu read when they start. Call it before jax has devices.

  Args:
    name: name of the topology.
    recipe: file with the environment of training. The compiler gets the same LIBTPU_INIT_ARGS as
      training, unless this process has the variable already.

  Raises:
    UserError: there is no such topology.
  """
  kind, _, shape = name.partition(':')
  if kind == _CPU:
    if not shape.isdecimal() or int(shape) < 1:
      raise UserError(f'--topology={name}: {_explain()}')
    jax.config.update('jax_num_cpu_devices', int(shape))
  else:
    flags = re.search(r'^LIBTPU_INIT_ARGS=(.*)$', recipe.read_text(), re.MULTILINE)
    os.environ.setdefault('LIBTPU_INIT_ARGS', flags[1])
  jax.config.update('jax_platforms', _CPU)  # libtpu only compiles here


def find_topology(name: str) -> Topology:
  """Returns the topology of a name: 'v5e:16x16', 'v5p:4x4x8', 'v6e:16x16' or 'cpu:8', for instance.

  `prepare` comes first.

  Raises:
    UserError: there is no such topology; the message lists all.
    UserError: libtpu is not installed, or this process has fewer virtual devices.
  """
  kind, _, shape = name.partition(':')
  if kind == _CPU and shape.isdecimal():
    devices = jax.devices(_CPU)
    if not 1 <= int(shape) <= len(devices):
      raise UserError(f'{name}: this process has {len(devices)} virtual CPU devices. Start it '
                      'with more.')
    return Topology(name, devices[:int(shape)], None)
  if kind not in CHIPS or shape.count('x') != CHIPS[kind].shapes[0].count('x'):
    raise UserError(f'--topology={name}: {_explain()}')
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(f'--topology={name} needs libtpu, the compiler for TPUs, which is not '
                    "installed: pip install -e '.[tpu]', or plan on virtual devices with "
                    '--topology=cpu:8')
  # Several processes may compile, and no metadata server is asked about this machine.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    raise UserError(f'--topology={name}: {str(error).splitlines()[0]}\n{_explain()}') from error
  return Topology(name, devices, CHIPS[kind])


def _explain() -> str:
  known = '\n'.join(f'  {kind}: {", ".join(chip.shapes)}' for kind, chip in CHIPS.items())
  return ('a topology is CHIP:SHAPE, such as v5e:16x16, or cpu:8 for eight virtual devices. '
          f'Shapes that are offered:\n{known}')
