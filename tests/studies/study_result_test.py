"""What a study measured fits together, or is refused with words that help."""

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.study_result import controlled_arm
from tests.studies.results import answer, make_arm, questions, read, texts


def test_controls_are_told_from_arms_by_their_last_name():
  names = ['frozen', 'own', 'shuffled', 'zero', 'depth/2', 'depth/2/shuffled', 'scratch/mean']
  assert [controlled_arm(name) for name in names] == [
    None, None, 'own', 'own', None, 'depth/2', 'scratch']


def test_an_arm_has_outcomes_or_text():
  for text in ((), (read(2.0),)):
    with pytest.raises(UserError, match=f'1 outcomes and {len(text)}|0 outcomes and 0 scores'):
      make_arm(answer(0.5), **({'text': text} if text else {'outcomes': ()}))


def test_an_arm_has_a_seed_and_a_time_for_each_run():
  with pytest.raises(UserError, match='2 runs, 1 seeds and 2 seconds'):
    make_arm(answer(0.5), answer(0.6), seeds=(0,))
  with pytest.raises(UserError, match='1 runs, 1 seeds and 0 seconds'):
    make_arm(answer(0.5), seconds=())


@pytest.mark.parametrize('cost', [{'flops_per_token': 0.0}, {'train_flops': float('nan')}])
def test_costs_are_finite_and_a_token_costs_something(cost):
  (name, value), = cost.items()
  with pytest.raises(UserError, match=f'{name} = {value}'):
    make_arm(answer(0.5), **cost)


def test_the_frozen_decoder_comes_first():
  frozen, own = make_arm(answer(0.5)), make_arm(answer(0.6))
  for arms in ({'own': own, 'frozen': frozen}, {'own': own}, {}):
    with pytest.raises(UserError, match="the first must be 'frozen'"):
      questions(arms=arms)


def test_a_control_needs_its_arm():
  arm = make_arm(answer(0.5))
  with pytest.raises(UserError, match="'rank8/shuffled' is a control of 'rank8', which is not"):
    questions(arms={'frozen': arm, 'own': arm, 'rank8/shuffled': arm})


def test_questions_and_text_are_not_mixed():
  with pytest.raises(UserError, match=r"only \['own'\] have scores on text"):
    questions(arms={'frozen': make_arm(answer(0.5)), 'own': make_arm(read(2.0))})
  with pytest.raises(UserError, match=r'positions = \(1,\), but the arms answered questions'):
    questions(positions=(1,))
  with pytest.raises(UserError, match='difficulty is given, but the arms were scored on text'):
    texts(difficulty=np.arange(6))


def test_all_arms_are_measured_on_the_same_items():
  with pytest.raises(UserError, match='run 0 of own has 39 items, run 0 of frozen has 40'):
    questions(arms={'frozen': make_arm(answer(0.5)),
                    'own': make_arm(answer(0.5).select(np.arange(40) > 0))})
  fewer = read(2.0).merged(np.array([0, 0, 1, 2, 3, 4]))
  with pytest.raises(UserError, match=r'own, seed 1 has \[texts, A\] = \[5, 4\], frozen, seed 0'):
    texts(arms={'frozen': make_arm(read(2.0)), 'own': make_arm(read(2.0), fewer)})


def test_difficulties_fit_the_items():
  with pytest.raises(UserError, match=r'difficulty is int64 \[39\].*each of the 40 items'):
    questions(difficulty=np.ones(39, int))
  with pytest.raises(UserError, match=r'difficulty is float64 \[40\]'):
    questions(difficulty=np.ones(40))
  with pytest.raises(UserError, match='difficulty 7 has 1 item, an interval needs at least 2'):
    questions(difficulty=np.array([7] + [1] * 39))


@pytest.mark.parametrize('positions', [(), None, (2, 1), (0, 1), (1, 5)])
def test_positions_are_those_that_were_scored(positions):
  with pytest.raises(UserError, match='must be increasing, from 1 to the 4 ahead positions'):
    texts(positions=positions)
