"""What learns: a step counter, float32 master weights and their optimiser state. Nothing frozen."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from latent_deliberation.array_types import Array, Params


@struct.dataclass
class TrainState:
  """Attributes: step: int32, updates done; params: trainable tree; opt_state: of optax."""
  step: Array
  params: Params
  opt_state: optax.OptState

  @classmethod
  def create(cls, params: Params, optimizer: optax.GradientTransformation) -> 'TrainState':
    """A state at step 0, with master weights in float32 whatever the dtype they came in.

    They are copies: a train step donates them, and some may have come from the frozen decoder.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
