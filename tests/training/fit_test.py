"""A run that was stopped goes on as if it had not been, and nothing else goes on in its place."""

import json
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
from latent_deliberation.training.loop import Preempted
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.train import train_coprocessor
from tests import finished

pytestmark = [
    pytest.mark.usefixtures('one_device'),
    # Tensorstore's threads outlive the event loop of a read that failed.
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')]


def losses(workdir: Path) -> list[dict[str, float]]:
  """Metrics by step, without what depends on the clock."""
  return [{key: value for key, value in row.items() if key not in ('seconds', 'tokens_per_second')}
          for row in read_metrics(workdir / METRICS_FILE)]


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """Sends this process SIGTERM when the batch of `step` is asked for, once."""
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
  assert stopped.value.code == 0
  assert 'SIGTERM at step 2/4' in str(stopped.value.args)
  assert (tmp_path / 'stopped/checkpoints/2').is_dir()
  assert not {'decoder', 'coprocessor'} & {path.name for path in (tmp_path / 'stopped').iterdir()}
  job(tmp_path / 'stopped')
  assert_identical(result(tmp_path / 'stopped'), result(tmp_path / 'straight'))
  assert losses(tmp_path / 'stopped') == losses(tmp_path / 'straight')


@pytest.mark.slow  # what they share is tested with the coprocessor
def test_a_decoder_whose_pretraining_was_stopped_is_bit_for_bit_that_of_one_that_was_not(
    tmp_path, quickstart, monkeypatch):
  experiment = finished.experiment()
  check_stopping_changes_nothing(
      lambda workdir: pretrain(experiment, workdir, quickstart),
      lambda workdir: weights.load(workdir / 'decoder'), tmp_path, monkeypatch)


def test_a_coprocessor_whose_training_was_stopped_is_bit_for_bit_that_of_one_that_was_not(
    tmp_path, quickstart, monkeypatch):
  experiment = finished.experiment(training__loop__num_steps=4, training__loop__save_every=4)
  decoder = quickstart / 'pretraining/decoder'
  check_stopping_changes_nothing(
      lambda workdir: train_coprocessor(experiment, decoder, workdir, quickstart),
      lambda workdir: coprocessor_checkpoint.load(workdir / 'coprocessor').params, tmp_path,
      monkeypatch)


@pytest.fixture
def coprocessor(tmp_path, quickstart) -> Path:
  """A copy of a finished run of training, to do harm to."""
  return shutil.copytree(quickstart / 'coprocessor', tmp_path / 'coprocessor')


def resume(workdir: Path, quickstart: Path, data: Path | None = None, decoder: Path | None = None,
           experiment: Experiment | None = None) -> None:
  train_coprocessor(experiment or finished.experiment(),
                    decoder or quickstart / 'pretraining/decoder', workdir, data or quickstart)


def test_another_config_is_refused_with_the_key_and_both_values(coprocessor, quickstart):
  changed = finished.experiment(training__optimizer__learning_rate=0.5)
  with pytest.raises(UserError, match=r'(?s)coprocessor belongs to another run:\n'
                     r'  config.training.optimizer.learning_rate: 0.01 there, 0.5 now\nUse anoth'):
    resume(coprocessor, quickstart, experiment=changed)


def test_what_only_the_other_job_reads_may_change(coprocessor, quickstart):
  """So may cadences and the evaluation; a finished run is then still the same run."""
  experiment = finished.experiment(pretraining__batch_size=16, training__loop__log_every=2,
                                   evaluation__bootstrap_samples=10)
  resume(coprocessor, quickstart, experiment=experiment)
  assert losses(coprocessor) == losses(quickstart / 'coprocessor')


def test_a_run_begun_before_there_was_a_key_goes_on_with_its_default(coprocessor, quickstart):
  path = coprocessor / RUN_FILE
  record = json.loads(path.read_text())
  del record['config']['training']['row_range_percent']
  path.write_text(json.dumps(record))
  resume(coprocessor, quickstart)
  # What the choices do not read may have been anything.
  record['config']['deliberation']['lora_alpha'] = 128.0
  path.write_text(json.dumps(record))
  resume(coprocessor, quickstart)
  with pytest.raises(UserError, match=r'training.row_range_percent: \[0, 100\] there, \[0, 50\] now'):
    resume(coprocessor, quickstart, experiment=finished.experiment(training__row_range_percent=(0, 50)))


def test_another_decoder_is_refused(coprocessor, quickstart, tmp_path):
  config, params = weights.load(quickstart / 'pretraining/decoder')
  other = jax.tree.map(lambda leaf: 2 * leaf, params)
  weights.save(tmp_path / 'decoder', config, other)
  with pytest.raises(UserError, match=f"decoder: '[0-9a-f]+' there, '{fingerprint(other)}' now"):
    resume(coprocessor, quickstart, decoder=tmp_path / 'decoder')


def test_rows_of_another_vocabulary_than_the_decoders_are_refused(quickstart, tmp_path):
  config, params = weights.load(quickstart / 'pretraining/decoder')
  weights.save(tmp_path / 'decoder', config, params, vocabulary='another')
  with pytest.raises(UserError, match='made with the vocabulary .*, the decoder .* with another'):
    resume(tmp_path / 'run', quickstart, decoder=tmp_path / 'decoder')


def test_other_data_are_refused(coprocessor, quickstart, tmp_path):
  finished.write_texts(tmp_path / 'texts', [f'{n} other words. ' * 60 for n in range(40)])
  experiment = finished.experiment(data__files=(str(tmp_path / 'texts'),))
  with pytest.raises(UserError, match="another run:\n  data: '[0-9a-f]+' there, '[0-9a-f]+' now"):
    resume(coprocessor, quickstart, tmp_path / 'data', experiment=experiment)
  with pytest.raises(UserError, match='rows/train was packed from something else .*source_finger'):
    resume(coprocessor, quickstart, experiment=experiment)


def test_the_same_files_with_other_contents_are_refused(coprocessor, quickstart, tmp_path):
  manifest = json.loads((quickstart / 'rows/train/manifest.json').read_text())
  data = shutil.copytree(quickstart, tmp_path / 'data', ignore=lambda *_: ['coprocessor'])
  manifest['content_hash'] = 'other'
  (data / 'rows/train/manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match="another run:\n  data: '"):
    resume(coprocessor, quickstart, data)


def test_a_truncated_checkpoint_is_named_and_removing_it_goes_back_to_the_one_before(
    coprocessor, quickstart):
  damaged = next((coprocessor / 'checkpoints/2/state/d').iterdir())
  damaged.write_bytes(damaged.read_bytes()[:100])
  with pytest.raises(UserError, match=r'(?s)checkpoints/2 cannot be read.*there: 1\. If its '):
    resume(coprocessor, quickstart)
  shutil.rmtree(coprocessor / 'checkpoints/2')
  resume(coprocessor, quickstart)
  assert losses(coprocessor) == losses(quickstart / 'coprocessor')


def test_checkpoints_of_an_unknown_run_are_refused(coprocessor, quickstart):
  (coprocessor / 'run.json').unlink()
  with pytest.raises(UserError, match='run.json does not: these checkpoints are of an unknown'):
    resume(coprocessor, quickstart)


def test_the_directory_of_another_job_is_refused(quickstart, tmp_path):
  workdir = shutil.copytree(quickstart / 'pretraining', tmp_path / 'pretraining')
  with pytest.raises(UserError, match="job: 'pretrain' there, 'train' now"):
    resume(workdir, quickstart)
