"""A decoder in int8 computes what the matrices that it stands for compute, and is as small."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.layers import FeedForward, Quantised, quantise
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from latent_deliberation.training.objectives import augmentation
from tests import tiny


def is_quantised(leaf):
  return isinstance(leaf, Quantised)


def as_floats(params):
  """The matrices that a quantised decoder stands for."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params, is_leaf=is_quantised)


@pytest.fixture(scope='module')
def quantised(decoder_params):
  return quantise(decoder_params)


def test_entries_are_off_by_half_a_scale_at_most_and_norms_not_at_all(decoder_params, quantised):
  matrices = 0

  def compare(rounded, weight):
    nonlocal matrices
    if not is_quantised(rounded):
      assert jnp.array_equal(rounded, weight)
      return
    matrices += 1
    half = jnp.broadcast_to(jnp.expand_dims(rounded.scale, rounded.contracted) / 2, weight.shape)
    assert rounded.values.dtype == jnp.int8 and rounded.size == weight.size
    assert (jnp.abs(rounded.astype(jnp.float32) - weight) <= 1.001 * half).all()

  jax.tree.map(compare, quantised, decoder_params, is_leaf=is_quantised)
  assert matrices == 8  # the table, four of attention, three of the feed-forward
  blocks = quantised['transformer']['blocks']
  assert blocks['attention']['query']['w'].scale.shape == (3, 4, 6)
  assert blocks['attention']['out']['w'].scale.shape == (3, 16)
  assert quantised['embedder']['table'].scale.shape == (38,)


def test_a_channel_of_zeros_stays_zero(decoder_params):
  table = decoder_params['embedder']['table'].at[3].set(0)
  quantised = quantise({'embedder': {'table': table}})['embedder']['table']
  assert not quantised.astype(jnp.float32)[3].any()


def test_scales_are_sharded_as_the_outputs_of_their_matrices():
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  boxed = jax.eval_shape(quantise, boxed_shapes(tiny.CONFIG))
  assert boxed['embedder']['table'].scale.names == ('vocab',)
  attention = boxed['transformer']['blocks']['attention']
  assert attention['query']['w'].scale.names == ('layers', 'heads', 'head_dim')
  assert attention['out']['w'].scale.names == ('layers', 'embed')
  placed = shardings_of(boxed, mesh, DEFAULT_RULES)['transformer']['blocks']['attention']['out']
  shapes = nn.unbox(attention)['out']['w']
  assert placed['w'].values.shard_shape(shapes.values.shape) == (3, 2, 6, 4)
  assert placed['w'].scale.shard_shape(shapes.scale.shape) == (3, 4)


@pytest.mark.parametrize('remat, choices', [
    ('none', {}), ('dots', {'latents': 'paper', 'trainable': 'lora'})])
def test_values_and_gradients_are_those_of_the_matrices_that_it_stands_for(
    remat, choices, decoder_params, quantised, batch):
  deliberator = tiny.deliberator(remat=remat, **choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  traces = sample_traces(jax.random.split(jax.random.key(0), 2), batch, deliberator.config)
  weight = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
  ours, theirs = (tiny.forward_and_gradient(deliberator, params, decoder, batch, traces, weight)
                  for decoder in (quantised, as_floats(quantised)))
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(ours[1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours, theirs)


def test_the_backward_pass_keeps_no_matrix_in_floats(decoder_params, quantised, batch):
  deliberator = tiny.deliberator()
  params = tiny.coprocessor_params(deliberator, decoder_params)
  traces = sample_traces(jax.random.split(jax.random.key(0), 2), batch, deliberator.config)
  _, pull = jax.eval_shape(
      lambda params, decoder: jax.vjp(
          lambda params: deliberator.forward(params, decoder, batch, traces), params),
      params, quantised)
  floats = {kept.shape for kept in jax.tree.leaves(pull) if kept.dtype == jnp.float32}
  matrices = {leaf.values.shape for leaf in jax.tree.leaves(quantised, is_leaf=is_quantised)
              if is_quantised(leaf)}
  trainable = {leaf.shape for leaf in jax.tree.leaves(params)}
  assert not floats & (matrices - trainable)


def test_loss_and_gradient_on_a_mesh_are_those_on_one_device(decoder_params, quantised, batch):
  deliberator, mesh = tiny.deliberator(), make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
  params = tiny.coprocessor_params(deliberator, decoder_params)
  batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (2, 1)), batch)
  keys = jax.random.split(jax.random.key(0), 4)
  boxed = jax.eval_shape(quantise, boxed_shapes(tiny.CONFIG))

  def gradient(params, decoder):
    with nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
      return jax.value_and_grad(augmentation(deliberator, 8), has_aux=True)(
          params, decoder, batch, keys)

  alone = jax.jit(gradient)(params, quantised)
  spread = jax.device_put(quantised, shardings_of(boxed, mesh, DEFAULT_RULES))
  with jax.set_mesh(mesh):
    together = jax.jit(gradient)(jax.device_put(
        params, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())), spread)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
               together, alone)


def test_shards_come_together_as_int8(decoder_params):
  mesh = make_mesh(MeshConfig(fsdp=8))
  sizes = {'gate': (16, 24), 'up': (16, 24), 'down': (24, 16)}
  random = np.random.default_rng(0)
  params = {name: {'w': jnp.asarray(random.normal(size=(1, *size)), jnp.float32)}
            for name, size in sizes.items()}
  params = jax.tree.map(lambda leaf: leaf[0], quantise(params))
  spread = jax.sharding.PartitionSpec
  x = jax.device_put(jnp.ones((8, 1, 5, 16)), jax.NamedSharding(mesh, spread('fsdp')))
  rows, columns = (jax.NamedSharding(mesh, spread(*axes)) for axes in (('fsdp',), (None, 'fsdp')))
  params = {name: {'w': leaf['w'].replace(values=jax.device_put(
      leaf['w'].values, columns if name == 'down' else rows))} for name, leaf in params.items()}

  def total(x, params):
    with nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
      return jnp.sum(FeedForward(24).apply({'params': params}, x) ** 2)

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(total)).lower(x, params).compile().as_text()
  assert set(re.findall(r'(\w+)\[16,24\]\S* all-gather', text)) == {'s8'}
  assert set(re.findall(r'(\w+)\[24,16\]\S* all-gather', text)) == {'s8'}
