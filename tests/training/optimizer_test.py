"""The optimizer equals AdamW, and its schedule ends as the config says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.training.optimizer import (
  OptimizerConfig,
  build_optimizer,
  build_schedule,
  spike_metrics,
)

CONFIG = OptimizerConfig(learning_rate=0.1, schedule='constant', clip_norm=0.0)


def parameters():
  matrix, vector = jax.random.normal(jax.random.key(0), (2, 3, 3))
  return {'body': {'kernel': matrix, 'bias': vector[0]}, 'gate': vector[1:2]}


def gradients(step):
  return jax.tree.map(lambda leaf: jnp.cos(leaf + step), parameters())


def run(optimizer, steps=3):
  params = parameters()
  state = optimizer.init(params)
  for step in range(steps):
    updates, state = optimizer.update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
  return params


def assert_trees_close(actual, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant'])
def test_schedule(schedule):
  """Warm-up rises to the peak, and the end is the final fraction."""
  config = OptimizerConfig(2.0, warmup_steps=4, schedule=schedule, final_fraction=0.25)
  rates = [float(build_schedule(config, 20)(step)) for step in range(21)]
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
  middle, end = {'cosine': (1.25, 0.5), 'linear': (1.25, 0.5), 'constant': (2.0, 2.0)}[schedule]
  np.testing.assert_allclose([rates[12], rates[20]], [middle, end], rtol=1e-6)


def test_cosine_equals_optax():
  config = OptimizerConfig(learning_rate=0.3, schedule='cosine', final_fraction=0.1)
  oracle = optax.cosine_decay_schedule(0.3, 17, alpha=0.1)
  for step in range(20):
    np.testing.assert_allclose(build_schedule(config, 17)(step), oracle(step), rtol=1e-5)


def test_equals_adamw():
  """It equals AdamW of optax with decay on matrices only."""
  config = dataclasses.replace(CONFIG, weight_decay=0.5)
  is_matrix = {'body': {'kernel': True, 'bias': False}, 'gate': True}
  oracle = optax.adamw(0.1, b1=config.b1, b2=config.b2, weight_decay=0.5, mask=is_matrix)
  assert_trees_close(run(build_optimizer(config, 10)), run(oracle))


def test_clip_norm():
  """It clips by the norm of all gradients together."""
  clipped = build_optimizer(dataclasses.replace(CONFIG, clip_norm=0.5, eps=1.0), 10)
  oracle = optax.chain(optax.clip_by_global_norm(0.5),
                       optax.adam(0.1, b1=CONFIG.b1, b2=CONFIG.b2, eps=1.0))
  assert_trees_close(run(clipped), run(oracle))
  unclipped = run(build_optimizer(dataclasses.replace(CONFIG, eps=1.0), 10))
  assert not np.allclose(run(clipped)['gate'], unclipped['gate'])


def test_multiplier():
  """A multiplier scales the updates below its key and no others."""
  start, plain = parameters(), run(build_optimizer(CONFIG, 10), 1)
  scaled = run(build_optimizer(CONFIG, 10, {'gate': 10.0}), 1)
  np.testing.assert_allclose(scaled['gate'] - start['gate'], 10 * (plain['gate'] - start['gate']),
                             rtol=1e-5)
  np.testing.assert_array_equal(scaled['body']['kernel'], plain['body']['kernel'])


def test_unknown_multiplier():
  """A multiplier for an unknown key is refused with the known keys."""
  with pytest.raises(ValueError, match=r"\['gates'\].*\['body', 'gate'\]"):
    build_optimizer(CONFIG, 10, {'gates': 10.0}).init(parameters())


def test_moments_keep_axes():
  """Moments keep the logical axes of boxed parameters."""
  boxed = {'kernel': nn.LogicallyPartitioned(jnp.ones((2, 3)), ('embed', 'heads'))}
  moments = build_optimizer(CONFIG, 10, {'kernel': 2.0}).init(boxed)[1].mu
  assert moments['kernel'].names == ('embed', 'heads')


@pytest.mark.parametrize('field, value', [
    ('learning_rate', -0.1), ('learning_rate', float('nan')), ('warmup_steps', -1),
    ('schedule', 'cosin'), ('final_fraction', 1.5), ('b1', 1.0), ('b2', -0.1), ('eps', 0.0),
    ('weight_decay', -1.0), ('clip_norm', -1.0), ('clip_norm', float('inf')),
])
def test_bad_setting(field, value):
  """A bad setting is refused by name."""
  with pytest.raises(UserError, match=f'optimizer.{field} = {value!r}'):
    dataclasses.replace(CONFIG, **{field: value})


def test_warmup_too_long():
  """A warm-up that is longer than the run is refused."""
  with pytest.raises(UserError, match='warmup_steps = 11.*10'):
    build_optimizer(dataclasses.replace(CONFIG, warmup_steps=11), 10)


def test_norms_do_not_decay():
  """The scales of stacked norms do not decay."""
  optimizer = build_optimizer(dataclasses.replace(CONFIG, weight_decay=0.5), 10)
  params = {'norm': {'scale': jnp.ones((2, 4))}, 'query': {'w': jnp.ones((2, 4))}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  assert not updates['norm']['scale'].any()
  assert (updates['query']['w'] < 0).all()


def spiky(factor=4.0, **settings):
  return build_optimizer(
      OptimizerConfig(learning_rate=0.1, schedule='linear', skip_spikes=factor, **settings), 100)


def follow(optimizer, losses, gradients):
  """Returns the parameters and the state after each update."""
  @jax.jit
  def step(params, state, loss, gradient):
    updates, state = optimizer.update({'w': jnp.full(3, gradient)}, state, params, loss=loss)
    return optax.apply_updates(params, updates), state

  params, state, found = {'w': jnp.ones(3)}, optimizer.init({'w': jnp.ones(3)}), []
  for loss, gradient in zip(losses, gradients, strict=True):
    params, state = step(params, state, loss, gradient)
    found.append((params['w'], state))
  return found


def wobbly(count):
  """Losses and gradients of a run without spikes."""
  random = np.random.default_rng(0)
  return list(3 + 0.1 * random.standard_normal(count)), list(
      0.5 + 0.05 * random.standard_normal(count))


@pytest.mark.parametrize('loss, gradient', [(9.0, 0.5), (3.0, 5.0), (np.nan, 0.5), (3.0, np.inf)])
def test_spike_is_skipped(loss, gradient):
  """An update far above the average changes nothing but its count; the learning rate goes on."""
  losses, gradients = wobbly(40)
  losses[30], gradients[30] = loss, gradient
  found = follow(spiky(), losses, gradients)
  assert [int(state.skipped) for _, state in found] == [0] * 30 + [1] * 10
  assert [int(state.in_a_row) for _, state in found] == [0] * 30 + [1] + [0] * 9
  (before, last), (after, state) = found[29:31]
  np.testing.assert_array_equal(before, after)
  assert not np.array_equal(found[31][0], after)
  np.testing.assert_array_equal(last.mean, state.mean)
  schedule, = (leaf for leaf in jax.tree.leaves(
      state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))
               if isinstance(leaf, optax.ScaleByScheduleState))
  assert int(schedule.count) == 31


def test_nothing_is_skipped_without_spikes():
  """The optimizer is the one without skipping, bit for bit."""
  losses, gradients = wobbly(60)
  with jax.disable_jit():  # XLA may fuse, and so round, the two in different ways
    skipping, plain = (follow(optimizer, losses, gradients) for optimizer in (
        spiky(6.0), optax.with_extra_args_support(spiky(0.0))))
  for (one, _), (other, _) in zip(skipping, plain, strict=True):
    np.testing.assert_array_equal(one, other)
  assert int(skipping[-1][1].skipped) == 0


def test_beginning_is_never_a_spike():
  """A loss that falls from far above, before there is an average, is no spike."""
  found = follow(spiky(), [9.0, 3.0, 12.0, *[3.0] * 10], [0.5, 9.0, *[0.5] * 11])
  assert int(found[-1][1].skipped) == 0 and spike_metrics(found[-1][1])['skipped_updates'] == 0
  assert spike_metrics(spiky(0.0).init({'w': jnp.ones(3)})) == {}


def test_slow_rise_is_no_spike():
  """An average that follows lets a loss rise slowly."""
  found = follow(spiky(), list(np.linspace(3.0, 6.0, 200)), [0.5] * 200)
  assert int(found[-1][1].skipped) == 0
