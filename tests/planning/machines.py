"""Abstract devices of a TPU slice, without libtpu."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from latent_deliberation.planning.topology import CHIPS, Topology


@dataclasses.dataclass(frozen=True)
class AbstractDevice:
  """A device with its place in the slice."""
  id: int
  coords: tuple[int, int, int]
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'


def slice_of(shape: tuple[int, int], axes: tuple[str, str] = ('data', 'fsdp')
             ) -> tuple[Topology, Mesh]:
  """Returns a v5e slice, and a mesh whose axes are its physical axes."""
  devices = np.empty(shape, object)
  for number, place in enumerate(np.ndindex(shape)):
    devices[place] = AbstractDevice(number, (*place, 0))
  return Topology(f'v5e:{shape[0]}x{shape[1]}', list(devices.flat), CHIPS['v5e']), Mesh(
      devices, axes)
