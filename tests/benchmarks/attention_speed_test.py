"""The benchmark of attention, with tiny sizes."""

import dataclasses
import json

import pytest

from latent_deliberation.benchmarks.attention_speed import benchmark
from latent_deliberation.experiment import bind
from tests import finished


@pytest.mark.slow
def test_ways_agree(tmp_path):
  """All ways have the same loss and gradient, and their times are written."""
  experiment = bind(finished.config_of('tiny'))
  experiment = dataclasses.replace(
      experiment, data=dataclasses.replace(experiment.data, length=16),
      deliberation=dataclasses.replace(experiment.deliberation, num_traces=2))
  output = tmp_path / 'attention.json'
  assert benchmark(experiment, 1, True, output, 1).keys() == json.loads(output.read_text()).keys()
  result = json.loads(output.read_text())
  assert result['measured'].keys() == {'ours', 'plain', 'dense mask'}
  for name in ('loss', 'gradient_norm'):
    fused, *others = (measured[name] for measured in result['measured'].values())
    assert others == pytest.approx([fused] * 2, rel=1e-4)
  assert result['over_ours']['plain'] == pytest.approx(
      result['seconds']['plain'] / result['seconds']['ours'])
