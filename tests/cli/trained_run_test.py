"""The data of a trained run are found: those that its run.json notes, or else rows/ nearby."""

import json
import shutil

import pytest

from latent_deliberation.cli import trained_run
from latent_deliberation.cli.trained_run import open_run
from latent_deliberation.errors import UserError
from latent_deliberation.paths import RUN_FILE
from latent_deliberation.training.run_identity import PREPARED_DATA, read_record
from tests import finished


@pytest.fixture
def run(quickstart, tmp_path, monkeypatch):
  """The run of a coprocessor, as its --config."""
  monkeypatch.setattr(trained_run, 'read_config', lambda on_devices: finished.experiment(
      decoder_from=str(quickstart / 'pretraining/decoder')))
  monkeypatch.setattr(trained_run, 'given_keys', frozenset)
  return shutil.copytree(quickstart / 'coprocessor', tmp_path / 'runs/coprocessor')


def note(run, noted):
  record = {key: value for key, value in read_record(run).items() if key != PREPARED_DATA}
  (run / RUN_FILE).write_text(json.dumps(record | ({PREPARED_DATA: noted} if noted else {})))


def rows_in(directory):
  (directory / 'rows').mkdir(parents=True)
  return directory


def test_data_that_the_run_notes(run):
  """They go before rows of something else above the run, and --data before them."""
  rows_in(run.parent)
  data = rows_in(run.parent / 'decoder')
  note(run, '../decoder')
  assert open_run('', str(run), '').prepared_dir == data
  assert open_run('', str(run / 'coprocessor'), '').prepared_dir == data
  assert str(open_run('', str(run), 'other').prepared_dir) == 'other'
  data.rename(run.parent / 'moved')
  with pytest.raises(UserError, match=f"--data = '': there are no rows/ in {data}; give"):
    open_run('', str(run), '')


@pytest.mark.parametrize('kept', [True, False])
def test_data_of_a_run_without_a_note(run, kept):
  """Runs of earlier code, and a coprocessor without its run.json, have them nearby."""
  note(run, '')
  if not kept:
    (run / RUN_FILE).unlink()
  with pytest.raises(UserError, match=f"--data = '': .* in {run} or {run.parent}; give"):
    open_run('', str(run), '')
  rows_in(run.parent)
  assert open_run('', str(run), '').prepared_dir == run.parent
  rows_in(run)
  assert open_run('', str(run), '').prepared_dir == run
