"""When to deliberate: at set places, or where a gate opens on what the decoder knows there."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct

from latent_deliberation.array_types import Array


@struct.dataclass(eq=False)
class Gate:
  """A linear prediction of what latents gain, from the decoder's hidden state.

  Attributes:
    weight: float32 [D].
    bias: float32 [].
  """
  weight: Array
  bias: Array

  def score(self, hidden: Array) -> Array:
    """Nats that latents are expected to save behind tokens with these hidden states, [B, D]."""
    # Not a matrix product, which some devices would round to bfloat16.
    return jnp.sum(hidden.astype(jnp.float32) * self.weight, axis=-1) + self.bias


@dataclasses.dataclass(frozen=True)
class Policy:
  """Where latents are asked for. Without any argument: nowhere, which is the plain decoder.

  Attributes:
    at: numbers of decoded tokens after which all texts deliberate; 0 is the end of the prompt, as
      in the paper's benchmarks.
    every: deliberate again and again, after every so many tokens from the end of the prompt on.
    threshold: score of the gate, nats, above which a text deliberates.
    gate: what gives the score; None for the entropy of the next token, see `calibrate`.
    apart: tokens that a text decodes before its gate may open again.
  """
  at: tuple[int, ...] = ()
  every: int | None = None
  threshold: float | None = None
  gate: Gate | None = None
  apart: int = 8

  def __post_init__(self):
    object.__setattr__(self, 'at', tuple(sorted(set(self.at))))
    if self.at and self.at[0] < 0:
      raise ValueError(f'at = {self.at}: tokens are counted from 0, the end of the prompt, on')
    for name in ('every', 'apart'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} = {value}: there must be at least 1 token in between')
    if self.gate is not None and self.threshold is None:
      raise ValueError('a gate without a threshold: give the score above which it opens')
    if self.threshold is not None:
      if math.isnan(self.threshold):
        raise ValueError(f'threshold = {self.threshold}: give a number of nats')
      if self.gate is None and self.threshold < 0:
        raise ValueError(f'threshold = {self.threshold}: an entropy in nats is 0 or above')

  @property
  def repeats(self) -> bool:
    """Whether a text may deliberate more than once."""
    return len(self.at) > 1 or self.every is not None or self.threshold is not None

  def next_stop(self, count: int) -> int | None:
    """The least number of decoded tokens, `count` or above, at which all texts deliberate."""
    stops = [stop for stop in self.at if stop >= count]
    if self.every is not None:
      stops.append(-(-count // self.every) * self.every)
    return min(stops, default=None)


NEVER = Policy()
ONCE = Policy(at=(0,))


def calibrate(entropies: Sequence[float], budget: float) -> float:
  """The threshold above which a fraction `budget` of tokens lies.

  Args:
    entropies: of the next token, nats, on validation text.
    budget: fraction of tokens to deliberate at. A `Policy` whose `apart` is above 1 stays below it.
  """
  entropies = np.asarray(entropies, np.float64)
  if not 0 <= budget <= 1:
    raise ValueError(f'budget = {budget}: it is a fraction of tokens, between 0 and 1')
  if not entropies.size or not np.isfinite(entropies).all():
    raise ValueError(f'{entropies.size} entropies, {np.isfinite(entropies).sum()} of them finite: '
                     'give those of the tokens of some validation text')
  return float(np.quantile(entropies, 1 - budget))
