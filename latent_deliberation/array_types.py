"""The axis legend, named array types, and `typed`, which checks them while a function is traced.

Axes, the same letters in annotations and in einsum strings:

    B texts            S cached keys       D model width       V vocabulary
    T trunk tokens     M traces            N query heads       L layers
    A ahead tokens     Z latents           K kv heads          R rank of a low-rank adapter
    Q fresh tokens     P fresh keys (= Q)  G = N / K
    H head width       F feed-forward width

Every forward pass works on rows of fresh tokens, [B, M, Q]: a packed trunk is one row (M = 1,
Q = T), M traces of a text are M rows that share its cache, a decode step is one row of one token.
"""

import numpy as np
from beartype import beartype
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree, jaxtyped

Tokens = Int[Array | np.ndarray, 'B T']
Rows = Float[Array, 'B M Q D']
RowTokens = Int[Array, 'B M Q']
Anchors = Int[Array, 'B M']
AheadTokens = Int[Array, 'B M A']
AheadMask = Bool[Array, 'B M A']
Latents = Float[Array, 'B M Z D']
Params = PyTree

typed = jaxtyped(typechecker=beartype)

__all__ = [
    'AheadMask', 'AheadTokens', 'Anchors', 'Array', 'Bool', 'Float', 'Int', 'Latents', 'Params',
    'PyTree', 'RowTokens', 'Rows', 'Tokens', 'typed',
]


@struct.dataclass
class Batch:
  """Packed rows of documents, int32 [B, T] each (numpy on the host, jax on devices).

  Attributes:
    tokens: token ids; 0 is padding.
    segments: 1, 2, ... for the documents of a row in order; 0 on padding.
    positions: index of a token in its own document, from 0; 0 on padding.
  """
  tokens: Array
  segments: Array
  positions: Array
