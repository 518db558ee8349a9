"""The legend of axes, named array types, and `typed`, which checks types while jax traces.

Axes, the same letters in annotations and in einsum strings:

    B texts            S cached keys       D model width       V vocabulary
    T trunk tokens     M traces            N query heads       L layers
    A ahead tokens     Z latents           K kv heads          R rank of a low-rank adapter
    Q fresh tokens     P fresh keys (= Q)  G = N / K
    H head width       F feed-forward width

Every forward pass works on rows of fresh tokens, [B, M, Q]. A packed trunk is one row (M = 1,
Q = T). M traces of a text are M rows that share its cache. A decode step is one row of one token.
"""

import numpy as np
from beartype import beartype
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree, jaxtyped

Tokens = Int[Array | np.ndarray, 'B T']
Rows = Float[Array, 'B M Q D']
RowTokens = Int[Array, 'B M Q']
Latents = Float[Array, 'B M Z D']
Params = PyTree

typed = jaxtyped(typechecker=beartype)

__all__ = [
    'Array', 'Batch', 'Bool', 'Float', 'Int', 'Latents', 'Params', 'PyTree', 'RowTokens', 'Rows',
    'Tokens', 'typed',
]


@struct.dataclass
class Batch:
  """Packed rows of documents, int32. They are numpy arrays on the host and jax arrays on devices.

  Attributes:
    tokens: token ids; 0 is padding.
    segments: number of each token's document in its row, from 1; 0 on padding.
    positions: index of each token in its own document, from 0; 0 on padding.
  """
  tokens: Int[Array | np.ndarray, 'B T']
  segments: Int[Array | np.ndarray, 'B T']
  positions: Int[Array | np.ndarray, 'B T']
