"""The fused kernel gives what plain attention gives, and reads no key block that nobody sees."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import topologies

from latent_deliberation.errors import UserError
from latent_deliberation.model import attention
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.kernels import fused_attention
from latent_deliberation.model.kernels.tiling import Blocks
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh

GLOBAL = np.iinfo(np.int32).max
# Two traces a product on a TPU, two or more blocks of all.
TPU = dataclasses.replace(fused_attention.TPU, blocks=Blocks(rows=64, keys=16, own=32))
GPU = dataclasses.replace(fused_attention.GPU, blocks=Blocks(rows=32, keys=16))
DOCUMENTS = (15, 21)  # of both texts; the rest is padding


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and options; by default, traces see nothing, little and all of their document."""
  traces: int = 5
  length: int = 3
  cached: int = 48
  heads: int = 4
  kv_heads: int = 2
  cap: float | None = 0.8
  window: int = GLOBAL
  late: bool = False

  def cache(self, normal):
    """Of two texts."""
    segments, positions = np.zeros((2, self.cached), np.int32)
    start = 0
    for number, size in enumerate(DOCUMENTS, start=1):
      inside = slice(start, min(start + size, self.cached))
      segments[inside], positions[inside] = number, np.arange(inside.stop - start)
      start = inside.stop
    keys, values = (normal(2, self.cached, self.kv_heads, 6) for _ in range(2))
    return KVCache(keys, values, *(jnp.stack([x, x]) for x in (positions, segments)))

  def inputs(self):
    """Arguments of `attend_visible`, but for cap and blocks."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    cache = self.cache(normal)
    anchors = np.sort(random.integers(0, self.cached, (2, self.traces)), axis=-1)
    anchors[:, 0], anchors[0, -1] = -1, self.cached - 1  # prefix_length 0, and a full one
    at_anchor = lambda x: np.take_along_axis(  # noqa: E731
        np.asarray(x), np.maximum(anchors, 0), axis=1)[..., None]
    order = np.arange(self.length)
    prefix_length, first = anchors + 1, None
    if self.late:  # tokens of a row differ in what they see of the trunk, and of the row
      prefix_length = np.maximum(prefix_length[..., None] - 2 * (order % 2), 0)
      first = jnp.broadcast_to(order // 2, (2, self.traces, self.length)).astype(jnp.int32)
    segments = jnp.broadcast_to(at_anchor(cache.segments), (2, self.traces, self.length))
    fresh = [normal(2, self.traces, self.length, heads, 6)
             for heads in (self.heads, self.kv_heads, self.kv_heads)]
    return (*fresh, jnp.asarray(at_anchor(cache.positions) + 1 + order),
            AttentionMaskSpec(segments, jnp.asarray(prefix_length, jnp.int32), first),
            jnp.array(self.window, jnp.int32), cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(function, cap, *inputs):
  """The result, and the gradients of its sum in random weights by queries, keys and values."""
  weight = jax.random.normal(jax.random.key(1), inputs[0].shape, inputs[0].dtype)
  result, pull = jax.vjp(lambda *fresh: function(*fresh, *inputs[3:], cap=cap), *inputs[:3])
  return result, pull(weight)


on_tpu, on_gpu = (functools.partial(fused_attention.attend_visible, kernels=kernels)
                  for kernels in (TPU, GPU))


@pytest.fixture(params=[on_tpu, on_gpu], ids=['tpu', 'gpu'])
def fused(request):
  """The function with the kernels of each machine, which a CPU interprets."""
  return request.param


def check_equal(fused, case, inputs=None, atol=1e-5):
  inputs = inputs or case.inputs()
  for function, plain in zip(*(jax.tree.leaves(evaluate(which, case.cap, *inputs))
                               for which in (fused, attention.attend_visible)), strict=True):
    np.testing.assert_allclose(function.astype(jnp.float32), plain.astype(jnp.float32),
                               rtol=1e-4, atol=atol)


@pytest.mark.parametrize('case', [
    pytest.param(Case(), id='packed'),
    pytest.param(Case(window=4), id='window', marks=pytest.mark.slow),
    pytest.param(Case(heads=2, cap=None), id='no-group-no-cap', marks=pytest.mark.slow),
    pytest.param(Case(kv_heads=1, cap=100.0), id='one-kv-head-high-cap'),
    pytest.param(Case(late=True, cached=7), id='late-short-cache'),
    pytest.param(Case(traces=1, length=17, cached=33), id='long-trace', marks=pytest.mark.slow)])
def test_values_and_gradients_equal_those_of_plain_attention(fused, case):
  check_equal(fused, case)


def test_bfloat16_differs_by_rounding_alone(fused):
  inputs = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, Case().inputs())
  assert {x.dtype for x in jax.tree.leaves(evaluate(fused, 0.8, *inputs))} == {jnp.bfloat16.dtype}
  check_equal(fused, Case(), inputs, atol=0.06)


def test_scores_of_any_size_do_not_overflow(fused):
  case = Case(heads=2, cap=None)
  queries, *inputs = case.inputs()
  result, gradients = evaluate(fused, None, queries * 1e4, *inputs)
  expected, _ = evaluate(attention.attend_visible, None, queries * 1e4, *inputs)
  np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(x).all() for x in gradients)


def test_one_row_without_a_cache_equals_plain_attention(fused):
  queries, keys, values, *_, window, cache = Case(traces=1, length=48, window=9).inputs()
  positions, segments = cache.positions[:, None], cache.segments[:, None]
  mask_spec = AttentionMaskSpec(segments, jnp.zeros((2, 1), jnp.int32))
  check_equal(fused, Case(), (queries, keys, values, positions, mask_spec, window, None))


def test_an_empty_cache_shows_nothing(fused):
  *inputs, cache = Case().inputs()
  check_equal(fused, Case(), (*inputs, jax.tree.map(lambda x: x[:, :0], cache)))


def test_gradients_flow_into_a_cache_that_is_not_constant():
  *inputs, cache = Case().inputs()

  def gradients(function):
    total = lambda keys, values: jnp.sum(function(  # noqa: E731
        *inputs, cache.replace(keys=keys, values=values), cap=0.8) ** 2)
    return jax.jit(jax.grad(total, argnums=(0, 1)))(cache.keys, cache.values)

  for gradient, plain in zip(gradients(on_tpu), gradients(attention.attend_visible), strict=True):
    assert np.abs(plain).max() > 0.01
    np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(fused):
  *inputs, mask_spec, window, cache = Case().inputs()
  nothing = mask_spec.replace(segments=jnp.zeros_like(mask_spec.segments))
  for result in jax.tree.leaves(evaluate(fused, 0.8, *inputs, nothing, window, cache)):
    assert np.all(result == 0)


@pytest.mark.parametrize('prefix_length, window, documents, unseen', [
    (16, GLOBAL, (48,), slice(16, 48)), (48, 3, (48,), slice(0, 32)),
    (48, GLOBAL, (16, 32), slice(0, 16))], ids=['prefix_length', 'window', 'document'])
def test_blocks_of_keys_that_no_query_sees_are_not_read(fused, prefix_length, window, documents, unseen):
  *fresh, positions, mask_spec, _, cache = Case().inputs()
  where = np.repeat(np.arange(len(documents)), documents) + 1
  cache = cache.replace(segments=jnp.array([where, where]),
                        positions=jnp.array([np.arange(48)] * 2))
  # All traces stand behind the trunk, in its last document.
  mask_spec = mask_spec.replace(
      segments=jnp.full_like(mask_spec.segments, len(documents)),
      prefix_length=jnp.full_like(mask_spec.prefix_length, prefix_length))
  positions = jnp.broadcast_to(jnp.arange(34, 37), positions.shape)
  run = lambda cache: evaluate(  # noqa: E731
      fused, 0.8, *fresh, positions, mask_spec, jnp.array(window), cache)
  # A key that is read and masked would spread its NaN, 0 times NaN.
  poisoned = cache.replace(keys=cache.keys.at[:, unseen].set(jnp.nan),
                           values=cache.values.at[:, unseen].set(jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, run(poisoned), run(cache))
  seen = cache.replace(values=cache.values.at[:, unseen.stop % 48].set(jnp.nan))
  assert np.isnan(run(seen)[0]).any()


def test_on_a_mesh_each_device_works_on_its_own_texts_and_heads():
  inputs = Case().inputs()
  expected = evaluate(on_tpu, 0.8, *inputs)
  mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
  with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
    sharded = jax.jit(functools.partial(evaluate.__wrapped__, on_tpu, 0.8))(*inputs)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
               sharded, expected)
  assert sharded[0].sharding.shard_shape(sharded[0].shape) == (1, 5, 3, 2, 6)


def test_heads_that_are_split_otherwise_than_kv_heads_are_refused():
  rules = {**DEFAULT_RULES, 'kv_heads': ()}
  with (jax.set_mesh(make_mesh(MeshConfig(4, 1, 2))),
        nn.logical_axis_rules(tuple(rules.items())),
        pytest.raises(UserError, match="split 'heads' over tensor and 'kv_heads' over None")):
    on_tpu(*Case().inputs(), cap=None)


def test_rows_that_stand_alone_are_refused():
  with pytest.raises(UserError, match="'fused' on 5 rows without a cache: .* 'plain'"):
    on_tpu(*Case().inputs()[:-1], cap=None)


@pytest.mark.parametrize('length, cap, width', [(31, 50.0, 256), (79, None, 128)])
def test_the_kernels_lower_for_a_gpu_at_sizes_that_fill_no_block(length, cap, width):
  inputs = shapes(3, length, 100, width)
  lowered = evaluate.trace(functools.partial(
      fused_attention.attend_visible, kernels=fused_attention.GPU), cap, *inputs).lower(
          lowering_platforms=('cuda',))
  assert lowered.as_text().count('@__gpu$xla.gpu.triton') == 3


def shapes(traces, length, cached, width, **where):
  """Arguments of `attend_visible` without values: two texts, 4 heads, 2 kv heads, bfloat16."""

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, **where)

  queries, keys, cache = (shape(2, *sizes, width, dtype=jnp.bfloat16) for sizes in (
      (traces, length, 4), (traces, length, 2), (cached, 2)))
  return (queries, keys, keys, shape(2, traces, length),
          AttentionMaskSpec(shape(2, traces, length), shape(2, traces)), shape(),
          KVCache(cache, cache, shape(2, cached), shape(2, cached)))


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, a compiler')
def test_the_kernels_compile_for_a_tpu_at_sizes_that_fill_no_block(monkeypatch):
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chip = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
  inputs = shapes(3, 79, 100, 128, sharding=jax.sharding.SingleDeviceSharding(chip))
  compiled = evaluate.lower(fused_attention.attend_visible, 50.0, *inputs).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
