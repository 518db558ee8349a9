"""The train state, and the jitted step: gradients for trainable parameters and no others."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Int, Params, PyTree
from latent_deliberation.sharding import batch_sharding, shardings_of
from latent_deliberation.training.optimizer import spike_metrics


@struct.dataclass
class TrainState:
  """Everything that a training run updates.

  Attributes:
    step: number of finished updates.
    params: trainable parameters, float32.
    opt_state: state of the optimizer.
  """
  step: Int[Array, '']
  params: Params
  opt_state: optax.OptState

  @classmethod
  def create(cls, params: Params, optimizer: optax.GradientTransformation) -> 'TrainState':
    """Returns a state at step 0 with float32 copies of the parameters.

    They are copies because a train step donates them, and the frozen decoder may share them.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


# (trainable, frozen, batch, keys [B]) -> (loss summed over targets, number of targets)
LossFn = Callable[[Params, Params, Batch, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """train_step(state, batch) -> (state, metrics), compiled for a mesh. It donates the state.

  Attributes:
    jitted: (state, frozen, batch) -> (state, metrics).
    frozen: frozen parameters, or their shapes with shardings for a step that is only lowered.
    mesh: mesh that the step runs on.
  """
  jitted: jax.stages.Wrapped
  frozen: Params
  mesh: Mesh

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    with jax.set_mesh(self.mesh):
      return self.jitted(state, self.frozen, batch)

  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Returns the program of this step, given shapes with shardings."""
    with jax.set_mesh(self.mesh):
      return self.jitted.lower(state, self.frozen, batch)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation,
                    schedule: optax.Schedule, *, state_shardings: PyTree, frozen: Params,
                    mesh: Mesh, rules: Mapping[str, Sequence[str]], seed: int,
                    accumulation: int = 1) -> TrainStep:
  """Returns the train step for a loss.

  The frozen parameters are a separate argument that is never donated and has no gradient. Each
  text gets the key fold_in(seed, step), split by its index in the global batch. So a step draws
  the same traces on any mesh and with any number of microbatches.

  Args:
    loss_fn: returns sums, which add up over microbatches with unequal numbers of targets.
    optimizer: optimizer of the trainable parameters.
    schedule: learning rate for the metric 'learning_rate'.
    state_shardings: shardings of the TrainState.
    frozen: frozen parameters on devices, or their shapes with shardings; shardings are kept.
    mesh: mesh that the step runs on.
    rules: mesh axes of each logical axis.
    seed: seed of the traces.
    accumulation: number of microbatches that a batch is split into, one after the other.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  optimizer = optax.with_extra_args_support(optimizer)  # most need no loss

  def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    # A key for each text, by step and place in the batch, on any mesh.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step),
                            batch.tokens.shape[0])
    with nn.logical_axis_rules(tuple(rules.items())):
      total, targets, gradients = sum_gradients(loss_fn, state.params, frozen, batch, keys,
                                                accumulation)
    with jax.named_scope('optimizer'):
      # The loss is a sum over targets. From here on, gradients are those of the mean.
      gradients = jax.tree.map(lambda leaf: leaf / jnp.maximum(targets, 1), gradients)
      loss = total / jnp.maximum(targets, 1)
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, loss=loss)
      params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        'targets': targets,
        'grad_norm': optax.tree.norm(gradients),
        'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
        **spike_metrics(opt_state),
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  # The new state takes the memory of the old one. Frozen parameters stay.
  jitted = jax.jit(
      step, donate_argnums=0,
      in_shardings=(state_shardings, jax.tree.map(lambda leaf: leaf.sharding, frozen),
                    batch_sharding(mesh, rules)),
      out_shardings=(state_shardings, replicated))

  return TrainStep(jitted, frozen, mesh)


def sum_gradients(loss_fn: LossFn, params: Params, frozen: Params, batch: Batch, keys: Array,
                  accumulation: int) -> tuple[Array, Array, Params]:
  """Returns summed loss, number of targets and summed gradients of all microbatches.

  Args:
    loss_fn: see `make_train_step`.
    params, frozen: trainable and frozen parameters.
    batch, keys: texts, and a key for each.
    accumulation: number of microbatches.
  """
  gradient = jax.value_and_grad(loss_fn, has_aux=True)

  def of_microbatch(micro: tuple[Batch, Array]) -> tuple[Array, Array, Params]:
    (total, targets), gradients = gradient(params, frozen, *micro)
    return total, targets, gradients

  if accumulation == 1:
    return of_microbatch((batch, keys))

  def split(leaf: Array) -> Array:
    # Strided, so every microbatch spans all shards of the batch.
    leaf = leaf.reshape(-1, accumulation, *leaf.shape[1:])
    return jnp.moveaxis(leaf, 1, 0)

  micros = jax.tree.map(split, (batch, keys))
  # Sums start as zeros in the shapes of one microbatch's results.
  first = jax.eval_shape(of_microbatch, jax.tree.map(lambda leaf: leaf[0], micros))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

  # A scan, so activations of one microbatch exist at a time.
  def add(sums, micro):
    return jax.tree.map(jnp.add, sums, of_microbatch(micro)), None

  return jax.lax.scan(add, zeros, micros)[0]


def abstract_state(boxed_params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh,
                   rules: Mapping[str, Sequence[str]]) -> TrainState:
  """Returns shapes, dtypes and shardings of a TrainState, without creating one.

  Args:
    boxed_params: trainable parameters, or their shapes, boxed with logical axes. The optimizer's
      moments inherit the boxes, and so the shardings.
    optimizer: optimizer of the run.
    mesh: mesh that the state is sharded over.
    rules: mesh axes of each logical axis.
  """
  boxed = jax.eval_shape(lambda params: TrainState.create(params, optimizer), boxed_params)
  shardings = shardings_of(boxed, mesh, rules)
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      nn.unbox(boxed), shardings)
