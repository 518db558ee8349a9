"""The quickstart's report, and what it refuses before its first phase."""

import itertools
import json
import subprocess

import jax
import pytest
from PIL import Image

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import quickstart as job
from latent_deliberation.cli.quickstart import quickstart as run_quickstart
from latent_deliberation.errors import UserError
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.train import train_coprocessor
from tests import finished


@pytest.fixture(scope='module')
def report(quickstart):
  return json.loads((quickstart / 'report.json').read_text())


def test_report_arms(report):
  """The report has every arm at every position."""
  assert report['positions'] == [1, 2, 4, 8]
  assert set(report['arms']) == {'frozen', 'own', 'shuffled', 'constant', 'zero'}
  for arm in report['arms'].values():
    assert [len(arm[key]) for key in ('nll', 'change_pct', 'ci95')] == [4, 4, 4]
    for change, (low, high) in zip(arm['change_pct'], arm['ci95'], strict=True):
      assert low <= change <= high
  assert report['texts'] == 8


def test_zero_latents_change_nothing(report):
  """Zero latents leave the frozen decoder as it is, so any gain comes from training."""
  assert report['arms']['zero']['nll'] == pytest.approx(report['arms']['frozen']['nll'], abs=1e-5)
  for name in ('own', 'shuffled', 'constant'):
    assert report['arms'][name]['nll'] != pytest.approx(report['arms']['frozen']['nll'], abs=1e-5)


def test_report_run(report):
  """The report has sizes, seconds, memory, commit and config of the run."""
  assert report['parameters'] == {
      'frozen decoder': 27_040, 'coprocessor': 19_808, 'constant soft tokens': 1_088}
  assert list(report['seconds']) == [
      'data', 'decoder', 'coprocessor', 'constant soft tokens', 'evaluation']
  assert all(seconds > 0 for seconds in report['seconds'].values())
  assert 1e8 < report['peak_memory_bytes'] < 8e9
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=finished.ROOT, capture_output=True,
                          text=True).stdout.strip()
  assert report['git_commit'].removesuffix('+changes') == (commit or 'unknown')
  assert report['config']['training']['loop']['num_steps'] == 2


def test_report_page(quickstart, report):
  """The page shows all pictures, and none is blank."""
  page = (quickstart / 'report.md').read_text()
  assert set(report['pictures']) == {'changes.png', 'losses.png', 'visibility.png'}
  for name in report['pictures']:
    assert f']({name})' in page
    with Image.open(quickstart / name) as picture:
      assert min(picture.size) > 200
      assert len(set(itertools.islice(picture.convert('L').tobytes(), 10**6))) > 10  # not blank


class Reached(Exception):
  """The job began to make data."""


@pytest.fixture
def no_data(monkeypatch):
  """Raises `Reached` when a job begins to make its data."""
  def stop(*unused):
    raise Reached

  for module in ('training.pretrain', 'training.train', 'cli.quickstart'):
    monkeypatch.setattr(f'latent_deliberation.{module}.prepare_data', stop)


BAD = [
    ({'pretraining__batch_size': 6, 'pretraining__accumulation': 4},
     'pretraining.batch_size = 6 .* 4 '),
    ({'pretraining__optimizer__warmup_steps': 5},
     'pretraining: .*warmup_steps .*5.* 4 '),
    ({'training__batch_size': 9, 'training__accumulation': 2},
     'training.batch_size = 9 .* 2 '),
    ({'training__optimizer__warmup_steps': 3},
     'training: .*warmup_steps .*3.* 2 '),
    ({'mesh__data': 2}, r"mesh \{.*'data': 2, 'fsdp': 1, 'tensor': 1\} needs 2 devices, and not 1"),
]


@pytest.mark.usefixtures('no_data', 'one_device')
@pytest.mark.parametrize('change, message', BAD)
def test_bad_training_is_refused(change, message, tmp_path, quickstart):
  """An experiment that cannot train is refused before data are made."""
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
     'evaluation.batch_size = 4 .* 8 shards'),
    ({'mesh__tensor': 8, 'mesh__data': 1},
     "pretraining: .*'vocab' of 260 .* 8 "),
])
def test_bad_mesh_is_refused(change, message, tmp_path):
  """An experiment that does not fit eight devices is refused before data are made."""
  assert len(jax.devices()) == 8
  with pytest.raises(UserError, match=message):
    run_quickstart(finished.experiment(**change), tmp_path)


@pytest.mark.usefixtures('no_data', 'one_device')
@pytest.mark.parametrize('change', [
    {}, {'training__multipliers': {'transformer': 0.1}}])  # which constant soft tokens have not
def test_good_training_reaches_data(change, tmp_path, quickstart):
  """An experiment that can train continues to its data."""
  experiment = finished.experiment(**change)
  for launch in (lambda: run_quickstart(experiment, tmp_path / 'quickstart'),
                 lambda: pretrain(experiment, tmp_path / 'pretrain', tmp_path),
                 lambda: train_coprocessor(experiment, quickstart / 'pretraining/decoder',
                                           tmp_path / 'train', tmp_path)):
    with pytest.raises(Reached):
      launch()


@pytest.mark.usefixtures('no_data', 'one_device')
def test_other_run_is_refused(quickstart, tmp_path):
  """The directory of another run is refused before data are made."""
  changed = finished.experiment(pretraining__optimizer__learning_rate=0.5)
  with pytest.raises(UserError, match='config.pretraining.*_rate: 0.01 .*, 0.5 now'):
    pretrain(changed, quickstart / 'pretraining', tmp_path)
  with pytest.raises(UserError, match='pretraining .*another run.*\n.*0.01 .*, 0.5 now'):
    run_quickstart(changed, quickstart)
  changed = finished.experiment(deliberation__gate='channel')
  with pytest.raises(UserError, match="coprocessor .*another run.*\n.*'matrix' .*, 'channel' now"):
    run_quickstart(changed, quickstart)


@pytest.mark.usefixtures('no_data', 'one_device')
def test_unwritable_is_refused(tmp_path):
  """A directory that cannot be written to is refused before data are made."""
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file/run .*directory'):
    run_quickstart(finished.experiment(), tmp_path / 'file/run')


@pytest.mark.usefixtures('one_device')
def test_too_little_text_is_refused(tmp_path, quickstart, monkeypatch):
  """Too little held-out text for the report is found before anything is trained."""
  monkeypatch.setattr(job, 'pretrain', lambda *unused: pytest.fail('training began'))
  with pytest.raises(UserError, match='8000.*evaluation.num_texts'):
    run_quickstart(finished.experiment(evaluation__num_texts=8000), tmp_path,
                   {'evaluation.num_texts'})


@pytest.mark.usefixtures('one_device')
def test_existing_decoder_is_not_pretrained(tmp_path, quickstart, monkeypatch):
  """Text is packed with its vocabulary, and both trainings and the report are on it."""
  seen = []
  monkeypatch.setattr(job, 'pretrain', lambda *unused: pytest.fail('pretraining began'))
  monkeypatch.setattr(job, 'train_coprocessor', lambda experiment, decoder, *unused: seen.append(
      (experiment.deliberation.trainable, decoder)))
  monkeypatch.setattr(job, 'evaluate', lambda experiment, **directories: {
      **directories, 'seconds': {'evaluation': 1.0}})
  decoder = quickstart / 'pretraining/decoder'
  start = finished.experiment(
      decoder__num_layers=1, data__vocabulary='sentencepiece', evaluation__num_texts=800)
  directories = run_quickstart(with_decoder(start, str(decoder)), tmp_path)
  assert seen == [('full', decoder), ('constant', decoder)]
  assert directories['decoder_dir'] == decoder and 'decoder' not in directories['runs']
  saved = json.loads((tmp_path / 'run.json').read_text())
  assert saved['config']['data']['vocabulary'] == 'byte'
  assert saved['config']['evaluation']['num_texts'] == saved['chosen']['evaluation.num_texts'] < 800
  # The same command chooses the same, also where the text has gone.
  monkeypatch.setattr(job, 'fit_to_text', lambda *unused: pytest.fail('chosen again'))
  run_quickstart(with_decoder(start, str(decoder)), tmp_path)
  assert json.loads((tmp_path / 'run.json').read_text()) == saved
