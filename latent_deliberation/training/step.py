"""The jitted train step: gradients for what learns, and for nothing else."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Params, PyTree
from latent_deliberation.sharding import batch_sharding, shardings_of


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


# (trainable, frozen, batch, keys [B]) -> (loss summed over targets, number of targets)
LossFn = Callable[[Params, Params, Batch, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """train_step(state, batch) -> (state, metrics), compiled for `mesh`; the state is donated.

  Attributes:
    jitted: (state, frozen, batch) -> (state, metrics).
    frozen: parameters, or their shapes with shardings, of which a step can only be lowered.
    mesh: that it runs on.
  """
  jitted: jax.stages.Wrapped
  frozen: Params
  mesh: Mesh

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    with jax.set_mesh(self.mesh):
      return self.jitted(state, self.frozen, batch)

  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """The program of this step, from shapes with shardings."""
    with jax.set_mesh(self.mesh):
      return self.jitted.lower(state, self.frozen, batch)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation,
                    schedule: optax.Schedule, *, state_shardings: PyTree, frozen: Params,
                    mesh: Mesh, rules: Mapping[str, Sequence[str]], seed: int,
                    accumulation: int = 1) -> TrainStep:
  """The step that trains by this loss.

  The frozen parameters are an argument of their own that is never donated and has no gradient.
  Each text gets the key fold_in(seed, step) split by its place in the global batch, so that a
  step draws the same traces on any mesh and in any number of microbatches.

  Args:
    loss_fn: sums, so that microbatches with unequal numbers of targets weigh what they should.
    optimizer: of the trainable parameters.
    schedule: for the metric 'learning_rate'.
    state_shardings: of the TrainState.
    frozen: on devices already, or their shapes with shardings; their shardings are kept.
    accumulation: microbatches that a batch is processed in, one after the other.
  """
  replicated = NamedSharding(mesh, PartitionSpec())

  def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step),
                            batch.tokens.shape[0])
    with nn.logical_axis_rules(tuple(rules.items())):
      total, targets, gradients = _accumulate(loss_fn, state.params, frozen, batch, keys,
                                              accumulation)
    gradients = jax.tree.map(lambda leaf: leaf / jnp.maximum(targets, 1), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics = {
        'loss': total / jnp.maximum(targets, 1),
        'targets': targets,
        'grad_norm': optax.tree.norm(gradients),
        'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
    }
    return state.replace(step=state.step + 1, opt_state=opt_state,
                         params=optax.apply_updates(state.params, updates)), metrics

  jitted = jax.jit(
      step, donate_argnums=0,
      in_shardings=(state_shardings, jax.tree.map(lambda leaf: leaf.sharding, frozen),
                    batch_sharding(mesh, rules)),
      out_shardings=(state_shardings, replicated))

  return TrainStep(jitted, frozen, mesh)


def _accumulate(loss_fn: LossFn, params: Params, frozen: Params, batch: Batch, keys: Array,
                accumulation: int) -> tuple[Array, Array, Params]:
  """Summed loss, number of targets and summed gradients of all microbatches."""
  gradient = jax.value_and_grad(loss_fn, has_aux=True)

  def of_microbatch(micro: tuple[Batch, Array]) -> tuple[Array, Array, Params]:
    (total, targets), gradients = gradient(params, frozen, *micro)
    return total, targets, gradients

  if accumulation == 1:
    return of_microbatch((batch, keys))

  def split(leaf: Array) -> Array:
    # Strided, so that every microbatch spans all the shards of the batch.
    leaf = leaf.reshape(-1, accumulation, *leaf.shape[1:])
    return jnp.moveaxis(leaf, 1, 0)

  micros = jax.tree.map(split, (batch, keys))
  first = jax.eval_shape(of_microbatch, jax.tree.map(lambda leaf: leaf[0], micros))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

  def add(sums, micro):
    return jax.tree.map(jnp.add, sums, of_microbatch(micro)), None

  return jax.lax.scan(add, zeros, micros)[0]


def abstract_state(boxed_params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh,
                   rules: Mapping[str, Sequence[str]]) -> TrainState:
  """Shapes, dtypes and shardings of a TrainState, without making one.

  Args:
    boxed_params: trainable parameters (or their shapes) boxed with logical axes; the optimiser's
      moments inherit the boxes, and so the shardings.
  """
  boxed = jax.eval_shape(lambda params: TrainState.create(params, optimizer), boxed_params)
  shardings = shardings_of(boxed, mesh, rules)
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      nn.unbox(boxed), shardings)
