"""Whole jobs in a bucket: they are killed and resumed, and their results are those of a disk."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.model import weights
from latent_deliberation.training.metrics import read_metrics
from tests import finished
from tests.stores.object_store import Fault
from tests.training import hosts_test

pytestmark = pytest.mark.slow


def launch(*command, **options):
  """Runs a launch script to its end, or says what it printed."""
  process = subprocess.run(command, cwd=finished.ROOT, env=finished.environment(), text=True,
                           capture_output=True, timeout=1200, **options)
  return process.returncode, process.stdout, process.stderr


def run(script, *arguments):
  status, printed, said = launch(sys.executable, f'launch/{script}.py', *arguments)
  assert status == 0, said
  return printed


def kill_when(command, happened):
  """Starts a command, and kills it without warning once something has happened."""
  process = subprocess.Popen(command, cwd=finished.ROOT, env=finished.environment(),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  try:
    end = time.monotonic() + 900
    while not happened():
      assert process.poll() is None, process.stderr.read()
      assert time.monotonic() < end
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
  finally:
    process.kill()
    process.communicate()


def figures(report):
  """The numbers of a report that do not depend on where and when it was made."""
  return {key: report[key] for key in (
      'all_positions', 'content_effect', 'parameters', 'decoder_fingerprint', 'rows', 'reached')}


def test_quickstart(store, place, quickstart):
  """Killed three times and resumed, it has the figures of one on a disk; all is in the bucket."""
  workdir = place / 'run'
  command = finished.command('quickstart', f'--workdir={workdir}')
  # While rows are written, while a checkpoint is, and while the coprocessor is.
  for wanted in (r'rows(/|%2F)train', r'pretraining.*checkpoints(/|%2F)2(/|%2F)state',
                 r'coprocessor(/|%2F)coprocessor(/|%2F)coprocessor\.safetensors'):
    writes = Fault(lambda method, path, wanted=wanted: method in ('PUT', 'POST')
                   and re.search(wanted, path) is not None, seconds=0.3)
    store.faults = {'slow': writes}
    kill_when(command, lambda writes=writes: writes.seen > 0)
  store.faults = {'fail': Fault(status=503, times=3)}
  status, printed, said = launch(*command)
  assert status == 0, said
  assert f'Report: {workdir}/report.md' in printed
  report = json.loads((workdir / 'report.json').read_bytes())
  assert figures(report) == figures(json.loads((quickstart / 'report.json').read_bytes()))
  steps = [row['step'] for row in read_metrics(workdir / 'coprocessor/metrics.jsonl')]
  assert steps == [row['step'] for row in read_metrics(quickstart / 'coprocessor/metrics.jsonl')]

  # What other commands read from there and write there.
  decoder, coprocessor = workdir / 'pretraining/decoder', workdir / 'coprocessor'
  local = [f'--decoder={quickstart}/pretraining/decoder', f'--coprocessor={quickstart}/coprocessor']
  remote = [f'--decoder={decoder}', f'--coprocessor={coprocessor}']
  prompt = ['--prompt=Document', '--max_tokens=8', '--length=64']
  assert run('generate', *remote, *prompt) == run('generate', *local, *prompt)
  run('evaluate', f'--coprocessor={coprocessor}', f'--output={place}/report')
  again = json.loads((place / 'report/report.json').read_bytes())
  assert again['decoder_fingerprint'] == report['decoder_fingerprint']
  assert (place / 'report/changes.png').read_bytes().startswith(b'\x89PNG')
  run('convert', f'--source={decoder}', f'--target={place}/converted', '--format=native')
  assert (place / 'converted/decoder.json').is_file()


def test_two_processes(place, tmp_path, quickstart):
  """Two processes write the shards of one decoder and read them again, without a common disk."""
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']
  for number, (script, *arguments) in enumerate([
      ('pretrain', f'--workdir={place}/pretraining'),
      ('train', f'--decoder={place}/pretraining/decoder', f'--workdir={place}/coprocessor')]):
    address = hosts_test.free_address()
    commands = [finished.command(
        script, *arguments, *mesh, f'--data={quickstart}', f'--coordinator_address={address}',
        '--process_count=2', f'--process_id={index}') for index in range(2)]
    logs = tmp_path / str(number)
    hosts_test.end_both(hosts_test.start_two(commands, logs), logs)
  assert weights.load(place / 'pretraining/decoder')[0].num_layers
  assert coprocessor_checkpoint.load(place / 'coprocessor/coprocessor').steps == 2


def test_second_launch(place, quickstart):
  """It is refused while the first one works, and names it."""
  command = finished.command('pretrain', f'--workdir={place}',
                             '--config.pretraining.loop.num_steps=100000')
  first = subprocess.Popen(command, cwd=finished.ROOT, env=finished.environment(),
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  try:
    end = time.monotonic() + 200
    while not (place / 'run.json').exists():
      assert first.poll() is None and time.monotonic() < end
      time.sleep(0.2)
    status, _, said = launch(*command)
    assert status == 1
    assert re.search(f'Error: process {first.pid} on .* works in {place}: let it end', said)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143, said
  finally:
    first.kill()
  assert not (place / 'run.lock').exists()


@pytest.mark.parametrize('fault, said', [
    (Fault(status=403), 'no permission'),
    (Fault(status=404), 'no bucket'),
    (Fault(seconds=90), 'did not answer in time')], ids=['403', '404', 'slow'])
def test_bad_bucket(store, place, fault, said):
  """The flag, its value and the remedy are named within some minutes."""
  store.faults['bad'] = fault
  status, _, error = launch(*finished.command('pretrain', f'--workdir={place}'))
  assert status == 1 and 'Traceback' not in error
  remedy = '(check|log in|AWS_PROFILE)'
  assert re.search(f'Error: .*--workdir={place}: {place}.*{said}.*{remedy}', error)


def test_workdir_that_is_a_file(place):
  """An object is no directory."""
  (place / 'file').write_bytes(b'1')
  status, _, error = launch(*finished.command('pretrain', f'--workdir={place}/file'))
  assert status == 1
  assert re.search(f'--workdir={place}/file: .*a file.*directory', error)
