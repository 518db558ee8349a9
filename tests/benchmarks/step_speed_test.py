"""The benchmark of a train step, with tiny sizes."""

import dataclasses
import json

import pytest

from latent_deliberation.benchmarks import step_speed


def test_ratios_are_written(tmp_path, monkeypatch):
  """Every ratio is written, and drawn."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  small = dataclasses.replace(
      step_speed.CONFIG, vocab_size=64, embed_dim=16, num_layers=2, num_heads=2,
      num_kv_heads=1, head_dim=8, hidden_dim=32, window=8)
  for name, value in {'CONFIG': small, 'TRUNK': 12, 'CASES': ((2, 2),), 'AHEAD': 3, 'TEXTS': 1,
                      'LENGTH': 8}.items():
    monkeypatch.setattr(step_speed, name, value)
  output = tmp_path / 'step.json'
  step_speed.benchmark(output, 1)
  result = json.loads(output.read_text())
  assert result['step']['2 traces, 2 latents']['over_ours'].keys() == {'dense mask', 'text a trace'}
  for name in ('forward', 'forward_backward'):
    measured = result['decoder'][name]
    assert measured['over_ours']['transformers'] == pytest.approx(
        measured['seconds']['transformers'] / measured['seconds']['ours'])
  assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
