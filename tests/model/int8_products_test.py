"""int8 weights, and products with them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.model.decoder import Decoder, boxed_shapes
from latent_deliberation.model.kernels import fused_rounding
from latent_deliberation.model.layers import FeedForward
from latent_deliberation.model.products import (
  LARGEST_INPUTS,
  Quantised,
  multiply_quantised,
  quantise,
  round_plainly,
)
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from latent_deliberation.training.objectives import augmentation
from tests import tiny


def is_quantised(leaf):
  return isinstance(leaf, Quantised)


def as_floats(params):
  """The matrices of a quantised decoder, as floats."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params, is_leaf=is_quantised)


@pytest.fixture(scope='module')
def quantised(decoder_params):
  return quantise(decoder_params)


@pytest.fixture(scope='module')
def rounding(decoder_params):
  """A decoder whose products round activations, too."""
  return quantise(decoder_params, rounds_inputs=True)


def test_quantise_error_is_half_a_scale(decoder_params, quantised):
  """An entry is off by half a scale at most; norms stay as they are."""
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


def test_quantise_llama():
  """A head of its own is int8, too; biases stay as they are."""
  params = tiny.decoder_params(tiny.LLAMA)
  quantised, tokens = quantise(params), jnp.arange(12).reshape(2, 6)
  assert is_quantised(quantised['embedder']['head'])
  key, stored = (tree['transformer']['blocks']['attention']['key'] for tree in (quantised, params))
  np.testing.assert_array_equal(key['b'], stored['b'])
  ours, theirs = (tiny.read(tree, tokens, config=tiny.LLAMA)[1]
                  for tree in (quantised, as_floats(quantised)))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quantise_keeps_zeros(decoder_params):
  """A channel of zeros stays zero."""
  table = decoder_params['embedder']['table'].at[3].set(0)
  quantised = quantise({'embedder': {'table': table}})['embedder']['table']
  assert not quantised.astype(jnp.float32)[3].any()


def test_scales_are_sharded_like_outputs():
  """Scales are sharded like the outputs of their matrices."""
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
def test_quantised_equals_rounded_matrices(remat, choices, decoder_params, quantised, batch):
  """Values and gradients equal those of the rounded matrices."""
  deliberator = tiny.deliberator(remat=remat, **choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  traces = sample_traces(jax.random.split(jax.random.key(0), 2), batch, deliberator.config)
  weight = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
  ours, theirs = (tiny.forward_and_gradient(deliberator, params, decoder, batch, traces, weight)
                  for decoder in (quantised, as_floats(quantised)))
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(ours[1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours, theirs)


def kept_by_backward(deliberator, params, decoder, batch):
  """Shapes of the arrays that the backward pass keeps."""
  traces = sample_traces(jax.random.split(jax.random.key(0), 2), batch, deliberator.config)
  _, pull = jax.eval_shape(
      lambda params, decoder: jax.vjp(
          lambda params: deliberator.forward(params, decoder, batch, traces), params),
      params, decoder)
  return jax.tree.leaves(pull)


def test_backward_keeps_int8(decoder_params, quantised, batch):
  """The backward pass keeps no matrix as floats."""
  deliberator = tiny.deliberator()
  params = tiny.coprocessor_params(deliberator, decoder_params)
  floats = {kept.shape for kept in kept_by_backward(deliberator, params, quantised, batch)
            if kept.dtype == jnp.float32}
  matrices = {leaf.values.shape for leaf in jax.tree.leaves(quantised, is_leaf=is_quantised)
              if is_quantised(leaf)}
  trainable = {leaf.shape for leaf in jax.tree.leaves(params)}
  assert not floats & (matrices - trainable)


@pytest.mark.parametrize('rounds_inputs', [False, True])
def test_quantised_on_mesh(rounds_inputs, decoder_params, batch):
  """Loss and gradient on a mesh equal those on one device."""
  quantised = quantise(decoder_params, rounds_inputs)
  deliberator, mesh = tiny.deliberator(), make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
  params = tiny.coprocessor_params(deliberator, decoder_params)
  batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (2, 1)), batch)
  keys = jax.random.split(jax.random.key(0), 4)
  boxed = jax.eval_shape(lambda boxed: quantise(boxed, rounds_inputs), boxed_shapes(tiny.CONFIG))

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


def test_shards_are_gathered_as_int8(decoder_params):
  """Shards are gathered as int8, not as floats."""
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


# --- W8A8 ---


def rounded(x):
  """Rows of x as int8 times one step a row, in numpy."""
  step = np.abs(x).max(-1, keepdims=True) / 127
  return np.round(x / np.where(step > 0, step, 1)) * step


@pytest.mark.parametrize('factor', [
    np.ones(40, np.float32), np.linspace(0.5, 2, 40, dtype=np.float32)], ids=['same', 'other'])
def test_rounding(factor):
  """A value is off by half a step at most. A token of zeros stays zero."""
  x = np.random.default_rng(0).normal(size=(3, 5, 40)).astype(np.float32)
  x[1, 2] = 0
  values, step = round_plainly(jnp.asarray(x), factor)
  assert values.dtype == jnp.int8 and step.shape == (3, 5, 1)
  off = np.abs(values * step - x * factor)
  assert (off <= 0.5001 * step).all() and not values[1, 2].any()
  assert (np.abs(values).max(-1) == 127).sum() == 14


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(300, 256), (1, 128), (130, 384)])
@pytest.mark.parametrize('has_factor', [False, True])
def test_rounding_kernel(monkeypatch, dtype, shape, has_factor):
  """The kernel gives what ordinary operations give, also where the last block is not full."""
  monkeypatch.setattr(fused_rounding, 'BLOCK_BYTES', 128 * 4 * (shape[1] + 128))
  random = np.random.default_rng(0)
  rows = jnp.asarray(random.normal(size=shape), dtype)
  factor = jnp.asarray(random.uniform(1, 2, shape[1]) if has_factor else np.ones(shape[1]),
                       jnp.float32)
  values, steps = fused_rounding.round_rows(rows, factor, interpret=True)
  expected, expected_steps = round_plainly(rows, factor)
  np.testing.assert_allclose(steps, expected_steps, rtol=1e-6)
  # A value half way between two may go either way, since the kernel multiplies by 1 / step.
  assert np.abs(values.astype(np.int32) - expected).max() <= 1
  assert (values != expected).mean() < 1e-3


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-4), ('bfloat16', 0.1)])
@pytest.mark.parametrize('shape, inputs', [((6, 10), 1), ((6, 2, 5), 1), ((2, 3, 10), 2)])
def test_rounded_product(shape, inputs, dtype, tolerance):
  """Value and gradient are products of what was rounded, where one axis holds a whole sum."""
  random = np.random.default_rng(0)
  axes = ('embed', 'mlp') if len(shape) == 2 else ('embed', 'heads', 'head_dim')
  x, w = (random.normal(size=size).astype(np.float32) for size in ((2, 1, 4) + shape[:inputs],
                                                                   shape))
  name = 'out' if inputs == 2 else 'up'
  largest = {name: {'x': (jnp.asarray(random.uniform(1, 20, (1, *shape[:inputs]))),)}}
  stack = quantise({name: {'w': jnp.asarray(w)[None]}}, True, largest)[name]['w']
  weight = jax.tree.map(lambda leaf: leaf[0], stack)
  y, pull = jax.vjp(lambda x: multiply_quantised(x, weight, inputs, axes, dtype), jnp.asarray(x))
  matrix = np.asarray(weight.astype(jnp.float32))
  np.testing.assert_allclose(matrix, w, atol=0.05)
  if inputs == 1:  # channels are scaled and rounded with what they hold
    input_scale = np.asarray(weight.input_scale)
    assert len(set(input_scale)) == 6
    expected = np.tensordot(rounded(x * input_scale),
                            matrix / input_scale.reshape(-1, *[1] * (matrix.ndim - 1)), 1)
  else:
    expected = np.tensordot(x, matrix, 2)
  np.testing.assert_allclose(y, expected, atol=tolerance if inputs == 2 else 1e-4)

  cotangent = random.normal(size=y.shape).astype(np.float32)
  outputs = matrix.ndim - inputs
  sums = (range(-outputs, 0), range(-outputs, 0))
  if outputs == 1:  # the scales of the channels are rounded with the cotangent
    values = rounded(cotangent * np.asarray(weight.scale))
    expected = np.tensordot(values, np.asarray(weight.values, float), sums)
    if inputs == 1:
      expected = expected * input_scale
  else:
    expected = np.tensordot(cotangent, matrix, sums)
  np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], expected,
                             atol=tolerance if outputs == 2 else 1e-4)


@pytest.mark.parametrize('axis', ['activation', 'mlp'])
@pytest.mark.parametrize('sizes', [{'fsdp': 4, 'data': 2}, {'fsdp': 4, 'tensor': 2}])
def test_rounding_on_mesh(monkeypatch, axis, sizes):
  """Each device rounds its own tokens. Tokens that are divided have the step of the whole."""
  monkeypatch.setattr(fused_rounding, 'round_rows',
                      functools.partial(fused_rounding.round_rows, interpret=True))
  random, mesh = np.random.default_rng(0), make_mesh(MeshConfig(**sizes))
  x = jnp.asarray(random.normal(size=(8, 1, 6, 128)), jnp.float32)
  factor = jnp.asarray(random.uniform(1, 2, 128), jnp.float32)

  def round_tokens(x, factor):
    with nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
      return fused_rounding.round_tokens(x, factor, axis=axis)

  with jax.set_mesh(mesh):
    text = str(jax.make_jaxpr(round_tokens)(x, factor))
    values, steps = jax.jit(round_tokens)(x, factor)
  is_divided = axis == 'mlp' and 'tensor' in sizes
  assert ('shard_map' in text) == (not is_divided)
  expected, expected_steps = round_plainly(x, factor)
  np.testing.assert_allclose(steps, expected_steps, rtol=1e-6)
  assert (values != expected).mean() < 1e-3


def test_large_channels_are_divided():
  """A channel that is larger than the others costs them little, and the matrix stays the same."""
  random = np.random.default_rng(0)
  x, w = random.normal(size=(50, 32)).astype(np.float32), random.normal(size=(1, 32, 8))
  x[:, 3] *= 1000
  w[:, 3] /= 100
  params = {'up': {'w': jnp.asarray(w, jnp.float32)}}

  def error(largest):
    weight = jax.tree.map(lambda leaf: leaf[0], quantise(params, True, largest)['up']['w'])
    np.testing.assert_allclose(weight.astype(jnp.float32), w[0], atol=0.05)
    y = multiply_quantised(jnp.asarray(x), weight, 1, ('embed', 'mlp'), 'float32')
    return np.sqrt(((y - x @ w[0]) ** 2).mean())

  largest = {'up': {'x': (jnp.abs(x).max(0)[None],)}}
  assert error(largest) < 0.2 * error(None)


def test_largest_inputs(decoder_params, batch):
  """Projections tell the largest value of each channel that they read, if they are asked."""
  decoder = Decoder(tiny.CONFIG)
  _, found = decoder.apply({'params': decoder_params}, batch.tokens, method='prefill',
                           mutable=[LARGEST_INPUTS])
  blocks = found[LARGEST_INPUTS]['transformer']['blocks']
  query, out = (blocks['attention'][name]['x'][0] for name in ('query', 'out'))
  assert query.shape == (3, 16) and out.shape == (3, 4, 6) and (query > 0).all()
  np.testing.assert_array_equal(query, blocks['attention']['key']['x'][0])
  rounded = quantise(decoder_params, True, found[LARGEST_INPUTS])['transformer']['blocks']
  assert rounded['attention']['query']['w'].input_scale.shape == (3, 16)
  assert rounded['attention']['out']['w'].input_scale is None


@pytest.mark.parametrize('remat', ['none', 'mid', 'dots'])
def test_rounded_decoder(remat, decoder_params, quantised, rounding, batch):
  """A decoder that rounds activations is near to one that does not, with its gradients."""
  deliberator = tiny.deliberator(remat=remat)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  traces = sample_traces(jax.random.split(jax.random.key(0), 2), batch, deliberator.config)
  weight = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
  (ours, gradient), (theirs, expected) = (
      tiny.forward_and_gradient(deliberator, params, decoder, batch, traces, weight)
      for decoder in (rounding, quantised))
  assert 0 < np.abs(ours - theirs).max() < 0.2 * np.abs(theirs).max()
  for leaf, other in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
    cosine = np.vdot(leaf, other) / np.linalg.norm(leaf) / np.linalg.norm(other)
    assert cosine > 0.97


def test_rounded_products_are_kept_scaled(decoder_params, rounding, batch):
  """With remat 'dots' the backward pass keeps the products of a block, and no integers of them."""
  def kept(remat):
    deliberator = tiny.deliberator(remat=remat)
    params = tiny.coprocessor_params(deliberator, decoder_params)
    return [(leaf.dtype.name, leaf.shape)
            for leaf in kept_by_backward(deliberator, params, rounding, batch)]

  # The second pass reads 4 traces of 3 latents and 3 ahead tokens; the feed-forward is 20 wide.
  of_products = [dtype for dtype, shape in kept('dots') if shape[-4:] == (2, 4, 6, 20)]
  assert of_products == ['float32'] * 2
  assert not [shape for _, shape in kept('mid') if shape[-4:] == (2, 4, 6, 20)]
