"""The command of benchmarks chooses arms, and refuses what cannot be scored before it loads."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from latent_deliberation.cli import benchmark_tasks
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.task_run import Plan
from latent_deliberation.inference.policy import FittedGate, Policy

FLAGS = {'decoder': 'no-such-decoder', 'coprocessor': 'no-such-coprocessor', 'constant': '',
         'arms': None, 'limit': None, 'num_fewshot': None, 'place': 'end', 'at': [], 'every': 0,
         'gate': '', 'gate_score': 'entropy', 'budget': 0.1,
         'plain_if_short': False, 'run_code': False, 'dtype': 'auto', 'max_length': 512,
         'batch_size': 0, 'mesh': '', 'vocabulary': '', 'overwrite': False}


@pytest.mark.parametrize('given, arms', [
    ({}, ('frozen', 'own', 'shuffled', 'zero', 'chain')),
    ({'every': 4}, ('frozen', 'own', 'zero', 'chain')),
    ({'data': '', 'coprocessor': ''}, ('frozen',)),
    ({'constant': 'x', 'coprocessor': ''}, ('frozen', 'constant', 'chain'))])
def test_default_arms(monkeypatch, given, arms):
  """By default an arm is scored if the flags allow it."""
  plans = []
  monkeypatch.setattr(Plan, 'check', lambda plan: plans.append(plan))
  monkeypatch.setattr(Plan, 'check_documents', lambda plan: None)
  monkeypatch.setattr(benchmark_tasks, 'find_arm_model', lambda *given, **named: SimpleNamespace(
      load=lambda: None))
  monkeypatch.setattr(benchmark_tasks, 'run_tasks', lambda *given, **named: {})
  benchmark_tasks.benchmark(['gsm8k'], Path('out'), **{**FLAGS, 'data': 'x', **given})
  assert plans[0].arms == arms


@pytest.mark.parametrize('at, expected', [([], ()), ([20], (20,))])
def test_gate(monkeypatch, at, expected):
  """Latents come where a gate opens, and at set places; the gate is of this decoder."""
  gate, runs, opened = FittedGate(Path('gate'), 'x', Policy(threshold=0.5)), [], []
  monkeypatch.setattr(Plan, 'check', lambda plan: None)
  monkeypatch.setattr(Plan, 'check_documents', lambda plan: None)
  monkeypatch.setattr(benchmark_tasks, 'open_gate', lambda *given: gate)
  monkeypatch.setattr(benchmark_tasks, 'find_arm_model', lambda *given, **named: SimpleNamespace(
      load=lambda: opened[-1]))
  monkeypatch.setattr(benchmark_tasks, 'run_tasks', lambda *given, **named: runs.append(given))
  flags = {**FLAGS, 'data': 'x', 'at': at, 'gate': 'gate'}
  opened.append(SimpleNamespace(fingerprint='x'))
  benchmark_tasks.benchmark(['piqa'], Path('out'), **flags)
  (_, plan, settings, _), = runs
  assert settings.policy == Policy(at=expected, threshold=0.5)
  assert plan.arms == ('frozen', 'own', 'zero', 'chain')
  opened.append(SimpleNamespace(fingerprint='y'))
  with pytest.raises(UserError, match='fitted on a decoder'):
    benchmark_tasks.benchmark(['piqa'], Path('out'), **flags)


def test_checks_without_documents_come_first(monkeypatch, tmp_path):
  """A wrong --decoder or --output is refused before any document is read."""
  monkeypatch.setattr(Plan, 'check', lambda plan: None)
  monkeypatch.setattr(Plan, 'check_documents', lambda plan: pytest.fail('documents were read'))
  with pytest.raises(UserError, match='no-such-decoder'):
    benchmark_tasks.benchmark(['piqa'], tmp_path, **{**FLAGS, 'data': 'x'})
  monkeypatch.setattr(benchmark_tasks, 'find_arm_model', lambda *given, **named: None)
  (tmp_path / 'run.json').write_text('{"job": "train"}')
  with pytest.raises(UserError, match='run.json is not of benchmarks'):
    benchmark_tasks.benchmark(['piqa'], tmp_path, **{**FLAGS, 'data': 'x'})


def test_no_gate(tmp_path):
  with pytest.raises(UserError, match='gate.py'):
    benchmark_tasks.benchmark(['piqa'], Path('out'), **{**FLAGS, 'data': 'x', 'gate': tmp_path})


def test_shuffled_by_policy():
  """Another example's latents by a policy are refused before anything is loaded."""
  with pytest.raises(UserError, match="'shuffled'"):
    benchmark_tasks.benchmark(['piqa'], Path('out'), **{
        **FLAGS, 'data': 'x', 'arms': ['own', 'shuffled'], 'at': [0, 20]})


@pytest.mark.parametrize('given, said', [
    ({'arms': ['frozen', 'own'], 'coprocessor': ''}, "'own' needs a coprocessor"),
    ({'arms': ['constant']}, "'constant' needs"), ({'arms': ['best', 'own']}, 'best')])
def test_arms_without_latents(given, said):
  """An arm without what makes its latents is refused before anything is loaded."""
  with pytest.raises(UserError, match=said):
    benchmark_tasks.benchmark(['piqa'], Path('out'), **{**FLAGS, 'data': 'x', **given})
