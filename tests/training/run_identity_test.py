"""A work directory belongs to one run, and its run.json says where the data of the run are."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path
from latent_deliberation.paths import CHECKPOINTS, RUN_FILE
from latent_deliberation.training import run_identity
from latent_deliberation.training.run_identity import (
  PREPARED_DATA,
  RunIdentity,
  claim_workdir,
  find_data,
  note_of,
  noted_data,
  place_of,
  read_record,
)

IDENTITY = RunIdentity(
    job='train', decoder_fingerprint='d1', data_fingerprint='rows1',
    config={'optimizer': {'learning_rate': 0.1}, 'loop': {'save_every': 10}, 'mesh': {},
            'positions': (1, 2)})


def changed(**config):
  return dataclasses.replace(IDENTITY, config={**IDENTITY.config, **config})


def test_claim_and_resume(tmp_path):
  """A new directory is claimed, and the same run claims it again."""
  workdir = tmp_path / 'runs' / 'a'
  claim_workdir(workdir, IDENTITY)
  assert read_record(workdir) == IDENTITY.record
  assert [path.name for path in workdir.iterdir()] == [RUN_FILE]
  (workdir / CHECKPOINTS).mkdir()
  claim_workdir(workdir, IDENTITY)


def test_data_of_a_run(tmp_path):
  """A run notes where its data are, also when they have moved, and is the same run."""
  run, data = tmp_path / 'runs/a', tmp_path / 'runs/data'
  assert find_data(run) == run and find_data(run, 'x/y') == Path('x/y')
  claim_workdir(run, IDENTITY)
  with pytest.raises(UserError,
                     match=f"--data = '': {run} holds a run, .* no rows/ .* {run}: give"):
    find_data(run)
  (run / 'rows').mkdir()
  assert noted_data(run) is None and find_data(run) == run  # as runs of earlier code
  claim_workdir(run, IDENTITY, prepared_dir=data)
  with pytest.raises(UserError, match=f"--data = '': .* {data}: give"):
    find_data(run)
  (data / 'rows').mkdir(parents=True)
  assert find_data(run) == data and find_data(run, 'x/y') == Path('x/y')
  (tmp_path / 'runs').rename(tmp_path / 'moved')  # both together
  run, data = tmp_path / 'moved/a', tmp_path / 'moved/data'
  assert find_data(run) == data
  data = data.rename(tmp_path / 'alone')
  claim_workdir(run, IDENTITY, prepared_dir=data)
  assert find_data(run) == data
  with pytest.raises(UserError, match="decoder: 'd1'"):
    claim_workdir(run, dataclasses.replace(IDENTITY, decoder_fingerprint='d2'), prepared_dir=run)
  assert find_data(run) == data


def test_data_of_a_run_in_a_bucket(tmp_path):
  """An address is kept as it is."""
  claim_workdir(tmp_path, IDENTITY)
  record = read_record(tmp_path) | {PREPARED_DATA: 'gs://bucket/data'}
  (tmp_path / RUN_FILE).write_text(json.dumps(record))
  assert str(noted_data(tmp_path)) == 'gs://bucket/data'


@pytest.mark.parametrize('data, run, note', [
    ('gs://bucket/q', 'gs://bucket/q/coprocessor', '..'),
    ('gs://bucket/data', 'gs://bucket/runs/a', '../../data'),
    ('gs://one/data', 'gs://two/run', 'gs://one/data'),
    ('/disk/data', 's3://two/run', '/disk/data'), ('s3://two/data', '/disk/run', 's3://two/data')])
def test_notes_of_data(data, run, note):
  """A note is relative within a bucket, and leads back to the data."""
  data, run = as_path(data), as_path(run)
  assert note_of(data, run) == note
  assert str(place_of(note, run)) == str(data)


def test_every_process_comes_to_the_note(tmp_path, monkeypatch):
  """A slow process reads run.json after process 0 has noted the data, and must not go on alone."""
  called = []

  def record(what, work):
    called.append(what)
    work()

  monkeypatch.setattr(run_identity, 'run_on_process_zero', record)
  claim_workdir(tmp_path / 'run', IDENTITY, prepared_dir=tmp_path)
  first = list(called)
  claim_workdir(tmp_path / 'run', IDENTITY, prepared_dir=tmp_path)
  assert called == 2 * first and 'note the data' in first[-1]


def test_trainings_note_their_data(quickstart):
  for run in ('pretraining', 'coprocessor'):
    assert find_data(quickstart / run) == quickstart


def test_claim_with_other_files(tmp_path):
  """A directory with other files can be claimed."""
  (tmp_path / 'vocabulary').mkdir()
  claim_workdir(tmp_path, IDENTITY)
  assert (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize('other, line', [
    (dataclasses.replace(IDENTITY, job='pretrain'), "job: 'train'.*'pretrain'"),
    (dataclasses.replace(IDENTITY, decoder_fingerprint='d2'), "decoder: 'd1'.*'d2'"),
    (dataclasses.replace(IDENTITY, data_fingerprint='rows2'), 'data: other rows than those'),
    (changed(optimizer={'learning_rate': 0.2}), 'config.optimizer.learning_rate: 0.1.*0.2'),
    (changed(optimizer={}), 'config.optimizer.learning_rate: 0.1.*nothing'),
    (changed(traces=4), 'config.traces: .*nothing.*4'),
])
def test_claim_other_run(tmp_path, other, line):
  """Another run is refused with the key and both values."""
  claim_workdir(tmp_path, IDENTITY)
  with pytest.raises(UserError, match=f'(?s){tmp_path}.*{line}.*--workdir') as error:
    claim_workdir(tmp_path, other)
  assert 'save_every' not in str(error.value)
  assert read_record(tmp_path) == IDENTITY.record


def test_free_keys(tmp_path):
  """Free keys and sections may change."""
  claim_workdir(tmp_path, IDENTITY)
  other = changed(loop={'save_every': 20}, mesh={'data': 8})
  claim_workdir(tmp_path, other, changeable=('loop.save_every', 'mesh'))
  with pytest.raises(UserError, match='config.mesh.data'):
    claim_workdir(tmp_path, other, changeable=('loop', 'mes'))


def test_older_than_a_key(tmp_path):
  """A run that is older than a key had its default."""
  claim_workdir(tmp_path, IDENTITY)
  newer = {'optimizer': {'clip': 1.0, 'bounds': (0, 1)}, 'unread': {'key': 3}}
  def now(**optimizer):
    config = changed(optimizer={'learning_rate': 0.1, **optimizer})
    return dataclasses.replace(config, defaults=newer)
  claim_workdir(tmp_path, now(clip=1.0, bounds=(0, 1)))
  with pytest.raises(UserError, match='\n  config.optimizer.clip: 1.0.*2.0'):
    claim_workdir(tmp_path, now(clip=2.0, bounds=(0, 1)))
  assert read_record(tmp_path) == IDENTITY.record


def test_claim_unknown_checkpoints(tmp_path):
  """Checkpoints without a run.json are refused."""
  (tmp_path / CHECKPOINTS).mkdir()
  with pytest.raises(UserError, match=f'{CHECKPOINTS}.*{RUN_FILE}'):
    claim_workdir(tmp_path, IDENTITY)


def test_claim_damaged_file(tmp_path):
  """A run.json that is not JSON is refused."""
  (tmp_path / RUN_FILE).write_text('{"job": ')
  with pytest.raises(UserError, match=f'{RUN_FILE}.*JSON'):
    claim_workdir(tmp_path, IDENTITY)


def test_claim_changed_file(tmp_path):
  """A run.json that was changed is refused, and accepted once its checksum is removed."""
  claim_workdir(tmp_path, IDENTITY)
  path = tmp_path / RUN_FILE
  path.write_text(path.read_text().replace('"save_every": 10', '"save_every": 20'))
  with pytest.raises(UserError, match=f'{path} has changed .*remove its checksum'):
    claim_workdir(tmp_path, IDENTITY, changeable=('loop.save_every',))
  path.write_text(re.sub(r',\s*"checksum": "\w+"', '', path.read_text()))
  claim_workdir(tmp_path, IDENTITY, changeable=('loop.save_every',))


def test_config_without_json(tmp_path):
  """A config that JSON cannot hold is refused."""
  with pytest.raises(UserError, match="'train'.*JSON"):
    claim_workdir(tmp_path, changed(dtype=object()))
  assert not list(tmp_path.iterdir())
