"""Accuracies, paired differences, McNemar's test; arms and a result that fit together."""

import math

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.study_result import (
  Outcomes,
  accuracy,
  accuracy_difference,
  controlled_arm,
  mcnemar,
  nll,
  nll_difference,
)
from tests.studies.results import answer, make_arm, questions, read, texts


def outcomes(*correct: bool) -> Outcomes:
  """Outcomes of that many questions; a wrong answer costs 2 nats, a right one 1."""
  right = np.array(correct, bool)
  return Outcomes(np.where(right, 1.0, 2.0), right)


def discordant(one_only: int, other_only: int, same: int = 0) -> tuple[Outcomes, Outcomes]:
  """Two runs of which so many questions are right in one alone."""
  one = [True] * one_only + [False] * other_only + [True] * same
  other = [False] * one_only + [True] * other_only + [True] * same
  return outcomes(*one), outcomes(*other)


def test_interval_is_close_to_textbook():
  items, fraction = 2000, 0.3
  estimate = accuracy([outcomes(*(np.arange(items) < fraction * items))])
  half = 1.96 * math.sqrt(fraction * (1 - fraction) / items)
  assert estimate.value == pytest.approx(fraction)
  assert estimate.low == pytest.approx(fraction - half, abs=0.1 * half)
  assert estimate.high == pytest.approx(fraction + half, abs=0.1 * half)


def test_question_counts_with_its_mean():
  runs = [outcomes(True, True, False, False), outcomes(True, False, False, False)]
  assert accuracy(runs).value == pytest.approx(3 / 8)
  assert nll(runs).value == pytest.approx(13 / 8)


def test_seeds_are_no_more_questions():
  run = outcomes(*([True, False] * 50))
  assert accuracy([run, run, run]) == accuracy([run])


@pytest.mark.parametrize('difference', [accuracy_difference, nll_difference])
def test_pairing_narrows_the_interval(difference):
  """The arms find the same questions hard."""
  rng = np.random.default_rng(0)
  base = rng.random(500) < 0.5
  arm = base | (rng.random(500) < 0.1)
  paired = difference([outcomes(*arm)], [outcomes(*base)])
  unpaired = difference([outcomes(*arm)], [outcomes(*rng.permutation(base))])
  assert paired.value == pytest.approx(unpaired.value)
  assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_differences_are_of_means():
  """The arms may have different numbers of seeds."""
  runs = [outcomes(True, True, True, False), outcomes(True, True, False, False)]
  frozen = [outcomes(True, False, False, False)]
  assert accuracy_difference(runs, frozen).value == pytest.approx(5 / 8 - 1 / 4)
  assert nll_difference(runs, frozen).value == pytest.approx(1.375 - 1.75)


def test_arm_equals_itself():
  runs = [outcomes(True, False, True)]
  difference = accuracy_difference(runs, runs)
  assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_bootstrap_seed_decides_interval():
  run = Outcomes(np.random.default_rng(0).normal(size=50), np.zeros(50, bool))
  assert nll([run], seed=1) == nll([run], seed=1) != nll([run], seed=2)


@pytest.mark.parametrize('one_only, other_only, p', [
  (0, 0, 1.0),
  (3, 3, 1.0),
  (5, 0, 2 / 32),
  (1, 5, 2 * (1 + 6) / 64),
  (10, 2, 2 * (1 + 12 + 66) / 4096),
])
def test_mcnemar_by_hand(one_only, other_only, p):
  one, other = discordant(one_only, other_only, same=7)
  assert mcnemar(one, other) == (one_only, other_only, pytest.approx(p))
  assert mcnemar(other, one) == (other_only, one_only, pytest.approx(p))


def test_mcnemar_is_nearly_normal():
  first, second, p = mcnemar(*discordant(2600, 2400))
  # With the continuity correction: P(|Z| > (200 - 1) / sqrt(5000)).
  assert (first, second) == (2600, 2400)
  assert p == pytest.approx(math.erfc(199 / math.sqrt(5000) / math.sqrt(2)), rel=0.01)


@pytest.mark.parametrize('one_only, other_only', [(1, 0), (41, 158), (294, 167), (36, 575)])
def test_mcnemar_equals_sums_of_integers(one_only, other_only):
  """The p-value by the formula: both tails of binomial(n, 1/2), in integers."""
  n, least = one_only + other_only, min(one_only, other_only)
  p = 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n
  assert mcnemar(*discordant(one_only, other_only))[2] == pytest.approx(min(1, p), rel=1e-9, abs=0)


def test_mcnemar_at_its_ends():
  assert mcnemar(*discordant(4000, 0))[2] == 0.0
  assert mcnemar(*discordant(2000, 2000))[2] == 1.0


def test_selected_questions_keep_outcomes():
  chosen = outcomes(True, False, True).select(np.array([False, True, True]))
  np.testing.assert_array_equal(chosen.nll, [2.0, 1.0])
  np.testing.assert_array_equal(chosen.correct, [False, True])


def test_differing_items_are_named():
  one, other = outcomes(True, False, True), outcomes(True, False)
  for call in (lambda: accuracy([one, other]), lambda: nll([one, other])):
    with pytest.raises(ValueError, match='run 1 of runs .*2 .*run 0 of runs .*3'):
      call()
  with pytest.raises(ValueError, match='run 0 of baseline_runs .*2 .*run 0 of runs .*3'):
    accuracy_difference([one], [other])
  with pytest.raises(ValueError, match='run 0 of other .*2 .*run 0 of one .*3'):
    mcnemar(one, other)


def test_too_few_items_or_runs():
  with pytest.raises(ValueError, match='0 items'):
    outcomes()
  with pytest.raises(UserError, match='1 item, .*interval'):
    accuracy([outcomes(True)])
  with pytest.raises(ValueError, match='baseline_runs has 0 runs'):
    nll_difference([outcomes(True, False)], [])


def test_infinite_nll_is_named():
  with pytest.raises(UserError, match='item 2 is nan'):
    Outcomes(np.array([1.0, 2.0, np.nan]), np.zeros(3, bool))


def test_bad_shapes_and_types():
  with pytest.raises(ValueError, match=r'nll .*\(3,\), correct \(2,\)'):
    Outcomes(np.zeros(3), np.zeros(2, bool))
  with pytest.raises(ValueError, match='correct .*float64.*bool'):
    Outcomes(np.zeros(3), np.zeros(3))


def test_controlled_arm():
  """A control is told from an arm by its last name."""
  names = ['frozen', 'own', 'shuffled', 'zero', 'depth/2', 'depth/2/shuffled', 'scratch/mean']
  assert [controlled_arm(name) for name in names] == [
    None, None, 'own', 'own', None, 'depth/2', 'scratch']


def test_arm_has_outcomes_or_text_scores():
  for text in ((), (read(2.0),)):
    with pytest.raises(ValueError, match=f'{len(text)} outcomes and {len(text)} text_scores'):
      make_arm(answer(0.5), **({'text_scores': text} if text else {'outcomes': ()}))


def test_arm_has_seed_and_time():
  with pytest.raises(ValueError, match='2 runs, 1 seeds and 2 seconds'):
    make_arm(answer(0.5), answer(0.6), seeds=(0,))
  with pytest.raises(ValueError, match='1 runs, 1 seeds and 0 seconds'):
    make_arm(answer(0.5), seconds=())


@pytest.mark.parametrize('cost', [{'flops_per_token': 0.0}, {'train_flops': float('nan')}])
def test_costs_are_finite(cost):
  (name, value), = cost.items()
  with pytest.raises(ValueError, match=f'{name} = {value}'):
    make_arm(answer(0.5), **cost)


def test_frozen_comes_first():
  frozen, own = make_arm(answer(0.5)), make_arm(answer(0.6))
  for arms in ({'own': own, 'frozen': frozen}, {'own': own}, {}):
    with pytest.raises(ValueError, match=r"arms = .*'frozen'"):
      questions(arms=arms)


def test_control_needs_its_arm():
  arm = make_arm(answer(0.5))
  with pytest.raises(ValueError, match="'rank8/shuffled' .*'rank8'"):
    questions(arms={'frozen': arm, 'own': arm, 'rank8/shuffled': arm})


def test_questions_and_text_are_not_mixed():
  with pytest.raises(ValueError, match=r"only \['own'\] have scores on text"):
    questions(arms={'frozen': make_arm(answer(0.5)), 'own': make_arm(read(2.0))})
  with pytest.raises(ValueError, match=r'positions = \(1,\).*None'):
    questions(positions=(1,))
  with pytest.raises(ValueError, match='difficulty .*None'):
    texts(difficulty=np.arange(6))


def test_arms_have_the_same_items():
  with pytest.raises(ValueError, match='run 0 of own .*39 .*run 0 of frozen .*40'):
    questions(arms={'frozen': make_arm(answer(0.5)),
                    'own': make_arm(answer(0.5).select(np.arange(40) > 0))})
  fewer = read(2.0).merged(np.maximum(np.arange(24) - 1, 0))
  with pytest.raises(ValueError, match=r'own, seed 1 .*\[23, 4\], frozen, seed 0'):
    texts(arms={'frozen': make_arm(read(2.0)), 'own': make_arm(read(2.0), fewer)})


def test_difficulties_fit_the_items():
  with pytest.raises(ValueError, match=r'difficulty .*int64 \[39\].* 40 '):
    questions(difficulty=np.ones(39, int))
  with pytest.raises(ValueError, match=r'difficulty .*float64 \[40\]'):
    questions(difficulty=np.ones(40))
  with pytest.raises(ValueError, match='difficulty 7 has 1 item'):
    questions(difficulty=np.array([7] + [1] * 39))


@pytest.mark.parametrize('positions', [(), None, (2, 1), (0, 1), (1, 5)])
def test_positions_were_scored(positions):
  with pytest.raises(ValueError, match='positions = .* 1 to the 4 '):
    texts(positions=positions)
