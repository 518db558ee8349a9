"""Plans of our step and of the same step under one dense mask."""

import dataclasses
import json

import pytest

from latent_deliberation.benchmarks import dense_plan
from latent_deliberation.benchmarks.dense_mask import dense_mask
from latent_deliberation.errors import UserError
from latent_deliberation.planning.topology import find_topology
from latent_deliberation.sharding import MeshConfig
from tests import finished


@pytest.fixture
def planned(monkeypatch, tmp_path):
  """Plans a small step; the mask takes the given seconds, and three times the memory of ours."""
  plan_step = dense_plan.plan_step

  def benchmark(mask_seconds):
    def plan(run, topology, objective):
      is_mask = objective is dense_mask
      return dataclasses.replace(
          plan_step(run, topology, objective), hbm_bytes_per_chip=3000 if is_mask else 1000,
          estimated_step_seconds=mask_seconds if is_mask else 2.0)

    monkeypatch.setattr(dense_plan, 'plan_step', plan)
    experiment = finished.experiment(decoder__num_layers=1, computation__attention='auto')
    return dense_plan.benchmark(experiment, find_topology('cpu:8'), tmp_path / 'dense.json')

  return benchmark


def test_ratios_and_plans(planned, tmp_path):
  """Seconds and memory are compared, and both plans are kept."""
  result = planned(5.0)
  assert result['over_ours'] == {'seconds': 2.5, 'memory': 3.0}
  written = json.loads((tmp_path / 'dense.json').read_text())
  assert {way: plan['settings']['remat'] for way, plan in written['plans'].items()} == {
      'ours': 'none', 'dense mask': 'full'}
  assert (tmp_path / 'dense.png').read_bytes().startswith(b'\x89PNG')


def test_mask_without_seconds(planned):
  """A mask that does not fit has no seconds to compare."""
  assert planned(None)['over_ours'] == {'seconds': None, 'memory': 3.0}


def test_as_dense():
  """The mask keeps nothing of a block and has one text a shard at a time."""
  experiment = finished.experiment(training__batch_size=32, computation__remat='dots')
  topology = find_topology('cpu:8')
  dense = dense_plan.as_dense(experiment, topology)
  assert (dense.computation.remat, dense.computation.attention) == ('full', 'plain')
  assert dense.training.accumulation == 4
  # Devices of a tensor axis share their texts.
  tensor = dataclasses.replace(experiment, mesh=MeshConfig(tensor=2))
  assert dense_plan.as_dense(tensor, topology).training.accumulation == 8


def test_int8_is_refused(tmp_path):
  """Before anything is compiled."""
  experiment = finished.experiment(computation__frozen_dtype='w8a8')
  with pytest.raises(UserError, match='no int8 weights'):
    dense_plan.benchmark(experiment, find_topology('cpu:8'), tmp_path / 'x.json')
