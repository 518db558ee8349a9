"""The speed of many experts: each way is timed, in turns, and written as JSON and pictures."""

import json
from pathlib import Path

import pytest

from latent_deliberation.benchmarks import expert_speed, lora_cost
from latent_deliberation.errors import UserError
from tests.serving import small_server


def test_benchmark(tmp_path, monkeypatch):
  monkeypatch.setattr(expert_speed, 'load_decoder', lambda name, dtype: small_server.decoder())
  monkeypatch.setattr(expert_speed, 'git_commit', lambda: 'abc')
  output = tmp_path / 'speed.json'
  result = expert_speed.benchmark('tiny', output, counts=(3, 1), batch=4, prompt=12, decoded=3,
                                  rank=2, repeats=1)
  assert json.loads(output.read_text()) == json.loads(json.dumps(result))
  assert list(result['ours']) == ['1 loaded', '3 loaded']
  in_batch = [found['experts_in_batch'] for found in result['ours'].values()]
  assert in_batch == [{'plain': 0, 'one for all': 1, 'mixed': 1},
                      {'plain': 0, 'one for all': 1, 'mixed': 3}]
  for found in result['ours'].values():
    for way in ('plain', 'one for all', 'mixed'):
      seconds = sum(found[way]['seconds'].values())
      assert found[way]['tokens_per_second'] * seconds == pytest.approx(4 * 3)
  page = output.with_suffix('.md').read_text()
  assert page.count('| ours |') == 6 and 'PEFT' not in page
  assert output.with_suffix('.png').exists()


def test_our_side_is_kept_when_the_other_fails(tmp_path, monkeypatch):
  """PEFT runs last, and its failure loses nothing of ours."""
  def fail(*unused):
    raise UserError('peft_side.py ended with code 1')

  monkeypatch.setattr(expert_speed, 'load_decoder', lambda name, dtype: small_server.decoder())
  monkeypatch.setattr(expert_speed, 'check_interpreter', lambda python: None)
  monkeypatch.setattr(expert_speed, 'run_other', fail)
  output = tmp_path / 'speed.json'
  with pytest.raises(UserError, match='code 1'):
    expert_speed.benchmark('tiny', output, counts=(1,), batch=2, prompt=12, decoded=2, rank=2,
                           repeats=1, python='python')
  assert list(json.loads(output.read_text())['ours']) == ['1 loaded']


@pytest.mark.parametrize('works', [False, True])
def test_interpreter_is_tried_before_anything_is_timed(tmp_path, monkeypatch, works):
  """One that is not there, and one without peft."""
  python = tmp_path / 'python'
  if works:
    python.write_text('#!/bin/sh\necho "No module named peft" >&2; exit 1\n')
    python.chmod(0o755)
  for module, name in ((expert_speed, 'load_decoder'), (lora_cost, 'load_package')):
    monkeypatch.setattr(module, name, lambda *unused, **more: pytest.fail('too late'))
  message = 'No module named peft' if works else 'cannot be run'
  with pytest.raises(UserError, match=f'--python={python} .*{message}'):
    expert_speed.benchmark('tiny', tmp_path / 'a.json', python=str(python))
  with pytest.raises(UserError, match=f'--python={python} .*{message}'):
    lora_cost.benchmark('tiny', Path('x'), Path('y'), tmp_path / 'a.json', python=str(python))


def test_numbers_of_experts():
  assert expert_speed.parse_counts(['1', ' 10']) == (1, 10)
  for written in ([], ['one'], ['0'], ['1', '-3'], ['2.5']):
    with pytest.raises(UserError, match=f'--experts={",".join(written)}: give integers'):
      expert_speed.parse_counts(written)
