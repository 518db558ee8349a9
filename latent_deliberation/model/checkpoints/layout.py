"""Where checkpoints keep each parameter of a decoder, and in what order of axes.

Axes are letters of the legend in array_types.py; '(N H)' is a merged axis. The same patterns, read
in either direction, load a tensor and write it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from latent_deliberation.model.transformer_config import TransformerConfig

LAYERED = 'transformer/blocks/'  # parameters with a leading layer axis have paths that begin so


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one parameter of ours, of one layer if it has layers, is stored.

  Attributes:
    name: of the stored tensor; '{}' stands for the number of the layer.
    axes: of the stored tensor.
    part: index on a leading axis, where `parts` parameters are stored as one tensor.
  """
  name: str
  axes: str
  part: int | None = None
  parts: int = 1


Layout = Mapping[str, Entry]  # by path of the parameter, keys joined by '/'


def parameter_axes(config: TransformerConfig) -> dict[str, str]:
  """Path -> axes of every parameter that a decoder of this config has, without the layer axis."""
  block = {
      'attention/query/w': 'D N H', 'attention/key/w': 'D K H', 'attention/value/w': 'D K H',
      'attention/out/w': 'N H D', 'feed_forward/gate/w': 'D F', 'feed_forward/up/w': 'D F',
      'feed_forward/down/w': 'F D', 'attention_in/scale': 'D', 'feed_forward_in/scale': 'D'}
  if config.post_norms:
    block |= {'attention_out/scale': 'D', 'feed_forward_out/scale': 'D'}
  if config.qk_norm:
    block |= {'attention/query_norm/scale': 'H', 'attention/key_norm/scale': 'H'}
  return {'embedder/table': 'V D',
          **{LAYERED + path: axes for path, axes in block.items()},
          'transformer/final_norm/scale': 'D'}


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
  """Letter -> size."""
  return {'V': config.vocab_size, 'D': config.embed_dim, 'N': config.num_heads,
          'K': config.num_kv_heads, 'H': config.head_dim, 'F': config.hidden_dim}


def stored_shape(entry: Entry, config: TransformerConfig) -> tuple[int, ...]:
  """Shape that the stored tensor has."""
  sizes = axis_sizes(config)
  shape = (math.prod(sizes[letter] for letter in letters) for letters in _axes(entry.axes))
  return tuple(shape) if entry.part is None else (entry.parts, *shape)


def stored_shapes(layout: Layout, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every tensor of a checkpoint."""
  return {entry.name.format(layer): stored_shape(entry, config)
          for path, entry in layout.items()
          for layer in range(config.num_layers if path.startswith(LAYERED) else 1)}


def stored_sharding(entry: Entry, path: str, axes: str, sharding: Sharding) -> Sharding:
  """Sharding of a stored tensor under which each device reads what it will hold, as far as it can.

  Args:
    path, axes: of our parameter, the axes without a layer axis.
    sharding: of our parameter, with one where there is one.
  """
  if not isinstance(sharding, NamedSharding):
    return sharding
  letters = ['L'] * path.startswith(LAYERED) + axes.split()
  spec = dict(itertools.zip_longest(letters, sharding.spec))
  # The shards of a merged axis are those of its first letter.
  stored = [spec[group[0]] for group in _axes(entry.axes)]
  leading = [] if entry.part is None else [None]
  return NamedSharding(sharding.mesh, PartitionSpec(*leading, *stored))


def _axes(pattern: str) -> list[str]:
  """Letters of each axis: 'D (N H)' gives ['D', 'NH']."""
  return [group.strip('()').replace(' ', '') for group in re.findall(r'\([^)]*\)|\w', pattern)]
