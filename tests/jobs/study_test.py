"""A study trains every arm once, scores all on the same questions, and refuses what is unfair."""

import dataclasses
import json

import numpy as np
import pytest

from latent_deliberation.data.config import DataConfig
from latent_deliberation.jobs.experiment import as_config, bind
from latent_deliberation.jobs.study import run_study
from latent_deliberation.jobs.study_config import ArmConfig, QuestionsConfig, Study
from latent_deliberation.model import weights
from latent_deliberation.model.fingerprint import fingerprint
from tests import finished

ADAPTERS = {'deliberation': {'trainable': 'lora', 'lora_rank': 2}}
CONSTANT = {'deliberation': {'trainable': 'constant'}}
ARMS = {'own': ArmConfig(), 'constant': ArmConfig(changes=CONSTANT),
        'unified': ArmConfig('unified', CONSTANT),
        'continued': ArmConfig('continued'), 'adapted': ArmConfig('adapted', ADAPTERS)}


def study(arms=ARMS, seeds=(0, 1), per_difficulty=3, **changes):
  experiment = dataclasses.replace(
      finished.experiment(training__loop__num_steps=2, pretraining__loop__num_steps=2),
      data=DataConfig(source='synthetic', name='hops', options={'nodes': 4, 'hops': 3},
                      documents=100, questions=6, vocabulary='byte', length=29,
                      validation_percent=20),
      **changes)
  experiment = dataclasses.replace(
      experiment, deliberation=dataclasses.replace(
          experiment.deliberation, num_latents=1, num_ahead=2, num_traces=6,
          anchor_tokens=tuple(4 + ord(sign) for sign in 'ABCD')),
      evaluation=dataclasses.replace(experiment.evaluation, num_texts=16, batch_size=8,
                                     num_traces=4, num_ahead=2, positions=(1, 2)))
  return Study(name='test', experiment=experiment, arms=arms, seeds=seeds,
               questions=QuestionsConfig(per_difficulty=per_difficulty, batch_size=4))


@pytest.fixture(scope='module')
def finished_study(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('study')
  return workdir, run_study(study(seeds=(0,)), workdir)


def test_every_arm_and_control_is_in_the_report(finished_study):
  workdir, summary = finished_study
  assert json.loads((workdir / 'results.json').read_text()) == summary
  names = ['frozen', 'own', 'shuffled', 'zero', 'mean', 'adapted', 'constant', 'continued',
           'unified']
  assert sorted(summary['by_difficulty']) == ['1', '2', '3']
  for scores in summary['by_difficulty'].values():
    assert list(scores) == names
    for arm in scores.values():
      assert 0 <= arm['accuracy'] <= 1 and len(arm['ci95']) == 2
  assert summary['items'] == 9
  assert (workdir / 'results.md').read_text().count('unified') >= 2
  assert summary['diagnostics']['own, seed 0'][0]['effective_rank'] >= 1


def test_the_frozen_decoder_stays_and_tuned_ones_leave_it(finished_study):
  workdir, summary = finished_study
  _, params = weights.load(workdir / 'decoder' / 'decoder')
  described = json.loads((workdir / 'arms/own/seed0/coprocessor/coprocessor.json').read_text())
  assert described['decoder'] == fingerprint(params)
  overall = summary['overall']
  assert overall['zero']['nll'] == pytest.approx(overall['frozen']['nll'], rel=1e-5)
  for arm in ('continued', 'adapted', 'unified'):
    assert overall[arm]['nll'] != pytest.approx(overall['frozen']['nll'], rel=1e-5)
  arms = summary['arms']
  assert arms['continued']['trained'] == arms['frozen']['total']
  assert arms['adapted']['trained'] < arms['own']['trained']
  assert arms['unified']['trained'] == arms['continued']['trained'] + arms['constant']['trained']
  assert arms['own']['flops_per_token'] > arms['constant']['flops_per_token'] > (
      arms['frozen']['flops_per_token'])


def test_more_seeds_go_on_from_what_is_complete(finished_study):
  workdir, summary = finished_study
  runs = sorted((workdir / 'arms').glob('*/seed0/metrics.jsonl'))
  before = [path.read_bytes() for path in runs]
  more = run_study(study({'own': ARMS['own']}, seeds=(0, 1)), workdir)
  assert [path.read_bytes() for path in runs] == before
  by_seed = more['overall']['own']['by_seed']
  assert len(by_seed) == 2 and more['seeds']['own'] == [0, 1]
  assert more['overall']['frozen'] == summary['overall']['frozen']


def test_text_is_scored_by_ahead_position(finished_study):
  workdir, _ = finished_study
  summary = run_study(study({'own': ARMS['own']}, seeds=(0,), per_difficulty=0), workdir)
  assert sorted(summary['by_position']) == ['1', '2']
  assert np.isfinite(summary['by_position']['1']['own']['change_pct'])


@pytest.mark.parametrize(('arms', 'message'), [
    ({}, 'there must be one'),
    ({'frozen': {}}, "none of .*'frozen'"),
    ({'a/b': {}}, 'slash'),
    ({'own': {'learns': 'everything'}}, "learns = 'everything'"),
    ({'own': {'lerns': 'latents'}}, "arms.own.lerns .* did you mean 'learns'"),
    ({'own': {'changes': {'decoder': {'num_layers': 3}}}}, r"\['decoder'\] must be the same"),
    ({'own': {'changes': {'deliberation': {'num_latent': 3}}}}, "did you mean 'num_latents'"),
    ({'own': {'changes': {'deliberation': {'num_latents': 0}}}}, 'num_latents = 0'),
    ({'unified': {'learns': 'unified'}}, "trainable = 'constant'"),
])
def test_unfair_or_unknown_arms_are_refused(arms, message):
  with pytest.raises(ValueError, match=message):
    study(arms)


def test_questions_need_a_task_that_asks_them():
  with pytest.raises(ValueError, match="data.source = 'stdlib' asks no questions"):
    Study('x', finished.experiment(data__source='stdlib', data__files=()), {'own': {}},
          questions=QuestionsConfig(per_difficulty=5))


def test_a_study_binds_and_comes_back():
  one = study()
  assert bind(as_config(one), Study) == one
