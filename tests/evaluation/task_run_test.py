"""Benchmarks run in every arm, go on after a stop, and are what the API says of the same texts."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip('lm_eval')

import latent_deliberation as ld
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import task_run
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.evaluation.arm_model import ArmModel, Writing
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.task_answers import Settings, TaskAnswers
from latent_deliberation.evaluation.task_report import format_page
from latent_deliberation.evaluation.task_run import Plan, _one_filter, run_tasks
from latent_deliberation.files import lock
from latent_deliberation.inference import session
from latent_deliberation.inference.policy import ONCE, Policy
from latent_deliberation.inference.session import DecodingOptions
from latent_deliberation.provenance import git_commit
from tests.evaluation import task_examples

TASKS = ('piqa', 'winogrande', 'gsm8k')
ARMS = ('frozen', 'own', 'shuffled', 'zero', 'constant', 'chain')
QUICK = {'max_gen_toks': 8}


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
  plan.check_documents()
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
  for control in ('shuffled', 'constant'):
    assert task[f'against_{control}']['nats']['value'] == pytest.approx(
        np.mean(own - np.array(task['arms'][control]['nats'])))
  assert '| own vs shuffled, nats | own vs constant, nats |' in (
      finished[0] / 'results.md').read_text()


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
    nats = [-score.nats for score in generator.score(prompts, answers, augment=augment)]
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


def test_other_data(model, data, tmp_path):
  """Other data of a task are another run; --overwrite removes even the results of the same run."""
  changed = tmp_path / 'data'
  shutil.copytree(data, changed)
  plan = Plan(('piqa',), ('own',), str(changed), limit=3)
  run_tasks(model, plan, Settings(), tmp_path / 'out')
  path, = (changed / 'piqa').iterdir()
  docs = task_examples.documents()['piqa/validation']
  path.unlink()
  (changed / 'piqa/validation.jsonl').write_text('\n'.join(map(json.dumps, docs[:2])))
  with pytest.raises(UserError, match='data of piqa: '):
    run_tasks(model, plan, Settings(), tmp_path / 'out')
  # Another task has data of its own.
  run_tasks(model, dataclasses.replace(plan, tasks=('boolq',)), Settings(), tmp_path / 'out')
  with pytest.raises(UserError, match='data of piqa: '):
    run_tasks(model, plan, Settings(), tmp_path / 'out')
  for kept in (False, True):
    summary = run_tasks(model, plan, Settings(), tmp_path / 'out', overwrite=not kept)
    assert len(summary['tasks']['piqa']['items']) == 2
    assert (tmp_path / 'out/tasks/mark').exists() == kept
    (tmp_path / 'out/tasks/mark').touch()


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('content', [
    '{"job": "train", "config": {}, "decoder": "d1", "data": "rows1"}',
    '{"job": "study", "config": {}, "chosen": {}}', '[]', '{"job": '])
def test_directory_of_another_job(model, data, tmp_path, content, overwrite):
  """The run.json of another job is never replaced, since its resume needs the file."""
  path = tmp_path / 'run.json'
  path.write_text(content)
  with pytest.raises(UserError, match=f'{path} is not .*give another --output$'):
    run_tasks(model, Plan(('piqa',), ('own',), str(data)), Settings(), tmp_path,
              overwrite=overwrite)
  assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('left', ['answers.jsonl', 'tasks/piqa.json', 'samples/own/a.jsonl'])
def test_files_without_run_json(model, data, tmp_path, left, overwrite):
  """They may be scores of another decoder, or somebody's own: neither taken over nor removed."""
  path = tmp_path / left
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('{}')
  with pytest.raises(UserError, match=f'holds {left.split("/")[0]} and no run.json'):
    run_tasks(model, Plan(('piqa',), ('own',), str(data)), Settings(), tmp_path,
              overwrite=overwrite)
  assert path.read_text() == '{}' and not (tmp_path / 'run.json').exists()


def test_damaged_outcomes(finished, model, data, tmp_path):
  """A task's file that cannot be read is named before anything is scored."""
  output = tmp_path / 'out'
  shutil.copytree(finished[0], output)
  before = json.loads((output / 'results.json').read_bytes())
  for content in ('{"name": ', '[]', '{"name": "x"}'):
    (output / 'tasks/other.json').write_text(content)
    with pytest.raises(UserError, match='other.json holds no outcomes of a task .*remove it'):
      run_tasks(model, Plan(TASKS, ARMS, str(data)), Settings(), output)
  (output / 'tasks/other.json').unlink()
  assert run_tasks(model, Plan(TASKS, ARMS, str(data)), Settings(), output) == before


def test_second_process(finished, model, data):
  """Another command on the same directory is refused, also one that would remove its results."""
  output, _ = finished
  with lock(output / 'run.lock', f'works in {output}'):
    with pytest.raises(UserError, match=f'works in {output}: let it end'):
      run_tasks(model, Plan(TASKS, ARMS, str(data)), Settings(), output, overwrite=True)
  assert (output / 'answers.jsonl').stat().st_size and (output / 'tasks/piqa.json').exists()


def test_directory_changes_meanwhile(model, data, tmp_path, monkeypatch):
  """What another command writes while this one checks its tasks is looked at once more."""
  output, plan = tmp_path / 'out', Plan(('piqa',), ('own',), str(data), limit=2)

  def meanwhile(limit):
    """Runs another command on another task during the check."""
    monkeypatch.setattr(task_run, '_check_requests', lambda *given: monkeypatch.undo() or run_tasks(
        model, Plan(('boolq',), ('own',), str(data), limit=limit), Settings(), output))

  meanwhile(limit=3)
  with pytest.raises(UserError, match='limit: 3 saved, 2 now'):
    run_tasks(model, plan, Settings(), output)
  shutil.rmtree(output)
  meanwhile(limit=2)
  assert set(run_tasks(model, plan, Settings(), output)['tasks']) == {'piqa', 'boolq'}
  assert set(json.loads((output / 'run.json').read_bytes())['data']) == {'piqa', 'boolq'}


def test_overwrite_removes_results(model, data, tmp_path, monkeypatch):
  """A run that overwrites and is stopped leaves no page of the run before."""
  plan = Plan(('piqa',), ('own',), str(data), limit=2)
  run_tasks(model, plan, Settings(), tmp_path / 'out')
  monkeypatch.setattr(task_run, '_run_task', lambda *given: pytest.fail('stopped'))
  with pytest.raises(pytest.fail.Exception, match='stopped'):
    run_tasks(model, plan, Settings(), tmp_path / 'out', overwrite=True)
  assert not list((tmp_path / 'out').glob('results.*'))


def test_task_names_its_commit(finished):
  """A task keeps the commit that scored it, whatever commit adds others later."""
  _, summary = finished
  assert {task['commit'] for task in summary['tasks'].values()} == {git_commit()}
  later = json.loads(json.dumps(summary))
  for name, task in later['tasks'].items():
    task['commit'] = f'{name}_0123456'
  assert 'piqa' in format_page(later) and '(piqa_01)' in format_page(later)
  for task in later['tasks'].values():
    del task['commit']  # as older code wrote it
  assert 'Seconds of the command that finished each task: piqa' in format_page(later)


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
  plan = Plan(('piqa', 'gsm8k'), ('frozen', 'own', 'shuffled'), str(data), limit=3)
  summary = run_tasks(model, plan, Settings(), tmp_path / 'out')
  for task in summary['tasks'].values():
    frozen = task['arms']['frozen']
    for arm in ('own', 'shuffled'):
      assert task['arms'][arm]['nats'] == frozen['nats']
      assert task['arms'][arm]['texts'] == frozen['texts']


def test_place(model, data, tmp_path):
  """Latents at the end of the question change other scores than at the end of the context."""
  plan = Plan(('piqa',), ('frozen', 'own'), str(data), limit=3)
  summaries = [run_tasks(model, plan, Settings(place),
                         tmp_path / place.replace(':', '_'))['tasks']['piqa']['arms']
               for place in ('end', 'before:Answer:')]
  frozen, own = ([summary[arm]['nats'] for summary in summaries] for arm in ('frozen', 'own'))
  np.testing.assert_allclose(frozen[0], frozen[1], atol=1e-3)
  assert np.abs(np.subtract(own[0], own[1])).max() > 1e-4


def test_place_of_written(model):
  """Latents before the end of a prompt are those of the engine, prompt by prompt."""
  shown = 'Document 5: the 5th of the forty. ' * 3
  prompts = [model.tokenizer.encode(f'{shown}Document {number}: the {number}th' + ' of the' * rest)
             for number, rest in ((6, 1), (7, 0), (8, 2))]
  anchors = [len(prompt) - 1 - at for prompt, at in zip(prompts, (5, 0, 9), strict=True)]
  # A large gate, so that texts tell where the latents are.
  own = coprocessor_checkpoint.CoprocessorCheckpoint(**{**vars(model.own), 'params': {
      **model.own.params, 'gate': 100 * model.own.params['gate']}})
  model = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, own=own,
                   max_length=256)
  engine, options = model.engine('own'), DecodingOptions(16)
  written, _ = next(model.write(prompts, 'own', Writing(options), anchors=anchors))
  texts = dict(zip(written.numbers, written.texts, strict=True))
  for number, (prompt, anchor) in enumerate(zip(prompts, anchors, strict=True)):
    state = engine.read([prompt[:anchor + 1]])
    state = engine.read_on(engine.attach(state, engine.augment(state)), [prompt[anchor + 1:]])
    stops = session.with_ends(options, model.tokenizer, ())
    completion, = session.generate(engine, state, stops)
    assert texts[number] == session.text_of(completion, model.tokenizer, (), prompt)
  # Elsewhere they write something else.
  ends, _ = next(model.write(prompts, 'own', Writing(options)))
  assert dict(zip(ends.numbers, ends.texts, strict=True)) != texts


def greedy_after(model, context, policy, count=5):
  engine = model.engine('own')
  return tuple(session.generate(engine, [context], DecodingOptions(count, policy=policy))[0].tokens)


def test_greedy_by_policy(model):
  """An answer that greedy decoding with the same latents writes is greedy, and no other."""
  policy = Policy(every=2)
  contexts = [tuple(model.tokenizer.encode(text)) for text in ('Document 3: the', 'Document 44')]
  answers = [greedy_after(model, context, policy) for context in contexts]
  answers += [(*answers[0][:-1], answers[0][-1] ^ 1), answers[0][:2]]
  requests = [Request(context, answer, len(context) - 1, item) for item, (context, answer) in
              enumerate(zip((*contexts, contexts[0], contexts[0]), answers, strict=True))]
  (scored, left), = model.score(requests, ('own',), policy=policy)
  assert left == 0
  assert dict(zip(scored.numbers.tolist(), scored.greedy[:, 0], strict=True)) == {
      0: True, 1: True, 2: False, 3: True}


def test_cut_texts_by_policy(model):
  """Texts that are cut to fit are scored by a policy, too, beside longer answers."""
  small = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, own=model.own,
                   max_length=64)
  pairs = [('Document 1: the 1th of the forty. ' * 4, ' end.'),
           ('Document 2:', ' the 2th of the forty, the 2th.')]
  nats = [TaskAnswers(small, ('frozen', 'own'), Settings(policy=policy)).score('t', pairs, (0, 1))
          for policy in (ONCE, Policy(at=(0, 500)))]
  for arm in ('frozen', 'own'):
    np.testing.assert_allclose(*([value for value, _ in found[arm]] for found in nats), atol=1e-3)


def test_cost(model):
  """A policy's latents count wherever they come, and controls without a coprocessor less."""
  latents, pairs = model.own.config.num_latents, [('Document 1: the', ' 1th of')]
  costs = {}
  for name, policy in (('once', ONCE), ('every', Policy(every=3)), ('late', Policy(at=(50,)))):
    arms = ('frozen', 'own', 'zero', *(['mean', 'shuffled'] if policy == ONCE else []))
    answers = TaskAnswers(model, arms, Settings(policy=policy))
    answers.score('t', pairs, (0,))
    costs[name] = {arm: dataclasses.astuple(answers.costs['t', arm]) for arm in arms}
    assert costs[name]['zero'] == costs[name]['frozen']
  once, every, late = costs.values()
  assert once['own'] == once['shuffled'] and once['mean'][0] == once['own'][0]
  assert once['frozen'][1] < once['mean'][1] < once['own'][1]
  # An answer of 7 tokens has latents after 0, 3 and 6; those before are read again each time.
  assert every['own'][0] - every['frozen'][0] == 3 * latents + 6
  assert every['own'][1] > once['own'][1]
  assert late['own'] == late['frozen']


@pytest.mark.slow
@pytest.mark.parametrize('policy', [Policy(every=4), Policy(threshold=0.0, min_gap=3)])
def test_policy(model, data, tmp_path, policy):
  """Latents after every few tokens of an answer are scored, too, and those of a gate."""
  settings = Settings(policy=policy)
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


@pytest.mark.parametrize('policy', [ONCE, Policy(every=4)])
def test_short_prompts(model, tmp_path, policy):
  """A short prompt is refused at once; or the frozen decoder continues it, and it is counted."""
  docs = [{'context': context, 'answer': 'it', 'aliases': ['it']} for context in (
      '', 'What is the 3th of the forty')]
  (tmp_path / 'triviaqa').mkdir()
  (tmp_path / 'triviaqa/validation.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  plan = Plan(('triviaqa',), ('frozen', 'own'), str(tmp_path))
  with pytest.raises(UserError, match='--plain_if_short'):
    run_tasks(model, plan, Settings(policy=policy), tmp_path / 'refused')
  assert not (tmp_path / 'refused/answers.jsonl').exists()
  summary = run_tasks(model, plan, Settings(policy=policy, plain_if_short=True), tmp_path / 'out')
  task = summary['tasks']['triviaqa']
  frozen, own = task['arms']['frozen'], task['arms']['own']
  assert task['short'] == 1
  assert own['texts'][0] == frozen['texts'][0] and own['nats'][0] == frozen['nats'][0]
  assert abs(own['nats'][1] - frozen['nats'][1]) > 1e-4


def test_gold_counts(model, data, tmp_path):
  """Gold answers of written tasks count where they make a text too long."""
  small = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, max_length=48)
  docs = [{'context': 'What is the 3th of the forty', 'answer': 'it is ' * 5, 'aliases': ['it']}]
  (tmp_path / 'triviaqa').mkdir()
  (tmp_path / 'triviaqa/validation.jsonl').write_text(json.dumps(docs[0]))
  summary = run_tasks(small, Plan(('triviaqa',), ('frozen',), str(tmp_path)), Settings(),
                      tmp_path / 'out')
  assert summary['tasks']['triviaqa']['truncated'] == 1


def test_chain_counts(model, data, tmp_path):
  """Prompts of a chain of thought count where they are cut."""
  small = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, max_length=48)
  summary = run_tasks(small, Plan(('gsm8k',), ('frozen', 'chain'), str(data), limit=1), Settings(),
                      tmp_path / 'out')
  # The prompt with its examples, the gold answer after it, and the prompt of the chain.
  assert summary['tasks']['gsm8k']['truncated'] == 3


@pytest.mark.parametrize('arms, said', [
    (('best',), 'best'), (('chain',), 'chain'), (('frozen', 'mean', 'none'), 'none')])
def test_unknown_arms(data, arms, said):
  with pytest.raises(UserError, match=said):
    Plan(('piqa',), arms, str(data)).check()


def test_chain_without_data():
  with pytest.raises(UserError, match='--data'):
    Plan(('gsm8k',), ('frozen', 'chain')).check()


def test_documents_are_checked(tmp_path):
  """A document that cannot be scored is refused before any work, unless a limit leaves it out."""
  docs = [{'sentence': 'It was _ .', 'option1': 'a', 'option2': 'b', 'answer': answer}
          for answer in ('1', '2', '3')]
  (tmp_path / 'winogrande').mkdir()
  (tmp_path / 'winogrande/validation.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  with pytest.raises(UserError, match='winogrande'):
    Plan(('winogrande',), ('frozen',), str(tmp_path)).check_documents()
  Plan(('winogrande',), ('frozen',), str(tmp_path), limit=2).check_documents()


def test_filter():
  """Of several filters the one that takes the last number counts, and otherwise the first."""
  rows = [{'filter': name, 'doc_id': number} for name in ('strict-match', 'flexible-extract')
          for number in (1, 0)]
  assert _one_filter(rows) == [{'filter': 'flexible-extract', 'doc_id': number}
                               for number in (0, 1)]
  assert _one_filter(rows[:2]) == [{'filter': 'strict-match', 'doc_id': number}
                                   for number in (0, 1)]
