"""Processes join where they were told to, or where jax knows of others, and nowhere else."""

import jax
import numpy as np
import pytest

from latent_deliberation import distributed
from latent_deliberation.errors import UserError

ALONE = ('JAX_COORDINATOR_ADDRESS', 'SLURM_NTASKS', 'SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE',
         'OMPI_MCA_orte_hnp_uri')


@pytest.fixture
def joined(monkeypatch):
  """The arguments of every call of jax.distributed.initialize, which does nothing."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **named: calls.append(args))
  for name in ALONE:
    monkeypatch.delenv(name, raising=False)
  return calls


def test_a_machine_on_its_own_stays_one_process(joined):
  distributed.initialize()
  assert not joined


def test_all_three_join_processes_and_the_address_may_be_a_variable(joined, monkeypatch):
  distributed.initialize('10.0.0.2:8476', 4, 3)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'other:1')
  distributed.initialize(None, 2, 0)
  assert joined == [('10.0.0.2:8476', 4, 3), ('other:1', 2, 0)]


@pytest.mark.parametrize('given, message', [
    (('host:1', None, None), '--coordinator_address=host:1 .* without --process_count and --proc'),
    (('host:1', 2, None), '--process_count=2 .* without --process_id: several'),
    ((None, 2, 1), '--process_count=2, --process_id=1 .* without --coordinator_address'),
    ((None, None, 0), '--process_id=0 .* without --coordinator_address and --process_count'),
    (('host', 2, 1), '--coordinator_address=host: it must be host:port'),
    (('host:1', 2, 2), '--process_id=2 with --process_count=2: it must lie between 0 and 1')])
def test_what_does_not_suffice_is_named_and_no_one_waits(joined, given, message):
  with pytest.raises(UserError, match=message):
    distributed.initialize(*given)
  assert not joined


def test_an_address_in_the_environment_alone_is_not_passed_over(joined, monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1')
  with pytest.raises(UserError, match='JAX_COORDINATOR_ADDRESS.* without --process_count'):
    distributed.initialize()


@pytest.mark.parametrize('environment, calls', [
    ({'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'node[1-2]'}, 1),
    ({'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'node1'}, 0),
    ({'SLURM_NTASKS': '2'}, 0),  # in a batch script, outside of srun
    ({'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.2:3'}, 1)])
def test_processes_of_a_launcher_join_by_themselves(joined, monkeypatch, environment, calls):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  distributed.initialize()
  assert joined == [()] * calls


def test_tpu_hosts_join_by_themselves_and_a_single_one_goes_on(joined, monkeypatch):
  def find_nobody():
    joined.append(())
    raise ValueError('coordinator_address should be defined.')

  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'tpu,cpu')
  try:
    distributed.initialize()
    monkeypatch.setattr(jax.distributed, 'initialize', find_nobody)
    distributed.initialize()
  finally:
    jax.config.update('jax_platforms', before)
  assert joined == [(), ()]


def test_alone_the_first_process_does_the_work_and_its_error_is_its_own():
  with pytest.raises(UserError, match='here'):
    distributed.run_on_process_zero('fail', lambda: np.fromfile('not here'))
