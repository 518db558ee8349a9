"""Each arm is scored on the same targets, and differs from the others in its outputs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.evaluation.perplexity import make_scorer, score_texts
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import tiny

BATCH = tiny.packed_batch([(7, 4, 8), (9, 6), (19,), (3, 16)])
ARMS = ('frozen', 'own', 'shuffled', 'zero')
NUM_TRACES, NUM_AHEAD = 5, 6  # other numbers than the coprocessor was trained with


def scorer(latents='refining', arms=ARMS, mesh=None, first_anchor=0, **choices):
  mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
  return make_scorer(tiny.deliberator(latents=latents, **choices), arms, num_traces=NUM_TRACES,
                     num_ahead=NUM_AHEAD, loss_chunk=7, seed=3, mesh=mesh, rules=DEFAULT_RULES,
                     first_anchor=first_anchor)


@pytest.fixture(scope='module')
def params(decoder_params):
  return tiny.coprocessor_params(tiny.deliberator(), decoder_params)


@pytest.fixture(scope='module')
def refining():
  return scorer()


@pytest.fixture(scope='module')
def scores(refining, params, decoder_params):
  sums, counts = refining(params, decoder_params, BATCH, 0)
  return {arm: np.asarray(total) for arm, total in sums.items()}, np.asarray(counts)


def test_any_number_of_latents_is_scored_on_the_same_targets_from_one_first_anchor(
    params, decoder_params):
  few, many, apart = (
      scorer(arms=('frozen',), num_latents=count, first_anchor=first)(
          params, decoder_params, BATCH, 0) for count, first in ((1, 4), (5, 0), (1, 0)))
  jax.tree.map(np.testing.assert_array_equal, few, many)
  assert np.any(few[1] != apart[1])


def test_the_frozen_arm_is_the_decoder_read_at_the_targets(scores, decoder_params):
  sums, counts = scores
  keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 4)
  config = tiny.deliberator().with_traces(NUM_TRACES, NUM_AHEAD).config
  traces = jax.device_get(sample_traces(keys, BATCH, config))
  _, logits, _ = tiny.read(decoder_params, BATCH.tokens, BATCH.positions, BATCH.segments)
  nll = np.asarray(optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], BATCH.tokens[:, 1:]))
  expected, targets = np.zeros((2, 4, NUM_AHEAD))
  for text, trace, ahead in np.argwhere(traces.ahead_valid):
    expected[text, ahead] += nll[text, traces.anchors[text, trace] + ahead]
    targets[text, ahead] += 1
  np.testing.assert_array_equal(counts, targets)
  np.testing.assert_allclose(sums['frozen'], expected, rtol=1e-5, atol=1e-5)
  assert counts.sum() > 60


def test_zero_thoughts_of_refining_latents_are_the_frozen_decoder(scores):
  sums, _ = scores
  np.testing.assert_allclose(sums['zero'], sums['frozen'], rtol=1e-5, atol=1e-4)
  for arm in ('own', 'shuffled'):
    assert np.abs(sums[arm] - sums['frozen']).max() > 0.1
  assert np.abs(sums['shuffled'] - sums['own']).max() > 0.1


def test_zero_thoughts_behind_the_anchor_still_repeat_it(params, decoder_params):
  sums, _ = scorer('anchored', ('frozen', 'zero'))(params, decoder_params, BATCH, 0)
  assert np.abs(sums['zero'] - sums['frozen']).max() > 0.1


def test_shuffled_thoughts_are_those_of_the_previous_text(refining, scores, params,
                                                          decoder_params):
  before, _ = scores
  tokens = BATCH.tokens.at[1].set(jnp.where(BATCH.segments[1] > 0, 7, 0))
  after, _ = refining(params, decoder_params, BATCH.replace(tokens=tokens), 0)
  changed = {arm: np.any(after[arm] != before[arm], axis=1).tolist() for arm in ARMS}
  assert changed == {
      'frozen': [False, True, False, False], 'own': [False, True, False, False],
      'zero': [False, True, False, False], 'shuffled': [False, True, True, False]}


def test_another_batch_index_draws_other_targets_and_the_same_one_the_same(
    refining, scores, params, decoder_params):
  again, _ = refining(params, decoder_params, BATCH, 0)
  other, _ = refining(params, decoder_params, BATCH, 1)
  for arm in ARMS:
    np.testing.assert_array_equal(again[arm], scores[0][arm])
    assert np.any(other[arm] != again[arm])


def test_any_mesh_gives_the_sums_of_one_device(scores, params, decoder_params):
  sharded = scorer(mesh=make_mesh(MeshConfig(2, 2, 2)))
  sums, counts = sharded(params, decoder_params, BATCH, 0)
  np.testing.assert_array_equal(counts, scores[1])
  for arm in ARMS:
    np.testing.assert_allclose(sums[arm], scores[0][arm], rtol=1e-4, atol=1e-4)


def test_texts_of_all_batches_are_listed_in_order(refining, params, decoder_params):
  second = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), BATCH)
  result = score_texts(refining, params, decoder_params, [BATCH, second])
  assert tuple(sorted(result)) == tuple(sorted(ARMS))
  for index, batch in enumerate((BATCH, second)):
    sums, counts = refining(params, decoder_params, batch, index)
    texts = slice(4 * index, 4 * index + 4)
    for arm in ARMS:
      np.testing.assert_array_equal(result[arm].total[texts], sums[arm])
      np.testing.assert_array_equal(result[arm].count[texts], counts)
  assert result['own'].total.dtype == np.float64


def test_late_latents_change_nothing_up_to_the_first_token_that_can_see_them(
    refining, scores, params, decoder_params):
  late = make_scorer(
      tiny.deliberator(), ('frozen', 'own'), num_traces=NUM_TRACES, num_ahead=NUM_AHEAD,
      loss_chunk=7, seed=3, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), rules=DEFAULT_RULES,
      delay=2)
  sums, counts = late(params, decoder_params, BATCH, 0)
  at_once, same = scores
  np.testing.assert_array_equal(counts, same)
  np.testing.assert_allclose(sums['frozen'], at_once['frozen'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(sums['own'][:, :3], sums['frozen'][:, :3], rtol=1e-5, atol=1e-4)
  assert np.abs(sums['own'] - sums['frozen'])[:, 3:].max() > 0.1
