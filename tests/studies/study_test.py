"""A study trains every arm once, scores all on the same questions, and refuses unfair arms."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.loading import prepare_data
from latent_deliberation.data.text_sizes import write_choices
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import ARM_DATA
from latent_deliberation.sharding import MeshConfig, make_mesh
from latent_deliberation.studies import study as study_module
from latent_deliberation.studies.study_config import QuestionsConfig, Study
from latent_deliberation.studies.study_result import ChainOutcomes
from tests import finished
from tests.studies.tiny_study import ARMS, study, word_problems


def run(workdir, which, *overrides):
  """Runs the study as a user would, and returns its report."""
  process = subprocess.run(
      [sys.executable, 'launch/study.py', f'--config=tests/studies/tiny_study.py:{which}',
       f'--workdir={workdir}', *overrides], cwd=finished.ROOT, env=finished.environment(),
      text=True, capture_output=True, timeout=300)
  assert process.returncode == 0, process.stderr
  assert (workdir / 'results.md').read_text().strip() in process.stdout
  return json.loads((workdir / 'results.json').read_text())


@pytest.fixture(scope='module')
def two_arms(tmp_path_factory):
  """A study of own latents, and of constant soft tokens with a tuned decoder."""
  workdir = tmp_path_factory.mktemp('two')
  return workdir, run(workdir, 'all', '--arm=own', '--arm=joint')


@pytest.fixture(scope='module')
def finished_study(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('study')
  return workdir, run(workdir, 'all')


def test_two_arms(two_arms):
  """Both arms and all controls are scored; the tuned decoder differs from the frozen one."""
  workdir, summary = two_arms
  overall, names = summary['overall'], ['frozen', 'own', 'shuffled', 'zero', 'mean', 'joint']
  assert list(overall) == names
  assert all(sorted(scores) == sorted(names) for scores in summary['by_difficulty'].values())
  assert summary['items'] == 9 and sorted(summary['by_difficulty']) == ['1', '2', '3']
  _, params = weights.load(workdir / 'decoder' / 'decoder')
  described = json.loads((workdir / 'arms/own/seed0/coprocessor/coprocessor.json').read_text())
  assert described['decoder'] == fingerprint(params)
  assert overall['zero']['nll'] == pytest.approx(overall['frozen']['nll'], rel=1e-5)
  assert overall['joint']['nll'] != pytest.approx(overall['frozen']['nll'], rel=1e-5)
  assert summary['arms']['joint']['trained'] > summary['arms']['frozen']['total']


@pytest.mark.slow
def test_report_has_every_arm_and_control(finished_study):
  workdir, summary = finished_study
  names = ['frozen', 'own', 'shuffled', 'zero', 'mean', 'lora', 'constant', 'finetuned',
           'joint']
  assert sorted(summary['by_difficulty']) == ['1', '2', '3']
  for scores in summary['by_difficulty'].values():
    assert sorted(scores) == sorted(names)
    for arm in scores.values():
      assert 0 <= arm['accuracy'] <= 1 and len(arm['ci95']) == 2
  assert summary['items'] == 9 and summary['bootstrap'] == {'samples': 100, 'seed': 0}
  assert (workdir / 'results.md').read_text().count('joint') >= 2
  assert summary['diagnostics']['own, seed 0'][0]['effective_rank'] >= 1


@pytest.mark.slow
def test_frozen_decoder_stays(finished_study):
  """Tuned decoders differ from it."""
  workdir, summary = finished_study
  _, params = weights.load(workdir / 'decoder' / 'decoder')
  described = json.loads((workdir / 'arms/own/seed0/coprocessor/coprocessor.json').read_text())
  assert described['decoder'] == fingerprint(params)
  overall = summary['overall']
  assert overall['zero']['nll'] == pytest.approx(overall['frozen']['nll'], rel=1e-5)
  for arm in ('finetuned', 'lora', 'joint'):
    assert overall[arm]['nll'] != pytest.approx(overall['frozen']['nll'], rel=1e-5)
  arms = summary['arms']
  assert arms['finetuned']['trained'] == arms['frozen']['total']
  assert arms['lora']['trained'] < arms['own']['trained']
  assert arms['joint']['trained'] == arms['finetuned']['trained'] + arms['constant']['trained']
  assert arms['own']['flops_per_token'] > arms['constant']['flops_per_token'] > (
      arms['frozen']['flops_per_token'])


def test_results_are_kept(two_arms):
  """Results of other settings, or of fewer arms, do not replace those that are there."""
  path = two_arms[0] / 'results.json'
  one = bind(as_config(study()), Study)
  study_module.check_results(one, tuple(one.arms), path)
  with pytest.raises(UserError, match=f"{path} has the arm 'joint'.*--overwrite"):
    study_module.check_results(one, ('own', 'constant'), path)
  with pytest.raises(UserError, match=r'config.seeds: \[0\] saved, \[0, 1\] now(?s:.)*--overwrite'):
    study_module.check_results(dataclasses.replace(one, seeds=(0, 1)), tuple(one.arms), path)


@pytest.mark.slow
def test_more_seeds_keep_complete_runs(finished_study):
  workdir, summary = finished_study
  trained = workdir / 'arms/own/seed0/coprocessor/coprocessor.json'
  before = trained.stat().st_mtime_ns
  more = run(workdir, 'own', '--overwrite', '--config.seeds=(0,1)')
  assert trained.stat().st_mtime_ns == before
  assert more['overall']['own']['by_seed'][0] == summary['overall']['own']['by_seed'][0]
  assert len(more['overall']['own']['by_seed']) == 2 and more['seeds']['own'] == [0, 1]
  assert more['overall']['frozen'] == summary['overall']['frozen']


@pytest.mark.slow
def test_some_arms_are_reported_alike(finished_study):
  workdir, summary = finished_study
  some = run(workdir, 'all', '--overwrite', '--arm=finetuned', '--arm=own')
  assert list(some['overall']) == ['frozen', 'own', 'shuffled', 'zero', 'mean', 'finetuned']
  for name in some['overall']:
    assert some['overall'][name] == summary['overall'][name]


def test_decoder_that_exists(quickstart, tmp_path, monkeypatch):
  """It is loaded with its own architecture, and none is pretrained."""
  monkeypatch.setattr(study_module, 'pretrain', lambda *unused: pytest.fail('pretraining began'))
  decoder = quickstart / 'pretraining/decoder'
  data = DataConfig(files=(str(finished.TEXTS),), vocabulary='byte', length=64,
                    validation_percent=30)
  start = study({name: ARMS[name] for name in ('own', 'lora', 'finetuned')}, data=data,
                per_difficulty=0)
  other = dataclasses.replace(start.experiment.decoder, num_layers=1)
  start = dataclasses.replace(start, experiment=dataclasses.replace(
      start.experiment, decoder=other,
      deliberation=dataclasses.replace(start.experiment.deliberation, anchor_tokens=())))
  asked, mesh = study_module.take_decoder(start, str(decoder)), make_mesh(MeshConfig())
  assert asked.experiment.decoder == finished.experiment().decoder
  study_module.check_arms(asked, tuple(asked.arms), tmp_path, mesh)
  prepare_data(data, asked.experiment.decoder.vocab_size, tmp_path)
  frozen = study_module._open_decoder(asked.experiment, tmp_path, mesh)
  assert frozen.directory == decoder
  assert frozen.fingerprint == fingerprint(weights.load(decoder)[1])


def test_unknown_arm_is_refused():
  """The error names the arms that the study has."""
  assert study_module.choose_arms(study(), ['joint', 'own']) == ('own', 'joint')
  assert study_module.choose_arms(study(), []) == tuple(study().arms)
  with pytest.raises(UserError, match="--arm=owm.*'own', 'constant'"):
    study_module.choose_arms(study(), ['own', 'owm'])


@pytest.mark.slow
def test_arm_data_options_are_for_arms(finished_study):
  """The decoder trains on its own text."""
  workdir, summary = finished_study
  other = run(workdir, 'arm_data_options', '--overwrite')
  assert other['overall']['frozen'] == summary['overall']['frozen']
  assert json.loads((workdir / 'arms/taught/seed0/run.json').read_text())['data'] != (
      json.loads((workdir / 'arms/own/seed0/run.json').read_text())['data'])
  assert json.loads((workdir / 'decoder/run.json').read_text())['config']['data']['options'] == {
      'nodes': 4, 'hops': 3}


@pytest.mark.slow
def test_text_is_scored_by_position(finished_study):
  workdir, _ = finished_study
  summary = run(workdir, 'own', '--overwrite', '--config.questions.per_difficulty=0',
                '--config.seeds=(0,1)')
  assert sorted(summary['by_position']) == ['1', '2']
  assert np.isfinite(summary['by_position']['1']['own']['change_pct'])


@pytest.mark.slow
def test_chain_arm_of_word_problems(tmp_path):
  """The same questions after latents, and after the decoder's own chain."""
  summary = run(tmp_path, 'word_problems')
  assert list(summary['overall']) == ['frozen', 'chain', 'own', 'shuffled', 'zero', 'mean']
  assert summary['items'] == 6 and summary['arms']['chain']['kind'].startswith('decoder with its')
  assert summary['arms']['chain']['flops_per_token'] > summary['arms']['own']['flops_per_token']
  assert np.isfinite(summary['overall']['chain']['nll'])
  vocabularies = [tmp_path / place / 'vocabulary.model' for place in ('', ARM_DATA)]
  assert vocabularies[0].read_bytes() == vocabularies[1].read_bytes()


def test_chains_are_written_once(tmp_path):
  """A relaunch takes them from a file; another limit or decoder writes them again."""
  written = []

  def write(experiment, params):
    written.append(params)
    return ChainOutcomes(np.array([0.5, 1.5]), np.array([True, False]), np.array([4, 7]))

  scorer = SimpleNamespace(identity='questions', score_chains=write)

  def score(limit, decoder='d1'):
    start = word_problems()
    asked = dataclasses.replace(start, questions=dataclasses.replace(
        start.questions, chain_tokens=limit))
    frozen = study_module.FrozenDecoder(tmp_path, decoder, decoder)
    return study_module._score_chains(asked, frozen, tmp_path, scorer)

  first, again = score(12), score(12)
  assert written == ['d1']
  for field in dataclasses.fields(ChainOutcomes):
    np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))
  score(12, 'd2')
  score(9, 'd2')
  assert written == ['d1', 'd2', 'd2']


def test_directory_of_a_quickstart(tmp_path):
  """A study takes no choices of a quickstart, and does not replace its run.json."""
  write_choices(tmp_path, 'quickstart', {}, {})
  before = (tmp_path / 'run.json').read_text()
  with pytest.raises(UserError, match=f"{tmp_path} .*'quickstart'.*'study'.*--workdir"):
    study_module.run_study(study(), tmp_path)
  assert (tmp_path / 'run.json').read_text() == before


def test_chains_need_their_task():
  with pytest.raises(UserError, match="chain_tokens = 9.*name = 'pointer_chasing'"):
    dataclasses.replace(study(), questions=QuestionsConfig(per_difficulty=3, chain_tokens=9))
  start, asked = study(), QuestionsConfig(per_difficulty=3, chain_tokens=9)
  for options, dtype, message in (
      ({'stories': 1.0, 'chains': 0.0}, 'float32', 'chain_tokens = 9.*data.options.chains = 0'),
      ({'stories': 1.0}, 'int8', "chain_tokens = 9.*frozen_dtype = 'int8'")):
    problems = dataclasses.replace(
        start.experiment,
        data=dataclasses.replace(start.experiment.data, name='word_problems', options=options),
        computation=dataclasses.replace(start.experiment.computation, frozen_dtype=dtype))
    with pytest.raises(UserError, match=message):
      dataclasses.replace(start, experiment=problems, questions=asked)
  with pytest.raises(UserError, match=r"questions.options = {'asked': ''}.*pointer_chasing"):
    dataclasses.replace(study(), questions=QuestionsConfig(options={'asked': ''}))


@pytest.mark.parametrize(('arms', 'message'), [
    ({}, r'arms = \[\]'),
    ({'frozen': {}}, r"arms = \['frozen'\]"),
    ({'a/b': {}}, r"arms = \['a/b'\]"),
    ({'own': {'learns': 'everything'}}, "learns = 'everything'"),
    ({'own': {'lerns': 'latents'}}, "arms.own.lerns .* did you mean 'learns'"),
    ({'own': {'changes': {'decoder': {'num_layers': 3}}}}, r"arms.own.changes .*'decoder'"),
    ({'own': {'changes': {'deliberation': {'num_latent': 3}}}},
     "did you mean 'deliberation.num_latents'"),
    ({'own': {'changes': {'deliberation': {'num_latents': 0}}}}, 'num_latents = 0'),
])
def test_unfair_or_unknown_arms(arms, message):
  with pytest.raises(UserError, match=message):
    study(arms)


def test_bad_arm_data_options_are_refused():
  with pytest.raises(UserError, match=r"arm_data_options = .*2.0.*'stdlib'"):
    study(data=DataConfig(vocabulary='byte', length=64), per_difficulty=0,
          arm_data_options={'skew': 2.0})
  with pytest.raises(UserError, match=r"arm_data_options = .*'skw'"):
    study(arm_data_options={'skw': 2.0})
  study(arm_data_options={'skew': 2.0})


def test_questions_need_a_task():
  with pytest.raises(UserError, match="data.source = 'stdlib'"):
    study(data=DataConfig(vocabulary='byte', length=64))


def test_study_binds_and_comes_back():
  one = study()
  assert bind(as_config(one), Study) == one


@pytest.mark.parametrize('lines, message', [
    (None, 'asked.txt'), ('which? #### 4', 'asked.txt:1'),
    ('which?||4 #### 4', 'difficulty 1 has 1 question')])
def test_file_is_read_before_data(lines, message, tmp_path, monkeypatch):
  """A file of questions is checked before any data are prepared."""
  monkeypatch.setattr(study_module, 'prepare_data', lambda *unused: pytest.fail('too late'))
  asked = tmp_path / 'asked.txt'
  if lines is not None:
    asked.write_text(lines)
  start = word_problems()
  questions = dataclasses.replace(start.questions, options={'asked': str(asked)})
  with pytest.raises(UserError, match=message):
    study_module.run_study(dataclasses.replace(start, questions=questions), tmp_path / 'run')


def test_arms_stay_in_order_after_own():
  arms = {f'{count} latents': {} for count in (4, 16, 8)} | {'own': {}}
  assert list(bind(as_config(study(arms)), Study).arms) == [
      'own', '4 latents', '16 latents', '8 latents']
