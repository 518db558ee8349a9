"""A step changes trainable parameters alone, and is the same on any mesh, in any microbatches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.model.decoder import Decoder, boxed_shapes, fingerprint
from latent_deliberation.sharding import (
  DEFAULT_RULES,
  MeshConfig,
  make_mesh,
  place_batch,
  shardings_of,
)
from latent_deliberation.training.objectives import augmentation, language_modelling
from latent_deliberation.training.step import TrainState, abstract_state, make_train_step
from tests import tiny

BATCH = tiny.packed_batch([(7, 4, 8), (9, 6), (19,), (3, 3, 3), (5, 5, 5), (10, 9), (2,), (6, 13)])
OPTIMIZER = optax.sgd(0.1, momentum=0.9)  # linear: the update shows the gradient as it is


@functools.cache
class Trainer:
  """A coprocessor on a mesh: its frozen decoder and the compiled step. Compiled once for all tests.

  Args:
    sizes: sizes of the mesh axes but for replica, over as many devices.
  """

  def __init__(self, sizes=(1, 1, 1), accumulation=1, dtype='float32', seed=0, trainable='full',
               attention='plain', replica=1):
    self.mesh = make_mesh(MeshConfig(*sizes, replica=replica),
                          jax.devices()[:replica * math.prod(sizes)])
    self.deliberator = tiny.deliberator(attention=attention, trainable=trainable)
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny.decoder_params())
    self.frozen = jax.device_put(frozen, shardings_of(
        boxed_shapes(tiny.CONFIG), self.mesh, DEFAULT_RULES))
    boxed = jax.eval_shape(self.deliberator.coprocessor.init, jax.random.key(0), self.frozen)
    self.shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(
        boxed, OPTIMIZER, self.mesh, DEFAULT_RULES))
    self.step = make_train_step(
        augmentation(self.deliberator, loss_chunk=5), OPTIMIZER, lambda step: 0.1 / (1 + step),
        state_shardings=self.shardings, frozen=self.frozen, mesh=self.mesh, rules=DEFAULT_RULES,
        seed=seed, accumulation=accumulation)

  def start(self):
    """A state on the mesh, the same for all trainers of one trainable part."""
    params = tiny.coprocessor_params(self.deliberator, self.frozen)
    return jax.device_put(TrainState.create(params, OPTIMIZER), self.shardings)

  def train(self, steps, state=None, batch=BATCH):
    """The state after some steps on one batch, and the metrics of each, on the host."""
    state, metrics = state or self.start(), []
    placed = place_batch(jax.tree.map(np.asarray, batch), self.mesh, DEFAULT_RULES)
    for _ in range(steps):
      state, scalars = self.step(state, placed)
      metrics.append(jax.device_get(scalars))
    return jax.device_get(state), metrics


def check_equal(trained, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               trained, expected)


@pytest.mark.parametrize('sizes', [
    (2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow)
                 for sizes in ((8, 1, 1), (1, 4, 2), (1, 1, 2)))])
def test_any_mesh(sizes):
  """Any mesh gives the loss, gradient and parameters of one device."""
  check_equal(Trainer(sizes).train(2), Trainer().train(2))


def test_replicas():
  """Replicas of a sharded mesh give those of one device too."""
  trainer = Trainer((2, 2, 1), replica=2)
  check_equal(trainer.train(2), Trainer().train(2))
  weight = trainer.start().params['transformer']['blocks']['attention']['query']['w']
  copies = {str(shard.index) for shard in weight.addressable_shards}
  assert len(weight.addressable_shards) == 8 and len(copies) == 2  # in two fsdp shards


def test_adapters_on_mesh():
  """Low-rank adapters are the same on a mesh too."""
  check_equal(Trainer((2, 2, 2), trainable='lora').train(2), Trainer(trainable='lora').train(2))


@pytest.mark.slow  # tests of the kernels have a mesh, too
def test_fused_on_mesh():
  """Fused attention on a mesh gives the results of plain attention on one device."""
  check_equal(Trainer((2, 2, 2), attention='fused').train(2), Trainer().train(2))


@pytest.mark.parametrize('sizes, accumulation', [
    ((1, 1, 1), 4), pytest.param((2, 2, 1), 2, marks=pytest.mark.slow)])
def test_microbatches(sizes, accumulation):
  """Microbatches add up to the whole batch."""
  check_equal(Trainer(sizes, accumulation).train(2), Trainer().train(2))


def test_state_is_sharded():
  """Trainable parameters and their momentum are sharded."""
  trainer = Trainer((2, 2, 2))
  before = trainer.start()
  after, _ = trainer.step(before, place_batch(
      jax.tree.map(np.asarray, BATCH), trainer.mesh, DEFAULT_RULES))
  for tree in (after.params, after.opt_state[0].trace):
    shard = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, tree)
    assert shard['gate'] == (8, 16) and shard['soft_tokens'] == (3, 8)
    assert shard['transformer']['blocks']['attention']['query']['w'] == (3, 8, 2, 6)


def test_loss_under_mesh_and_rules():
  """The loss is traced under the mesh and the rules."""
  mesh, seen = make_mesh(MeshConfig(2, 2, 2)), []

  def loss(params, frozen, batch, keys):
    x = nn.with_logical_constraint(params['w'] * batch.tokens, ('batch', 'mlp'))
    jax.debug.inspect_array_sharding(x, callback=seen.append)
    return jnp.sum(x), jnp.sum(batch.segments)

  boxed = {'w': nn.LogicallyPartitioned(jnp.ones(()), ())}
  abstract = abstract_state(boxed, OPTIMIZER, mesh, DEFAULT_RULES)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  step = make_train_step(
      loss, OPTIMIZER, lambda step: 0.1, state_shardings=shardings, frozen={}, mesh=mesh,
      rules=DEFAULT_RULES, seed=0)
  batch = jax.tree.map(lambda leaf: np.asarray(leaf)[:, :18], BATCH)
  step(jax.device_put(TrainState.create(nn.unbox(boxed), OPTIMIZER), shardings),
       place_batch(batch, mesh, DEFAULT_RULES))
  assert {sharding.shard_shape((8, 18)) for sharding in seen} == {(2, 9)}


@pytest.mark.parametrize('trainer', [Trainer, functools.partial(Trainer, dtype='bfloat16')],
                         ids=['float32', 'bfloat16'])
def test_decoder_is_frozen(trainer):
  """The decoder keeps every bit, and the coprocessor is trained in float32."""
  trainer = trainer()
  start = jax.device_get(trainer.start().params)
  bits = lambda: jax.tree.map(  # noqa: E731
      lambda leaf: np.asarray(leaf).tobytes(), trainer.frozen)
  before = bits(), fingerprint(trainer.frozen)
  state, _ = trainer.train(3)
  assert (bits(), fingerprint(trainer.frozen)) == before
  assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == np.float32, state.params))
  assert jax.tree.all(jax.tree.map(lambda a, b: np.any(a != b), state.params, start))


def test_metrics_and_determinism():
  """A step reports its true metrics and repeats itself exactly."""
  trainer = Trainer()
  start = jax.device_get(trainer.start().params)
  state, (first, second) = trainer.train(2)
  after, (again,) = trainer.train(1)
  assert (after.step, state.step) == (1, 2)
  assert first == again and first['loss'] != second['loss']
  assert (first['learning_rate'], second['learning_rate']) == (np.float32(0.1), np.float32(0.05))
  # The first step is 0.1 times the gradient.
  moved = jax.tree.map(lambda a, b: (a - b) / 0.1, start, after.params)
  assert optax.tree.norm(moved) == pytest.approx(first['grad_norm'], rel=1e-3)


def test_loss_is_mean(decoder_params):
  """The loss is the mean over valid targets."""
  trainer = Trainer()
  deliberator, config = trainer.deliberator, trainer.deliberator.config
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 8)
  traces = sample_traces(keys, BATCH, config)
  hidden = tiny.forward(deliberator, tiny.coprocessor_params(deliberator, decoder_params),
                        decoder_params, BATCH, traces)
  logits = 3 * np.tanh(hidden @ decoder_params['embedder']['table'].T / 3)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, traces.ahead_tokens)
  _, (metrics,) = trainer.train(1)
  assert metrics['targets'] == traces.ahead_valid.sum()
  assert metrics['loss'] == pytest.approx(np.asarray(nll)[traces.ahead_valid].mean(), rel=1e-5)


def test_seed_and_step_draw_traces():
  """Another seed or another step draws other traces."""
  trainer = Trainer()
  later = trainer.start()
  later = later.replace(step=later.step + 1)
  losses = {float(metrics['loss']) for _, (metrics,) in (
      trainer.train(1), trainer.train(1, later), Trainer(seed=1).train(1))}
  assert len(losses) == 3


def test_donation():
  """The state is donated and the decoder is not."""
  trainer = Trainer()
  state = trainer.start()
  trainer.train(1, state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.frozen))


def test_state_owns_weights():
  """A state owns copies of its weights, also of the decoder's."""
  lent = {'w': jnp.ones(3)}
  state = TrainState.create(lent, OPTIMIZER)
  jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
  assert state.params['w'].is_deleted() and not lent['w'].is_deleted()


def test_no_targets():
  """A batch without a single target changes nothing."""
  trainer = Trainer()
  before = jax.device_get(trainer.start().params)
  state, (metrics,) = trainer.train(1, batch=tiny.packed_batch([()] * 8))
  assert (metrics['loss'], metrics['targets'], metrics['grad_norm']) == (0, 0, 0)
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_abstract_state(decoder_params):
  """An abstract state has the shapes and dtypes of a real one."""
  deliberator, optimizer = tiny.deliberator(trainable='lora'), optax.adam(0.1)
  boxed = jax.eval_shape(deliberator.coprocessor.init, jax.random.key(0), decoder_params)
  abstract = abstract_state(boxed, optimizer, make_mesh(MeshConfig(2, 2, 2)), DEFAULT_RULES)
  real = TrainState.create(tiny.coprocessor_params(deliberator, decoder_params), optimizer)
  assert jax.tree.all(jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, real))


def test_language_modelling(decoder_params):
  """Language modelling sums over next tokens of the same document."""
  loss = language_modelling(Decoder(tiny.CONFIG), loss_chunk=4)
  total, targets = jax.jit(loss)(decoder_params, {}, BATCH, jnp.zeros(8))
  _, logits, _ = tiny.read(decoder_params, BATCH.tokens, BATCH.positions, BATCH.segments)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], BATCH.tokens[:, 1:])
  segments = np.asarray(BATCH.segments)
  pairs = [(text, i) for text, i in np.ndindex(8, tiny.LENGTH - 1)
           if segments[text, i] == segments[text, i + 1] > 0]
  assert targets == len(pairs)
  assert total == pytest.approx(sum(float(nll[pair]) for pair in pairs), rel=1e-5)


def test_language_modelling_on_padding(decoder_params):
  """Language modelling on padding has finite gradients."""
  loss = language_modelling(Decoder(tiny.CONFIG), loss_chunk=4)
  batch = tiny.packed_batch([(7,), ()])
  gradients = jax.jit(jax.grad(loss, has_aux=True))(decoder_params, {}, batch, jnp.zeros(2))[0]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
