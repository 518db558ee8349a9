"""A batch of packed texts: the only thing that data hands to training and evaluation."""

from flax import struct

from latent_deliberation.array_types import Array


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
