"""The blocks of the model, one after the other, each with a cache of its own size.

Training scans over stacked layers; here every layer is called by itself, with weights that were
unstacked once (and turned, where they are large), so that a decode step reads each weight once, as
fast as it can be read, and copies none.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latent_deliberation.array_types import Array, Params
from latent_deliberation.inference.ring_cache import SlotCache
from latent_deliberation.model.attention import Visibility
from latent_deliberation.model.cache import KeysValues
from latent_deliberation.model.layers import LowRank, RMSNorm
from latent_deliberation.model.quantised import input_axes
from latent_deliberation.model.transformer import Block, layer_traits
from latent_deliberation.model.transformer_config import TransformerConfig

CACHED_BYTES = 2**21  # a weight of fewer stays in a core's own cache, and turning it gains nothing


@struct.dataclass
class Layers:
  """Weights of a transformer, unstacked.

  Attributes:
    blocks: variables of each of the L blocks: 'params', with large projections turned, and 'lora'
      where there are adapters.
    final_norm: parameters of the norm behind them.
  """
  blocks: tuple[Params, ...]
  final_norm: Params


def unstack(transformer: Params) -> Layers:
  """The layers of a scanned transformer's parameters; see `Projection` for what is turned."""
  blocks = tuple({'params': _turn(layer)} for layer in _slices(transformer['blocks']))
  return Layers(blocks, transformer['final_norm'])


def adapt(layers: Layers, lora: Params) -> Layers:
  """The same layers with low-rank adapters beside their weights; the last ones if few."""
  adapters = _slices(lora['blocks'])
  return layers.replace(blocks=tuple(
      {**block, 'lora': adapter}
      for block, adapter in zip(layers.blocks[-len(adapters):], adapters, strict=True)))


def _slices(stacked: Params) -> list[Params]:
  length = len(jax.tree.leaves(stacked)[0])
  return [jax.tree.map(lambda leaf: leaf[number], stacked) for number in range(length)]  # noqa: B023


def _turn(params: Params, inputs: int = 1) -> Params:
  turned = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      turned[name] = _turn(child, input_axes(name))
    elif name == 'w' and child.nbytes >= CACHED_BYTES:
      turned['turned'] = jnp.moveaxis(child, range(inputs), range(-inputs, 0))
    else:
      turned[name] = child
  return turned


def run(config: TransformerConfig, layers: Layers, x: Array, positions: Array, segments: Array,
        cache: SlotCache | None = None, lora: LowRank | None = None,
        ) -> tuple[Array, Sequence[KeysValues]]:
  """Hidden states [B, Q, D] after the final norm, and keys and values of each layer.

  Args:
    x: [B, Q, D] embeddings of fresh tokens or latents.
    positions, segments: [B, Q]; segment 0 is a hole, all else is one document.
    cache: all that it shows is seen, inside a layer's window; where it has more layers than
      `layers`, its last ones.
    lora: rank and scale of the adapters in `layers`.
  """
  rows, positions = x[:, None], positions[:, None]
  everything = jnp.full((len(x), 1), np.iinfo(np.int32).max)
  visibility = Visibility(segments[:, None], everything)
  traits = layer_traits(config)
  block, fresh = Block(config, lora), []
  skipped = len(cache.keys) - len(layers.blocks) if cache is not None else 0
  for number, variables in enumerate(layers.blocks):
    layer = jax.tree.map(lambda leaf: leaf[number], traits)  # noqa: B023
    seen = None if cache is None else cache.layer(skipped + number)
    rows, keys_values = block.apply(variables, rows, (layer, seen), positions, visibility)
    fresh.append(keys_values)
  hidden = RMSNorm(config.norm_epsilon).apply({'params': layers.final_norm}, rows)
  return hidden[:, 0], fresh
