"""The load test counts what is lost and what changes, and a real small load loses nothing."""

import json

import pytest

from latent_deliberation.benchmarks import serving_load
from latent_deliberation.benchmarks.serving_load import LoadOptions, check_load, measure_load
from latent_deliberation.errors import UserError
from tests.serving import small_server


def answer(model='load', text='a', status=200, ended='length', experts=None, fault=None):
  return {'model': model, 'prompt': 'p', 'status': status, 'text': text, 'tokens': 4, 'first': 0.1,
          'seconds': 0.5, 'latents': {'experts': experts or {}, 'fault': fault}, 'ended': ended}


def test_losses_and_changes_are_counted():
  found = serving_load.summarise_phase([
      answer(), answer(text='b'), answer(status=500), answer(ended=None), answer(ended='shutdown'),
      answer('load+one', 'c', experts={'one': 1.0}), answer('load+one', fault='it failed'),
      answer('load+one', 'd', fault='it failed'), answer('load+two', status=404)],
      {'p': 'a'}, 2.0, 10)
  assert (found['whole'], found['lost'], found['unknown_expert']) == (5, 4, 1)
  assert (found['changed'], found['with_latents'], found['faults']) == (2, 1, 2)
  assert found['tokens_per_second'] == 10
  with pytest.raises(UserError, match='4 of 10 requests were lost.* 2 plain texts'):
    check_load({'phases': {'plain': found}})


def test_texts_without_room(tmp_path, monkeypatch):
  """They are refused before a decoder is loaded, or else with what the server said of them."""
  monkeypatch.setattr(serving_load, 'load_decoder', lambda name: small_server.decoder())
  with pytest.raises(UserError, match='max_tokens = 64: .*length = 64 '):
    LoadOptions(max_tokens=64, length=64)
  output = tmp_path / 'load.json'
  with pytest.raises(UserError, match='plain: 2 of 2 requests were lost .*room for 64'):
    measure_load(output, 'tiny', LoadOptions(
        clients=2, requests=1, max_tokens=63, rows=2, length=64, latent_seconds=5.0))
  assert json.loads(output.read_text())['phases']['plain']['lost'] == 2


def test_small_load(tmp_path, monkeypatch):
  """Six clients on tiny weights: faults are injected, nothing is lost, plain texts stay.

  None hangs here, which would last longer than all else: tests of the server have hangs.
  """
  monkeypatch.setattr(serving_load, '_FAULTS', ('fails', 'nan'))
  monkeypatch.setattr(serving_load, 'load_decoder', lambda name: small_server.decoder())
  result = measure_load(tmp_path / 'load.json', 'tiny', LoadOptions(
      clients=6, requests=4, max_tokens=6, rows=2, length=64, share=0.7, latent_seconds=50.0))
  assert result == json.loads((tmp_path / 'load.json').read_text())
  assert (tmp_path / 'load.png').stat().st_size > 5000
  page = (tmp_path / 'load.md').read_text()
  assert all(f'| {phase} | 24 |' in page for phase in serving_load.PHASES) and 'removed' in page
  plain, healthy, faulty = result['phases'].values()
  assert all(each['lost'] == each['changed'] == 0 for each in (plain, healthy, faulty))
  assert plain['with_latents'] == healthy['faults'] == 0 < healthy['with_latents']
  assert faulty['faults'] > 0 and sum(result['faults'].values()) > 0
