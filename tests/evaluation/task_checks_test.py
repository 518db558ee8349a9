"""What cannot be scored is refused before the output is claimed; earlier tasks stay in results."""

import json

import pytest

pytest.importorskip('lm_eval')

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import task_catalog, task_run
from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_run import Plan, run_tasks

BEFORE_ANSWER = Settings('before:Answer:')


@pytest.fixture
def idle(model, monkeypatch):
  """The model, which must compute nothing."""
  for name in ('score', 'write'):
    monkeypatch.setattr(ArmModel, name, lambda *arguments: pytest.fail('computed'))
  return model


@pytest.mark.parametrize('tasks, arms, settings, said', [
    (('piqa', 'winogrande'), ('frozen', 'own'), BEFORE_ANSWER, 'winogrande.*has no such text'),
    (('piqa', 'triviaqa'), ('frozen', 'mean'), Settings(), "'mean' cannot write"),
    (('piqa', 'math'), ('frozen',), Settings(), 'max_length = 512')])
def test_before_the_claim(idle, data, tmp_path, tasks, arms, settings, said):
  """The last of the tasks cannot be scored, which is said before the first one is."""
  with pytest.raises(UserError, match=said):
    run_tasks(idle, Plan(tasks, arms, str(data)), settings, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_room_before_the_claim(idle, data, tmp_path):
  """So is a context without room for latents."""
  for name, docs in (('piqa', [{'goal': 'a', 'sol1': 'b', 'sol2': 'c', 'label': 0}]),
                     ('winogrande', [{'sentence': '_ came.', 'option1': ' ', 'option2': 'b',
                                      'answer': '1'}])):
    (tmp_path / name).mkdir()
    (tmp_path / f'{name}/validation.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  plan = Plan(('piqa', 'winogrande'), ('own',), str(tmp_path))
  with pytest.raises(UserError, match='winogrande.*too short'):
    run_tasks(idle, plan, Settings(), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_arms_before_the_claim(model, data, tmp_path):
  """An arm needs what makes its latents; the corrected command takes the same output."""
  alone = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer)
  with pytest.raises(UserError, match='coprocessor'):
    run_tasks(alone, Plan(('piqa',), ('frozen', 'own'), str(data)), Settings(), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_chain_needs_no_place(idle, data, tmp_path, monkeypatch):
  """The chain of thought has no latents, so its prompts need no place for them."""
  monkeypatch.setattr(task_run, '_claim', lambda *given: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run_tasks(idle, Plan(('gsm8k',), ('own', 'chain'), str(data)),
              Settings('before:#### 14'), tmp_path / 'out')


def test_earlier_tasks(model, data, tmp_path):
  """Tasks of an earlier command stay in the results of a later one, with their data."""
  summaries = [run_tasks(model, Plan(tasks, ('frozen',), str(data), limit=2), Settings(),
                         tmp_path / 'out') for tasks in (('piqa',), ('boolq',), ('piqa',))]
  assert [list(summary['tasks']) for summary in summaries] == [
      ['piqa'], ['boolq', 'piqa'], ['piqa', 'boolq']]
  assert set(summaries[1]['identity']['data']) == {'piqa', 'boolq'}
  assert summaries[2]['tasks'] == summaries[1]['tasks']
  assert '| boolq |' in (tmp_path / 'out/results.md').read_text()


def test_checked_prompts(model, data, tmp_path):
  """What is checked is what is scored, with the same drawn examples."""
  run_tasks(model, Plan(('piqa',), ('frozen',), str(data), limit=3, num_fewshot=2), Settings(),
            tmp_path / 'out')
  lines = (tmp_path / 'out/samples/frozen/samples_piqa.jsonl').read_text().splitlines()
  scored = [tuple(pair) for line in lines for pair in json.loads(line)['arguments']]
  assert scored == [instance.args for _, instance, _ in task_catalog.requests_of(
      'piqa', str(data), 3, 2)]
