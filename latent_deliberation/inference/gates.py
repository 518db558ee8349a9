"""A fitted gate on disk, as a policy of decoding."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from latent_deliberation.inference.policy import NEVER, Gate, Policy

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
    """Raises ValueError unless this is the decoder that it was fitted on."""
    if fingerprint != self.decoder:
      raise ValueError(f'the gate in {self.directory} was fitted on a decoder with fingerprint '
                       f'{self.decoder}, this one has {fingerprint}: fit one with launch/gate.py')


def open_gate(directory: Path, score: str, budget: float) -> FittedGate:
  """A gate whose threshold spends a budget, by its measured curve.

  Args:
    score: 'learned', or 'entropy' for the decoder's own uncertainty.
    budget: fraction of the places of the curve at which the gate was open; between two measured
      fractions the threshold is interpolated.

  Raises:
    FileNotFoundError: there is no gate in `directory`.
    ValueError: it is damaged, or has no threshold for this budget.
  """
  for name in (RESULT, WEIGHTS):
    if not (directory / name).is_file():
      raise FileNotFoundError(f'{directory} holds no {name}: give the output of launch/gate.py')
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
    raise ValueError(f'the gate in {directory} is damaged ({type(error).__name__}: {error}): fit '
                     'it again with launch/gate.py') from error
  if not fractions[0] <= budget <= fractions[-1]:
    raise ValueError(
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
