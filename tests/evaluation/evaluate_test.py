"""A report is of one decoder and of the coprocessor that was trained on it."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import evaluate as evaluate_module
from latent_deliberation.evaluation.evaluate import evaluate
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import fingerprint
from tests import finished

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def no_scoring(monkeypatch):
  """Fails where the first batch would be scored."""
  monkeypatch.setattr(evaluate_module, 'score_texts', lambda *unused: pytest.fail('scoring began'))


def score(quickstart: Path, output: Path, experiment=None, **directories: Path):
  directories = {'decoder_dir': quickstart / 'pretraining/decoder', 'prepared_dir': quickstart,
                 'coprocessor_dir': quickstart / 'coprocessor'} | directories
  return evaluate(experiment or finished.experiment(), output=output, **directories)


def test_evaluation_repeats_the_quickstart(quickstart, tmp_path):
  summary = score(quickstart, tmp_path / 'deep/report', constant_dir=quickstart / 'constant')
  expected = json.loads((quickstart / 'report.json').read_text())
  assert list(summary['seconds']) == ['evaluation']
  for name, arm in expected['arms'].items():
    assert summary['arms'][name]['nll'] == pytest.approx(arm['nll'], abs=1e-5)
  assert {path.name for path in (tmp_path / 'deep/report').iterdir()} == {
      'report.json', 'report.md', 'changes.png', 'losses.png', 'visibility.png'}


def test_coprocessor_alone_is_scored(quickstart, tmp_path):
  """Its run and its training data are gone; constant soft tokens and losses are left out."""
  checkpoint = shutil.copytree(quickstart / 'coprocessor/coprocessor', tmp_path / 'mine/package')
  shutil.copytree(quickstart / 'rows/validation', tmp_path / 'data/rows/validation')
  (tmp_path / 'mine/run.json').write_text('{"lm_eval": "0.4.9"}')  # of benchmarks, beside it
  experiment = finished.experiment(
      evaluation__positions=(1, 3), data__mode='online', data__files=('gone.txt',))
  summary = score(quickstart, tmp_path / 'report', experiment, coprocessor_dir=checkpoint,
                  prepared_dir=tmp_path / 'data')
  assert set(summary['arms']) == {'frozen', 'own', 'shuffled', 'zero'}
  assert summary['positions'] == [1, 3]
  assert set(summary['pictures']) == {'changes.png', 'visibility.png'}
  assert not (tmp_path / 'report/losses.png').exists()


@pytest.mark.usefixtures('no_scoring')
def test_another_decoder_is_refused(quickstart, tmp_path):
  config, params = weights.load(quickstart / 'pretraining/decoder')
  other = jax.tree.map(lambda leaf: -leaf, params)
  weights.save(tmp_path / 'decoder', config, other)
  with pytest.raises(UserError, match=f'{fingerprint(params)}.*{fingerprint(other)}'):
    score(quickstart, tmp_path / 'out', decoder_dir=tmp_path / 'decoder')


@pytest.mark.usefixtures('no_scoring')
def test_another_config_is_refused(quickstart, tmp_path):
  experiment = finished.experiment(deliberation__gate='channel')
  with pytest.raises(UserError, match=r"deliberation.gate.*'matrix'.*'channel'"):
    score(quickstart, tmp_path, experiment)


@pytest.mark.usefixtures('no_scoring')
def test_full_coprocessor_as_constant_is_refused(quickstart, tmp_path):
  with pytest.raises(UserError, match=r"trainable.*'full'.*'constant'"):
    score(quickstart, tmp_path, constant_dir=quickstart / 'coprocessor')


@pytest.mark.usefixtures('no_scoring')
def test_missing_coprocessor_is_refused(quickstart, tmp_path):
  with pytest.raises(UserError, match='nothing'):
    score(quickstart, tmp_path, coprocessor_dir=tmp_path / 'nothing')
  assert not (tmp_path / 'nothing').exists()


@pytest.mark.usefixtures('no_scoring')
def test_truncated_coprocessor_is_refused(quickstart, tmp_path):
  coprocessor = shutil.copytree(quickstart / 'coprocessor', tmp_path / 'coprocessor')
  damaged = coprocessor / 'coprocessor/coprocessor.safetensors'
  damaged.write_bytes(damaged.read_bytes()[:100])
  with pytest.raises(UserError, match='coprocessor.safetensors .*100 bytes'):
    score(quickstart, tmp_path / 'out', coprocessor_dir=coprocessor)


@pytest.mark.usefixtures('no_scoring')
def test_unwritable_output_is_refused(quickstart, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='/file cannot be written'):
    score(quickstart, tmp_path / 'file')


@pytest.mark.usefixtures('no_scoring')
def test_too_many_texts_are_refused(quickstart, tmp_path):
  experiment = finished.experiment(evaluation__num_texts=8000)
  with pytest.raises(UserError, match='8000 .*evaluation.num_texts'):
    score(quickstart, tmp_path, experiment)


@pytest.mark.parametrize('pattern, said', [
    (('local', 'global'), 'its window is: 8 tokens in local layers.'),
    (('global',), 'its window is: none.')])
def test_caption_of_the_window(pattern, said):
  """A decoder of global layers has a number for the window too, and no layer has it."""
  experiment = finished.experiment(decoder__layer_pattern=pattern)
  assert experiment.decoder.window == 8
  assert said in ' '.join(evaluate_module._captions(experiment, 1, False).values())
