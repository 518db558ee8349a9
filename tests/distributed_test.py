"""Processes join where flags say so or jax finds others, and nowhere else."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from latent_deliberation import distributed
from latent_deliberation.errors import UserError

ALONE = ('JAX_COORDINATOR_ADDRESS', 'SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NODELIST',
         'SLURM_PTY_PORT', 'OMPI_COMM_WORLD_SIZE', 'OMPI_MCA_orte_hnp_uri')
TASK = {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_STEP_NODELIST': 'node[1-4]'}


@pytest.fixture
def joined(monkeypatch):
  """The arguments of every call of jax.distributed.initialize, which does nothing."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **named: calls.append(args))
  for name in ALONE:
    monkeypatch.delenv(name, raising=False)
  return calls


def test_single_machine(joined):
  """A single machine stays one process."""
  distributed.initialize()
  assert not joined


def test_given_processes(joined, monkeypatch):
  """All three arguments join processes, and the address may be a variable."""
  distributed.initialize('10.0.0.2:8476', 4, 3)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'other:1')
  distributed.initialize(None, 2, 0)
  assert joined == [('10.0.0.2:8476', 4, 3), ('other:1', 2, 0)]


@pytest.mark.parametrize('given, message', [
    (('host:1', None, None), '--coordinator_address=host:1 .*--process_count.*--process_id'),
    (('host:1', 2, None), '--process_count=2 .*--process_id'),
    ((None, 2, 1), '--process_count=2, --process_id=1 .*--coordinator_address'),
    ((None, None, 0), '--process_id=0 .*--coordinator_address.*--process_count'),
    (('host', 2, 1), '--coordinator_address=host:.*host:port'),
    (('host:1', 2, 2), '--process_id=2.*--process_count=2.*0 and 1')])
def test_bad_arguments(joined, given, message):
  """Missing or bad arguments are named, and nothing is joined."""
  with pytest.raises(UserError, match=message):
    distributed.initialize(*given)
  assert not joined


def test_address_alone(joined, monkeypatch):
  """An address in the environment alone is refused."""
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1')
  with pytest.raises(UserError, match='JAX_COORDINATOR_ADDRESS.*--process_count'):
    distributed.initialize()


@pytest.mark.parametrize('environment, calls', [
    (TASK, 1),
    ({**TASK, 'SLURM_STEP_NUM_TASKS': '1'}, 0),  # the shell of an allocation
    ({**TASK, 'SLURM_PTY_PORT': '4711'}, 0),  # srun --ntasks=4 --pty bash
    ({'SLURM_NTASKS': '2'}, 0),  # in a batch script, outside of srun
    ({'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.2:3'}, 1)])
def test_launchers(joined, monkeypatch, environment, calls):
  """Processes of a launcher join by themselves."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr('sys.stdin', SimpleNamespace(isatty=lambda: False))
  distributed.initialize()
  assert joined == [()] * calls


def test_terminal(joined, monkeypatch):
  """Nobody joins the command that somebody types, or that is to run alone."""
  for name, value in TASK.items():
    monkeypatch.setenv(name, value)
  distributed.initialize(None, 1)
  monkeypatch.setattr('sys.stdin', SimpleNamespace(isatty=lambda: True))
  distributed.initialize()
  assert not joined


def test_tpu_hosts(joined, monkeypatch):
  """TPU hosts join by themselves, and a single one runs alone."""
  def find_nobody(**unused):
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


def test_run_alone():
  """A single process does the work, and its error stays as it is."""
  with pytest.raises(FileNotFoundError, match='not here'):
    distributed.run_on_process_zero('fail', lambda: np.fromfile('not here'))
