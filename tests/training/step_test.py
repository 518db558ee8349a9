"""A step changes what learns and nothing else, and is the same on any mesh, in any microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.fingerprint import fingerprint
from latent_deliberation.sharding import (
  DEFAULT_RULES,
  MeshConfig,
  make_mesh,
  place_batch,
  shardings_of,
)
from latent_deliberation.training.objectives import augmentation, language_modelling
from latent_deliberation.training.state import TrainState
from latent_deliberation.training.step import abstract_state, make_train_step
from tests import tiny

BATCH = tiny.packed_batch([(7, 4, 8), (9, 6), (19,), (3, 3, 3), (5, 5, 5), (10, 9), (2,), (6, 13)])
OPTIMIZER = optax.sgd(0.1, momentum=0.9)  # linear: the update shows the gradient as it is


class Trainer:
  """A coprocessor on a mesh: its frozen decoder, the compiled step and a state to start from."""

  def __init__(self, mesh=None, accumulation=1, optimizer=OPTIMIZER, dtype='float32', seed=0,
               **choices):
    self.mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    deliberator = tiny.deliberator(**choices)
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny.decoder_params())
    self.frozen = jax.device_put(frozen, shardings_of(
        weights.boxed_shapes(tiny.CONFIG), self.mesh, DEFAULT_RULES))
    boxed = jax.eval_shape(deliberator.coprocessor.init, jax.random.key(0), self.frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(
        boxed, optimizer, self.mesh, DEFAULT_RULES))
    self.state = jax.device_put(TrainState.create(
        tiny.coprocessor_params(deliberator, frozen), optimizer), shardings)
    self.step = make_train_step(
        augmentation(deliberator, loss_chunk=5), optimizer, lambda step: 0.1 / (1 + step),
        state_shardings=shardings, frozen=self.frozen, mesh=self.mesh, rules=DEFAULT_RULES,
        seed=seed, accumulation=accumulation)

  def train(self, steps, batch=BATCH):
    """The state and the metrics of each step after some steps on one batch."""
    state, metrics = self.state, []
    for _ in range(steps):
      state, scalars = self.step(
          state, place_batch(jax.tree.map(np.asarray, batch), self.mesh, DEFAULT_RULES))
      metrics.append(jax.device_get(scalars))
    self.state = state
    return jax.device_get(state), metrics


@pytest.fixture(scope='module')
def alone():
  """Two steps on one device."""
  return Trainer().train(2)


def check_equal(trained, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               trained, expected)


@pytest.mark.parametrize('config, devices', [
    (MeshConfig(8, 1, 1), 8), (MeshConfig(2, 2, 2), 8), (MeshConfig(1, 4, 2), 8),
    (MeshConfig(1, 1, 2), 2)], ids=lambda value: '-'.join(map(str, vars(value).values())) if
    isinstance(value, MeshConfig) else str(value))
def test_any_mesh_gives_the_loss_gradient_and_parameters_of_one_device(alone, config, devices):
  trainer = Trainer(make_mesh(config, jax.devices()[:devices]))
  check_equal(trainer.train(2), alone)
  gate = trainer.state.params['gate']
  assert gate.addressable_shards[0].data.shape == (16 // config.fsdp, 16)
  query = trainer.state.params['transformer']['blocks']['attention']['query']['w']
  assert query.addressable_shards[0].data.size * config.fsdp * config.tensor == query.size
  jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail(
      'the momentum lies elsewhere than its parameter'),
      trainer.state.opt_state[0].trace, trainer.state.params)


@pytest.mark.parametrize('mesh, accumulation', [
    (None, 2), (None, 4), (MeshConfig(2, 2, 1), 2)], ids=['2', '4', '2 on a mesh'])
def test_microbatches_add_up_to_the_whole_batch(alone, mesh, accumulation):
  mesh = mesh and make_mesh(mesh, jax.devices()[:4])
  check_equal(Trainer(mesh, accumulation).train(2), alone)


@pytest.mark.parametrize('trainable', ['lora', 'constant'])
def test_other_trainable_parts_are_the_same_on_a_mesh_too(trainable):
  mesh = make_mesh(MeshConfig(2, 2, 2))
  check_equal(Trainer(mesh, trainable=trainable).train(1), Trainer(trainable=trainable).train(1))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_decoder_keeps_every_bit_and_the_coprocessor_learns_in_float32(dtype):
  trainer = Trainer(make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2]), dtype=dtype)
  before = fingerprint(trainer.frozen), jax.tree.map(
      lambda leaf: np.asarray(leaf).tobytes(), trainer.frozen)
  start = jax.device_get(trainer.state.params)
  state, _ = trainer.train(3)
  after = fingerprint(trainer.frozen), jax.tree.map(
      lambda leaf: np.asarray(leaf).tobytes(), trainer.frozen)
  assert after == before
  assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == np.float32, state.params))
  assert jax.tree.all(jax.tree.map(lambda a, b: np.any(a != b), state.params, start))


def test_a_step_reports_what_it_did_and_repeats_itself_exactly():
  trainer = Trainer()
  start = jax.device_get(trainer.state)
  state, metrics = trainer.train(2)
  assert state.step == 2
  assert [float(each['learning_rate']) for each in metrics] == pytest.approx([0.1, 0.05])
  # Sgd from a fresh state: the first step is 0.1 times the gradient.
  again, (first,) = Trainer().train(1)
  moved = jax.tree.map(lambda a, b: (a - b) / 0.1, start.params, again.params)
  assert optax.global_norm(moved) == pytest.approx(first['grad_norm'], rel=1e-3)
  assert metrics[0] == first
  assert metrics[1]['targets'] > 0 and metrics[1]['loss'] != first['loss']


def test_a_seed_and_a_step_draw_traces_of_their_own():
  trainer = Trainer(optimizer=optax.sgd(0.0))
  _, (first, second) = trainer.train(2)
  _, (other,) = Trainer(optimizer=optax.sgd(0.0), seed=1).train(1)
  assert len({float(each['loss']) for each in (first, second, other)}) == 3


def test_the_state_is_donated_and_the_decoder_is_not():
  trainer = Trainer()
  before = trainer.state
  trainer.train(1)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.frozen))


def test_a_state_owns_its_weights_even_if_the_decoder_lent_them(decoder_params):
  deliberator = tiny.deliberator()
  params = nn.unbox(deliberator.coprocessor.init(jax.random.key(0), decoder_params))
  state = TrainState.create(params, OPTIMIZER)
  jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(decoder_params))


def test_a_batch_without_a_single_target_changes_nothing():
  nothing = tiny.packed_batch([()] * 8)
  trainer = Trainer(optimizer=optax.sgd(0.1))
  before = jax.device_get(trainer.state.params)
  state, (metrics,) = trainer.train(1, nothing)
  assert (metrics['loss'], metrics['targets'], metrics['grad_norm']) == (0, 0, 0)
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_an_abstract_state_has_the_shapes_and_dtypes_of_a_real_one(decoder_params):
  deliberator, optimizer = tiny.deliberator(trainable='lora'), optax.adam(0.1)
  boxed = jax.eval_shape(deliberator.coprocessor.init, jax.random.key(0), decoder_params)
  abstract = abstract_state(boxed, optimizer, make_mesh(MeshConfig(2, 2, 2)), DEFAULT_RULES)
  real = TrainState.create(tiny.coprocessor_params(deliberator, decoder_params), optimizer)
  assert jax.tree.all(jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, real))


def test_language_modelling_is_the_mean_over_next_tokens_of_the_same_document(decoder_params):
  loss = language_modelling(Decoder(tiny.CONFIG), loss_chunk=4)
  total, targets = jax.jit(loss)(decoder_params, {}, BATCH, jnp.zeros(8))
  _, logits, _ = tiny.read(decoder_params, BATCH.tokens, BATCH.positions, BATCH.segments)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], BATCH.tokens[:, 1:])
  segments = np.asarray(BATCH.segments)
  pairs = [(text, i) for text, i in np.ndindex(8, tiny.LENGTH - 1)
           if segments[text, i] == segments[text, i + 1] > 0]
  assert targets == len(pairs)
  assert total == pytest.approx(sum(float(nll[pair]) for pair in pairs), rel=1e-5)


def test_language_modelling_on_padding_has_finite_gradients(decoder_params):
  loss = language_modelling(Decoder(tiny.CONFIG), loss_chunk=4)
  batch = tiny.packed_batch([(7,), ()])
  gradients = jax.jit(jax.grad(loss, has_aux=True))(decoder_params, {}, batch, jnp.zeros(2))[0]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
