"""Two processes with four devices each do what one process with eight does.

Run as a script, this file is one of the two, which pretrain, or train and resume a cut-off run.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_deliberation import distributed
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.experiment import Experiment
from latent_deliberation.model import weights
from latent_deliberation.paths import COPROCESSOR, DECODER, METRICS_FILE
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.train import train_coprocessor
from tests import finished

STEPS, CUT = 4, 2
# The axis that spans the processes divides the batch in training, and not in pretraining.
MESH = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}
SHARED_ROWS = {**MESH, 'rules__batch': ('fsdp',)}
OTHER_MESH = {'mesh__data': 1, 'mesh__fsdp': 4, 'mesh__tensor': 2}


def experiment(texts: Path, places: dict) -> Experiment:
  return finished.experiment(data__files=(str(texts),), training__loop__num_steps=STEPS,
                             training__loop__save_every=CUT, **places)


def cut_off(workdir: Path) -> None:
  """Leaves the files of a run that was killed before its last checkpoint."""
  shutil.rmtree(workdir / COPROCESSOR)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  shutil.rmtree(workdir / 'checkpoints/data' / str(STEPS))


def run_as_one_of_two(address: str, index: str, prepared_dir: str, texts: str, place: str,
                      decoder_dir: str = '') -> None:
  """Pretrains a decoder, or trains on a given one."""
  distributed.initialize(address, 2, int(index))
  assert jax.local_device_count() == 4 and jax.device_count() == 8
  workdir, data, texts = Path(place), Path(prepared_dir), Path(texts)
  if not decoder_dir:
    pretrain(experiment(texts, SHARED_ROWS), workdir / 'pretraining', data)
    return

  def train() -> None:
    train_coprocessor(experiment(texts, MESH), Path(decoder_dir), workdir / 'coprocessor', data)

  def copy_and_cut() -> None:
    for name in ('whole', 'taken_over'):
      shutil.copytree(workdir / 'coprocessor', workdir / name)
    cut_off(workdir / 'taken_over')
    cut_off(workdir / 'coprocessor')

  train()
  distributed.run_on_process_zero('cut the run off', copy_and_cut)
  train()


def run_two(place: Path, quickstart: Path, *decoder_dir: str) -> Path:
  """Runs this file as two processes with their files in `place`."""
  address = free_address()
  end_both(start_two([[sys.executable, __file__, address, str(index), str(quickstart),
                       str(finished.TEXTS), str(place), *decoder_dir] for index in range(2)],
                     place / 'logs'), place / 'logs')
  return place


def start_two(commands: Sequence[list[str]], logs: Path) -> list[subprocess.Popen]:
  """Processes 0 and 1, with stdout and stderr in <logs>/0.out, 0.err, ..."""
  logs.mkdir()
  processes = []
  for index, command in enumerate(commands):
    with open(logs / f'{index}.out', 'wb') as out, open(logs / f'{index}.err', 'wb') as errors:
      processes.append(subprocess.Popen(
          command, cwd=finished.ROOT, stdout=out, stderr=errors,
          env={**finished.environment(), 'JAX_NUM_CPU_DEVICES': '4'}))
  return processes


def end_both(processes: Sequence[subprocess.Popen], logs: Path,
             expected: Sequence[int] = (0, 0)) -> None:
  """Waits for both, and fails with their logs where one ends with another code."""
  try:
    codes = [process.wait(timeout=200) for process in processes]
  finally:
    for process in processes:
      process.kill()
  said = '\n\n'.join((logs / f'{index}.err').read_text() for index in range(2))
  assert codes == list(expected), said


def free_address() -> str:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{found.getsockname()[1]}'


def assert_close(params, expected):
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
               params, expected)


def assert_same_losses(workdir, expected):
  one, other = ([[row['step'], row['loss'], row['grad_norm'], row['targets']]
                 for row in read_metrics(place / METRICS_FILE)] for place in (workdir, expected))
  assert len(one) == STEPS
  np.testing.assert_allclose(one, other, rtol=1e-4)


def steps_written(workdir):
  """The steps of the lines that training wrote, in the order of the file."""
  lines = (workdir / METRICS_FILE).read_text().splitlines()
  return [json.loads(line)['step'] for line in lines if 'grad_norm' in line]


def test_pretraining_on_two(quickstart, tmp_path):
  """Two processes with the same rows pretrain the decoder of one, and log once."""
  by_two = run_two(tmp_path, quickstart) / 'pretraining'
  decoder = pretrain(experiment(finished.TEXTS, SHARED_ROWS), tmp_path / 'one', quickstart)
  assert_same_losses(by_two, tmp_path / 'one')
  assert_close(weights.load(by_two / DECODER)[1], weights.load(decoder)[1])
  assert steps_written(by_two) == [1, 2, 3, 4]


@pytest.mark.slow
def test_training_on_two(quickstart, tmp_path):
  """Two processes train the coprocessor of one, also after they were cut off."""
  decoder, config = quickstart / 'pretraining' / DECODER, experiment(finished.TEXTS, MESH)
  by_two = run_two(tmp_path, quickstart, str(decoder))
  expected = train_coprocessor(config, decoder, tmp_path / 'one', quickstart)
  for name in ('whole', 'coprocessor'):
    assert_same_losses(by_two / name, tmp_path / 'one')
    assert_close(coprocessor_checkpoint.load(by_two / name / COPROCESSOR).params, expected)
  # What two began, one ends on another mesh.
  taken_over = train_coprocessor(experiment(finished.TEXTS, OTHER_MESH), decoder,
                                 by_two / 'taken_over', quickstart)
  assert_close(taken_over, expected)
  assert steps_written(by_two / 'whole') == [1, 2, 3, 4]
  for name in ('coprocessor', 'taken_over'):
    assert steps_written(by_two / name) == [1, 2, 3, 4, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize('number, codes, reason', [
    (signal.SIGTERM, (143, 143), 'preemption'), (signal.SIGINT, (143, 130), 'SIGINT')])
def test_signal_stops_both(quickstart, tmp_path, number, codes, reason):
  """A signal to one process stops both at the same saved step."""
  address, logs, workdir = free_address(), tmp_path / 'logs', tmp_path / 'run'
  processes = start_two([finished.command(
      'pretrain', f'--workdir={workdir}', f'--data={quickstart}',
      '--config.pretraining.loop.num_steps=10_000', '--config.pretraining.loop.save_every=10_000',
      '--config.pretraining.loop.eval_every=10_000', f'--coordinator_address={address}',
      '--process_count=2', f'--process_id={index}') for index in range(2)], logs)
  try:
    until = time.monotonic() + 120
    while 'step 2/' not in (logs / '1.err').read_text() and time.monotonic() < until:
      time.sleep(0.1)
    processes[1].send_signal(number)
  finally:
    end_both(processes, logs, codes)
  step, = (int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
  assert 2 < step < 10_000
  for index in range(2):
    log = (logs / f'{index}.err').read_text()
    assert f'{reason if index else "preemption"} at step {step}/10000' in log
    assert any(line.startswith(f'[{index}/2] ') and f'step {step}/10000  loss' in line
               for line in log.splitlines())


if __name__ == '__main__':
  run_as_one_of_two(*sys.argv[1:])
