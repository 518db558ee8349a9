"""Norms, projections, adapters, embeddings and int8 matrices compute what their formulas say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.model.attention import AttentionMaskSpec
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.layers import (
  Embedder,
  FeedForward,
  LowRank,
  Projection,
  Quantised,
  RMSNorm,
  matmul,
  merge,
  quantise,
)
from latent_deliberation.model.transformer import Transformer
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh, shardings_of
from latent_deliberation.training.objectives import augmentation
from tests import tiny


def test_norm_formula():
  """The norm is computed in float32, and its scale is stored as an offset from 1."""
  x = 100 * jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)
  scale = jnp.linspace(-1, 1, 64)
  y = RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
  wide = np.asarray(x, np.float32)
  expected = wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(scale))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


def test_norm_of_zeros():
  """The norm of zeros is zero and has a finite gradient."""
  def total(x):
    return RMSNorm(1e-6).apply({'params': {'scale': jnp.ones(4)}}, x).sum()

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize('shape, inputs', [((5, 2, 3), 1), ((2, 3, 5), 2)])
def test_adapter_adds_scaled_product(shape, inputs):
  """An adapter adds its scaled product to the weight."""
  plain = Projection(shape, ('embed',) * 3, inputs)
  adapted = Projection(shape, ('embed',) * 3, inputs, lora=LowRank(rank=2, alpha=3.0))
  x = jax.random.normal(jax.random.key(0), (7, *shape[:inputs]))
  variables = tiny.randomised(adapted.init(jax.random.key(1), x), seed=0)
  weight, (a, b) = variables['params']['w'], map(variables['lora'].get, 'ab')
  merged = weight + 3.0 / 2 * np.tensordot(a, b, axes=1)
  np.testing.assert_allclose(adapted.apply(variables, x), plain.apply({'params': {'w': merged}}, x),
                             rtol=1e-5, atol=1e-5)


def test_new_adapter_changes_nothing():
  """A new adapter changes nothing, and can learn."""
  adapted = Projection((5, 3), ('embed', 'mlp'), lora=LowRank(rank=2, alpha=3.0))
  lora = adapted.init(jax.random.key(1), jnp.ones((1, 5)))['lora']
  assert np.all(lora['b'].value == 0) and np.all(lora['a'].value != 0)


def test_lora_rank_below_one():
  """A rank below 1 is refused."""
  with pytest.raises(UserError, match='rank = 0'):
    LowRank(rank=0)


def test_lora_scale():
  """Without an alpha, the factor of an adapter is 1."""
  assert LowRank(rank=8).scale == 1
  assert LowRank(rank=8, alpha=128.0).scale == 16


@pytest.mark.parametrize('dtypes', [('float32', 'bfloat16'), ('bfloat16', 'bfloat16'),
                                    ('float32', 'float32')])
@pytest.mark.parametrize('lead', [(), (3, 2)])
@pytest.mark.parametrize('transposed', [False, True])
def test_matmul(dtypes, lead, transposed):
  """Products have float32 results near the exact ones, and every factor a gradient in its dtype."""
  random = np.random.default_rng(0)
  x, y, weight = (jnp.asarray(random.normal(size=lead + shape), jnp.float32)
                  for shape in ((5, 8), (7, 8) if transposed else (8, 7), (5, 7)))
  factors = x.astype(dtypes[0]), y.astype(dtypes[1])
  turned = jnp.swapaxes(y, -1, -2)
  value, gradients = jax.value_and_grad(
      lambda x, y: jnp.sum(matmul(x, y, transposed) * weight), argnums=(0, 1))(*factors)
  assert matmul(*factors, transposed).dtype == value.dtype == jnp.float32
  np.testing.assert_allclose(matmul(*factors, transposed), x @ (turned if transposed else y),
                             atol=0.1)
  exact = ((weight @ y, jnp.swapaxes(weight, -1, -2) @ x) if transposed else
           (weight @ turned, jnp.swapaxes(x, -1, -2) @ weight))
  for dtype, gradient, expected in zip(dtypes, gradients, exact, strict=True):
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=0.1)
  # Backward as well, both factors of a product have one dtype: a CPU is slow otherwise.
  text = jax.jit(jax.grad(lambda x, y: jnp.sum(matmul(x, y, transposed) ** 2), (0, 1))).lower(
      *factors).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) == 3
  used = 'bf16' if 'bfloat16' in dtypes else 'f32'
  assert all(line.count(f'x{used}>') >= 2 for line in products), products


@pytest.mark.parametrize('transposed', [False, True])
def test_compiled_products_keep_their_dtype(transposed):
  """If a CPU multiplies bfloat16 in the forward pass, it does so for the gradient of x, too.

  XLA decides by the form of a product, and otherwise converts both factors to float32 first.
  """
  x, y = jnp.ones((64, 32)), jnp.ones((48, 32) if transposed else (32, 48), jnp.bfloat16)

  def used(function):
    text = jax.jit(function).lower(x, y).compile().as_text()
    kinds = dict(re.findall(r'%([\w.-]+) = (\w+)\[', text))
    return [tuple(kinds[name] for name in names)
            for names in re.findall(r' dot\(%([\w.-]+), %([\w.-]+)\)', text)]

  forward = used(lambda x, y: matmul(x, y, transposed))
  backward = used(jax.grad(lambda x, y: jnp.sum(jnp.tanh(matmul(x, y, transposed)))))
  assert len(forward) == 1 and len(backward) == 2
  assert set(backward) == set(forward)


def test_feed_forward_formula():
  """The feed-forward gates with the tanh form of gelu."""
  block = FeedForward(hidden_dim=6)
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
  params = tiny.randomised(block.init(jax.random.key(1), x)['params'], seed=0)
  gate, up = x @ params['gate']['w'], x @ params['up']['w']
  gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate ** 3)))
  np.testing.assert_allclose(block.apply({'params': params}, x), (gelu * up) @ params['down']['w'],
                             rtol=1e-5, atol=1e-5)


def test_embeddings_are_scaled():
  """Embeddings are scaled by the root of the width."""
  embedder = Embedder(vocab_size=3, embed_dim=4)
  table = jnp.arange(12.0).reshape(3, 4)
  rows = embedder.apply({'params': {'table': table}}, jnp.array([[[2, 0]]]), 'float32',
                        method='encode')
  np.testing.assert_array_equal(rows, 2 * table[jnp.array([[[2, 0]]])])


@pytest.mark.parametrize('config', [tiny.CONFIG, tiny.LLAMA], ids=['gemma', 'llama'])
def test_merge_equals_adapters(config):
  """Merged weights compute the same as weights with adapters; biases stay."""
  low_rank, decoder_params = LowRank(rank=2, alpha=3.0), tiny.decoder_params(config)
  deliberator = tiny.deliberator(config, trainable='lora')
  adapters = tiny.coprocessor_params(deliberator, decoder_params)['lora']
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 7, tiny.CONFIG.embed_dim)),
                  jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 1, 7))
  mask_spec = AttentionMaskSpec(jnp.ones_like(positions), jnp.zeros((2, 1), jnp.int32))
  weights = decoder_params['transformer']
  adapted, _ = Transformer(config, lora=low_rank).apply(
      {'params': weights, 'lora': adapters}, x, positions, mask_spec)
  plain = Transformer(config)
  folded, _ = plain.apply({'params': merge(weights, adapters, low_rank)}, x, positions, mask_spec)
  without, _ = plain.apply({'params': weights}, x, positions, mask_spec)
  np.testing.assert_allclose(folded, adapted, rtol=1e-4, atol=1e-5)
  assert np.abs(without - adapted).max() > 0.1


def is_quantised(leaf):
  return isinstance(leaf, Quantised)


def as_floats(params):
  """The matrices of a quantised decoder, as floats."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params, is_leaf=is_quantised)


@pytest.fixture(scope='module')
def quantised(decoder_params):
  return quantise(decoder_params)


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


def test_backward_keeps_int8(decoder_params, quantised, batch):
  """The backward pass keeps no matrix as floats."""
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


def test_quantised_on_mesh(decoder_params, quantised, batch):
  """Loss and gradient on a mesh equal those on one device."""
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
