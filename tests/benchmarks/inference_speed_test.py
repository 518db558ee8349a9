"""The benchmark of inference, with tiny sizes."""

import dataclasses
import json

import pytest

from latent_deliberation.benchmarks import inference_speed


def test_ratios_are_written(tmp_path, monkeypatch):
  """Every ratio is written, and drawn."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  small = dataclasses.replace(
      inference_speed.SIZES['small'], vocab_size=64, embed_dim=16, num_layers=2, num_heads=2,
      num_kv_heads=1, head_dim=8, hidden_dim=32, window=8)
  for name, value in {'SIZES': {'tiny': small}, 'BATCHES': (1, 2), 'PROMPT': 12, 'DECODED': 8,
                      'LENGTH': 21, 'NUM_LATENTS': (2,), 'FIRST_TOKENS': 2}.items():
    monkeypatch.setattr(inference_speed, name, value)
  output = tmp_path / 'speed.json'
  inference_speed.benchmark(output, 7)  # several turns, since decoding is a difference of times
  result = json.loads(output.read_text())
  cases = {'tiny_batch1', 'tiny_batch2'}
  assert result['decode_ratio_vs_transformers'].keys() == cases
  assert result['prefill_ratio_vs_transformers'].keys() == cases
  assert all(ratio > 0 for ratio in result['decode_ratio_vs_transformers'].values())
  assert result['first_token_ratio_background_vs_plain'] > 0
  for held in result['cache_bytes'].values():
    assert held['held'] == held['formula']
  assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
