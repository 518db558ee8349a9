"""Policies of deliberation: set places, or places where a gate opens; and fitted gates on disk."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load

from latent_deliberation.array_types import Array, Float
from latent_deliberation.errors import UserError, check_integer, check_number
from latent_deliberation.files import unseal
from latent_deliberation.paths import GATE_FILE, GATE_WEIGHTS_FILE

MIN_GAP = 8  # tokens that a text decodes, by default, before its gate may open again
MOST_GAP = 2**30  # added to a number of tokens in int32


@struct.dataclass(eq=False)
class Gate:
  """A linear prediction, from the decoder's hidden state, of what latents gain."""
  weight: Float[Array, ' D']
  bias: Float[Array, '']

  def score(self, hidden: Array) -> Array:
    """Returns the nats [B] that latents should save after tokens with hidden states [B, D]."""
    # Not a matrix product, which some devices would round to bfloat16.
    return jnp.sum(hidden.astype(jnp.float32) * self.weight, axis=-1) + self.bias


@dataclasses.dataclass(frozen=True)
class Policy:
  """The places where latents are made. Without any argument: none, which is the plain decoder.

  Attributes:
    at: numbers of decoded tokens after which all texts deliberate; 0 is the end of the prompt, as
      in the paper's benchmarks.
    every: number of tokens after which all texts deliberate again, from the end of the prompt on.
    threshold: score of the gate, nats, above which a text deliberates.
    gate: source of the score; None for the entropy of the next token.
    min_gap: number of tokens that a text decodes before its gate may open again.
  """
  at: tuple[int, ...] = ()
  every: int | None = None
  threshold: float | None = None
  gate: Gate | None = None
  min_gap: int = MIN_GAP

  def __post_init__(self):
    for stop in self.at:  # 0 is the end of the prompt
      check_integer('at', stop, 0)
    object.__setattr__(self, 'at', tuple(sorted(set(self.at))))
    if self.every is not None:
      check_integer('every', self.every, 1, otherwise=', or none to leave it out (--every=0)')
    check_integer('min_gap', self.min_gap, 1, MOST_GAP)
    # A gate needs a threshold. Without a gate the score is an entropy.
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
    """Returns the first number of decoded tokens, from `count` on, at which all deliberate."""
    stops = [stop for stop in self.at if stop >= count]
    if self.every is not None:
      # The next multiple of the period, or `count` if it is one.
      stops.append(-(-count // self.every) * self.every)
    return min(stops, default=None)


NEVER = Policy()
ONCE = Policy(at=(0,))


SCORES = ('learned', 'entropy')  # curves of gate.json that can be decoded with


@dataclasses.dataclass(frozen=True)
class FittedGate:
  """A gate that launch/gate.py has written, at one budget.

  Attributes:
    directory: directory of the gate.
    decoder_fingerprint: fingerprint of the decoder that it was fitted on.
    policy: policy that deliberates where the gate opens.
  """
  directory: Path
  decoder_fingerprint: str
  policy: Policy

  def check_decoder(self, decoder_fingerprint: str) -> None:
    """Raises UserError unless the gate was fitted on this decoder."""
    if decoder_fingerprint != self.decoder_fingerprint:
      raise UserError(
          f'the gate in {self.directory} was fitted on a decoder with fingerprint '
          f'{self.decoder_fingerprint}, but this one has {decoder_fingerprint}: fit one with '
          'launch/gate.py')


def open_gate(directory: Path, score: str, budget: float, min_gap: int = MIN_GAP) -> FittedGate:
  """Reads a gate, and finds the threshold that spends a budget by its measured curve.

  Args:
    directory: output of launch/gate.py.
    score: 'learned', or 'entropy' for the decoder's own uncertainty.
    budget: expected fraction of decoded tokens at which the gate opens. Between two measured
      thresholds it is interpolated.
    min_gap: number of tokens that a text decodes before its gate may open again.

  Raises:
    UserError: there is no gate, it is damaged, or it has no threshold for this budget.
  """
  if score not in SCORES:
    raise UserError(f'gate_score = {score!r}: it must be one of {SCORES}')
  check_number('budget', budget, 0)
  check_integer('min_gap', min_gap, 1, MOST_GAP)
  if budget * min_gap > 1:
    raise UserError(f'budget = {budget}: a gate that opens every min_gap = {min_gap} tokens opens '
                    f'at {1 / min_gap:.4g} of them. Give a budget up to that, or a smaller '
                    '--min_gap')
  for name in (GATE_FILE, GATE_WEIGHTS_FILE):
    if not (directory / name).is_file():
      raise UserError(f'{directory} holds no {name}: give the output of launch/gate.py')
  try:
    result = unseal((directory / GATE_FILE).read_bytes(), directory / GATE_FILE)
    curve, decoder_fingerprint = result['curves'][score], result['decoder']
    # No threshold is high enough to open nowhere, so a fraction of 0 has none.
    known = [(fraction, float(threshold)) for fraction, threshold in zip(
        curve['fractions'], curve['thresholds'], strict=True) if threshold is not None]
    fractions, thresholds = map(np.array, zip(*known, strict=True))
    stored = (directory / GATE_WEIGHTS_FILE).read_bytes()
    # Gates of earlier code do not say which weights are theirs.
    if result.get('weights', found := hashlib.sha256(stored).hexdigest()) != found:
      raise ValueError(f'{GATE_WEIGHTS_FILE} is not the one that {GATE_FILE} names')
    arrays = load(stored)
    gate = Gate(arrays['weight'], arrays['bias'][0])
  except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
    raise UserError(f'the gate in {directory} is damaged ({type(error).__name__}: {error}): fit '
                    'it again with launch/gate.py') from error
  # Outside of the curve, interpolation would give its end without a warning.
  needed = fraction_of_places(budget, min_gap)
  if not fractions[0] <= needed <= fractions[-1]:
    least, most = (1 / (min_gap - 1 + 1 / fraction) for fraction in fractions[[0, -1]])
    raise UserError(
        f'budget = {budget}: {directory / GATE_FILE} has thresholds for budgets from {least:.4g} '
        f'to {most:.4g}, at min_gap = {min_gap}. Give one of these, or no coprocessor to '
        'deliberate nowhere')
  threshold = float(np.interp(needed, fractions, thresholds))
  return FittedGate(directory, decoder_fingerprint, Policy(
      threshold=threshold, gate=gate if score == 'learned' else None, min_gap=min_gap))


def fraction_of_places(budget: float, min_gap: int) -> float:
  """Returns the fraction of places that must pass, so that a gate opens at `budget` of the tokens.

  After it has opened, a gate stays shut for min_gap - 1 places. It then opens at each place with
  the probability p, which is this fraction, if places are independent. So it opens once in
  min_gap - 1 + 1 / p tokens.
  """
  open_again = 1 - budget * (min_gap - 1)  # fraction of tokens at which the gate may open
  return min(1.0, budget / open_again)


def combine(at: Sequence[int], every: int, gate: FittedGate | None,
            otherwise: Sequence[int] = (0,)) -> Policy:
  """Combines set places, a period, and a gate into one policy.

  Args:
    at: see Policy.
    every: see Policy; 0 for none.
    gate: gate that opens at further places; None for none.
    otherwise: places for `at` if neither it nor a gate is given; default is the end of the prompt.
  """
  at = tuple(at or (() if gate else otherwise))
  return dataclasses.replace(gate.policy if gate else NEVER, at=at, every=every or None)
