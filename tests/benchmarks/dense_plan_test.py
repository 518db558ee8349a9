"""One dense mask is planned beside our step, in the way that needs least memory."""

import dataclasses
import json

import pytest

from latent_deliberation.benchmarks import dense_plan
from latent_deliberation.benchmarks.dense_mask import dense_mask
from latent_deliberation.planning.topology import find_topology
from tests import finished


@pytest.fixture
def planned(monkeypatch, tmp_path):
  """Benchmarks a small step whose baseline takes given seconds, and three times the memory."""
  plan_step = dense_plan.plan_step

  def benchmark(seconds_of_peer):
    def plan(run, topology, objective):
      is_peer = objective is dense_mask
      return dataclasses.replace(
          plan_step(run, topology, objective), hbm_bytes_per_chip=3000 if is_peer else 1000,
          estimated_step_seconds=seconds_of_peer if is_peer else 2.0)

    monkeypatch.setattr(dense_plan, 'plan_step', plan)
    experiment = finished.experiment(decoder__num_layers=1, computation__attention='auto')
    return dense_plan.benchmark(experiment, find_topology('cpu:8'), tmp_path / 'dense.json')

  return benchmark


def test_the_mask_is_compared_by_seconds_and_by_memory_and_both_plans_are_kept(planned, tmp_path):
  result = planned(5.0)
  assert result['over_ours'] == {'seconds': 2.5, 'memory': 3.0}
  written = json.loads((tmp_path / 'dense.json').read_text())
  assert {way: plan['settings']['remat'] for way, plan in written['plans'].items()} == {
      'ours': 'none', 'dense mask': 'full'}
  assert (tmp_path / 'dense.png').read_bytes().startswith(b'\x89PNG')


def test_a_mask_that_does_not_fit_has_no_seconds_to_compare(planned):
  assert planned(None)['over_ours'] == {'seconds': None, 'memory': 3.0}


def test_the_mask_keeps_nothing_and_has_one_text_of_a_device_at_a_time():
  experiment = finished.experiment(training__batch_size=32, computation__remat='dots')
  dense = dense_plan.as_dense(experiment, 8)
  assert (dense.computation.remat, dense.computation.attention) == ('full', 'plain')
  assert dense.training.accumulation == 4
