"""Experts that misbehave as they are told, and the text that a batch should still give."""

import threading

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.experts.attach import Experts
from tests.experts import small


class FaultyExperts(Experts):
  """The experts 'stars' and 'law', of which each may fail, hang or give NaN.

  Attributes:
    faults: fault by name: 'fails', 'hangs', 'nan' or 'lost', of a device that fails later.
    released: set to let the threads go that hang.
  """

  def __init__(self, router='gain', **faults):
    self.faults, self.released, self.begun = faults, threading.Event(), 0
    super().__init__(small.decoder(), {'stars': small.lora(1), 'law': small.lora(2)},
                     length=small.LENGTH, strict=True, router=router)

  def augment(self, state, mixes):
    self.begun += 1
    found = super().augment(state, mixes)
    for fault in {self.faults.get(name) for mix in mixes for name in mix}:
      if fault == 'fails':
        raise RuntimeError('RESOURCE_EXHAUSTED in /a/path')
      if fault == 'hangs':
        self.released.wait(30)
      if fault == 'lost':
        return found.replace(finite=Lost())
      if fault == 'nan':
        return found.replace(finite=jnp.zeros_like(found.finite), latents=jax.tree.map(
            lambda leaf: leaf * np.nan, found.latents))
    return found


class Lost:
  """An array of a device that has failed."""

  def __array__(self, *_, **__):
    raise RuntimeError('the device is lost')


class Fixed:
  """A router that gives what it is told."""

  def __init__(self, names, *scores):
    self.names, self._scores = names, np.array([scores])

  def scores(self, query):
    if not len(self._scores[0]):
      raise ValueError('no scores')
    return self._scores
