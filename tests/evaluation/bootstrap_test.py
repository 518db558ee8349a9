"""Perplexity changes and their intervals."""

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import AheadNLL, check_paired, relative_change


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


def test_nll_weighs_every_target_the_same():
  scores = AheadNLL(np.array([[2.0], [9.0]]), np.array([[1], [3]]))
  np.testing.assert_allclose(scores.nll, [11 / 4])


def test_the_change_is_that_of_the_mean_over_all_targets():
  count = np.array([[1, 2], [3, 2]])
  baseline = AheadNLL(2.0 * count, count)
  arm = AheadNLL(2.0 * count + np.log([1.1, 0.8]) * count, count)
  np.testing.assert_allclose(relative_change(arm, baseline).percent, [10.0, -20.0])


def test_an_equal_shift_of_every_text_leaves_no_uncertainty_however_much_texts_differ():
  baseline = random_arms()[1]
  arm = AheadNLL(baseline.total + np.log(0.9) * baseline.count, baseline.count)
  change = relative_change(arm, baseline)
  for values in (change.percent, change.low, change.high):
    np.testing.assert_allclose(values, -10.0)


def test_the_interval_equals_that_of_a_slow_bootstrap():
  arm, baseline = random_arms()
  change = relative_change(arm, baseline, samples=8000)
  width = change.high - change.low
  # Two independent runs of the bootstrap: their ends agree to a few percent of the width.
  error = np.abs(np.stack([change.low, change.high]) - slow_change(arm, baseline, 8000))
  assert (error < 0.06 * width).all()


def test_the_interval_has_the_width_of_the_normal_approximation():
  rng = np.random.default_rng(0)
  count = np.ones((1000, 1), int)
  difference = rng.normal(0.0, 0.1, (1000, 1))
  change = relative_change(AheadNLL(3.0 + difference, count), AheadNLL(3.0 * count, count))
  half = 1.96 * 0.1 / np.sqrt(1000) * 100
  np.testing.assert_allclose(change.high - change.low, 2 * half, rtol=0.1)


def test_the_interval_covers_the_truth_about_95_times_in_100():
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


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
  arm, baseline = random_arms()
  first, again, other = (relative_change(arm, baseline, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first.low, again.low)
  assert (first.low != other.low).any()


def test_a_position_that_only_two_texts_reach_has_a_finite_interval():
  count = np.ones((10, 2), int)
  count[2:, 1] = 0
  base = AheadNLL(3.0 * count, count)
  change = relative_change(AheadNLL(base.total - np.arange(1, 11)[:, None] / 10 * count, count),
                           base)
  ends = 100 * (np.exp([-0.2, -0.1]) - 1)  # only the second, or only the first of the two
  np.testing.assert_allclose([change.low[1], change.high[1]], ends)


def test_a_position_with_no_target_is_named():
  count = np.array([[1, 1, 0], [1, 2, 0]])
  with pytest.raises(UserError, match='ahead position 3 has no target in any of 2 texts'):
    AheadNLL(1.0 * count, count)


def test_a_position_that_one_text_reaches_has_no_interval():
  count = np.array([[1, 1], [1, 0], [1, 0]])
  scores = AheadNLL(1.0 * count, count)
  with pytest.raises(UserError, match='ahead position 2 has targets in 1 of 3 texts.*at least 2'):
    relative_change(scores, scores)


def test_a_loss_that_is_not_finite_is_named():
  total = np.ones((3, 4))
  total[1, 2] = np.nan
  with pytest.raises(UserError, match='text 1 at ahead position 3 is nan'):
    AheadNLL(total, np.ones((3, 4), int))


def test_shapes_that_differ_are_both_named():
  with pytest.raises(UserError, match=r'total has shape \(2, 3\), count \(2, 4\)'):
    AheadNLL(np.ones((2, 3)), np.ones((2, 4), int))


def test_arms_of_different_size_are_both_named():
  one, two = (AheadNLL(np.ones((texts, 3)), np.ones((texts, 3), int)) for texts in (4, 5))
  with pytest.raises(UserError, match=r'own has \[texts, A\] = \[5, 3\], frozen has \[4, 3\]'):
    check_paired({'frozen': one, 'own': two})


def test_arms_with_different_targets_are_both_named():
  count = np.ones((4, 3), int)
  other = count.copy()
  other[2, 1] = 7
  with pytest.raises(UserError, match='text 2 has 7 targets at ahead position 2 in own and 1 in'):
    check_paired({'frozen': AheadNLL(1.0 * count, count), 'own': AheadNLL(1.0 * count, other)})


def test_merged_texts_keep_the_sums_and_count_once():
  scores = AheadNLL(np.arange(8.0).reshape(4, 2), np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
  merged = scores.merged(np.array([7, 2, 7, 2]))
  np.testing.assert_array_equal(merged.total, [[8, 10], [4, 6]])
  np.testing.assert_array_equal(merged.count, [[10, 12], [6, 8]])
  np.testing.assert_allclose(merged.nll, scores.nll)
