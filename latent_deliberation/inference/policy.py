"""When to deliberate: at set places, or where a gate opens on what the decoder knows there."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError


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
      raise UserError(f'at = {self.at}: tokens are counted from 0, the end of the prompt, on')
    for name in ('every', 'apart'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f'{name} = {value}: there must be at least 1 token in between')
    if self.gate is not None and self.threshold is None:
      raise UserError('a gate without a threshold: give the score above which it opens')
    if self.threshold is not None:
      if math.isnan(self.threshold):
        raise UserError(f'threshold = {self.threshold}: give a number of nats')
      if self.gate is None and self.threshold < 0:
        raise UserError(f'threshold = {self.threshold}: an entropy in nats is 0 or above')

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
    raise UserError(f'budget = {budget}: it is a fraction of tokens, between 0 and 1')
  if not entropies.size or not np.isfinite(entropies).all():
    raise UserError(f'{entropies.size} entropies, {np.isfinite(entropies).sum()} of them finite: '
                     'give those of the tokens of some validation text')
  return float(np.quantile(entropies, 1 - budget))


RESULT, WEIGHTS = 'gate.json', 'gate.safetensors'
SCORES = ('learned', 'entropy')  # curves of gate.json that can be decoded with


@dataclasses.dataclass(frozen=True)
class FittedGate:
  """What launch/gate.py has written, at one budget.

  Attributes:
    directory: where it lies.
    decoder: fingerprint of the decoder that it was fitted on.
    policy: deliberates where the gate opens.
  """
  directory: Path
  decoder: str
  policy: Policy

  def check_decoder(self, fingerprint: str) -> None:
    """Raises UserError unless this is the decoder that it was fitted on."""
    if fingerprint != self.decoder:
      raise UserError(f'the gate in {self.directory} was fitted on a decoder with fingerprint '
                       f'{self.decoder}, this one has {fingerprint}: fit one with launch/gate.py')


def open_gate(directory: Path, score: str, budget: float) -> FittedGate:
  """A gate whose threshold spends a budget, by its measured curve.

  Args:
    score: 'learned', or 'entropy' for the decoder's own uncertainty.
    budget: fraction of the places of the curve at which the gate was open; between two measured
      fractions the threshold is interpolated.

  Raises:
    UserError: there is no gate in `directory`.
    UserError: it is damaged, or has no threshold for this budget.
  """
  for name in (RESULT, WEIGHTS):
    if not (directory / name).is_file():
      raise UserError(f'{directory} holds no {name}: give the output of launch/gate.py')
  try:
    result = json.loads((directory / RESULT).read_text())
    curve, decoder = result['curves'][score], result['decoder']
    # No threshold is so high that it opens nowhere: a fraction of 0 has none.
    known = [(fraction, float(threshold)) for fraction, threshold in zip(
        curve['fractions'], curve['thresholds'], strict=True) if threshold is not None]
    fractions, thresholds = map(np.array, zip(*known, strict=True))
    arrays = load_file(directory / WEIGHTS)
    gate = Gate(arrays['weight'], arrays['bias'][0])
  except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
    raise UserError(f'the gate in {directory} is damaged ({type(error).__name__}: {error}): fit '
                     'it again with launch/gate.py') from error
  if not fractions[0] <= budget <= fractions[-1]:
    raise UserError(
        f'budget = {budget}: {directory / RESULT} has thresholds for fractions from {fractions[0]} '
        f'to {fractions[-1]}; give one of these, or no coprocessor to deliberate nowhere')
  threshold = float(np.interp(budget, fractions, thresholds))
  return FittedGate(directory, decoder,
                    Policy(threshold=threshold, gate=gate if score == 'learned' else None))


def combine(at: Sequence[int], every: int, gate: FittedGate | None,
            otherwise: Sequence[int] = (0,)) -> Policy:
  """Deliberates at places, after every so many tokens (0: not), and where a gate opens.

  Args:
    otherwise: places where neither `at` nor a gate is given; default is the end of the prompt.
  """
  at = tuple(at or (() if gate else otherwise))
  return dataclasses.replace(gate.policy if gate else NEVER, at=at, every=every or None)
