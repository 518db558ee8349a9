"""Low-rank adapters folded into the weights that they adapt."""

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Params
from latent_deliberation.model.layers import LowRank


def merge(params: Params, adapters: Params, low_rank: LowRank) -> Params:
  """Parameters of a scanned transformer with W + (alpha / rank) A B in the place of every W.

  The same function as the weights with adapters beside them (see LowRank), as one set of weights;
  differentiable by the adapters.

  Args:
    params: of a Transformer, without boxes.
    adapters: its collection 'lora'; A is [L, inputs.., rank], B is [L, rank, outputs..].
  """
  if set(adapters) == {'a', 'b'}:
    update = jax.vmap(lambda down, up: jnp.tensordot(down, up, axes=1))(
        adapters['a'], adapters['b']) * low_rank.scale
    return {**params, 'w': params['w'] + update.astype(params['w'].dtype)}
  return {**params, **{name: merge(params[name], child, low_rank)
                       for name, child in adapters.items()}}
