"""The quickstart reports all that it measured, and stops before its first phase where it can."""

import itertools
import json
import subprocess

import jax
import pytest
from PIL import Image

from latent_deliberation.cli import quickstart as job
from latent_deliberation.cli.quickstart import quickstart as run_quickstart
from latent_deliberation.errors import UserError
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.train import train_coprocessor
from tests import finished


@pytest.fixture(scope='module')
def report(quickstart):
  return json.loads((quickstart / 'report.json').read_text())


def test_the_report_has_every_arm_at_every_position(report):
  assert report['positions'] == [1, 2, 4, 8]
  assert set(report['arms']) == {'frozen', 'own', 'shuffled', 'constant', 'zero'}
  for arm in report['arms'].values():
    assert [len(arm[key]) for key in ('nll', 'change_pct', 'ci95')] == [4, 4, 4]
    for change, (low, high) in zip(arm['change_pct'], arm['ci95'], strict=True):
      assert low <= change <= high
  assert report['texts'] == 8


def test_zero_latents_leave_the_frozen_decoder_as_it_is(report):
  """They refine nothing: whatever is measured is due to what was trained."""
  assert report['arms']['zero']['nll'] == pytest.approx(report['arms']['frozen']['nll'], abs=1e-5)
  for name in ('own', 'shuffled', 'constant'):
    assert report['arms'][name]['nll'] != pytest.approx(report['arms']['frozen']['nll'], abs=1e-5)


def test_the_report_says_what_ran_and_what_it_took(report):
  assert report['parameters'] == {
      'frozen decoder': 27_040, 'coprocessor': 19_808, 'constant soft tokens': 1_088}
  assert list(report['seconds']) == [
      'data', 'decoder', 'coprocessor', 'constant soft tokens', 'evaluation']
  assert all(seconds > 0 for seconds in report['seconds'].values())
  assert 1e8 < report['peak_memory_bytes'] < 8e9
  assert report['decoder_unchanged'] is True
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=finished.ROOT, capture_output=True,
                          text=True).stdout.strip()
  assert report['git_commit'].removesuffix('+changes') == (commit or 'unknown')
  assert report['config']['training']['loop']['num_steps'] == 2


def test_the_page_and_its_pictures_are_there(quickstart, report):
  page = (quickstart / 'report.md').read_text()
  assert set(report['pictures']) == {'changes.png', 'losses.png', 'visibility.png'}
  for name in report['pictures']:
    assert f']({name})' in page
    with Image.open(quickstart / name) as picture:
      assert min(picture.size) > 200
      assert len(set(itertools.islice(picture.convert('L').tobytes(), 10**6))) > 10  # not blank


class Reached(Exception):
  """The job went as far as making data."""


@pytest.fixture
def no_data(monkeypatch):
  """Raises where a job would begin to make its data."""
  def stop(*unused):
    raise Reached

  for name in ('pretrain', 'train', 'quickstart'):
    monkeypatch.setattr(f'latent_deliberation.jobs.{name}.prepare_data', stop)


BAD = [
    ({'pretraining__batch_size': 6, 'pretraining__accumulation': 4},
     'pretraining: batch_size = 6 does not divide into 4 microbatches over 1 shards of mesh'),
    ({'pretraining__optimizer__warmup_steps': 5},
     'pretraining: optimizer.warmup_steps is 5, but the run has only 4 steps'),
    ({'training__batch_size': 9, 'training__accumulation': 2},
     'training: batch_size = 9 .* must be a multiple of 2'),
    ({'training__optimizer__warmup_steps': 3},
     'training: optimizer.warmup_steps is 3, but the run has only 2 steps'),
    ({'mesh__data': 2}, r"mesh \{.*'data': 2, 'fsdp': 1, 'tensor': 1\} has 2 places for 1 devices"),
]


@pytest.mark.usefixtures('no_data', 'one_device')
@pytest.mark.parametrize('change, message', BAD)
def test_what_cannot_be_trained_with_is_refused_before_there_are_data(
    change, message, tmp_path, quickstart):
  experiment = finished.experiment(**change)
  decoder = quickstart / 'pretraining/decoder'
  with pytest.raises(UserError, match=message):
    run_quickstart(experiment, tmp_path / 'new')
  with pytest.raises(UserError, match=message):
    if message.startswith('training'):
      train_coprocessor(experiment, decoder, tmp_path / 'new', tmp_path)
    else:
      pretrain(experiment, tmp_path / 'new', tmp_path)


@pytest.mark.usefixtures('no_data')
@pytest.mark.parametrize('change, message', [
    ({'evaluation__batch_size': 4, 'evaluation__num_texts': 4},
     'evaluation: batch_size = 4 does not divide into 1 microbatches over 8 shards'),
    ({'mesh__tensor': 8, 'mesh__data': 1},
     "pretraining: .* axis 'vocab' of 260 does not divide by the 8 shards of mesh axes"),
])
def test_what_does_not_fit_eight_devices_is_refused_before_there_are_data(
    change, message, tmp_path):
  assert len(jax.devices()) == 8
  with pytest.raises(UserError, match=message):
    run_quickstart(finished.experiment(**change), tmp_path)


@pytest.mark.usefixtures('no_data', 'one_device')
@pytest.mark.parametrize('change', [
    {}, {'training__multipliers': {'transformer': 0.1}}])  # which constant soft tokens have not
def test_what_can_be_trained_with_goes_on_to_the_data(change, tmp_path, quickstart):
  experiment = finished.experiment(**change)
  for launch in (lambda: run_quickstart(experiment, tmp_path / 'quickstart'),
                 lambda: pretrain(experiment, tmp_path / 'pretrain', tmp_path),
                 lambda: train_coprocessor(experiment, quickstart / 'pretraining/decoder',
                                           tmp_path / 'train', tmp_path)):
    with pytest.raises(Reached):
      launch()


@pytest.mark.usefixtures('no_data', 'one_device')
def test_a_directory_of_another_run_is_refused_before_there_are_data(quickstart, tmp_path):
  changed = finished.experiment(pretraining__optimizer__learning_rate=0.5)
  with pytest.raises(UserError, match='config.pretraining.*_rate: 0.01 there, 0.5 now'):
    pretrain(changed, quickstart / 'pretraining', tmp_path)
  with pytest.raises(UserError, match='pretraining belongs to another run:.*\n.*0.01 there, 0.5'):
    run_quickstart(changed, quickstart)
  changed = finished.experiment(deliberation__gate='channel')
  with pytest.raises(UserError, match="coprocessor belongs to another run:.*\n.*'matrix' there"):
    run_quickstart(changed, quickstart)


@pytest.mark.usefixtures('no_data', 'one_device')
def test_a_directory_that_cannot_be_written_to_is_refused_before_there_are_data(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file/run cannot be written to .*name another directory'):
    run_quickstart(finished.experiment(), tmp_path / 'file/run')


@pytest.mark.usefixtures('one_device')
def test_too_little_validation_text_for_the_report_is_found_before_anything_is_trained(
    tmp_path, quickstart, monkeypatch):
  monkeypatch.setattr(job, 'pretrain', lambda *unused: pytest.fail('training began'))
  with pytest.raises(UserError, match='need 8000 rows, .*: lower evaluation.num_texts'):
    run_quickstart(finished.experiment(evaluation__num_texts=8000), tmp_path)
