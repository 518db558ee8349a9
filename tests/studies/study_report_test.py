"""The figures of a study."""

import json

import numpy as np
import pytest

from latent_deliberation.studies.study_report import summarise_study
from tests.studies.results import answer, make_arm, questions, read, texts


def test_a_summary_of_questions_is_plain_json_with_the_documented_keys():
  summary = summarise_study(questions(), samples=50)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert set(summary) == {
    'name', 'items', 'items_by_difficulty', 'overall', 'by_difficulty', 'content_effect',
    'mcnemar', 'arms', 'seeds', 'bootstrap', 'diagnostics', 'command', 'machine', 'seconds',
    'git_commit', 'config'}
  assert list(summary['by_difficulty']) == ['1', '2']
  for arms in (summary['overall'], *summary['by_difficulty'].values()):
    assert list(arms) == ['frozen', 'own', 'shuffled', 'constant']
    for arm in arms.values():
      assert set(arm) == {'accuracy', 'ci95', 'by_seed', 'change', 'change_ci95', 'nll',
                          'nll_ci95', 'nll_change', 'nll_change_ci95'}
  assert set(summary['content_effect']['1']['own']) == {
    'accuracy', 'ci95', 'nll_saved', 'nll_saved_ci95'}
  assert set(summary['arms']['own']) == {
    'kind', 'trained', 'total', 'flops_per_token', 'train_flops', 'seconds', 'note'}
  assert (summary['items'], summary['items_by_difficulty']) == (40, {'1': 20, '2': 20})
  assert summary['seeds'] == {'frozen': [0], 'own': [0, 1], 'shuffled': [0, 1], 'constant': [0, 1]}
  assert summary['bootstrap'] == {'samples': 50, 'seed': 0}


def test_accuracies_are_means_over_seeds_and_change_against_the_frozen_decoder():
  own = summarise_study(questions(), samples=200)['overall']['own']
  assert own['by_seed'] == [0.6, 0.7]
  assert own['accuracy'] == pytest.approx(0.65)
  assert own['ci95'][0] < 0.65 < own['ci95'][1]
  assert own['change'] == pytest.approx(0.45)
  assert own['nll_change'] == pytest.approx(1.1 - 2.0)
  assert own['nll_change_ci95'] == pytest.approx([-0.9, -0.9])


def test_a_difficulty_counts_its_own_questions_alone():
  difficulty = np.where(np.arange(40) < 24, 1, 5)  # 24 = the items that own's first seed has right
  rows = summarise_study(questions(difficulty=difficulty), samples=50)['by_difficulty']
  assert rows['1']['own']['by_seed'] == [1.0, 1.0]
  assert rows['5']['own']['by_seed'] == [0.0, 0.25]


def test_content_is_own_against_shuffled_and_above_zero_where_it_helps():
  effect = summarise_study(questions(), samples=50)['content_effect']['overall']['own']
  assert effect['accuracy'] == pytest.approx(0.65 - 0.2)
  assert effect['nll_saved'] == pytest.approx(2.5 - 1.1)


def test_every_arm_with_a_shuffled_control_has_a_content_effect():
  arms = {**questions().arms, 'rank8': make_arm(answer(0.5)),
          'rank8/shuffled': make_arm(answer(0.4))}
  summary = summarise_study(questions(arms=arms), samples=50)
  effects = summary['content_effect']['overall']
  assert list(effects) == ['own', 'rank8']
  assert effects['rank8']['accuracy'] == pytest.approx(0.1)
  assert list(summary['mcnemar']['overall']) == [
    'own vs frozen', 'own vs shuffled', 'own vs constant',
    'rank8 vs frozen', 'rank8 vs rank8/shuffled', 'rank8 vs constant']


def test_mcnemar_pairs_seeds_in_order_and_repeats_the_one_frozen_run():
  tests = summarise_study(questions(), samples=50)['mcnemar']['overall']
  assert tests['own vs frozen'] == [
    {'seed': 0, 'own_only': 16, 'frozen_only': 0, 'p': pytest.approx(2 / 2**16)},
    {'seed': 1, 'own_only': 20, 'frozen_only': 0, 'p': pytest.approx(2 / 2**20)}]
  assert [row['own_only'] for row in tests['own vs constant']] == [12, 16]


def test_questions_that_are_all_alike_have_figures_overall():
  summary = summarise_study(questions(difficulty=None), samples=50)
  assert summary['by_difficulty'] == {}
  assert list(summary['content_effect']) == list(summary['mcnemar']) == ['overall']


def test_a_summary_of_text_is_plain_json_with_the_documented_keys():
  summary = summarise_study(texts(), samples=50)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert list(summary['by_position']) == list(summary['content_effect']) == ['1', '4']
  for arms in summary['by_position'].values():
    assert list(arms) == ['frozen', 'own', 'shuffled']
    assert set(arms['own']) == {'perplexity', 'change_pct', 'ci95', 'by_seed'}
  assert (summary['texts'], summary['targets']) == (6, {'1': 6, '4': 6})


def test_perplexity_changes_with_the_mean_loss_of_all_seeds():
  summary = summarise_study(texts(), samples=50)
  row, effect = summary['by_position']['4'], summary['content_effect']['4']
  nll = read(2.0).nll[3]
  assert row['frozen']['perplexity'] == pytest.approx(np.exp(nll))
  assert row['own']['by_seed'] == pytest.approx([np.exp(nll - 0.15), np.exp(nll - 0.05)])
  for change, nats in ((row['frozen'], 0.0), (row['own'], -0.1), (effect['own'], -0.2)):
    percent = 100 * np.expm1(nats)
    assert change['change_pct'] == pytest.approx(percent, abs=1e-9)
    assert change['ci95'] == pytest.approx([percent, percent], abs=1e-9)


def test_diagnostics_that_json_has_no_form_for_become_none():
  diagnostics = {'own, seed 0': [{'step': np.int64(10), 'gate': np.float32(0.5)},
                                 {'step': 20, 'gate': float('nan')}], 'own, seed 1': []}
  summary = summarise_study(questions(diagnostics=diagnostics), samples=50)
  assert summary['diagnostics'] == {
    'own, seed 0': [{'step': 10.0, 'gate': 0.5}, {'step': 20.0, 'gate': None}]}
