"""Rotary embedding computes its formula, and the fused form computes the same."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import topologies

from latent_deliberation.model import rotary
from latent_deliberation.model.kernels import fused_rotary
from latent_deliberation.model.rotary import rotary_frequencies
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh

WIDTH = 256  # halves of heads must be 128 wide for the kernel


def rotated(x, position, scale=1.0):
  """x rotated as a query and as a key."""
  frequencies = jnp.asarray(rotary_frequencies(x.size, base=100.0))
  heads = x[None, None, None, None, :]
  return tuple(rotated.reshape(-1) for rotated in rotary.rotate(
      heads, heads, jnp.full((1, 1, 1), position), frequencies, scale))


def test_rotation_keeps_lengths():
  """Position 0 is not rotated, and no position changes a length."""
  x = jax.random.normal(jax.random.key(0), (8,))
  np.testing.assert_array_equal(rotated(x, 0)[1], x)
  np.testing.assert_allclose(np.linalg.norm(rotated(x, 13)[1]), np.linalg.norm(x), rtol=1e-6)


def test_product_depends_on_distance():
  """A product of rotated vectors depends only on their distance."""
  q, k = jax.random.normal(jax.random.key(0), (2, 8))
  product = lambda i, j: rotated(q, i)[0] @ rotated(k, j)[1]  # noqa: E731
  np.testing.assert_allclose(product(7, 3), product(1007, 1003), atol=2e-4)
  assert abs(product(7, 3) - product(7, 4)) > 0.01


def test_halves_are_paired():
  """Halves are paired as in Gemma, and only queries are scaled."""
  # The first pair is (x_0, x_2), which rotates by one radian a position.
  query, key = rotated(jnp.array([1.0, 0.0, 0.0, 0.0]), 1, scale=0.5)
  np.testing.assert_allclose(key, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
  np.testing.assert_allclose(query, key / 2, atol=1e-6)


def test_sines_are_exact():
  """Sines and cosines of short and of long texts are those of float64."""
  frequencies = rotary_frequencies(WIDTH, 1e4)
  positions = np.concatenate([np.arange(-300, 300), 16_000 + np.arange(300),
                              131_072 + np.arange(300), 199_700 + np.arange(300)])
  # An angle is rounded to float32 before, as by every rotary embedding.
  angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
  # Compiled, products and differences may be fused, and are more exact then.
  for compute in (rotary.sines, jax.jit(rotary.sines)):
    sine, cosine = compute(positions[None, None].astype(np.int32), frequencies)
    np.testing.assert_allclose(sine[0, 0], np.sin(angles), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(cosine[0, 0], np.cos(angles), rtol=0, atol=1.2e-7)


def inputs(traces=3, length=7, dtype='float32', width=WIDTH):
  """Arguments of `rotate` for two texts, 4 heads and 2 kv heads."""
  random = np.random.default_rng(0)
  heads = [jnp.asarray(random.normal(size=(2, traces, length, count, width)), dtype)
           for count in (4, 2)]
  positions = jnp.asarray(random.integers(0, 3000, (2, traces, length)), jnp.int32)
  return *heads, positions, jnp.asarray(rotary_frequencies(width, 1e4))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(function, *inputs):
  """The results, and the gradients of their randomly weighted sum by queries and keys."""
  weights = [jax.random.normal(jax.random.key(1), x.shape, x.dtype) for x in inputs[:2]]
  results, pull = jax.vjp(lambda *heads: function(*heads, *inputs[2:], scale=0.3), *inputs[:2])
  return results, pull(tuple(weights))


@pytest.mark.parametrize('sizes', [
    {}, {'traces': 1, 'length': 1}, {'traces': 1, 'length': 1031}, {'dtype': 'bfloat16'},
    {'width': 24}], ids=str)
def test_fused_rotary_equals_plain(sizes):
  """The fused form has the values and gradients of the plain one."""
  given = inputs(**sizes)
  for fused, plain in zip(*(jax.tree.leaves(evaluate(function, *given)) for function in (
      fused_rotary.rotate, rotary.rotate)), strict=True):
    assert fused.dtype == plain.dtype and np.abs(plain.astype(jnp.float32)).max() > 0.1
    np.testing.assert_allclose(fused.astype(jnp.float32), plain.astype(jnp.float32), rtol=1e-5,
                               atol=0.02 if plain.dtype == jnp.bfloat16 else 1e-5)


def test_fused_rotary_on_mesh():
  """On a mesh, each device rotates its own texts and heads."""
  given = inputs()
  mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
  with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
    results, gradients = jax.jit(functools.partial(
        evaluate.__wrapped__, fused_rotary.rotate))(*given)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
               (results, gradients), evaluate(rotary.rotate, *given))
  for heads, count in zip((*results, *gradients), (2, 1, 2, 1), strict=True):
    assert heads.sharding.shard_shape(heads.shape) == (1, 3, 7, count, WIDTH)


def test_gpu_runs_plain_rotary():
  """A GPU runs the plain form."""
  lowered = evaluate.trace(fused_rotary.rotate, *inputs()).lower(lowering_platforms=('cuda',))
  assert 'custom_call' not in lowered.as_text()


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, a compiler')
def test_fused_rotary_compiles_for_tpu(monkeypatch):
  """The kernel compiles for a TPU at a size that fills no block."""
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chip = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
  place = jax.sharding.SingleDeviceSharding(chip)
  given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
           for x in inputs(traces=1, length=1040, dtype='bfloat16')]
  compiled = evaluate.lower(fused_rotary.rotate, *given).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4
