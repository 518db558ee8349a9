"""A report is of one decoder and of the coprocessor that was trained on it."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import evaluate as job
from latent_deliberation.evaluation.evaluate import evaluate
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from tests import finished

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def no_scoring(monkeypatch):
  """Fails where the first batch would be scored."""
  monkeypatch.setattr(job, 'score_texts', lambda *unused: pytest.fail('scoring began'))


def score(quickstart: Path, output: Path, experiment=None, **directories: Path):
  directories = {'decoder': quickstart / 'pretraining/decoder', 'data': quickstart,
                 'coprocessor': quickstart / 'coprocessor'} | directories
  return evaluate(experiment or finished.experiment(), output=output, **directories)


def test_an_evaluation_alone_repeats_the_figures_of_the_quickstart(quickstart, tmp_path):
  summary = score(quickstart, tmp_path / 'deep/report', constant=quickstart / 'constant')
  expected = json.loads((quickstart / 'report.json').read_text())
  assert list(summary['seconds']) == ['evaluation']
  for name, arm in expected['arms'].items():
    assert summary['arms'][name]['nll'] == pytest.approx(arm['nll'], abs=1e-5)
  assert {path.name for path in (tmp_path / 'deep/report').iterdir()} == {
      'report.json', 'report.md', 'changes.png', 'losses.png', 'visibility.png'}


def test_a_coprocessor_alone_is_scored_on_text_without_its_run_and_its_training_data(
    quickstart, tmp_path):
  """Constant soft tokens and the drawing of losses are then left out."""
  package = shutil.copytree(quickstart / 'coprocessor/coprocessor', tmp_path / 'mine/package')
  shutil.copytree(quickstart / 'rows/validation', tmp_path / 'data/rows/validation')
  experiment = finished.experiment(
      evaluation__positions=(1, 3), data__mode='online', data__files=('gone.txt',))
  summary = score(quickstart, tmp_path / 'report', experiment, coprocessor=package,
                  data=tmp_path / 'data')
  assert set(summary['arms']) == {'frozen', 'own', 'shuffled', 'zero'}
  assert summary['positions'] == [1, 3]
  assert set(summary['pictures']) == {'changes.png', 'visibility.png'}
  assert not (tmp_path / 'report/losses.png').exists()


@pytest.mark.usefixtures('no_scoring')
def test_a_coprocessor_of_another_decoder_is_refused(quickstart, tmp_path):
  config, params = weights.load(quickstart / 'pretraining/decoder')
  other = jax.tree.map(lambda leaf: -leaf, params)
  weights.save(tmp_path / 'decoder', config, other)
  with pytest.raises(UserError, match='coprocessor was trained on a decoder with fingerprint '
                     f'{fingerprint(params)}, this one has {fingerprint(other)}: give the decoder'):
    score(quickstart, tmp_path / 'out', decoder=tmp_path / 'decoder')


@pytest.mark.usefixtures('no_scoring')
def test_a_coprocessor_of_another_config_is_refused(quickstart, tmp_path):
  experiment = finished.experiment(deliberation__gate='channel')
  with pytest.raises(UserError, match="config.deliberation.gate: 'matrix' there, 'channel' now"):
    score(quickstart, tmp_path, experiment)


@pytest.mark.usefixtures('no_scoring')
def test_a_full_coprocessor_in_the_place_of_constant_soft_tokens_is_refused(quickstart, tmp_path):
  with pytest.raises(UserError, match="trainable: 'full' there, 'constant' now"):
    score(quickstart, tmp_path, constant=quickstart / 'coprocessor')


@pytest.mark.usefixtures('no_scoring')
def test_a_directory_without_a_coprocessor_is_refused(quickstart, tmp_path):
  with pytest.raises(UserError, match='name a directory in which launch/train.py has'):
    score(quickstart, tmp_path, coprocessor=tmp_path / 'nothing')
  assert not (tmp_path / 'nothing').exists()


@pytest.mark.usefixtures('no_scoring')
def test_a_truncated_coprocessor_is_refused(quickstart, tmp_path):
  coprocessor = shutil.copytree(quickstart / 'coprocessor', tmp_path / 'coprocessor')
  damaged = coprocessor / 'coprocessor/coprocessor.safetensors'
  damaged.write_bytes(damaged.read_bytes()[:100])
  with pytest.raises(UserError, match='coprocessor.safetensors .100 bytes. is not a whole'):
    score(quickstart, tmp_path / 'out', coprocessor=coprocessor)


@pytest.mark.usefixtures('no_scoring')
def test_a_report_that_could_not_be_written_is_not_begun(quickstart, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file cannot be written to .*: name another directory'):
    score(quickstart, tmp_path / 'file')


@pytest.mark.usefixtures('no_scoring')
def test_more_texts_than_there_are_is_refused(quickstart, tmp_path):
  experiment = finished.experiment(evaluation__num_texts=8000)
  with pytest.raises(UserError, match='need 8000 rows, .*: lower evaluation.num_texts'):
    score(quickstart, tmp_path, experiment)
