"""Files that were written under old names resume and load, and the user's cache can move."""

import json
import shutil
from pathlib import Path

import pytest

from latent_deliberation import paths
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import DESCRIPTION
from latent_deliberation.errors import UserError
from latent_deliberation.paths import OLD_KEYS, OLD_VALUES, RUN_FILE, with_current_names
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.run_identity import RunIdentity, claim_workdir
from latent_deliberation.training.train import describe_training
from tests import finished


def test_names():
  """Keys and values are renamed at any depth, and a value only under its own key."""
  old = {'job': 'unified', 'config': {
      'training': {'portion': [0, 50]}, 'evaluation': {'watch_batches': 3},
      'data': {'name': 'hops', 'options': {'hops': 2}}, 'deliberation': {'soft_tokens': 'rested'},
      'arms': {'own': {'learns': 'adapted', 'lessons': {}}}, 'decoder': {'comment': 'hops'}}}
  assert with_current_names(old) == {'job': 'joint', 'config': {
      'training': {'row_range_percent': [0, 50]}, 'evaluation': {'eval_batches': 3},
      'data': {'name': 'pointer_chasing', 'options': {'hops': 2}},
      'deliberation': {'soft_tokens': 'additive'},
      'arms': {'own': {'learns': 'lora', 'arm_data_options': {}}}, 'decoder': {'comment': 'hops'}}}


def test_current_names_stay():
  """No current name is also an old one, so renaming twice changes nothing."""
  assert not set(OLD_KEYS) & set(OLD_KEYS.values())
  for names in OLD_VALUES.values():
    assert not set(names) & set(names.values())


@pytest.fixture
def old_run(quickstart, tmp_path):
  """A copy of a finished training run whose files have the old names."""
  workdir = shutil.copytree(quickstart / 'coprocessor', tmp_path / 'coprocessor')
  for path in (workdir / RUN_FILE, workdir / 'coprocessor' / DESCRIPTION):
    text = path.read_text()
    for key, values in OLD_VALUES.items():
      for old, new in values.items():
        text = text.replace(f'"{key}": "{new}"', f'"{key}": "{old}"')
    for old, new in OLD_KEYS.items():
      text = text.replace(f'"{new}"', f'"{old}"')
    assert text != path.read_text()
    content = json.loads(text)
    del content['checksum']  # which came later than the current names
    path.write_text(json.dumps(content, indent=2))
  return workdir


@pytest.mark.usefixtures('one_device')
def test_old_run_resumes(old_run):
  """A run.json with old names is that of the same run, and still refuses another."""
  experiment = finished.experiment()
  run = describe_training(experiment, old_run, make_mesh(experiment.mesh))
  saved = json.loads((old_run / RUN_FILE).read_text())
  assert saved['config']['training']['portion'] == [0, 100]
  run.check()
  claim_workdir(old_run, run.identity(saved['decoder'], saved['data']), run.changeable)
  with pytest.raises(UserError, match="soft_tokens: 'additive'.*'free'"):
    describe_training(finished.experiment(deliberation__soft_tokens='free'), old_run,
                      run.mesh).check()


def test_old_job_resumes(tmp_path):
  """A job and a task with old names are the same run."""
  identity = RunIdentity('finetuned', {'data': {'name': 'state_tracking'}}, 'd', 'rows')
  (tmp_path / RUN_FILE).write_text(json.dumps(
      {'job': 'continued', 'config': {'data': {'name': 'groups'}}, 'decoder': 'd', 'data': 'rows'}))
  claim_workdir(tmp_path, identity)


def test_old_coprocessor_loads(old_run):
  """A coprocessor.json with old names loads with current ones."""
  assert '"rested"' in (old_run / 'coprocessor' / DESCRIPTION).read_text()
  loaded = coprocessor_checkpoint.load(old_run / 'coprocessor')
  assert loaded.config == finished.experiment().deliberation


def test_user_cache(monkeypatch):
  """One variable moves all of the user's cache, and must name a directory of this machine."""
  monkeypatch.delenv(paths.CACHE_VARIABLE, raising=False)
  assert paths.cache_directory('models') == Path.home() / '.cache/latent_deliberation/models'
  monkeypatch.setenv(paths.CACHE_VARIABLE, '~/large')
  assert paths.cache_directory('stores') == Path.home() / 'large/stores'
  monkeypatch.setenv(paths.CACHE_VARIABLE, 'gs://bucket/cache')
  with pytest.raises(UserError, match='LATENT_DELIBERATION_CACHE is gs://bucket/cache, a URL'):
    paths.cache_directory('models')
