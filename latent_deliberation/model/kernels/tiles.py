"""What the kernels of both platforms are given, and the scores that they are made of."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array
from latent_deliberation.model.attention import MASKED

# exp of a score that a soft-cap bounds by this, summed over any number of keys, fits a float32.
BOUNDED_CAP = 60.0


class Rows(NamedTuple):
  """I blocks of R queries.

  Attributes:
    queries: [B, N, I * R, H].
    index: int32 [B, I, 4, R]: segment (0 sees nothing); position that a key must be beyond to be
      inside the window; horizon; place in its chunk of the first own key that may be seen.
    begin, end: int32 [B, I] range of blocks of shared keys that a block of queries sees.
  """
  queries: Array
  index: Array
  begin: Array
  end: Array


class Keys(NamedTuple):
  """Shared keys, in J blocks, or the rows' own, in chunks.

  Attributes:
    keys, values: [B, K, S or I * R, H].
    index: int32 [B, J or chunks, 2, keys]: segment (-1 is not seen), position.
  """
  keys: Array
  values: Array
  index: Array


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes that are compiled in.

  Attributes:
    kv_heads, group, width: K, G, H.
    rows: R, queries of a block.
    keys: shared keys of a block.
    chunk: queries, and as many own keys, of a chunk: whole traces. It divides R on TPUs.
    cap: of the scores; None for no cap.
    interpret: run as ordinary operations, on any platform.
  """
  kv_heads: int
  group: int
  width: int
  rows: int
  keys: int
  chunk: int
  cap: float | None
  interpret: bool = False

  @property
  def bounded(self) -> bool:
    """Scores are small enough for exp without a running maximum."""
    return self.cap is not None and self.cap <= BOUNDED_CAP

  def chunks(self) -> list[slice]:
    """Rows of each chunk of a block."""
    return [slice(start, start + self.chunk) for start in range(0, self.rows, self.chunk)]


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
  """Matrix product over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())),
                             preferred_element_type=jnp.float32)


def masked_scores(tiles: Tiles, queries: Array, keys: Array, visible: Array) -> tuple[Array, Array]:
  """Masked scores [rows, keys], and the derivative of the soft-cap at each."""
  raw = product(queries, keys, (1, 1))
  if tiles.cap is None:
    return jnp.where(visible, raw, MASKED), jnp.ones((), jnp.float32)
  share = jnp.tanh(raw * (1 / tiles.cap))
  return jnp.where(visible, tiles.cap * share, MASKED), 1 - share * share
