"""Benchmarks run in every arm, go on after a stop, and are what the API says of the same texts."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval')

import latent_deliberation as ld
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.arm_model import ArmModel, open_arm_model
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_run import Plan, run_tasks
from latent_deliberation.inference.policy import Policy
from tests.evaluation import task_examples

TASKS = ('piqa', 'winogrande', 'gsm8k')
ARMS = ('frozen', 'own', 'shuffled', 'zero', 'constant', 'chain')
QUICK = {'max_gen_toks': 8}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return task_examples.write(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def model(quickstart):
  devices, jax.devices = jax.devices, lambda *backend: devices(*backend)[:1]
  try:
    yield open_arm_model(quickstart / 'pretraining/decoder', quickstart / 'coprocessor',
                         quickstart / 'constant', max_length=512)
  finally:
    jax.devices = devices


@pytest.fixture(scope='module', autouse=True)
def short_texts():
  """Texts of a few tokens."""
  from latent_deliberation.evaluation import task_answers
  writing = task_answers._writing

  def short(generation, batch_size):
    return writing({**generation, **QUICK}, batch_size)

  task_answers._writing = short
  yield
  task_answers._writing = writing


@pytest.fixture(scope='module')
def finished(model, data, tmp_path_factory):
  """The directory of a run, and its results."""
  output = tmp_path_factory.mktemp('run') / 'out'
  plan = Plan(TASKS, ARMS, str(data))
  plan.check()
  return output, run_tasks(model, plan, Settings(), output)


def test_results(finished):
  """Every item has nats, p and accuracy in every arm; tables and picture are there."""
  output, summary = finished
  assert json.loads((output / 'results.json').read_bytes()) == summary
  assert list(summary['tasks']) == list(TASKS)
  piqa = summary['tasks']['piqa']
  assert (piqa['chance'], piqa['majority'], piqa['metric'], piqa['shots']) == (0.5, 0.5, 'acc', 0)
  assert list(piqa['arms']) == ['frozen', 'own', 'shuffled', 'zero', 'constant']
  for arm in piqa['arms'].values():
    assert [len(arm[key]) for key in ('nats', 'p', 'correct', 'norm')] == [6] * 4
    assert np.mean(arm['nats']) == pytest.approx(arm['means']['nats']['value'])
    assert 0 <= min(arm['p']) < max(arm['p']) <= 1 and set(arm['correct']) <= {0, 1}
  assert piqa['arms']['own']['cost']['flops'] > piqa['arms']['frozen']['cost']['flops']
  page = (output / 'results.md').read_text()
  assert '| piqa | 6 |' in page and 'chain of thought' in page
  assert (output / 'results.png').stat().st_size > 10_000
  samples = (output / 'samples/own/samples_piqa.jsonl').read_text().splitlines()
  assert len(samples) == 6 and json.loads(samples[0])['doc']['goal'].startswith('How do I')


def test_differences(finished):
  """Differences are paired, and McNemar's test counts the items that changed."""
  task = finished[1]['tasks']['piqa']
  own, frozen = (np.array(task['arms'][arm]['nats']) for arm in ('own', 'frozen'))
  found = task['arms']['own']['difference']
  assert found['nats']['value'] == pytest.approx((own - frozen).mean())
  low, high = found['nats']['ci95']
  assert low <= found['nats']['value'] <= high
  right = [np.array(task['arms'][arm]['correct']) for arm in ('own', 'frozen')]
  assert found['mcnemar']['only_this'] == ((right[0] == 1) & (right[1] == 0)).sum()
  assert task['against_shuffled']['nats']['value'] == pytest.approx(
      np.mean(own - np.array(task['arms']['shuffled']['nats'])))


def test_written(finished):
  """A written task has texts, nats of its gold answers, and a chain of thought of its own."""
  task = finished[1]['tasks']['gsm8k']
  assert task['shots'] == 8 and list(task['arms']) == list(ARMS)
  assert all(len(arm['texts']) == 6 for arm in task['arms'].values())
  assert len(task['arms']['own']['nats']) == 6 and task['arms']['chain']['nats'] == []
  # A chain has no examples before it.
  assert task['arms']['chain']['cost']['tokens'] < task['arms']['frozen']['cost']['tokens']
  # Zero latents of the refining kind are the frozen decoder.
  assert task['arms']['zero']['texts'] == task['arms']['frozen']['texts']
  assert task['arms']['zero']['nats'] == task['arms']['frozen']['nats']


def test_equals_api(finished, quickstart, data):
  """Scores and texts are those of the public API, prompt by prompt."""
  decoder = ld.load_decoder(quickstart / 'pretraining/decoder')
  generator = ld.Generator(decoder, ld.load_coprocessor(quickstart / 'coprocessor'), length=512)
  arms = finished[1]['tasks']['piqa']['arms']
  docs = task_examples.documents()['piqa/validation']
  prompts = [f'Question: {doc["goal"]}\nAnswer:' for doc in docs]
  answers = [f' {doc["sol2" if doc["label"] else "sol1"]}' for doc in docs]
  for arm, augment in (('frozen', False), ('own', True)):
    nats = [-score.nats for score in ld.score(generator, prompts, answers, augment=augment)]
    np.testing.assert_allclose(arms[arm]['nats'], nats, atol=1e-3)
  sample = json.loads((finished[0] / 'samples/own/samples_gsm8k.jsonl').read_text().split('\n')[0])
  text, = generator.generate([sample['arguments'][0][0]], max_tokens=8,
                             stop=['Question:', '\n\n'], augment=True)
  assert sample['resps'] == [[text.text]]


def test_resumes(finished, model, data, monkeypatch):
  """Finished tasks and finished batches are not scored again."""
  output, summary = finished
  (output / 'tasks/piqa.json').unlink()
  (output / 'tasks/gsm8k.json').unlink()
  for name in ('score', 'write'):
    monkeypatch.setattr(ArmModel, name, lambda *arguments: pytest.fail('scored again'))
  again = run_tasks(model, Plan(TASKS, ARMS, str(data)), Settings(), output)
  for task in TASKS:
    assert again['tasks'][task]['arms'] == summary['tasks'][task]['arms']


def test_other_run(finished, model, data):
  """Another run is refused in the same directory, and says what differs."""
  output, _ = finished
  with pytest.raises(UserError, match='limit: None saved, 2 now'):
    run_tasks(model, Plan(TASKS, ARMS, str(data), limit=2), Settings(), output)


def test_limit_and_overwrite(model, data, tmp_path):
  """The first items of a task alone; then others over them, when it is asked for."""
  for limit in (2, 3):
    summary = run_tasks(model, Plan(('piqa',), ('own',), str(data), limit=limit), Settings(),
                        tmp_path / 'out', overwrite=True)
    assert len(summary['tasks']['piqa']['items']) == limit
    assert 'difference' not in summary['tasks']['piqa']['arms']['own']


def test_zero_gate(quickstart, data, tmp_path, one_device):
  """A coprocessor whose gate is zero scores as the decoder alone, to the bit."""
  trained = coprocessor_checkpoint.load(quickstart / 'coprocessor/coprocessor')
  params = {**trained.params, 'gate': 0 * trained.params['gate']}
  coprocessor_checkpoint.save(tmp_path / 'zero', coprocessor_checkpoint.CoprocessorCheckpoint(
      **{**vars(trained), 'params': params}))
  model = open_arm_model(quickstart / 'pretraining/decoder', tmp_path / 'zero', max_length=512)
  summary = run_tasks(model, Plan(('piqa', 'gsm8k'), ('frozen', 'own', 'shuffled'), str(data)),
                      Settings(), tmp_path / 'out')
  for task in summary['tasks'].values():
    frozen = task['arms']['frozen']
    for arm in ('own', 'shuffled'):
      assert task['arms'][arm]['nats'] == frozen['nats']
      assert task['arms'][arm]['texts'] == frozen['texts']


def test_place(model, data, tmp_path):
  """Latents at the end of the question change other scores than at the end of the context."""
  summaries = [run_tasks(model, Plan(('piqa',), ('frozen', 'own'), str(data)), Settings(place),
                         tmp_path / place.replace(':', '_'))['tasks']['piqa']['arms']
               for place in ('end', 'before:Answer:')]
  frozen, own = ([summary[arm]['nats'] for summary in summaries] for arm in ('frozen', 'own'))
  np.testing.assert_allclose(frozen[0], frozen[1], atol=1e-3)
  assert np.abs(np.subtract(own[0], own[1])).max() > 1e-4


@pytest.mark.slow
def test_policy(model, data, tmp_path):
  """Latents after every few tokens of an answer are scored, too."""
  settings = Settings(policy=Policy(every=4))
  summary = run_tasks(model, Plan(('piqa',), ('frozen', 'own'), str(data), limit=2), settings,
                      tmp_path / 'out')
  once = run_tasks(model, Plan(('piqa',), ('frozen', 'own'), str(data), limit=2), Settings(),
                   tmp_path / 'once')
  frozen, own = ([each['tasks']['piqa']['arms'][arm]['nats'] for each in (summary, once)]
                 for arm in ('frozen', 'own'))
  np.testing.assert_allclose(frozen[0], frozen[1], atol=1e-3)
  assert np.abs(np.subtract(own[0], own[1])).max() > 1e-4


def test_short_contexts(model, tmp_path):
  """A context without room for latents is refused, or scored without them and counted."""
  # Two latents have no room in a context that is a space, which belongs to the answer.
  docs = [{'sentence': sentence, 'option1': ' ', 'option2': 'The documents', 'answer': '1'}
          for sentence in ('_ came.', 'After that _ went.')]
  (tmp_path / 'winogrande').mkdir()
  (tmp_path / 'winogrande/validation.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  plan = Plan(('winogrande',), ('frozen', 'own'), str(tmp_path))
  with pytest.raises(UserError, match='winogrande'):
    run_tasks(model, plan, Settings(), tmp_path / 'refused')
  summary = run_tasks(model, plan, Settings(plain_if_short=True), tmp_path / 'out')
  task = summary['tasks']['winogrande']
  assert task['short'] == 1 and task['arms']['own']['nats'][0] == task['arms']['frozen']['nats'][0]
  assert '1 contexts without room' in (tmp_path / 'out/results.md').read_text()


@pytest.mark.parametrize('arms, said', [
    (('best',), 'best'), (('chain',), 'chain'), (('frozen', 'mean', 'none'), 'none')])
def test_unknown_arms(data, arms, said):
  with pytest.raises(UserError, match=said):
    Plan(('piqa',), arms, str(data)).check()


def test_unable_arms(model, data, tmp_path):
  """Mean latents write no text, and an arm needs what makes its latents."""
  with pytest.raises(UserError, match="'mean'"):
    run_tasks(model, Plan(('triviaqa',), ('mean',), str(data)), Settings(), tmp_path / 'out')
  alone = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer)
  with pytest.raises(UserError, match='coprocessor'):
    run_tasks(alone, Plan(('piqa',), ('own',), str(data)), Settings(), tmp_path / 'other')
