"""Perplexity: controls of the outputs, scores on the same targets, changes and their intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import (
  AheadNLL,
  check_paired,
  make_scorer,
  mean,
  own,
  relative_change,
  score_texts,
  shuffled,
  zero,
)
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import tiny

BATCH = tiny.packed_batch([(7, 4, 8), (9, 6), (19,), (3, 16)])
ARMS = ('frozen', 'own', 'shuffled', 'zero')
NUM_TRACES, NUM_AHEAD = 5, 6  # other numbers than the coprocessor was trained with

# Two texts of three traces; the first has two valid traces, its third is not valid.
OUTPUTS = jnp.arange(6.0).reshape(2, 3, 1, 1)
VALID = jnp.array([[True, True, False], [True, True, True]])


def controlled(control):
  return np.asarray(control(OUTPUTS, VALID))[..., 0, 0].tolist()


def test_own_and_zero_outputs():
  assert controlled(own) == [[0, 1, 2], [3, 4, 5]] and controlled(zero) == [[0] * 3] * 2


def test_shuffled_outputs():
  """They are the outputs of valid traces of the previous text."""
  assert controlled(shuffled) == [[3, 4, 5], [0, 1, 0]]


def test_mean_outputs():
  """They average over valid traces alone."""
  np.testing.assert_allclose(controlled(mean), (0 + 1 + 3 + 4 + 5) / 5, rtol=1e-6)


def scorer(latents='refining', arms=ARMS, mesh=None, first_anchor=0, constant=None, **choices):
  mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
  return make_scorer(tiny.deliberator(latents=latents, **choices), arms, num_traces=NUM_TRACES,
                     num_ahead=NUM_AHEAD, loss_chunk=7, seed=3, mesh=mesh, rules=DEFAULT_RULES,
                     first_anchor=first_anchor, constant=constant)


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


def test_same_first_anchor_same_targets(params, decoder_params):
  """Any number of latents has the same targets, from one first anchor."""
  few, many, apart = (
      scorer(arms=('frozen',), num_latents=count, first_anchor=first)(
          params, decoder_params, BATCH, 0) for count, first in ((1, 4), (5, 0), (1, 0)))
  jax.tree.map(np.testing.assert_array_equal, few, many)
  assert np.any(few[1] != apart[1])


def test_frozen_arm_is_the_decoder(scores, decoder_params):
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


def test_zero_refining_latents_are_frozen(scores):
  sums, _ = scores
  np.testing.assert_allclose(sums['zero'], sums['frozen'], rtol=1e-5, atol=1e-4)
  for arm in ('own', 'shuffled'):
    assert np.abs(sums[arm] - sums['frozen']).max() > 0.1
  assert np.abs(sums['shuffled'] - sums['own']).max() > 0.1


@pytest.mark.parametrize('latents', ['refining', 'anchored'])
def test_constant_soft_tokens_share_the_prefill(latents, decoder_params):
  """Their scores, and those of the other arms, are what either has alone."""
  makers = [tiny.deliberator(latents=latents, trainable=kind) for kind in ('full', 'constant')]
  weights = [tiny.coprocessor_params(maker, decoder_params, seed)
             for seed, maker in enumerate(makers)]
  both, counts = scorer(latents, (*ARMS, 'constant'), constant=makers[1])(
      tuple(weights), decoder_params, BATCH, 0)
  own, same = scorer(latents)(weights[0], decoder_params, BATCH, 0)
  alone, _ = scorer(latents, ('own',), trainable='constant')(weights[1], decoder_params, BATCH, 0)
  np.testing.assert_array_equal(counts, same)
  for arm, expected in {**own, 'constant': alone['own']}.items():
    np.testing.assert_allclose(both[arm], expected, rtol=1e-5, atol=1e-4)
  assert np.abs(both['constant'] - both['own']).max() > 0.1


def test_zero_anchored_latents_differ(params, decoder_params):
  """After the anchor, zero outputs still repeat its embedding."""
  sums, _ = scorer('anchored', ('frozen', 'zero'))(params, decoder_params, BATCH, 0)
  assert np.abs(sums['zero'] - sums['frozen']).max() > 0.1


def test_shuffled_arm_depends_on_previous_text(refining, scores, params, decoder_params):
  before, _ = scores
  tokens = BATCH.tokens.at[1].set(jnp.where(BATCH.segments[1] > 0, 7, 0))
  after, _ = refining(params, decoder_params, BATCH.replace(tokens=tokens), 0)
  changed = {arm: np.any(after[arm] != before[arm], axis=1).tolist() for arm in ARMS}
  assert changed == {
      'frozen': [False, True, False, False], 'own': [False, True, False, False],
      'zero': [False, True, False, False], 'shuffled': [False, True, True, False]}


def test_batch_index_draws_the_targets(refining, scores, params, decoder_params):
  again, _ = refining(params, decoder_params, BATCH, 0)
  other, _ = refining(params, decoder_params, BATCH, 1)
  for arm in ARMS:
    np.testing.assert_array_equal(again[arm], scores[0][arm])
    assert np.any(other[arm] != again[arm])


def test_any_mesh_gives_same_sums(scores, params, decoder_params):
  sharded = scorer(mesh=make_mesh(MeshConfig(2, 2, 2)))
  sums, counts = sharded(params, decoder_params, BATCH, 0)
  np.testing.assert_array_equal(counts, scores[1])
  for arm in ARMS:
    np.testing.assert_allclose(sums[arm], scores[0][arm], rtol=1e-4, atol=1e-4)


def test_texts_stay_in_order(refining, params, decoder_params):
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


def test_late_latents_change_later_tokens(refining, scores, params, decoder_params):
  """Nothing changes before the first token that can see the latents."""
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


def random_arms(texts: int = 40, ahead: int = 3, seed: int = 0) -> tuple[AheadNLL, AheadNLL]:
  """Two arms with unequal counts, some of them zero."""
  rng = np.random.default_rng(seed)
  count = rng.integers(0, 5, (texts, ahead))
  base = rng.gamma(4.0, 0.6, (texts, ahead)) * count
  return AheadNLL(base + rng.normal(-0.1, 0.2, count.shape) * count, count), AheadNLL(base, count)


def slow_change(arm: AheadNLL, baseline: AheadNLL, samples: int) -> np.ndarray:
  """Bootstrap by the book, [low, high] x [A]: texts picked one by one."""
  rng = np.random.default_rng(1)
  texts = len(arm.count)
  draws = []
  for _ in range(samples):
    picked = rng.integers(0, texts, texts)
    nll = [one.total[picked].sum(axis=0) / one.count[picked].sum(axis=0)
           for one in (arm, baseline)]
    draws.append(100 * (np.exp(nll[0] - nll[1]) - 1))
  return np.percentile(draws, (2.5, 97.5), axis=0)


def test_nll_weighs_targets_equally():
  scores = AheadNLL(np.array([[2.0], [9.0]]), np.array([[1], [3]]))
  np.testing.assert_allclose(scores.nll, [11 / 4])


def test_change_is_over_all_targets():
  count = np.array([[1, 2], [3, 2]])
  baseline = AheadNLL(2.0 * count, count)
  arm = AheadNLL(2.0 * count + np.log([1.1, 0.8]) * count, count)
  np.testing.assert_allclose(relative_change(arm, baseline).percent, [10.0, -20.0])


def test_equal_shift_has_no_uncertainty():
  """However much texts differ, an equal shift of all of them is certain."""
  baseline = random_arms()[1]
  arm = AheadNLL(baseline.total + np.log(0.9) * baseline.count, baseline.count)
  change = relative_change(arm, baseline)
  for values in (change.percent, change.low, change.high):
    np.testing.assert_allclose(values, -10.0)


def test_interval_matches_slow_bootstrap():
  arm, baseline = random_arms()
  change = relative_change(arm, baseline, samples=8000)
  width = change.high - change.low
  # Two independent runs of the bootstrap: their ends agree to a few percent of the width.
  error = np.abs(np.stack([change.low, change.high]) - slow_change(arm, baseline, 8000))
  assert (error < 0.06 * width).all()


def test_interval_has_normal_width():
  rng = np.random.default_rng(0)
  count = np.ones((1000, 1), int)
  difference = rng.normal(0.0, 0.1, (1000, 1))
  change = relative_change(AheadNLL(3.0 + difference, count), AheadNLL(3.0 * count, count))
  half = 1.96 * 0.1 / np.sqrt(1000) * 100
  np.testing.assert_allclose(change.high - change.low, 2 * half, rtol=0.1)


def test_interval_covers_the_truth():
  """About 95 times in 100."""
  rng = np.random.default_rng(0)
  truth, covered, runs = -5.0, 0, 300
  for run in range(runs):
    count = rng.integers(1, 9, (60, 1))
    base = rng.gamma(4.0, 0.6, (60, 1))
    shift = np.log1p(truth / 100) + rng.normal(0, 0.1, (60, 1))
    change = relative_change(AheadNLL((base + shift) * count, count),
                             AheadNLL(base * count, count), samples=300, seed=run)
    covered += change.low[0] <= truth <= change.high[0]
  assert 0.90 <= covered / runs <= 0.98


def test_seed_decides_the_interval():
  arm, baseline = random_arms()
  first, again, other = (relative_change(arm, baseline, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first.low, again.low)
  assert (first.low != other.low).any()


def test_two_texts_give_an_interval():
  count = np.ones((10, 2), int)
  count[2:, 1] = 0
  base = AheadNLL(3.0 * count, count)
  change = relative_change(AheadNLL(base.total - np.arange(1, 11)[:, None] / 10 * count, count),
                           base)
  ends = 100 * (np.exp([-0.2, -0.1]) - 1)  # only the second, or only the first of the two
  np.testing.assert_allclose([change.low[1], change.high[1]], ends)


def test_position_without_target_is_named():
  count = np.array([[1, 1, 0], [1, 2, 0]])
  with pytest.raises(UserError, match='ahead position 3 .* 2 rows'):
    AheadNLL(1.0 * count, count)


def test_one_text_gives_no_interval():
  count = np.array([[1, 1], [1, 0], [1, 0]])
  scores = AheadNLL(1.0 * count, count)
  with pytest.raises(UserError, match='ahead position 2 .* 1 of 3 texts'):
    relative_change(scores, scores)


def test_infinite_loss_is_named():
  total = np.ones((3, 4))
  total[1, 2] = np.nan
  with pytest.raises(UserError, match='row 1 at ahead position 3 .*nan'):
    AheadNLL(total, np.ones((3, 4), int))


def test_differing_shapes_are_named():
  with pytest.raises(ValueError, match=r'total .*\(2, 3\), count \(2, 4\)'):
    AheadNLL(np.ones((2, 3)), np.ones((2, 4), int))


def test_differing_sizes_are_named():
  one, two = (AheadNLL(np.ones((texts, 3)), np.ones((texts, 3), int)) for texts in (4, 5))
  with pytest.raises(ValueError, match=r'own .*\[5, 3\], frozen .*\[4, 3\]'):
    check_paired({'frozen': one, 'own': two})


def test_differing_targets_are_named():
  count = np.ones((4, 3), int)
  other = count.copy()
  other[2, 1] = 7
  with pytest.raises(ValueError, match='text 2 .*7 .*position 2 in own and 1'):
    check_paired({'frozen': AheadNLL(1.0 * count, count), 'own': AheadNLL(1.0 * count, other)})


def test_merged_texts_keep_sums():
  scores = AheadNLL(np.arange(8.0).reshape(4, 2), np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
  merged = scores.merged(np.array([7, 2, 7, 2]))
  np.testing.assert_array_equal(merged.total, [[8, 10], [4, 6]])
  np.testing.assert_array_equal(merged.count, [[10, 12], [6, 8]])
  np.testing.assert_allclose(merged.nll, scores.nll)
