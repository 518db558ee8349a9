"""Scores are computed once, and again when anything that they depend on has changed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import AheadNLL
from latent_deliberation.files import seal
from latent_deliberation.provenance import git_commit
from latent_deliberation.studies.kept_scores import keep_scores, scores_identity
from latent_deliberation.studies.study_result import Outcomes
from tests.studies.tiny_study import study

TEXT = {'own': AheadNLL(np.array([[0.1, 1 / 3], [2.0, 0.0]]), np.array([[4, 3], [4, 0]])),
        'zero': AheadNLL(np.array([[1.5, 2.5], [2.0, 0.0]]), np.array([[4, 3], [4, 0]]))}
QUESTIONS = {'own': Outcomes(np.array([0.1, 1 / 3]), np.array([True, False]))}


def never():
  raise AssertionError('scored again')


@pytest.mark.parametrize('scores', [TEXT, QUESTIONS])
def test_kept_scores_are_the_same(tmp_path, scores):
  path = tmp_path / 'scores.json'
  assert keep_scores(path, 'a', lambda: scores) is scores
  kept = keep_scores(path, 'a', never)
  assert list(kept) == list(scores)
  for name, expected in scores.items():
    for field in dataclasses.fields(expected):
      found, wanted = getattr(kept[name], field.name), getattr(expected, field.name)
      np.testing.assert_array_equal(found, wanted)
      assert found.dtype == wanted.dtype


def test_another_identity_is_scored_again(tmp_path):
  path = tmp_path / 'scores.json'
  keep_scores(path, 'a', lambda: TEXT)
  assert keep_scores(path, 'b', lambda: QUESTIONS) is QUESTIONS
  assert list(keep_scores(path, 'b', never)) == ['own']


def test_log_names_the_commit(tmp_path, caplog):
  path = tmp_path / 'scores.json'
  keep_scores(path, 'a', lambda: TEXT)
  with caplog.at_level('INFO'):
    keep_scores(path, 'a', never)
  assert f'of git commit {git_commit()},' in caplog.text
  assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_scores_of_another_commit_are_warned_of(tmp_path, caplog):
  path = tmp_path / 'scores.json'
  keep_scores(path, 'a', lambda: TEXT)
  path.write_text(json.dumps(seal({**json.loads(path.read_text()), 'git_commit': 'abc'})))
  keep_scores(path, 'a', never)
  assert 'scores of git commit abc' in caplog.text


@pytest.mark.parametrize('damage', [
    lambda text: text[:-20], lambda text: text.replace('2.5', '2.4'), lambda text: '[]'])
def test_damaged_scores_are_told(tmp_path, damage):
  path = tmp_path / 'scores.json'
  keep_scores(path, 'a', lambda: TEXT)
  path.write_text(damage(path.read_text()))
  with pytest.raises(UserError, match=r'scores\.json is damaged: remove it'):
    keep_scores(path, 'a', never)


def test_identity_has_all_that_scores_depend_on():
  experiment, params = study().experiment, {'gate': jnp.ones(2)}
  first = scores_identity(experiment, ('own',), params, 'decoder', 'text')
  assert first == scores_identity(experiment, ('own',), {'gate': jnp.ones(2)}, 'decoder', 'text')
  # A seed and what is reported of the scores change none of them.
  same = dataclasses.replace(experiment, seed=7, evaluation=dataclasses.replace(
      experiment.evaluation, bootstrap_samples=5, positions=(1,)))
  assert first == scores_identity(same, ('own',), params, 'decoder', 'text')

  longer = dataclasses.replace(experiment, evaluation=dataclasses.replace(
      experiment.evaluation, num_texts=32))
  more = dataclasses.replace(experiment, deliberation=dataclasses.replace(
      experiment.deliberation, num_latents=2))
  others = {scores_identity(*changed) for changed in (
      (longer, ('own',), params, 'decoder', 'text'), (more, ('own',), params, 'decoder', 'text'),
      (experiment, ('own', 'zero'), params, 'decoder', 'text'),
      (experiment, ('own',), {'gate': jnp.zeros(2)}, 'decoder', 'text'),
      (experiment, ('own',), params, 'another', 'text'),
      (experiment, ('own',), params, 'decoder', 'other text'))}
  assert len(others) == 6 and first not in others
