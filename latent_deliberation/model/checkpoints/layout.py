"""The tables of checkpoints: the tensor of each parameter of a decoder, and its order of axes.

Axes are letters of the legend in array_types.py; '(N H)' is a merged axis. The same patterns load a
tensor, and write it when they are read backwards.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from latent_deliberation.model.transformer_config import TransformerConfig

LAYERED = 'transformer/blocks/'  # prefix of the paths of parameters with a leading layer axis


@dataclasses.dataclass(frozen=True)
class Entry:
  """The stored tensor of one of our parameters, or of one layer of it.

  Attributes:
    name: name of the stored tensor; '{}' is the number of the layer.
    axes: axes of the stored tensor.
    part: index on a leading axis, if one tensor holds `parts` parameters; else None.
    parts: number of parameters in the tensor.
  """
  name: str
  axes: str
  part: int | None = None
  parts: int = 1


Layout = Mapping[str, Entry]  # path of the parameter, keys joined by '/' -> entry


def parameter_axes(config: TransformerConfig) -> dict[str, str]:
  """Returns path -> axes of every parameter of a decoder, without the layer axis."""
  block = {
      'attention/query/w': 'D N H', 'attention/key/w': 'D K H', 'attention/value/w': 'D K H',
      'attention/out/w': 'N H D', 'feed_forward/gate/w': 'D F', 'feed_forward/up/w': 'D F',
      'feed_forward/down/w': 'F D', 'attention_in/scale': 'D', 'feed_forward_in/scale': 'D'}
  if config.post_norms:
    block |= {'attention_out/scale': 'D', 'feed_forward_out/scale': 'D'}
  if config.qk_norm:
    block |= {'attention/query_norm/scale': 'H', 'attention/key_norm/scale': 'H'}
  if config.qkv_bias:
    block |= {'attention/query/b': 'N H', 'attention/key/b': 'K H', 'attention/value/b': 'K H'}
  head = {} if config.tied_head else {'embedder/head': 'V D'}
  return {'embedder/table': 'V D', **head,
          **{LAYERED + path: axes for path, axes in block.items()},
          'transformer/final_norm/scale': 'D'}


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
  """Returns letter -> size of every axis."""
  return {'V': config.vocab_size, 'D': config.embed_dim, 'N': config.num_heads,
          'K': config.num_kv_heads, 'H': config.head_dim, 'F': config.hidden_dim}


def stored_shape(entry: Entry, config: TransformerConfig) -> tuple[int, ...]:
  """Returns the shape of the stored tensor."""
  sizes = axis_sizes(config)
  shape = (math.prod(sizes[letter] for letter in letters) for letters in _axes(entry.axes))
  return tuple(shape) if entry.part is None else (entry.parts, *shape)


def stored_shapes(layout: Layout, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of every tensor of a checkpoint."""
  return {entry.name.format(layer): stored_shape(entry, config)
          for path, entry in layout.items()
          for layer in range(config.num_layers if path.startswith(LAYERED) else 1)}


def stored_sharding(entry: Entry, path: str, axes: str, sharding: Sharding) -> Sharding:
  """Returns the sharding of a stored tensor: each device reads what it will hold, where possible.

  Args:
    entry: entry of the tensor.
    path, axes: path and axes of our parameter, without the layer axis.
    sharding: sharding of our parameter, with the layer axis if it has one.
  """
  if not isinstance(sharding, NamedSharding):
    return sharding
  # The mesh axes of each letter. A spec may leave out trailing axes, which are not split.
  letters = ['L'] * path.startswith(LAYERED) + axes.split()
  spec = dict(itertools.zip_longest(letters, sharding.spec))
  # The shards of a merged axis are those of its first letter.
  stored = [spec[group[0]] for group in _axes(entry.axes)]
  leading = [] if entry.part is None else [None]
  return NamedSharding(sharding.mesh, PartitionSpec(*leading, *stored))


def _axes(pattern: str) -> list[str]:
  """Returns the letters of each axis: 'D (N H)' gives ['D', 'NH']."""
  return [group.strip('()').replace(' ', '') for group in re.findall(r'\([^)]*\)|\w', pattern)]
