"""Prints how far bfloat16 moves the logits of the goldens, for our decoder and for transformers.

    python -m tests.parity.agreement

Both weights and arithmetic are rounded. Each result is compared with its own float32 logits. This
needs no torch, because the goldens hold the bfloat16 logits of transformers.
"""

import dataclasses

import jax
import numpy as np

from latent_deliberation.array_types import Params
from latent_deliberation.model import weights
from latent_deliberation.model.transformer_config import TransformerConfig
from tests.parity import golden


@dataclasses.dataclass(frozen=True)
class Agreement:
  """The distance between two arrays of logits.

  Attributes:
    largest, mean: largest and mean absolute difference.
    first_choices: share of positions with the same most likely token.
    divergence: mean Kullback-Leibler divergence of the next-token distributions, in nats.
  """
  largest: float
  mean: float
  first_choices: float
  divergence: float

  @classmethod
  def between(cls, exact: np.ndarray, rounded: np.ndarray) -> 'Agreement':
    """Compares logits [B, T, V]."""
    difference = np.abs(exact - rounded)
    wanted, got = (np.asarray(jax.nn.log_softmax(logits)) for logits in (exact, rounded))
    return cls(
        largest=float(difference.max()), mean=float(difference.mean()),
        first_choices=float(np.mean(exact.argmax(-1) == rounded.argmax(-1))),
        divergence=float((np.exp(wanted) * (wanted - got)).sum(-1).mean()))

  def __str__(self) -> str:
    return (f'{self.largest:.3f} | {self.mean:.4f} | {self.first_choices:.1%} | '
            f'{self.divergence:.1e}')


def measure(stored: golden.Golden, config: TransformerConfig, params: Params,
            ) -> tuple[Agreement, Agreement]:
  """Compares bfloat16 with float32 on a golden, for our decoder and for transformers."""
  exact = golden.logits_of(config, params, stored.tokens)
  params = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), params)
  rounded = golden.logits_of(config, params, stored.tokens, dtype='bfloat16')
  return (Agreement.between(np.asarray(exact), np.asarray(rounded)),
          Agreement.between(stored.logits, stored.logits_bfloat16))


def main() -> None:
  columns = 'largest | mean | same first choice | KL'
  print(f'| golden | ours: {columns} | transformers: {columns} |')
  print('|---' * 9 + '|')
  for name in golden.NAMES:
    stored = golden.read_golden(name)
    ours, theirs = measure(stored, *weights.load(stored.directory, dtype='float32'))
    print(f'| {name} | {ours} | {theirs} |')


if __name__ == '__main__':
  main()
