"""The decoder is Gemma 2: equal to a plain reference, cached or not, and of its real sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.model.decoder import Decoder, boxed_shapes
from latent_deliberation.model.transformer_config import PRESETS
from tests import tiny
from tests.deliberation import dense_reference


@pytest.fixture(scope='module')
def logits(batch, decoder_params):
  return logits_of(decoder_params, batch, tiny.CONFIG)


def logits_of(params, batch, config):
  return tiny.read(params, batch.tokens, batch.positions, batch.segments, config)[1]


def test_logits_equal_those_of_a_dense_reference(batch, decoder_params, logits):
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
    {'window': 1000}, {'window': 3}, {'layer_pattern': ('global', 'local')},
    {'attention_softcap': None}, {'final_softcap': None}, {'query_scale': None},
    {'rope_base': 1e4}, {'rope_local_base': 1e4}, {'rope_scaling': 8.0}, {'post_norms': False},
    {'norm_epsilon': 1e-1}])
def test_every_setting_of_the_architecture_matters(batch, decoder_params, logits, change):
  # What this test cannot tell apart, no other test here could either.
  other = logits_of(decoder_params, batch, dataclasses.replace(tiny.CONFIG, **change))
  assert np.abs(other - logits).max() > 0.05


def test_a_packed_document_is_read_as_if_it_were_alone(batch, decoder_params, logits):
  for text, inside in ((0, slice(7, 11)), (1, slice(9, 15))):
    _, alone, cache = tiny.read(decoder_params, batch.tokens[text:text + 1, inside])
    np.testing.assert_allclose(logits[text, inside], alone[0], atol=2e-5)
    np.testing.assert_array_equal(cache.positions, batch.positions[text:text + 1, inside])


@pytest.mark.parametrize('sizes', [(1, 1, 1), (4,)])
def test_reading_on_from_a_cache_equals_reading_all_at_once(batch, decoder_params, sizes):
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


def test_computing_in_bfloat16_rounds_and_keeps_logits_in_float32(batch, decoder_params, logits):
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
def test_the_published_sizes_have_the_published_numbers_of_parameters(name, inner, total):
  shapes = boxed_shapes(PRESETS[name])
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert (count(shapes['transformer']), count(shapes)) == (inner, total)


def test_tokens_may_be_of_numpy(decoder_params):
  tokens = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
  logits, _ = Decoder(tiny.CONFIG).apply({'params': decoder_params}, tokens)
  np.testing.assert_array_equal(
      logits, Decoder(tiny.CONFIG).apply({'params': decoder_params}, jnp.asarray(tokens))[0])
