"""A stopped run resumes exactly, and a work directory takes no other run."""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_deliberation.data.rows import PermutedBatches
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import METRICS_FILE, RUN_FILE
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.loop import Preempted
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.pretrain import describe_pretraining, pretrain
from latent_deliberation.training.run import check_no_later_run
from latent_deliberation.training.run_identity import (
  CHANGEABLE,
  WITHOUT_EFFECT,
  check_same_settings,
  hold_workdir,
  read_record,
)
from latent_deliberation.training.train import train_coprocessor
from tests import finished

pytestmark = [
    pytest.mark.usefixtures('one_device'),
    # Tensorstore's threads outlive the event loop of a read that failed.
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')]


def losses(workdir: Path) -> list[dict[str, float]]:
  """Metrics by step, without what depends on the clock."""
  of_clock = ('seconds', 'tokens_per_second', 'teraflops_per_device', 'memory_gib')
  return [{key: value for key, value in row.items()
           if key not in of_clock and not key.startswith('time/')}
          for row in read_metrics(workdir / METRICS_FILE)]


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """Sends this process SIGTERM, once, when the loop takes the batch of `step`."""
  take, sent = PermutedBatches.__call__, []

  def take_and_stop(batches: PermutedBatches, at: int):
    if at == step and not sent:
      sent.append(at)
      signal.raise_signal(signal.SIGTERM)
    return take(batches, at)

  monkeypatch.setattr(PermutedBatches, '__call__', take_and_stop)


def assert_identical(actual, expected) -> None:
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def check_stopping_changes_nothing(job: Callable[[Path], object], result: Callable[[Path], object],
                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  job(tmp_path / 'straight')
  stop_before(1, monkeypatch)
  with pytest.raises(Preempted) as stopped:
    job(tmp_path / 'stopped')
  assert stopped.value.code == 143
  assert 'SIGTERM at step 2/4' in str(stopped.value.args)
  assert (tmp_path / 'stopped/checkpoints/2').is_dir()
  assert not {'decoder', 'coprocessor'} & {path.name for path in (tmp_path / 'stopped').iterdir()}
  job(tmp_path / 'stopped')
  assert_identical(result(tmp_path / 'stopped'), result(tmp_path / 'straight'))
  assert losses(tmp_path / 'stopped') == losses(tmp_path / 'straight')
  # A finished run does nothing twice.
  written = (tmp_path / 'stopped' / METRICS_FILE).read_text()
  job(tmp_path / 'stopped')
  assert (tmp_path / 'stopped' / METRICS_FILE).read_text() == written


@pytest.mark.slow  # the coprocessor tests the shared code
def test_pretraining_resume_is_exact(tmp_path, quickstart, monkeypatch):
  """A decoder whose pretraining was stopped is bit for bit the same."""
  experiment = finished.experiment()
  check_stopping_changes_nothing(
      lambda workdir: pretrain(experiment, workdir, quickstart),
      lambda workdir: weights.load(workdir / 'decoder'), tmp_path, monkeypatch)


def test_training_resume_is_exact(tmp_path, quickstart, monkeypatch):
  """A coprocessor whose training was stopped is bit for bit the same."""
  # With averages of spikes in its state, and a save by time that no resume depends on.
  experiment = finished.experiment(
      training__loop__num_steps=4, training__loop__save_every=4,
      training__loop__save_minutes=1e-9, training__optimizer__skip_spikes=6.0)
  decoder = quickstart / 'pretraining/decoder'
  check_stopping_changes_nothing(
      lambda workdir: train_coprocessor(experiment, decoder, workdir, quickstart),
      lambda workdir: coprocessor_checkpoint.load(workdir / 'coprocessor').params, tmp_path,
      monkeypatch)


def test_trained_further(coprocessor, quickstart, caplog):
  """A finished run goes on with a larger num_steps, and keeps its earlier result."""
  before = coprocessor_checkpoint.load(coprocessor / 'coprocessor').params
  longer = finished.experiment(training__loop__num_steps=4)
  with caplog.at_level('INFO', logger='absl'):
    resume(coprocessor, quickstart, experiment=longer)
  assert 'to 4 steps instead of 2' in caplog.text
  assert_identical(coprocessor_checkpoint.load(coprocessor / 'coprocessor_2').params, before)
  assert coprocessor_checkpoint.describe(coprocessor / 'coprocessor').steps == 4
  assert [row['step'] for row in losses(coprocessor)] == [1, 2, 3, 4]
  # The learning rate is that of a run of four steps, which has not decayed at step 3.
  assert losses(coprocessor)[2]['learning_rate'] > losses(coprocessor)[1]['learning_rate'] / 2
  record = json.loads((coprocessor / RUN_FILE).read_text())
  assert record['config']['training']['loop']['num_steps'] == 4
  assert record['earlier_num_steps'] == [2]
  written = (coprocessor / METRICS_FILE).read_text()
  with caplog.at_level('INFO', logger='absl'):
    resume(coprocessor, quickstart, experiment=longer)
  assert 'at step 4 of 4; it is finished' in caplog.text
  assert (coprocessor / METRICS_FILE).read_text() == written
  with pytest.raises(UserError, match='(?s)training.loop.num_steps: 4 saved, 2 now.*may only grow'):
    resume(coprocessor, quickstart)


def test_trained_further_after_a_kill(coprocessor, quickstart):
  """A launch was killed in a store, where the result was copied and not removed yet."""
  shutil.copytree(coprocessor / 'coprocessor', coprocessor / 'coprocessor_2')
  longer = finished.experiment(training__loop__num_steps=4)
  resume(coprocessor, quickstart, experiment=longer)
  assert coprocessor_checkpoint.describe(coprocessor / 'coprocessor_2').steps == 2
  assert coprocessor_checkpoint.describe(coprocessor / 'coprocessor').steps == 4


def test_trained_further_beside_another_result(coprocessor, quickstart):
  """What has the name already is not overwritten."""
  (coprocessor / 'coprocessor_2').mkdir()
  (coprocessor / 'coprocessor_2/coprocessor.json').write_text('{}')
  with pytest.raises(UserError, match='coprocessor_2 exists already.*move it away'):
    resume(coprocessor, quickstart, experiment=finished.experiment(training__loop__num_steps=4))


def test_second_launch(coprocessor, quickstart):
  """A second launch in the same directory is told of the first, before any work."""
  with hold_workdir(coprocessor):
    with pytest.raises(UserError, match=f'process {os.getpid()} .*works in {coprocessor}'):
      resume(coprocessor, quickstart)
  resume(coprocessor, quickstart)


def test_decoder_of_other_runs(quickstart, tmp_path):
  """A decoder that others were trained on is not trained further."""
  experiment = finished.experiment(pretraining__loop__num_steps=8)
  pretraining = describe_pretraining(experiment, quickstart / 'pretraining',
                                     make_mesh(experiment.mesh))
  pretraining.check()
  check_no_later_run(pretraining, [tmp_path])
  with pytest.raises(UserError, match='pretraining.loop.num_steps: 4 saved, 8 now.*/coprocessor '):
    check_no_later_run(pretraining, [tmp_path, quickstart / 'coprocessor'])


@pytest.mark.parametrize('change, line', [
    ({'evaluation__bootstrap_samples': 10}, 'config.evaluation.bootstrap_samples: 2000.*10'),
    ({'training__loop__log_every': 2}, ''),
])
def test_report_of_other_settings(quickstart, change, line):
  """A report of other settings is not overwritten, and one of other cadences is the same."""
  path = quickstart / 'report.json'
  check = functools.partial(check_same_settings, path, finished.experiment(**change),
                            WITHOUT_EFFECT)
  if not line:
    check()
    return
  with pytest.raises(UserError, match=f'{path}(?s:.)*{line}(?s:.)*--overwrite'):
    check()


@pytest.fixture
def coprocessor(tmp_path, quickstart) -> Path:
  """A copy of a finished run of training, to be damaged."""
  return shutil.copytree(quickstart / 'coprocessor', tmp_path / 'coprocessor')


def resume(workdir: Path, quickstart: Path, prepared_dir: Path | None = None,
           decoder_dir: Path | None = None, experiment: Experiment | None = None) -> None:
  train_coprocessor(experiment or finished.experiment(),
                    decoder_dir or quickstart / 'pretraining/decoder', workdir,
                    prepared_dir or quickstart)


def test_resume_other_config(coprocessor, quickstart):
  """Another config is refused with the key and both values, and nothing else."""
  changed = finished.experiment(training__optimizer__learning_rate=0.5)
  with pytest.raises(UserError, match=(
      r'coprocessor.*\n  config.training.optimizer.learning_rate: 0.01.*0.5.*\n[^ ]')):
    resume(coprocessor, quickstart, experiment=changed)


def test_resume_other_evaluation(coprocessor, quickstart):
  """Cadences, the evaluation and settings of pretraining may change."""
  experiment = finished.experiment(pretraining__batch_size=16, training__loop__log_every=2,
                                   evaluation__bootstrap_samples=10)
  resume(coprocessor, quickstart, experiment=experiment)
  assert losses(coprocessor) == losses(quickstart / 'coprocessor')


def test_resume_with_other_ways_to_compute(coprocessor, quickstart):
  """Other machines may need other microbatches and less memory; results differ by rounding."""
  shutil.rmtree(coprocessor / 'checkpoints/2')
  shutil.rmtree(coprocessor / 'coprocessor')
  resume(coprocessor, quickstart, experiment=finished.experiment(
      training__accumulation=2, computation__remat='full', computation__scan=False,
      computation__loss_chunk=3))
  made, expected = (coprocessor_checkpoint.load(path / 'coprocessor').params
                    for path in (coprocessor, quickstart / 'coprocessor'))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5), made, expected)


def test_keys_that_may_change_are_documented():
  """A page lists all keys that a resumed run may change."""
  page = (finished.ROOT / 'docs/runs.md').read_text()
  assert not [key for key in CHANGEABLE
              if f'`{key.removeprefix("pretraining.").removeprefix("training.")}`' not in page]


def test_resume_without_a_key(coprocessor, quickstart):
  """A run that is older than a key resumes with its default."""
  path = coprocessor / RUN_FILE
  record = read_record(coprocessor)  # of a code that wrote no checksum
  del record['config']['training']['row_range_percent']
  path.write_text(json.dumps(record))
  resume(coprocessor, quickstart)
  # A key without effect may have had any value.
  record['config']['deliberation']['lora_alpha'] = 128.0
  path.write_text(json.dumps(record))
  resume(coprocessor, quickstart)
  with pytest.raises(UserError, match=r'training.row_range_percent: \[0, 100\].*\[0, 50\]'):
    resume(coprocessor, quickstart,
           experiment=finished.experiment(training__row_range_percent=(0, 50)))


def test_resume_other_decoder(coprocessor, quickstart, tmp_path):
  """Another decoder is refused with both fingerprints."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  other = jax.tree.map(lambda leaf: 2 * leaf, params)
  weights.save(tmp_path / 'decoder', config, other)
  with pytest.raises(UserError, match=f"decoder: '[0-9a-f]+'.*'{fingerprint(other)}'"):
    resume(coprocessor, quickstart, decoder_dir=tmp_path / 'decoder')


def test_rows_of_other_vocabulary(quickstart, tmp_path):
  """Rows of another vocabulary than the decoder's are refused."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  weights.save(tmp_path / 'decoder', config, params, vocabulary_hash='another')
  with pytest.raises(UserError, match='vocabulary.*another'):
    resume(tmp_path / 'run', quickstart, decoder_dir=tmp_path / 'decoder')


def test_resume_other_data(coprocessor, quickstart, tmp_path):
  """Other data are refused."""
  finished.write_texts(tmp_path / 'texts', [f'{n} other words. ' * 60 for n in range(40)])
  experiment = finished.experiment(data__files=(str(tmp_path / 'texts'),))
  with pytest.raises(UserError, match="\n  data: other rows"):
    resume(coprocessor, quickstart, tmp_path / 'data', experiment=experiment)
  with pytest.raises(UserError, match='(?s)rows/train.*files: .*contents'):
    resume(coprocessor, quickstart, experiment=experiment)


def test_resume_other_contents(coprocessor, quickstart, tmp_path):
  """The same files with other contents are refused."""
  manifest = json.loads((quickstart / 'rows/train/manifest.json').read_text())
  data = shutil.copytree(quickstart, tmp_path / 'data', ignore=lambda *_: ['coprocessor'])
  manifest['content_hash'] = 'other'
  del manifest['checksum']
  (data / 'rows/train/manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match="\n  data: other rows"):
    resume(coprocessor, quickstart, data)


def test_resume_before_damage(tmp_path, quickstart, caplog):
  """A truncated checkpoint is named, and without it the one before is resumed."""
  # Not the finished quickstart: on one core, sums of another process may round otherwise.
  whole = tmp_path / 'whole'
  resume(whole, quickstart)
  run = shutil.copytree(whole, tmp_path / 'damaged')
  damaged = next((run / 'checkpoints/2/state/d').iterdir())
  damaged.write_bytes(damaged.read_bytes()[:100])
  with pytest.raises(UserError, match=r'(?s)checkpoints/2.*: 1\.'):
    resume(run, quickstart)
  shutil.rmtree(run / 'checkpoints/2')
  with caplog.at_level('INFO', logger='absl'):
    resume(run, quickstart)
  assert 'at step 1 of 2' in caplog.text
  assert losses(run) == losses(whole)


def test_resume_unknown_run(coprocessor, quickstart):
  """Checkpoints of an unknown run are refused."""
  (coprocessor / 'run.json').unlink()
  with pytest.raises(UserError, match='checkpoints.*run.json'):
    resume(coprocessor, quickstart)


@pytest.mark.parametrize('content, said', [
    ('{"decoder": "d1", "data": {}, "lm_eval": "0.4.9"}', 'something else'),
    ('{"job": "study", "config": {}, "chosen": {}}', "'study'"),
    ('{"job": "train", "config": 1, "decoder": "d1", "data": "rows1"}', "'train'"),
    ('[]', 'something else'), ('{"job": ', 'JSON')])
def test_file_of_another_kind(tmp_path, content, said):
  """The run.json of benchmarks or of a study is refused before any text is packed."""
  (tmp_path / RUN_FILE).write_text(content)
  experiment = finished.experiment()
  run = describe_pretraining(experiment, tmp_path, make_mesh(experiment.mesh))
  with pytest.raises(UserError, match=f'{tmp_path / RUN_FILE} is .*{said}.*--workdir'):
    run.check()


@pytest.mark.parametrize('result', ['decoder', 'coprocessor'])
def test_result_of_an_unknown_run(tmp_path, quickstart, result):
  """An old result would be kept in place of that of a new run, so it is refused at once."""
  (tmp_path / result).mkdir()
  with pytest.raises(UserError, match=f'{tmp_path / result} exists.*{RUN_FILE}.*--workdir'):
    if result == 'decoder':
      pretrain(finished.experiment(), tmp_path, quickstart)
    else:
      resume(tmp_path, quickstart)
  assert [path.name for path in tmp_path.iterdir()] == [result]


def test_something_else_as_result(tmp_path, quickstart):
  """A folder without a decoder is no result of a finished pretraining."""
  workdir = shutil.copytree(quickstart / 'pretraining', tmp_path / 'pretraining')
  (workdir / 'decoder/decoder.json').unlink()
  with pytest.raises(UserError, match=f'{workdir}/decoder holds something else.*--workdir'):
    pretrain(finished.experiment(), workdir, quickstart)


@pytest.mark.parametrize('name', ['decoder', 'coprocessor'])
def test_finished_model_in_place_of_its_run(quickstart, coprocessor, name):
  """Its run is named, and nothing is written into it."""
  workdir = coprocessor / name
  workdir.mkdir(exist_ok=True)
  (workdir / f'{name}.json').touch()
  before = sorted(workdir.iterdir())
  with pytest.raises(UserError, match=f'{workdir} .*{name}.*{coprocessor}, '):
    resume(workdir, quickstart)
  assert sorted(workdir.iterdir()) == before


def test_run_with_a_byte_order_mark(coprocessor, quickstart):
  """An editor may save run.json with one."""
  path = coprocessor / 'run.json'
  path.write_text(path.read_text(), encoding='utf-8-sig')
  resume(coprocessor, quickstart)


def test_resume_other_job(quickstart, tmp_path):
  """The directory of another job is refused."""
  workdir = shutil.copytree(quickstart / 'pretraining', tmp_path / 'pretraining')
  with pytest.raises(UserError, match="job: 'pretrain'.*'train'"):
    resume(workdir, quickstart)
