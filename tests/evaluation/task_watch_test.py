"""Training scores chosen tasks at every evaluation, on the same items each time."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval')

from latent_deliberation.build import build_deliberator, load_frozen, open_frozen
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import task_watch
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_run import Plan, run_tasks
from latent_deliberation.inference.tokenizer import ByteTokenizer
from latent_deliberation.sharding import MeshConfig, make_mesh
from latent_deliberation.training import train
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.train import train_coprocessor
from tests import finished
from tests.evaluation import task_examples

TASKS = ('piqa', 'gsm8k')


def watched(data, **overrides):
  return finished.experiment(evaluation__tasks=TASKS, evaluation__task_data=str(data),
                             evaluation__task_items=4, **overrides)


def test_training(quickstart, data, tmp_path, one_device):
  """Values are in the metrics. They begin at the frozen decoder's, since the gate begins at 0."""
  experiment = watched(data, training__loop__num_steps=1, training__loop__eval_every=1)
  train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'run', quickstart)
  row, = (row for row in read_metrics(tmp_path / 'run/metrics.jsonl') if 'tasks/piqa/gain' in row)
  assert row['step'] == 1 and np.isfinite(row['tasks/gsm8k/content'])
  assert 0 <= row['tasks/piqa/accuracy'] <= 1


def test_equals_benchmarks(quickstart, data, tmp_path, one_device):
  """The values are those of the benchmarks on the same items."""
  experiment = watched(data)
  decoder_dir, mesh = quickstart / 'pretraining/decoder', make_mesh(MeshConfig(), jax.devices())
  frozen, _ = load_frozen(experiment, open_frozen(experiment.decoder, decoder_dir), mesh)
  evaluate = task_watch.make_evaluator(experiment, build_deliberator(experiment), frozen,
                                       task_watch.read_samples(experiment, quickstart), mesh)
  params = coprocessor_checkpoint.load(quickstart / 'coprocessor/coprocessor').params
  values = evaluate(params)
  model = open_arm_model(decoder_dir, quickstart / 'coprocessor', max_length=1024)
  tasks = run_tasks(model, Plan(('piqa',), ('frozen', 'own', 'shuffled'), str(data), limit=4),
                    Settings(), tmp_path / 'out')['tasks']
  arms = {name: arm['means'] for name, arm in tasks['piqa']['arms'].items()}
  for key, value in (
      ('gain', arms['frozen']['nats']['value'] - arms['own']['nats']['value']),
      ('content', arms['shuffled']['nats']['value'] - arms['own']['nats']['value']),
      ('accuracy', arms['own']['correct']['value']),
      ('frozen_accuracy', arms['frozen']['correct']['value'])):
    assert values[f'piqa/{key}'] == pytest.approx(value, abs=1e-3)
  still = evaluate({**params, 'gate': 0 * params['gate']})
  assert still['piqa/gain'] == still['piqa/content'] == 0


def test_left_out(tmp_path, monkeypatch):
  """Items without room for latents are left out, cut texts are counted, and the log says both."""
  docs = task_examples.documents()['triviaqa/validation_6'][:4]
  docs[1]['context'] = ''
  (tmp_path / 'triviaqa').mkdir()
  (tmp_path / 'triviaqa/validation.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  said = []
  monkeypatch.setattr(task_watch.logging, 'warning', lambda form, *values: said.append(
      form % values))
  monkeypatch.setattr(task_watch, 'MAX_LENGTH', 48)
  config = finished.experiment(evaluation__tasks=('triviaqa',), evaluation__task_items=4,
                               evaluation__task_data=str(tmp_path)).evaluation
  values = task_watch._read('triviaqa', config, ByteTokenizer(), 1)
  assert values['items'] == values['gold'] == [0, 1, 2]
  cut, = said
  assert 'triviaqa: 0 of 4' in cut and '1 of 4 items have no room' in cut
  with pytest.raises(UserError, match='none of its 4 items'):
    task_watch._read('triviaqa', config, ByteTokenizer(), 100)
  monkeypatch.setattr(task_watch, 'MAX_LENGTH', 24)
  task_watch._read('triviaqa', config, ByteTokenizer(), 1)
  assert '3 of 4 requests have more than 24' in said[-1]


def test_documents_before_weights(quickstart, tmp_path, monkeypatch, one_device):
  """A document that cannot be scored is found before the decoder's weights are loaded."""
  monkeypatch.setattr(train, 'load_frozen', lambda *unused: pytest.fail('weights were loaded'))
  doc = {'sentence': 'It was _ .', 'option1': 'a', 'option2': 'b', 'answer': '3'}
  (tmp_path / 'winogrande').mkdir()
  (tmp_path / 'winogrande/validation.jsonl').write_text(json.dumps(doc))
  experiment = finished.experiment(evaluation__tasks=('winogrande',), evaluation__task_items=4,
                                   evaluation__task_data=str(tmp_path))
  with pytest.raises(UserError, match='winogrande'):
    train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'run', quickstart)


def test_ties():
  """Of equally likely answers the first one is chosen, as lm-evaluation-harness chooses."""
  sample = task_watch.Sample([], np.array([0, 3, 5]), np.array([0, 0, 1, 1, 1, 2, 2]), True)
  nats = np.array([[1, 1], [1, 2], [4, 5], [4, 4], [5, 4], [7, 8], [6, 9]])
  assert task_watch._right(nats, sample).tolist() == [[True, True], [False, True], [False, True]]


@pytest.mark.parametrize('values, said', [
    ({'evaluation__tasks': ('pica',)}, 'did you mean piqa'),
    ({'evaluation__tasks': ('drop',)}, 'drop/train.jsonl'),
    ({'evaluation__tasks': ('humaneval',)}, 'runs programs'),
    ({'evaluation__task_data': ''}, 'evaluation.task_data'),
    ({'evaluation__task_items': 0}, 'task_items')])
def test_refused(data, values, said):
  """Wrong tasks are refused before any work."""
  with pytest.raises(UserError, match=said):
    task_watch.check(finished.experiment(**{
        'evaluation__tasks': TASKS, 'evaluation__task_data': str(data), **values}).evaluation)
