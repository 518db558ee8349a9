"""Accuracies, paired differences and McNemar's test."""

import math

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.study_result import (
  Outcomes,
  accuracy,
  accuracy_difference,
  mcnemar,
  nll,
  nll_difference,
)


def outcomes(*correct: bool) -> Outcomes:
  """Outcomes of that many questions; a wrong answer costs 2 nats, a right one 1."""
  right = np.array(correct, bool)
  return Outcomes(np.where(right, 1.0, 2.0), right)


def discordant(one_only: int, other_only: int, same: int = 0) -> tuple[Outcomes, Outcomes]:
  """Two runs of which so many questions are right in one alone."""
  one = [True] * one_only + [False] * other_only + [True] * same
  other = [False] * one_only + [True] * other_only + [True] * same
  return outcomes(*one), outcomes(*other)


def test_the_interval_of_an_accuracy_is_close_to_the_textbook_one():
  items, fraction = 2000, 0.3
  estimate = accuracy([outcomes(*(np.arange(items) < fraction * items))])
  half = 1.96 * math.sqrt(fraction * (1 - fraction) / items)
  assert estimate.value == pytest.approx(fraction)
  assert estimate.low == pytest.approx(fraction - half, abs=0.1 * half)
  assert estimate.high == pytest.approx(fraction + half, abs=0.1 * half)


def test_a_question_counts_with_its_mean_over_seeds():
  runs = [outcomes(True, True, False, False), outcomes(True, False, False, False)]
  assert accuracy(runs).value == pytest.approx(3 / 8)
  assert nll(runs).value == pytest.approx(13 / 8)


def test_seeds_are_not_taken_for_more_questions():
  run = outcomes(*([True, False] * 50))
  assert accuracy([run, run, run]) == accuracy([run])


@pytest.mark.parametrize('difference', [accuracy_difference, nll_difference])
def test_pairing_narrows_the_interval_of_arms_that_find_the_same_questions_hard(difference):
  rng = np.random.default_rng(0)
  base = rng.random(500) < 0.5
  arm = base | (rng.random(500) < 0.1)
  paired = difference([outcomes(*arm)], [outcomes(*base)])
  unpaired = difference([outcomes(*arm)], [outcomes(*rng.permutation(base))])
  assert paired.value == pytest.approx(unpaired.value)
  assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_differences_are_those_of_the_means_whatever_the_numbers_of_seeds():
  runs = [outcomes(True, True, True, False), outcomes(True, True, False, False)]
  frozen = [outcomes(True, False, False, False)]
  assert accuracy_difference(runs, frozen).value == pytest.approx(5 / 8 - 1 / 4)
  assert nll_difference(runs, frozen).value == pytest.approx(1.375 - 1.75)


def test_an_arm_differs_from_itself_by_nothing():
  runs = [outcomes(True, False, True)]
  difference = accuracy_difference(runs, runs)
  assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_seed_of_the_bootstrap_decides_the_interval():
  run = Outcomes(np.random.default_rng(0).normal(size=50), np.zeros(50, bool))
  assert nll([run], seed=1) == nll([run], seed=1) != nll([run], seed=2)


@pytest.mark.parametrize('one_only, other_only, p', [
  (0, 0, 1.0),
  (3, 3, 1.0),
  (5, 0, 2 / 32),
  (1, 5, 2 * (1 + 6) / 64),
  (10, 2, 2 * (1 + 12 + 66) / 4096),
])
def test_mcnemar_gives_the_p_values_that_are_worked_out_by_hand(one_only, other_only, p):
  one, other = discordant(one_only, other_only, same=7)
  assert mcnemar(one, other) == (one_only, other_only, pytest.approx(p))
  assert mcnemar(other, one) == (other_only, one_only, pytest.approx(p))


def test_mcnemar_of_many_questions_agrees_with_the_normal_approximation():
  first, second, p = mcnemar(*discordant(2600, 2400))
  # With the continuity correction: P(|Z| > (200 - 1) / sqrt(5000)).
  assert (first, second) == (2600, 2400)
  assert p == pytest.approx(math.erfc(199 / math.sqrt(5000) / math.sqrt(2)), rel=0.01)


def test_mcnemar_neither_overflows_nor_passes_one():
  assert mcnemar(*discordant(4000, 0))[2] == 0.0
  assert mcnemar(*discordant(2000, 2000))[2] == 1.0


def test_selected_questions_keep_their_outcomes():
  chosen = outcomes(True, False, True).select(np.array([False, True, True]))
  np.testing.assert_array_equal(chosen.nll, [2.0, 1.0])
  np.testing.assert_array_equal(chosen.correct, [False, True])


def test_different_numbers_of_items_are_both_named():
  one, other = outcomes(True, False, True), outcomes(True, False)
  for call in (lambda: accuracy([one, other]), lambda: nll([one, other])):
    with pytest.raises(UserError, match='run 1 of runs has 2 items, run 0 of runs has 3'):
      call()
  with pytest.raises(UserError, match='run 0 of baseline_runs has 2 items, run 0 of runs has 3'):
    accuracy_difference([one], [other])
  with pytest.raises(UserError, match='run 0 of other has 2 items, run 0 of one has 3'):
    mcnemar(one, other)


def test_too_few_items_or_runs_are_refused():
  with pytest.raises(UserError, match='0 items, at least 1 is needed'):
    outcomes()
  with pytest.raises(UserError, match='1 item, an interval needs at least 2'):
    accuracy([outcomes(True)])
  with pytest.raises(UserError, match='baseline_runs has 0 runs, at least 1 is needed'):
    nll_difference([outcomes(True, False)], [])


def test_an_nll_that_is_not_finite_is_named():
  with pytest.raises(UserError, match='the nll of item 2 is nan, expected a finite number'):
    Outcomes(np.array([1.0, 2.0, np.nan]), np.zeros(3, bool))


def test_shapes_and_types_that_do_not_fit_are_named():
  with pytest.raises(UserError, match=r'nll has shape \(3,\), correct \(2,\)'):
    Outcomes(np.zeros(3), np.zeros(2, bool))
  with pytest.raises(UserError, match='correct is float64, expected bool'):
    Outcomes(np.zeros(3), np.zeros(3))
