"""A work directory belongs to one run; what differs is named, with both values."""

import dataclasses
import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.paths import CHECKPOINTS, RUN_FILE
from latent_deliberation.training.run import RunIdentity, claim_workdir

IDENTITY = RunIdentity(
    job='train', decoder='d1', data='rows1',
    config={'optimizer': {'learning_rate': 0.1}, 'loop': {'save_every': 10}, 'mesh': {},
            'positions': (1, 2)})


def changed(**config):
  return dataclasses.replace(IDENTITY, config={**IDENTITY.config, **config})


def test_a_new_directory_is_claimed_and_resumed(tmp_path):
  workdir = tmp_path / 'runs' / 'a'
  claim_workdir(workdir, IDENTITY)
  assert json.loads((workdir / RUN_FILE).read_text()) == IDENTITY.to_json()
  assert [path.name for path in workdir.iterdir()] == [RUN_FILE]
  (workdir / CHECKPOINTS).mkdir()
  claim_workdir(workdir, IDENTITY)


def test_a_directory_with_other_files_is_claimed(tmp_path):
  (tmp_path / 'vocabulary').mkdir()
  claim_workdir(tmp_path, IDENTITY)
  assert (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize('other, line', [
    (dataclasses.replace(IDENTITY, job='pretrain'), "job: 'train' there, 'pretrain' now"),
    (dataclasses.replace(IDENTITY, decoder='d2'), "decoder: 'd1' there, 'd2' now"),
    (dataclasses.replace(IDENTITY, data='rows2'), "data: 'rows1' there, 'rows2' now"),
    (changed(optimizer={'learning_rate': 0.2}),
     'config.optimizer.learning_rate: 0.1 there, 0.2 now'),
    (changed(optimizer={}), r"config.optimizer.learning_rate: 0.1 there, '\(nothing\)' now"),
    (changed(traces=4), r"config.traces: '\(nothing\)' there, 4 now"),
])
def test_another_run_is_refused_with_both_values_and_the_remedy(tmp_path, other, line):
  claim_workdir(tmp_path, IDENTITY)
  with pytest.raises(UserError, match=f'(?s){tmp_path}.*{line}.*another --workdir') as error:
    claim_workdir(tmp_path, other)
  assert 'save_every' not in str(error.value)
  assert json.loads((tmp_path / RUN_FILE).read_text()) == IDENTITY.to_json()


def test_free_keys_and_sections_may_change(tmp_path):
  claim_workdir(tmp_path, IDENTITY)
  other = changed(loop={'save_every': 20}, mesh={'data': 8})
  claim_workdir(tmp_path, other, free=('loop.save_every', 'mesh'))
  with pytest.raises(UserError, match='config.mesh.data'):
    claim_workdir(tmp_path, other, free=('loop', 'mes'))


def test_a_run_that_is_older_than_a_key_had_its_default(tmp_path):
  claim_workdir(tmp_path, IDENTITY)
  newer = {'optimizer': {'clip': 1.0, 'bounds': (0, 1)}, 'unread': {'key': 3}}
  def now(**optimizer):
    config = changed(optimizer={'learning_rate': 0.1, **optimizer})
    return dataclasses.replace(config, defaults=newer)
  claim_workdir(tmp_path, now(clip=1.0, bounds=(0, 1)))
  with pytest.raises(UserError, match='another run:\n  config.optimizer.clip: 1.0 there, 2.0 now'):
    claim_workdir(tmp_path, now(clip=2.0, bounds=(0, 1)))
  assert json.loads((tmp_path / RUN_FILE).read_text()) == IDENTITY.to_json()


def test_checkpoints_without_a_run_file_are_foreign(tmp_path):
  (tmp_path / CHECKPOINTS).mkdir()
  with pytest.raises(UserError, match=f'{RUN_FILE} does not'):
    claim_workdir(tmp_path, IDENTITY)


def test_a_run_file_that_is_not_json_is_refused(tmp_path):
  (tmp_path / RUN_FILE).write_text('{"job": ')
  with pytest.raises(UserError, match='is not JSON'):
    claim_workdir(tmp_path, IDENTITY)


def test_a_url_is_refused_instead_of_becoming_a_local_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='mount the bucket'):
    claim_workdir(type(tmp_path)('gs://bucket/run'), IDENTITY)
  assert not list(tmp_path.iterdir())


def test_a_config_that_json_cannot_hold_is_refused():
  with pytest.raises(UserError, match="config of job 'train'"):
    RunIdentity(job='train', config={'dtype': object()}, decoder='', data='')
