"""The decoder equals a plain reference, cached or not; a fingerprint changes with any bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latent_deliberation.model import decoder as module
from latent_deliberation.model.decoder import Decoder, boxed_shapes, fingerprint
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.deliberation import dense_reference


@pytest.fixture(scope='module')
def logits(batch, decoder_params):
  return logits_of(decoder_params, batch, tiny.CONFIG)


def logits_of(params, batch, config):
  return tiny.read(params, batch.tokens, batch.positions, batch.segments, config)[1]


def test_logits_equal_dense_reference(batch, decoder_params, logits):
  """Logits equal those of a plain reference with dense masks."""
  table = decoder_params['embedder']['table']
  for text in range(2):
    tokens, segments, positions = (np.asarray(leaf[text]) for leaf in (
        batch.tokens, batch.segments, batch.positions))
    trunk = [dense_reference.Place(None, i, *place, i + 1)
             for i, place in enumerate(zip(segments, positions, strict=True))]
    hidden, _ = dense_reference.transformer(
        tiny.CONFIG, decoder_params['transformer'], table[tokens] * 4, positions,
        dense_reference.masks(trunk, trunk, tiny.CONFIG))
    np.testing.assert_allclose(logits[text], 3 * np.tanh(hidden @ table.T / 3), atol=2e-5)


@pytest.mark.parametrize('change', [
    {'window': 1000}, {'attention_softcap': None}, *(pytest.param(change, marks=pytest.mark.slow)
    for change in (
        {'window': 3}, {'layer_pattern': ('global', 'local')}, {'final_softcap': None},
        {'query_scale': None}, {'rope_base': 1e4}, {'rope_local_base': 1e4}, {'rope_scaling': 8.0},
        {'post_norms': False}, {'norm_epsilon': 1e-1}))])
def test_every_setting_matters(batch, decoder_params, logits, change):
  """Every setting of the architecture moves the logits."""
  # A setting without effect here would have none in the other tests, too.
  other = logits_of(decoder_params, batch, dataclasses.replace(tiny.CONFIG, **change))
  assert np.abs(other - logits).max() > 0.05


def test_packed_document_equals_alone(batch, decoder_params, logits):
  """A packed document has the logits and positions that it has alone."""
  for text, inside in ((0, slice(7, 11)), (1, slice(9, 15))):
    _, alone, cache = tiny.read(decoder_params, batch.tokens[text:text + 1, inside])
    np.testing.assert_allclose(logits[text, inside], alone[0], atol=2e-5)
    np.testing.assert_array_equal(cache.positions, batch.positions[text:text + 1, inside])


@pytest.mark.parametrize('sizes', [(1, 1, 1), (4,)])
def test_cached_equals_uncached(batch, decoder_params, sizes):
  """Reading on from a cache gives the logits of reading all at once."""
  tokens = batch.tokens[:, :7]
  _, whole, expected = tiny.read(decoder_params, tokens)
  start = 7 - sum(sizes)
  _, _, cache = tiny.read(decoder_params, tokens[:, :start])
  for size in sizes:
    fed = slice(start, start + size)
    x = tiny.embed(decoder_params, tokens[:, fed])
    _, logits, cache = tiny.read_on(decoder_params, x, jnp.arange(7)[fed], cache)
    np.testing.assert_allclose(logits, whole[:, fed], atol=2e-5)
    start += size
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache, expected)


def test_float32_activations(batch, decoder_params, logits):
  """Float32 activations between bfloat16 products round less, and results stay bfloat16."""
  errors = {}
  for activations in ('bfloat16', 'float32'):
    decoder = Decoder(tiny.CONFIG, dtype='bfloat16', activations=activations)
    other, cache = jax.jit(decoder.apply)({'params': decoder_params}, batch.tokens,
                                          batch.positions, batch.segments)
    assert cache.keys.dtype == jnp.bfloat16
    errors[activations] = jnp.sqrt(jnp.mean((other - logits) ** 2))
  assert 0 < errors['float32'] < errors['bfloat16'] / 1.2, errors


def test_bfloat16_keeps_float32_logits(batch, decoder_params, logits):
  """A bfloat16 computation rounds a little, and its logits are float32."""
  rounded = jax.jit(Decoder(tiny.CONFIG, dtype='bfloat16').apply)
  other, cache = rounded({'params': decoder_params}, batch.tokens, batch.positions,
                         batch.segments)
  assert other.dtype == jnp.float32 and cache.keys.dtype == jnp.bfloat16
  assert 1e-4 < np.abs(other - logits).mean() < 0.1


# Without embeddings: table 2 of arXiv 2403.08295 and of arXiv 2408.00118 (whose embeddings have
# 256,128 rows, here 256,000).
@pytest.mark.parametrize('name, inner, total', [
    ('gemma1_2b', 1_981_884_416, 2_506_172_416),
    ('gemma1_7b', 7_751_248_896, 8_537_680_896),
    ('gemma2_2b', 2_024_517_888, 2_614_341_888),
    ('gemma2_9b', 8_324_201_984, 9_241_705_984),
    ('gemma2_27b', 26_047_480_320, 27_227_128_320)])
def test_presets_have_published_sizes(name, inner, total):
  """The presets have the published numbers of parameters."""
  shapes = boxed_shapes(PRESETS[name])
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert (count(shapes['transformer']), count(shapes)) == (inner, total)


def test_tokens_may_be_numpy(decoder_params):
  """Tokens of numpy and of jax give the same logits."""
  tokens = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
  logits, _ = Decoder(tiny.CONFIG).apply({'params': decoder_params}, tokens)
  np.testing.assert_array_equal(
      logits, Decoder(tiny.CONFIG).apply({'params': decoder_params}, jnp.asarray(tokens))[0])


VALUES = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def tree(values=VALUES, name='w'):
  return {'layer': {name: jnp.asarray(values)}, 'scale': jnp.ones(3, jnp.bfloat16)}


def swapped():
  values = VALUES.copy()
  values[1, 2], values[3, 4] = VALUES[3, 4], VALUES[1, 2]
  return values


def flipped(bit):
  bits = VALUES.view(np.uint32).copy()
  bits[5, 1] ^= np.uint32(1 << bit)
  return bits.view(np.float32)


@pytest.mark.parametrize('other', [
    tree(flipped(0)), tree(flipped(31)), tree(swapped()), tree(VALUES[::-1]), tree(name='v'),
    tree(VALUES.reshape(6, 8)), tree(VALUES.astype(jnp.bfloat16)), tree()['layer'],
    {**tree(), 'scale': tree()['scale'].at[0].set(-0.0)},
], ids=['lowest bit', 'sign', 'swapped', 'reversed', 'renamed', 'reshaped', 'rounded', 'fewer',
        'bfloat16 bit'])
def test_fingerprint_changes(other):
  """Any change of bits, names or shapes changes the fingerprint."""
  assert fingerprint(other) != fingerprint(tree())


def test_fingerprint_of_signed_zeros():
  """Zeros of different signs have different fingerprints."""
  assert fingerprint({'w': jnp.zeros(3)}) != fingerprint({'w': -jnp.zeros(3)})


@pytest.mark.parametrize('mesh, spec', [
    (MeshConfig(8), PartitionSpec('data')), (MeshConfig(1, 4, 2), PartitionSpec('fsdp', 'tensor')),
    (MeshConfig(2, 2, 2), PartitionSpec(('data', 'fsdp'), 'tensor')),
    (MeshConfig(2, 2, 2), PartitionSpec())])
def test_fingerprint_ignores_sharding(mesh, spec):
  """The fingerprint is the same under any sharding."""
  sharding = NamedSharding(make_mesh(mesh), spec)
  sharded = {**tree(), 'layer': jax.device_put(tree()['layer'], sharding)}
  assert fingerprint(sharded) == fingerprint(tree())


def test_fingerprint_ignores_order():
  """The fingerprint is the same for numpy, and in any order of a dict."""
  reordered = dict(reversed(tree().items()))
  assert fingerprint(jax.tree.map(np.asarray, reordered)) == fingerprint(tree())


def test_fingerprint_in_blocks(monkeypatch):
  """Large leaves are summed in blocks, with the same result."""
  leaf = jax.random.normal(jax.random.key(0), (7, 5, 3))
  at_once = fingerprint({'w': leaf})
  monkeypatch.setattr(module, '_BLOCK', 31)  # two rows at a time, and one
  assert fingerprint({'w': leaf}) == at_once
  assert fingerprint({'w': leaf.at[6, 4, 2].add(1)}) != at_once
