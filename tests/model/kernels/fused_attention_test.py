"""Fused attention equals plain attention, skips unseen keys, and has kernels for each machine."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import topologies

from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.model import attention
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.kernels import fused_attention
from latent_deliberation.model.kernels.tiling import Blocks
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh

GLOBAL = np.iinfo(np.int32).max
# Small sizes: two traces a product on a TPU, and at least two blocks of rows and keys.
TPU = dataclasses.replace(fused_attention.TPU, blocks=Blocks(rows=64, keys=16, own=32))
GPU = dataclasses.replace(fused_attention.GPU, blocks=Blocks(rows=32, keys=16))
DOCUMENTS = (15, 21)  # of both texts; the rest is padding


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and options. By default, traces see nothing, a part or all of their document."""
  traces: int = 5
  length: int = 3
  cached: int = 48
  heads: int = 4
  kv_heads: int = 2
  cap: float | None = 0.8
  window: int = GLOBAL
  late: bool = False

  def cache(self, normal):
    """The cache of two texts."""
    segments, positions = np.zeros((2, self.cached), np.int32)
    start = 0
    for number, size in enumerate(DOCUMENTS, start=1):
      inside = slice(start, min(start + size, self.cached))
      segments[inside], positions[inside] = number, np.arange(inside.stop - start)
      start = inside.stop
    keys, values = (normal(2, self.cached, self.kv_heads, 6) for _ in range(2))
    return KVCache(keys, values, *(jnp.stack([x, x]) for x in (positions, segments)))

  def inputs(self):
    """Arguments of `attend_visible`, without cap and kernels."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    cache = self.cache(normal)
    anchors = np.sort(random.integers(0, self.cached, (2, self.traces)), axis=-1)
    anchors[:, 0], anchors[0, -1] = -1, self.cached - 1  # an empty prefix, and a full one
    at_anchor = lambda x: np.take_along_axis(  # noqa: E731
        np.asarray(x), np.maximum(anchors, 0), axis=1)[..., None]
    order = np.arange(self.length)
    prefix_length, first = anchors + 1, None
    if self.late:  # tokens of a row see different parts of the trunk and of the row
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
  """The result, and the gradients of its randomly weighted sum by queries, keys and values."""
  weight = jax.random.normal(jax.random.key(1), inputs[0].shape, inputs[0].dtype)
  result, pull = jax.vjp(lambda *fresh: function(*fresh, *inputs[3:], cap=cap), *inputs[:3])
  return result, pull(weight)


on_tpu, on_gpu = (functools.partial(fused_attention.attend_visible, kernels=kernels)
                  for kernels in (TPU, GPU))


@pytest.fixture(params=[on_tpu, on_gpu], ids=['tpu', 'gpu'])
def fused(request):
  """Fused attention with the kernels of each machine, which a CPU interprets."""
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
def test_fused_equals_plain(fused, case):
  """Values and gradients equal those of plain attention."""
  check_equal(fused, case)


def test_fused_bfloat16(fused):
  """In bfloat16, fused and plain attention differ only by rounding."""
  inputs = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, Case().inputs())
  assert {x.dtype for x in jax.tree.leaves(evaluate(fused, 0.8, *inputs))} == {jnp.bfloat16.dtype}
  check_equal(fused, Case(), inputs, atol=0.06)


def test_large_scores_do_not_overflow(fused):
  """Scores of any size give finite values and gradients."""
  case = Case(heads=2, cap=None)
  queries, *inputs = case.inputs()
  result, gradients = evaluate(fused, None, queries * 1e4, *inputs)
  expected, _ = evaluate(attention.attend_visible, None, queries * 1e4, *inputs)
  np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)
  assert all(np.isfinite(x).all() for x in gradients)


def test_one_row_without_cache(fused):
  """One causal row without a cache equals plain attention."""
  queries, keys, values, *_, window, cache = Case(traces=1, length=48, window=9).inputs()
  positions, segments = cache.positions[:, None], cache.segments[:, None]
  mask_spec = AttentionMaskSpec(segments, jnp.zeros((2, 1), jnp.int32))
  check_equal(fused, Case(), (queries, keys, values, positions, mask_spec, window, None))


def test_fused_over_empty_cache(fused):
  """Over an empty cache, rows see only themselves."""
  *inputs, cache = Case().inputs()
  check_equal(fused, Case(), (*inputs, jax.tree.map(lambda x: x[:, :0], cache)))


def test_gradients_flow_into_cache():
  """Gradients flow into a cache that is not constant."""
  *inputs, cache = Case().inputs()

  def gradients(function):
    total = lambda keys, values: jnp.sum(function(  # noqa: E731
        *inputs, cache.replace(keys=keys, values=values), cap=0.8) ** 2)
    return jax.jit(jax.grad(total, argnums=(0, 1)))(cache.keys, cache.values)

  for gradient, plain in zip(gradients(on_tpu), gradients(attention.attend_visible), strict=True):
    assert np.abs(plain).max() > 0.01
    np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-5)


def test_blind_query_gives_zeros(fused):
  """A query that sees nothing gives zeros and no gradient."""
  *inputs, mask_spec, window, cache = Case().inputs()
  nothing = mask_spec.replace(segments=jnp.zeros_like(mask_spec.segments))
  for result in jax.tree.leaves(evaluate(fused, 0.8, *inputs, nothing, window, cache)):
    assert np.all(result == 0)


@pytest.mark.parametrize('prefix_length, window, documents, unseen', [
    (16, GLOBAL, (48,), slice(16, 48)), (48, 3, (48,), slice(0, 32)),
    (48, GLOBAL, (16, 32), slice(0, 16))], ids=['prefix_length', 'window', 'document'])
def test_unseen_blocks_are_not_read(fused, prefix_length, window, documents, unseen):
  """Blocks of keys that no query sees are not read."""
  *fresh, positions, mask_spec, _, cache = Case().inputs()
  where = np.repeat(np.arange(len(documents)), documents) + 1
  cache = cache.replace(segments=jnp.array([where, where]),
                        positions=jnp.array([np.arange(48)] * 2))
  # All traces come after the trunk, in its last document.
  mask_spec = mask_spec.replace(
      segments=jnp.full_like(mask_spec.segments, len(documents)),
      prefix_length=jnp.full_like(mask_spec.prefix_length, prefix_length))
  positions = jnp.broadcast_to(jnp.arange(34, 37), positions.shape)
  run = lambda cache: evaluate(  # noqa: E731
      fused, 0.8, *fresh, positions, mask_spec, jnp.array(window), cache)
  # A key that is read and masked would spread its NaN: 0 times NaN is NaN.
  poisoned = cache.replace(keys=cache.keys.at[:, unseen].set(jnp.nan),
                           values=cache.values.at[:, unseen].set(jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, run(poisoned), run(cache))
  seen = cache.replace(values=cache.values.at[:, unseen.stop % 48].set(jnp.nan))
  assert np.isnan(run(seen)[0]).any()


def test_fused_on_mesh():
  """On a mesh, each device works on its own texts and heads."""
  inputs = Case().inputs()
  expected = evaluate(on_tpu, 0.8, *inputs)
  mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
  with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(DEFAULT_RULES.items())):
    sharded = jax.jit(functools.partial(evaluate.__wrapped__, on_tpu, 0.8))(*inputs)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
               sharded, expected)
  assert sharded[0].sharding.shard_shape(sharded[0].shape) == (1, 5, 3, 2, 6)


def test_different_head_splits():
  """Different splits of heads and kv heads are refused."""
  rules = {**DEFAULT_RULES, 'kv_heads': ()}
  with (jax.set_mesh(make_mesh(MeshConfig(4, 1, 2))),
        nn.logical_axis_rules(tuple(rules.items())),
        pytest.raises(UserError, match="'heads' over tensor.*'kv_heads' over None")):
    on_tpu(*Case().inputs(), cap=None)


def test_rows_without_cache():
  """Several rows without a cache are refused."""
  with pytest.raises(UserError, match="5 rows.*'plain'"):
    on_tpu(*Case().inputs()[:-1], cap=None)


@pytest.mark.parametrize('length, cap, width', [(31, 50.0, 256), (79, None, 128)])
def test_kernels_lower_for_gpu(length, cap, width):
  """The kernels lower for a GPU at sizes that fill no block."""
  inputs = shapes(3, length, 100, width)
  # Newer versions of JAX ask which GPU it is.
  gpu = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
    lowered = evaluate.trace(functools.partial(
        fused_attention.attend_visible, kernels=fused_attention.GPU), cap, *inputs).lower(
            lowering_platforms=('cuda',))
  assert lowered.as_text().count('@__gpu$xla.gpu.triton') == 3


def shapes(traces, length, cached, width, **where):
  """Shapes of arguments of `attend_visible`: two texts, 4 heads, 2 kv heads, bfloat16."""

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, **where)

  queries, keys, cache = (shape(2, *sizes, width, dtype=jnp.bfloat16) for sizes in (
      (traces, length, 4), (traces, length, 2), (cached, 2)))
  return (queries, keys, keys, shape(2, traces, length),
          AttentionMaskSpec(shape(2, traces, length), shape(2, traces)), shape(),
          KVCache(cache, cache, shape(2, cached), shape(2, cached)))


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, a compiler')
def test_kernels_compile_for_tpu(monkeypatch):
  """The kernels compile for a TPU at sizes that fill no block."""
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chip = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
  inputs = shapes(3, 79, 100, 128, sharding=jax.sharding.SingleDeviceSharding(chip))
  compiled = evaluate.lower(fused_attention.attend_visible, 50.0, *inputs).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def queries_of(width, dtype):
  return jnp.ones((2, 5, 3, 4, width), dtype)


@pytest.mark.parametrize('platform, kernels', [
    ('tpu', fused_attention.TPU), ('cpu', fused_attention.TPU), ('gpu', fused_attention.GPU)])
def test_choose_kernels_by_platform(monkeypatch, platform, kernels):
  """Each machine has its kernels; a CPU has those of a TPU."""
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert fused_attention.choose_kernels(queries_of(256, 'bfloat16')) is kernels


def test_unknown_platform(monkeypatch):
  """Any other platform is refused."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'metal')
  with pytest.raises(UserError, match="'metal'.*'plain'"):
    fused_attention.choose_kernels(queries_of(256, 'bfloat16'))


@pytest.mark.parametrize('trainable', ['full', 'lora'])
def test_coprocessor_of_wide_heads_begins_on_a_gpu(monkeypatch, trainable):
  """Parameters of a Gemma's coprocessor, with heads of 256 x bfloat16, are made there."""
  decoder_config = dataclasses.replace(PRESETS['gemma2_2b'], num_layers=2)
  frozen = jax.eval_shape(Decoder(decoder_config).init, jax.random.key(0), jnp.zeros((1, 1), int))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  coprocessor = Coprocessor(
      decoder_config, DeliberationConfig(num_latents=4, num_ahead=4, num_traces=2,
                                         trainable=trainable), 'bfloat16', attention='fused')
  made = jax.eval_shape(coprocessor.init, jax.random.key(0), nn.unbox(frozen)['params'])
  assert {'full': 'transformer', 'lora': 'lora'}[trainable] in made


@pytest.mark.parametrize('width, dtype, words', [
    (6, 'bfloat16', '6 x bfloat16'), (96, 'bfloat16', '96 x bfloat16'),
    (256, 'float32', "256 x float32.*dtype = 'bfloat16'")])
def test_heads_too_large_for_gpu(monkeypatch, width, dtype, words):
  """Heads that do not fit a GPU are refused."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(UserError, match=words):
    fused_attention.choose_kernels(queries_of(width, dtype))
