"""The speed of many experts: each way is timed, in turns, and written as JSON and pictures."""

import json

import pytest

from latent_deliberation.benchmarks import expert_speed
from latent_deliberation.benchmarks.baseline import alternate
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


def test_work_takes_turns():
  """All run once to compile, then once in each round."""
  done = []
  taken = alternate({name: lambda name=name: done.append(name) for name in 'ab'}, 2)
  assert done == list('ababab') and set(taken) == {'a', 'b'}
