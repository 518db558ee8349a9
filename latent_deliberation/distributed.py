"""The processes of one run, one on each host: they find each other, wait, and fail together."""

import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from latent_deliberation.errors import UserError

ADDRESS = 'JAX_COORDINATOR_ADDRESS'
# Variables that a launcher sets for each of its processes: their number, and one that exists only
# where jax recognises the launcher and so finds the other processes. SLURM_NTASKS will not do for
# the number: it is that of an allocation, also in a shell that is a single task of it.
LAUNCHERS = (('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NODELIST'),
             ('OMPI_COMM_WORLD_SIZE', 'OMPI_MCA_orte_hnp_uri'))
WAITING = 'waiting for all of them'  # logged until all processes have come
TERMINAL = 'SLURM_PTY_PORT'  # exists in a shell that srun --pty gave a terminal
PATIENCE_SECONDS = 24 * 3600  # for the work of one process alone, such as packing a corpus
# After so long without a sign of life from one process, all others end. jax's own threads give the
# sign, also while a process packs, compiles or waits.
HEARTBEAT_SECONDS = 45
START_SECONDS = 300  # for all processes to come; jax then ends those that did


def initialize(address: str | None = None, count: int | None = None,
               index: int | None = None) -> None:
  """Joins the processes of a run, where there are several. Call it before jax has devices.

  On a Cloud TPU, and under srun or mpirun, jax finds the processes by itself. Elsewhere give all
  three arguments. With none of them, a single machine stays one process, and so does a command in
  a terminal, whose other tasks would never come. `count` = 1 alone joins nobody.

  Args:
    address: host:port of process 0; default is the variable JAX_COORDINATOR_ADDRESS.
    count: number of processes.
    index: index of this process, 0 to count - 1.

  Raises:
    UserError: one of the three is missing or has a value that it cannot have.
  """
  if count == 1 and not index:
    return
  # Without arguments, jax may find the other processes by itself.
  detected = address is None and count is None and index is None and _are_others_known()
  address = address or os.environ.get(ADDRESS) or None
  if detected:
    _initialize_known()
  elif not (address is None and count is None and index is None):
    _check_given(address, count, index)
    logging.info('process %d of %d: %s at %s', index, count, WAITING, address)
    jax.distributed.initialize(address, count, index, cluster_detection_method='deactivate',
                               initialization_timeout=START_SECONDS,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _check_given(address: str | None, count: int | None, index: int | None) -> None:
  given = {'--coordinator_address': address, '--process_count': count, '--process_id': index}
  missing = [name for name, value in given.items() if value is None]
  if missing:
    present = ', '.join(f'{name}={value}' for name, value in given.items() if value is not None)
    raise UserError(
        f'{present} (a flag, or {ADDRESS}) without {" and ".join(missing)}: give all three for '
        'several processes, and --process_count=1 alone for one process')
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise UserError(f'--coordinator_address={address}: it must be host:port of process 0, such as '
                     '10.0.0.2:8476')
  if not 0 <= index < count:
    raise UserError(f'--process_id={index} with --process_count={count}: it must be between 0 '
                     f'and {count - 1}')


def _is_on_tpu() -> bool:
  """Whether jax will use the TPUs of this machine. jax sets the option where it sees chips."""
  return (jax.config.jax_platforms or '').split(',')[0] == 'tpu'


def _are_others_known() -> bool:
  """Whether jax can find the other processes by itself."""
  launched = any(mark in os.environ and int(os.environ.get(count, 1)) > 1
                 for count, mark in LAUNCHERS)
  return _is_on_tpu() or launched and not _is_in_terminal()


def _is_in_terminal() -> bool:
  """Whether somebody types the commands: a launcher gives its tasks no terminal."""
  return TERMINAL in os.environ or sys.stdin is not None and sys.stdin.isatty()


def _initialize_known() -> None:
  logging.info('waiting for the other processes that jax finds, if any; --process_count=1 runs '
               'this one alone')
  try:
    jax.distributed.initialize(initialization_timeout=START_SECONDS,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    # jax's error where no variable and no metadata server describes a pod, as in a notebook.
    if not _is_on_tpu() or 'coordinator_address should be defined' not in str(error):
      raise
    logging.warning('jax found no other TPU hosts: this process runs alone')


def barrier(name: str) -> None:
  """Returns once every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_process_zero(value: int) -> int:
  """Returns the value of process 0, a bool or an integer of 32 bits, on every process."""
  if jax.process_count() == 1:
    return value
  return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def run_on_process_zero(task: str, work: Callable[[], None]) -> None:
  """Runs `work` on process 0 while the others wait. If it fails, every process raises.

  Args:
    task: the task, to complete "process 0 could not ...".
    work: the function to run.

  Raises:
    UserError: on every other process, where process 0 raised an error.
  """
  if jax.process_count() == 1:
    work()
    return
  failure = None
  if jax.process_index() == 0:
    try:
      work()
    except Exception as error:  # raised below, once the others know
      failure = error
  # A list of processes makes this a barrier with our own timeout; a collective's may be too short.
  multihost.sync_global_processes(
      task, timeout=PATIENCE_SECONDS, processes=set(range(jax.process_count())))
  # The others learn whether it failed, and raise too.
  failed = from_process_zero(failure is not None)
  if failure is not None:
    raise failure
  if failed:
    raise UserError(f'process 0 could not {task}: see its own log')
