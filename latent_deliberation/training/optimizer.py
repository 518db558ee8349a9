"""AdamW with warm-up, a schedule, clipping, and multipliers of the learning rate."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_deliberation.array_types import Array, Params
from latent_deliberation.errors import UserError, check_types, raise_problems

_SHAPES = {
    'constant': jnp.ones_like,
    'linear': lambda progress: 1 - progress,
    'cosine': lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter, arXiv 1711.05101) after a clip by global norm.

  Attributes:
    learning_rate: peak learning rate, reached at the end of warm-up.
    warmup_steps: number of steps of linear warm-up; the first step already changes parameters.
    schedule: shape after warm-up, until the last step: 'cosine', 'linear' or 'constant'.
    final_fraction: learning rate at the end, relative to its peak; unused by 'constant'.
    b1: decay of Adam's average of gradients.
    b2: decay of Adam's average of squared gradients.
    eps: Adam's term in the denominator.
    weight_decay: decoupled weight decay, per unit of learning rate.
      It applies to leaves of two or more axes, except for the scales of norms.
    clip_norm: largest global norm of a gradient; 0 clips nothing.
    skip_spikes: number of standard deviations above the average from which an update counts as a
      spike, by its loss or the norm of its gradient; 0 for none. The average is that of the last 50
      or so. A spike is not applied. 6 is a good start.
  """
  learning_rate: float
  warmup_steps: int = 0
  schedule: str = 'cosine'
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  skip_spikes: float = 0.0

  def __post_init__(self):
    check_types(self)
    demands = {
        'learning_rate': ('a finite number above 0', 0 < self.learning_rate < math.inf),
        'warmup_steps': ('0 or more', self.warmup_steps >= 0),
        'schedule': (f'one of {sorted(_SHAPES)}', self.schedule in _SHAPES),
        'final_fraction': ('within [0, 1]', 0 <= self.final_fraction <= 1),
        'b1': ('within [0, 1)', 0 <= self.b1 < 1),
        'b2': ('within [0, 1)', 0 <= self.b2 < 1),
        'eps': ('a finite number above 0', 0 < self.eps < math.inf),
        'weight_decay': ('a finite number, 0 or more', 0 <= self.weight_decay < math.inf),
        'clip_norm': ('a finite number, 0 or more', 0 <= self.clip_norm < math.inf),
        'skip_spikes': ('a finite number, 0 or more', 0 <= self.skip_spikes < math.inf),
    }
    raise_problems(f'optimizer.{name} = {getattr(self, name)!r}: it must be {demand}'
                   for name, (demand, met) in demands.items() if not met)


def build_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of finished steps.

  Raises:
    UserError: warm-up is longer than the run.
  """
  if config.warmup_steps > num_steps:
    raise UserError(f'optimizer.warmup_steps = {config.warmup_steps}, but the run has only '
                    f'{num_steps} steps: shorten the warm-up or train longer')
  decay_steps = max(1, num_steps - config.warmup_steps)
  floor = 1.0 if config.schedule == 'constant' else config.final_fraction

  def learning_rate(step: Array) -> Array:
    # `step` counts finished updates. Adding 1 lets the first update change parameters.
    warmth = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
    height = floor + (1 - floor) * _SHAPES[config.schedule](progress)
    return config.learning_rate * warmth * height

  return learning_rate


def build_optimizer(config: OptimizerConfig, num_steps: int,
                    multipliers: Mapping[str, float] | None = None
                    ) -> optax.GradientTransformation:
  """Returns a clip by global norm, Adam, weight decay and learning rate, in that order.

  With `skip_spikes`, an update that is a spike changes nothing.

  Args:
    config: the settings.
    num_steps: length of the run, which the schedule spans.
    multipliers: factors on learning rates, by top-level key of the parameters.

  Raises:
    UserError: warm-up is longer than the run.
    ValueError: raised by `init` where the parameters lack a key of `multipliers`.
  """
  chain = optax.chain(
      # Clip before Adam, whose averages should not see outliers.
      optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
      optax.scale_by_learning_rate(build_schedule(config, num_steps)),
      # Last, because Adam would cancel a factor on gradients.
      _scale_by_key(multipliers or {}),
  )
  return _skip_spikes(chain, config.skip_spikes) if config.skip_spikes else chain


def _is_matrix(params: Params) -> Params:
  # Stacked layers give the scales of norms two axes as well.
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf.ndim >= 2 and 'scale' not in jax.tree_util.keystr(path), params)


def _scale_by_key(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates below each top-level key by its factor, 1 by default."""

  def init(params: Mapping[str, Params]) -> optax.EmptyState:
    # A multiplier that applies to nothing is a mistake.
    unknown = sorted(set(multipliers) - set(params))
    if unknown:
      raise ValueError(f'learning-rate multipliers name {unknown}, but the trainable parameters '
                       f'are {sorted(params)}')
    return optax.EmptyState()

  def update(updates: Mapping[str, Params], state: optax.EmptyState,
             params: Params | None = None) -> tuple[Params, optax.EmptyState]:
    del params
    scaled = {key: jax.tree.map(lambda leaf, factor=factor: factor * leaf, updates[key])
              for key, factor in multipliers.items()}
    return {**updates, **scaled}, state

  return optax.GradientTransformation(init, update)


_MEMORY = 50  # updates that an average of spikes goes back
_FEWEST = 20  # updates before anything counts as a spike
_LEAST_SPREAD = 0.01  # of the average, where a loss hardly varies


class SpikeState(NamedTuple):
  """State of an optimizer that skips spikes.

  Attributes:
    inner: state of the optimizer inside.
    count: number of updates that were applied.
    mean: averages of loss and norm of the gradient over those, [2].
    variance: their variances, [2].
    skipped: number of updates that were skipped.
    in_a_row: how many of them are the newest.
  """
  inner: optax.OptState
  count: Array
  mean: Array
  variance: Array
  skipped: Array
  in_a_row: Array


def spike_metrics(opt_state: optax.OptState) -> dict[str, Array]:
  """Returns the numbers of skipped updates, where the optimizer skips any."""
  if not isinstance(opt_state, SpikeState):
    return {}
  return {'skipped_updates': opt_state.skipped, 'skipped_in_a_row': opt_state.in_a_row}


def _skip_spikes(optimizer: optax.GradientTransformation,
                 factor: float) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer without the updates whose loss or gradient is far above the average.

  `update` needs the loss. A number that is not finite is a spike, too, once there is an average.
  """

  def init(params: Params) -> SpikeState:
    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
    return SpikeState(optimizer.init(params), zero, zeros, zeros, zero, zero)

  def update(gradients: Params, state: SpikeState, params: Params | None = None, *,
             loss: Array) -> tuple[Params, SpikeState]:
    updates, inner = optimizer.update(gradients, state.inner, params)
    values = jnp.stack([loss, optax.tree.norm(gradients)]).astype(jnp.float32)
    spread = jnp.maximum(jnp.sqrt(state.variance), _LEAST_SPREAD * jnp.abs(state.mean))
    # A comparison with NaN is false, so NaN counts as above.
    is_low = jnp.all(values <= state.mean + factor * spread)
    is_applied = is_low | (state.count < _FEWEST)

    def choose(applied: Array, skipped: Array) -> Array:
      return jnp.where(is_applied, applied, skipped)

    # The learning rate belongs to the step, and goes on.
    inner = jax.tree.map(
        lambda new, old: new if isinstance(new, optax.ScaleByScheduleState)
        else choose(new, old), inner, state.inner,
        is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))
    # A plain average at first, then one that forgets.
    weight = 1 / jnp.minimum(state.count + 1, _MEMORY)
    change = values - state.mean
    return jax.tree.map(lambda leaf: choose(leaf, jnp.zeros_like(leaf)), updates), SpikeState(
        inner, state.count + is_applied,
        choose(state.mean + weight * change, state.mean),
        choose((1 - weight) * (state.variance + weight * change**2), state.variance),
        state.skipped + ~is_applied, choose(0, state.in_a_row + 1))

  return optax.GradientTransformationExtraArgs(init, update)
