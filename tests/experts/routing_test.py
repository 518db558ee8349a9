"""Each router prefers the expert that it should, and says none where it can."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts import routing
from latent_deliberation.experts.package import Routing
from latent_deliberation.experts.routing import (
  ROUTERS,
  ArrowRouter,
  Known,
  Query,
  choose,
  make_router,
)
from latent_deliberation.inference import passes
from tests import tiny
from tests.experts import small
from tests.inference.small import PROMPTS

WIDTH = tiny.CONFIG.embed_dim
AXES = np.eye(WIDTH, dtype=np.float32)


def query(texts=(), hidden=None):
  return Query(list(texts), np.zeros((len(texts), WIDTH)) if hidden is None else hidden, None)


def known(card=None, **values):
  defaults = dict(centroid=AXES[0], origin=np.zeros(WIDTH, np.float32), threshold=0.5,
                  gain_weight=np.zeros(WIDTH, np.float32), gain_bias=0.0)
  return Known(card, Routing(**{**defaults, **values}))


def chosen(router, query):
  return choose(router, router.scores(query))


@pytest.mark.skipif(importlib.util.find_spec('bm25s') is None, reason='needs bm25s')
def test_words_choose_the_card():
  """BM25 takes the card with the prompt's words, and none without any of them."""
  router = make_router('bm25', {
      'stars': Known(small.card('stars', keywords=('comet', 'planet')), None),
      'law': Known(small.card('law', description='Courts', keywords=('judge',)), None),
      'bare': Known(None, None)})
  assert chosen(router, query(['The COMET came', 'a judge said', 'so it was', ''])) == [
      'stars', 'law', None, None]
  # One word of a long text is chance.
  assert chosen(router, query(['comet ' + 'other ' * 30, 'comet ' + 'other ' * 40])) == [
      'stars', None]
  with pytest.raises(UserError, match='not known here'):
    router.scores(Query([], np.zeros((2, WIDTH)), None))


def test_words_need_their_library(monkeypatch):
  monkeypatch.setattr(routing.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='bm25s: pip install'):
    make_router('bm25', {})


def test_centroid_is_a_cosine_above_a_threshold():
  """Length does not matter, the origin does."""
  router = make_router('centroid', {
      'a': known(centroid=AXES[0]), 'b': known(centroid=AXES[1], origin=AXES[2]),
      'bare': Known(None, None)})
  hidden = np.stack([7 * AXES[0], AXES[2] + 0.1 * AXES[1], AXES[3], -AXES[0]])
  np.testing.assert_allclose(router.scores(query(hidden=hidden))[:2, :2],
                             [[0.5, -0.5], [-0.5, 0.5]], atol=1e-6)
  assert chosen(router, query(hidden=hidden)) == ['a', 'b', None, None]


def test_gain_is_a_linear_head():
  router = make_router('gain', {'a': known(gain_weight=AXES[0], gain_bias=-0.5),
                                'b': known(gain_weight=AXES[1], gain_bias=-1.5),
                                'bare': Known(None, None)})
  hidden = np.stack([AXES[0], 2 * AXES[1], AXES[0] + 2 * AXES[1], AXES[3]])
  np.testing.assert_allclose(router.scores(query(hidden=hidden))[:, :2],
                             [[0.5, -1.5], [-0.5, 0.5], [0.5, 0.5], [-0.5, -1.5]])
  assert chosen(router, query(hidden=hidden)) == ['a', 'b', 'a', None]


def test_prototype_is_the_first_singular_vector():
  """It is that of the products of queries, keys and values, side by side."""
  layers = passes.adapt(small.decoder().params['transformer'], small.lora(3).params['lora'])
  found = np.asarray(routing._prototypes(layers, len(layers.blocks)))
  for vector, block in zip(found, layers.blocks, strict=True):
    adapters = [block['lora']['attention'][name] for name in ('query', 'key', 'value')]
    whole = np.concatenate([np.asarray(each['a']) @ np.asarray(each['b']).reshape(2, -1)
                            for each in adapters], axis=1)
    expected = np.linalg.svd(whole)[0][:, 0]
    np.testing.assert_allclose(abs(vector @ expected), 1, atol=1e-4)
    np.testing.assert_allclose(vector @ vector, 1, atol=1e-4)


def test_arrow_points_along_the_inputs_of_layers(monkeypatch):
  """A prototype along the first layer's input of a text scores 1 there, and 1/2 over two layers."""
  experts = small.experts(a=small.lora(1), b=small.lora(2), whole=small.coprocessor(3))
  state = experts.engine.read(PROMPTS[1:2])
  router = ArrowRouter(experts.known())
  scores = router.scores(Query(['x'], np.asarray(state.hidden), state))
  assert 0 < scores[0, 0] < 1 and scores[0, 2] == -np.inf  # a whole coprocessor has no adapters
  # One latent: the last token. Its input of the first layer is its normed embedding.
  experts = small.experts(a=small.lora(1, num_latents=1))
  router = ArrowRouter(experts.known())
  params = tiny.decoder_params()
  x = np.asarray(tiny.embed(params, jnp.array([PROMPTS[1][-1:]])))[0, 0]
  scale = np.asarray(params['transformer']['blocks']['attention_in']['scale'][0])
  inputs = x * (1 + scale)
  router._prototypes = jnp.stack([jnp.asarray(inputs / np.linalg.norm(inputs)),
                                  jnp.zeros(WIDTH), jnp.zeros(WIDTH)])[None]
  state = experts.engine.read(PROMPTS[1:2])
  found = router.scores(Query(['x'], np.asarray(state.hidden), state))
  np.testing.assert_allclose(found, [[1]], atol=1e-5)  # layers without a prototype do not count
  first = router._prototypes[0, 0]
  router._prototypes = jnp.stack([first, jnp.zeros(WIDTH).at[0].set(1e-9), jnp.zeros(WIDTH)])[None]
  found = router.scores(Query(['x'], np.asarray(state.hidden), state))
  np.testing.assert_allclose(found, [[1 / 2]], atol=1e-5)


def test_arrow_compares_experts_of_different_depth():
  """An expert of one layer is scored on the decoder's last one, whoever stands beside it."""
  experts = small.experts(deep=small.lora(1), shallow=small.lora(2, num_layers=1))
  state = experts.engine.read(PROMPTS[1:2])
  query = Query(['x'], np.asarray(state.hidden), state)
  together = ArrowRouter(experts.known()).scores(query)
  for column, name in enumerate(('deep', 'shallow')):
    alone = ArrowRouter({name: experts.known()[name]}).scores(query)
    np.testing.assert_allclose(together[:, column], alone[:, 0], atol=1e-6)
  assert 0 < together[0, 1] < 1


@pytest.mark.parametrize('name', ROUTERS)
def test_routers_without_experts_choose_none(name):
  if name == 'bm25' and importlib.util.find_spec('bm25s') is None:
    pytest.skip('needs bm25s')
  router = make_router(name, {})
  assert chosen(router, query(['a', 'b'])) == [None, None]


def test_scores_that_are_no_numbers_choose_none():
  router = make_router('gain', {'a': known(), 'b': known()})
  assert choose(router, np.array([[np.nan, -np.inf], [np.nan, 1.0], [0.0, 0.0]])) == [
      None, 'b', None]


def test_unknown_router():
  with pytest.raises(UserError, match="router = 'best': .*'bm25'"):
    make_router('best', {})
