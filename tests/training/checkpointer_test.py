"""Checkpoints are whole or absent, of one run, and come back bit for bit.

Run as a script, this file saves in a process whose disk fills up half-way, or that is killed.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import latent_deliberation
from latent_deliberation.errors import UserError
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.step import TrainState


class Position:
  """Batches that hold nothing but their position."""
  fingerprint = 'rows1'
  restored = None

  def save(self, directory, step):
    (directory / 'position.json').write_text(json.dumps(step))

  def restore(self, directory, step):
    self.restored = (json.loads((directory / 'position.json').read_text()), step)


def make_state(seed, width=8):
  kernel = jax.random.normal(jax.random.key(seed), (width, width))
  state = TrainState.create({'dense': {'kernel': kernel, 'bias': kernel[0]}}, optax.adam(1e-3))
  return state.replace(step=state.step + seed)


def abstract(state, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def save_all(directory, steps, keep=10, width=8):
  checkpointer = Checkpointer(directory, keep)
  for step in steps:
    checkpointer.save(step, make_state(step, width), Position())
  checkpointer.close()


def restore(directory, like=None, batches=None, sharding=None):
  checkpointer = Checkpointer(directory, keep=10)
  try:
    like = abstract(make_state(0) if like is None else like, sharding)
    return checkpointer.restore(like, batches or Position())
  finally:
    checkpointer.close()


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_round_trip(tmp_path):
  """The newest state and the position of the data come back."""
  save_all(tmp_path, [3, 5])
  batches = Position()
  restored = restore(tmp_path, batches=batches)
  assert_same(restored, make_state(5))
  assert batches.restored == (5, 5)


@pytest.mark.parametrize('name', ['sweep lr[1e-2]', 'a*b?'])
def test_directory_with_signs_of_a_pattern(tmp_path, name):
  save_all(tmp_path / name, [3, 5])
  assert_same(restore(tmp_path / name), make_state(5))


def test_directory_with_backslash(tmp_path):
  with pytest.raises(UserError, match='backslash'):
    Checkpointer(tmp_path / 'a\\b', keep=1)


def test_stray_entries(tmp_path):
  """Entries of other programs are neither read nor removed."""
  save_all(tmp_path, [1, 2], keep=1)
  strays = ['.DS_Store', '.nfs0001', 'data/.DS_Store', 'data/2~', '2/.DS_Store', '2/about/._a']
  for stray in strays:
    (tmp_path / stray).touch()
  shutil.copytree(tmp_path / '2', tmp_path / '9 copy')
  save_all(tmp_path, [3], keep=1)
  assert_same(restore(tmp_path), make_state(3))
  assert all((tmp_path / stray).exists() for stray in [*strays[:4], '9 copy'])


def test_checkpoint_copied_in_part(tmp_path):
  """It is named, and the one before it is restored once it is removed."""
  save_all(tmp_path, [1, 2])
  shutil.rmtree(tmp_path / '2' / 'about')
  with pytest.raises(UserError, match=f'(?s){tmp_path}/2 .*in part.*: 1.*remove {tmp_path}/2'):
    restore(tmp_path)
  shutil.rmtree(tmp_path / '2')
  assert_same(restore(tmp_path), make_state(1))


def test_new_directory(tmp_path):
  """Nothing is restored from a new directory."""
  assert restore(tmp_path / 'new') is None


def test_donated_state(tmp_path):
  """A state may be donated as soon as `save` returns."""
  advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
  checkpointer = Checkpointer(tmp_path, keep=1)
  state = make_state(1, width=600)
  checkpointer.save(1, state, Position())
  for _ in range(5):
    state = advance(state)
  jax.block_until_ready(state)
  checkpointer.close()
  expected = make_state(1, width=600)
  assert_same(restore(tmp_path, like=expected), expected)


def test_shardings(tmp_path):
  """The state is restored onto the given shardings."""
  save_all(tmp_path, [1])
  mesh = Mesh(np.array(jax.devices()), 'd')
  sharding = NamedSharding(mesh, PartitionSpec())
  restored = restore(tmp_path, sharding=sharding)
  assert restored.params['dense']['kernel'].sharding == sharding


def test_keep(tmp_path):
  """Only the newest checkpoints and their data are kept."""
  save_all(tmp_path, [1, 2, 3, 4], keep=2)
  assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {'3', '4', 'data'}
  assert {path.name for path in (tmp_path / 'data').iterdir()} == {'3', '4'}


def test_other_model(tmp_path):
  """A checkpoint of another model is refused with paths and both shapes."""
  save_all(tmp_path, [1])
  with pytest.raises(UserError, match=r'params/dense/kernel.*\[8, 8\].*\[9, 9\]'):
    restore(tmp_path, like=make_state(0, width=9))
  other = make_state(0)
  with pytest.raises(UserError, match=r'params/gate.*nothing.*float32\[8\]'):
    restore(tmp_path, like=other.replace(params={
        **other.params, 'gate': other.params['dense']['bias']}))


def test_foreign_checkpoint(tmp_path):
  """A checkpoint of another program is refused."""
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(7, args=ocp.args.StandardSave({'kernel': np.ones(3)}))
  with pytest.raises(UserError, match=f'(?s){tmp_path}/7.*written by another.*remove {tmp_path}/7'):
    restore(tmp_path)


# Tensorstore's threads outlive the event loop of a read that failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('pattern', [
    'state/d/*', 'state/manifest.ocdbt', 'state/_METADATA', 'about/metadata'])
@pytest.mark.parametrize('kept', [0, 0.5])
def test_damaged_checkpoint(tmp_path, pattern, kept):
  """A damaged checkpoint is named with the way back to an older one."""
  save_all(tmp_path, [1, 2, 3])
  damaged = next((tmp_path / '3').glob(pattern))
  damaged.write_bytes(damaged.read_bytes()[:int(kept * damaged.stat().st_size)])
  with pytest.raises(UserError, match=f'(?s){tmp_path}/3 .*: 1, 2.*{tmp_path}/3'):
    restore(tmp_path)
  shutil.rmtree(tmp_path / '3')
  assert_same(restore(tmp_path), make_state(2))
  save_all(tmp_path, [3])  # over what the removed one left in data
  assert_same(restore(tmp_path), make_state(3))


@pytest.mark.parametrize('key, damaged', [
    ('commit_timestamp_nsecs', 1.5), ('init_timestamp_nsecs', '7')])
def test_damaged_description_of_a_step(tmp_path, key, damaged):
  """A step that keeps orbax from listing all is named, and the rest is read without it."""
  save_all(tmp_path, [2, 4])
  metadata = tmp_path / '4' / '_CHECKPOINT_METADATA'
  metadata.write_text(json.dumps({**json.loads(metadata.read_text()), key: damaged}))
  with pytest.raises(UserError, match=f'{tmp_path}/4 cannot be read: .*Move {tmp_path}/4 away'):
    restore(tmp_path)
  shutil.rmtree(tmp_path / '4')
  assert_same(restore(tmp_path), make_state(2))


def test_old_step(tmp_path):
  """A step that is not new is refused, and the checkpoint stays."""
  save_all(tmp_path, [4])
  with pytest.raises(UserError, match='step 2.*step 4'):
    save_all(tmp_path, [2])
  assert_same(restore(tmp_path), make_state(4))


def test_keep_none(tmp_path):
  """Keeping no checkpoint is refused."""
  with pytest.raises(ValueError, match='keep.*0'):
    Checkpointer(tmp_path, keep=0)


def test_failed_data_position(tmp_path):
  """A disk that is full for the data's position is named; a bug there keeps its own error."""
  class Failing(Position):
    error = OSError(28, 'No space left on device')

    def save(self, directory, step):
      raise self.error

  checkpointer = Checkpointer(tmp_path, keep=1)
  with pytest.raises(UserError, match=f'step 1.*{tmp_path}.*No space left'):
    checkpointer.save(1, make_state(1), Failing())
  Failing.error = KeyError('bug')
  with pytest.raises(KeyError, match='bug'):
    checkpointer.save(1, make_state(1), Failing())
  checkpointer.close()
  assert restore(tmp_path) is None


def run_script(*arguments):
  source = Path(latent_deliberation.__file__).parents[1]
  return subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True,
                        text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(source)})


def test_full_disk(tmp_path):
  """A full disk stops the run at the next call, and the last checkpoint survives."""
  process = run_script('full', tmp_path)
  assert process.returncode == 0, process.stderr
  assert re.fullmatch(f'(?s).*step 2.*{tmp_path}.*: 1\\..*latest 1\n', process.stdout)
  assert_same(restore(tmp_path, like=make_state(1, width=200)), make_state(1, width=200))


def test_killed_while_saving(tmp_path):
  """A process that is killed while saving leaves the last checkpoint."""
  process = run_script('killed', tmp_path)
  assert process.returncode == -signal.SIGXFSZ, process.stderr
  assert [path for path in tmp_path.iterdir() if path.name.startswith('2.')]
  assert_same(restore(tmp_path, like=make_state(1, width=200)), make_state(1, width=200))
  # orbax removes the unfinished checkpoint in a thread that `close` does not wait for.
  end = time.monotonic() + 60
  while any(path.name.startswith('2.') for path in tmp_path.iterdir()):
    assert time.monotonic() < end
    time.sleep(0.01)
  save_all(tmp_path, [3], width=200)
  assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {'1', '3', 'data'}


def save_beyond_the_limit(how, directory):
  checkpointer = Checkpointer(directory, keep=1)
  checkpointer.save(1, make_state(1, width=200), Position())
  checkpointer.wait()
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
  if how == 'killed':
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # dies in the write; Python ignores it otherwise
  checkpointer.save(2, make_state(2, width=200), Position())
  try:
    checkpointer.wait()
  except UserError as error:
    print(error)
  print('latest', checkpointer.latest_step())
  checkpointer.close()


if __name__ == '__main__':
  save_beyond_the_limit(sys.argv[1], Path(sys.argv[2]))
