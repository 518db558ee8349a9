"""One transformer serves every pass. Options of computation change nothing, and nothing leaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.transformer import REMAT_POLICIES, Transformer
from tests import tiny


def trunk_rows(batch, seed=0):
  """Random embeddings for a batch, its positions and its mask spec."""
  segments = batch.segments[:, None]
  x = jax.random.normal(jax.random.key(seed), (*segments.shape, tiny.CONFIG.embed_dim))
  nothing_cached = jnp.zeros(segments.shape[:2], jnp.int32)
  return x, batch.positions[:, None], AttentionMaskSpec(segments, nothing_cached)


def values_and_gradients(batch, params, **options):
  """Hidden states and keys, and their gradients, with options of the transformer."""
  transformer = Transformer(tiny.CONFIG, **options)
  x, positions, mask_spec = trunk_rows(batch)

  @jax.jit
  def compute(params, x):
    outputs, pull = jax.vjp(
        lambda *given: transformer.apply({'params': given[0]}, given[1], positions, mask_spec),
        params, x)
    return outputs, pull(jax.tree.map(jnp.cos, outputs))

  return compute(params, x)


@pytest.fixture(scope='module')
def plain(batch, decoder_params):
  return values_and_gradients(batch, decoder_params['transformer'])


@pytest.mark.parametrize('options', [
    {'scan': False}, *({'remat': remat} for remat in REMAT_POLICIES if remat != 'none'),
    {'scan': False, 'remat': 'full'}])
def test_scan_and_remat_change_nothing(batch, decoder_params, plain, options):
  """Unrolling and recomputing change neither values nor gradients."""
  other = values_and_gradients(batch, decoder_params['transformer'], **options)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, plain)


def kernels(jaxpr):
  """Number of calls of Pallas kernels in a jaxpr, also inside its loops and calls."""
  found = 0
  for equation in jaxpr.eqns:
    found += equation.primitive.name == 'pallas_call'
    for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
      found += kernels(getattr(leaf, 'jaxpr', leaf)) if is_jaxpr(leaf) else 0
  return found


def is_jaxpr(leaf):
  return hasattr(getattr(leaf, 'jaxpr', leaf), 'eqns')


def test_remat_keeps_fused_results(batch, decoder_params):
  """Only a backward pass that keeps nothing runs the fused kernel again."""
  x, positions, mask_spec = trunk_rows(batch)
  keys = jnp.ones((tiny.CONFIG.num_layers, *x.shape[:1], 5, tiny.CONFIG.num_kv_heads,
                   tiny.CONFIG.head_dim))
  index = jnp.ones((x.shape[0], 5), jnp.int32)

  def runs(remat):
    transformer = Transformer(tiny.CONFIG, attention='fused', remat=remat)
    return kernels(jax.make_jaxpr(jax.grad(lambda x: transformer.apply(
        {'params': decoder_params['transformer']}, x, positions, mask_spec,
        KVCache(keys, keys, index, index))[0].sum()))(x).jaxpr)

  once = runs('none')
  assert once > 0
  assert [runs(remat) == once for remat in ('mid', 'dots', 'full')] == [True, True, False]


def test_fused_transformer_equals_plain(batch):
  """A fused transformer rotates wide heads in a kernel and equals the plain one."""
  config = dataclasses.replace(tiny.CONFIG, head_dim=256, layer_pattern=('global',), num_layers=1)
  x, positions, mask_spec = trunk_rows(batch)
  plain, fused = (Transformer(config, attention=name) for name in ('plain', 'fused'))
  params = nn.unbox(plain.init(jax.random.key(1), x, positions, mask_spec))

  def total(transformer, x):
    hidden, fresh = transformer.apply(params, x, positions, mask_spec)
    return jnp.sum(jnp.cos(hidden)) + jnp.sum(jnp.cos(fresh.keys))

  jaxpr = jax.make_jaxpr(functools.partial(total, fused))(x)
  assert 'name=rotary' in str(jaxpr)
  values = [jax.jit(jax.value_and_grad(functools.partial(total, transformer)))(x)
            for transformer in (fused, plain)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *values)


def test_unknown_attention(batch):
  """An unknown computation of attention is refused."""
  with pytest.raises(UserError, match="attention = 'flash'.*'plain', 'fused'"):
    Transformer(tiny.CONFIG, attention='flash').init(jax.random.key(0), *trunk_rows(batch))


def influence(transformer, params, x, *where):
  """Whether a hidden state depends on an embedding, by gradient: [B, M, Q, B, M, Q]."""

  @jax.jit
  @jax.vmap
  def gradient(text, row, query):
    def hidden(x):
      return transformer.apply({'params': params}, x, *where)[0][text, row, query].sum()
    return jax.grad(hidden)(x)

  indices = (jnp.asarray(part.ravel()) for part in np.indices(x.shape[:3]))
  return (np.abs(gradient(*indices)).max(axis=-1) > 0).reshape(x.shape[:3] * 2)


def test_tokens_see_their_document(decoder_params, batch):
  """By gradient, a token sees its own document up to itself; nothing sees padding."""
  touched = influence(Transformer(tiny.CONFIG), decoder_params['transformer'], *trunk_rows(batch))
  segments, order = np.asarray(batch.segments), np.arange(tiny.LENGTH)
  for text in range(2):
    assert not touched[text, 0, :, 1 - text].any()
    expected = ((segments[text][:, None] == segments[text]) & (order[:, None] >= order)
                & (segments[text] > 0) | np.eye(tiny.LENGTH, dtype=bool))
    np.testing.assert_array_equal(touched[text, 0, :, text, 0], expected)


@pytest.mark.parametrize('layers, window, reach', [(1, 4, 3), (3, 2, 3), (1, 1, 0)])
def test_local_layers_reach_their_window(decoder_params, layers, window, reach):
  """Local layers reach exactly as far as their window."""
  config = dataclasses.replace(tiny.CONFIG, num_layers=layers, window=window,
                               layer_pattern=('local',))
  params = decoder_params['transformer']
  params = {**params, 'blocks': jax.tree.map(lambda leaf: leaf[:layers], params['blocks'])}
  touched = influence(Transformer(config), params, *trunk_rows(tiny.packed_batch([(8,)], length=8)))
  distance = np.arange(8)[:, None] - np.arange(8)
  np.testing.assert_array_equal(touched[0, 0, :, 0, 0], (0 <= distance) & (distance <= reach))


def test_rows_do_not_see_each_other(decoder_params, batch):
  """Rows that share a cache do not see each other."""
  _, _, cache = tiny.read(decoder_params, batch.tokens, batch.positions, batch.segments)
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, tiny.CONFIG.embed_dim))
  positions = jnp.broadcast_to(jnp.array([4, 5]), x.shape[:3])
  mask_spec = AttentionMaskSpec(jnp.ones_like(positions), jnp.full((2, 3), 4))
  touched = influence(Transformer(tiny.CONFIG), decoder_params['transformer'], x, positions,
                      mask_spec, cache)
  own = np.einsum('BC,MN,PQ->BMPCNQ', np.eye(2), np.eye(3), np.tri(2))
  np.testing.assert_array_equal(touched, own > 0)
