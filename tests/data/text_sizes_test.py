"""A small text gets sizes that fit it; large texts and given keys keep theirs."""

import dataclasses
from pathlib import Path

import pytest

from latent_deliberation.data import text_sizes, vocabularies
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.text_sizes import (
  fit_to_rows,
  fit_to_text,
  read_choices,
  with_choices,
  write_choices,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind
from tests import finished


@pytest.fixture
def notes(tmp_path) -> Path:
  """Thirty notes of 75 kB in all."""
  for number in range(30):
    words = (f'{number * word % 97} words' for word in range(250))
    (tmp_path / f'{number}.txt').write_text(' '.join(words)[:2500])
  return tmp_path


def experiment(notes: Path, **data) -> Experiment:
  start = bind(finished.config_of('quickstart'))
  return dataclasses.replace(start, data=dataclasses.replace(
      start.data, source='text', files=(f'{notes}/*.txt',), **data))


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
  """Sizes of the vocabularies that were tried; one of more than 400 pieces fits no text."""
  tried = []

  def train(texts, path, size):
    tried.append(size)
    if size > 400:
      raise UserError(f'vocabulary_size = {size}')

  monkeypatch.setattr(vocabularies, 'train_sentencepiece', train)
  return tried


@pytest.fixture
def rows(monkeypatch):
  """Sets the numbers of packed rows."""
  def set_rows(train, validation):
    found = {'train': range(train), 'validation': range(validation)}
    monkeypatch.setattr(text_sizes, 'PackedRows', lambda path: found[path.name])
  return set_rows


def test_small_text(notes, trainings):
  """The vocabulary is one that the text allows, and the decoder follows it."""
  start = experiment(notes)
  choices = fit_to_text(start, set())
  pieces = choices['data.vocabulary_size']
  assert pieces == trainings[-1] <= 400 < trainings[0] < 2048
  assert choices['decoder.vocab_size'] == pieces
  assert choices['data.validation_percent'] in (20, 30)
  chosen = with_choices(start, choices)
  assert chosen.decoder.vocab_size == chosen.data.vocabulary_size == pieces


def test_tiny_text_is_read_as_bytes(tmp_path, trainings):
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(name * 500)
  choices = fit_to_text(experiment(tmp_path), set())
  assert (choices['data.vocabulary'], choices['decoder.vocab_size']) == ('byte', 260)
  assert not trainings


def test_given_keys_stay(notes, trainings, rows):
  given = {'data.validation_percent', 'data.vocabulary_size'}
  assert fit_to_text(experiment(notes), given) == {}
  rows(80, 40)
  for key in ('evaluation.num_texts', 'training.batch_size', 'pretraining.loop.num_steps'):
    assert key not in fit_to_rows(experiment(notes), {key}, notes)


def test_existing_decoder_keeps_its_vocabulary(notes, trainings, rows):
  """Nor is anything chosen for a pretraining, which it does not have."""
  start = dataclasses.replace(experiment(notes), decoder_from='somewhere')
  assert set(fit_to_text(start, set())) <= {'data.validation_percent'} and not trainings
  rows(80, 40)
  assert {key.partition('.')[0] for key in fit_to_rows(start, set(), notes)} == {
      'evaluation', 'training'}


def test_only_files_of_the_user(tmp_path):
  """The standard library keeps every size, whatever its rows."""
  start = bind(finished.config_of('quickstart'))
  assert fit_to_text(start, set()) == fit_to_rows(start, set(), tmp_path) == {}


@pytest.mark.parametrize('train, validation', [(80, 40), (51, 20), (9, 5), (1500, 200)])
def test_rows_suffice(rows, notes, train, validation):
  """Every batch finds its rows, intervals have texts, and no row is read too often."""
  rows(train, validation)
  start = experiment(notes)
  chosen = with_choices(start, fit_to_rows(start, set(), notes))
  scored = chosen.evaluation
  assert 0 < scored.num_texts <= validation and scored.num_texts % scored.batch_size == 0
  assert scored.eval_batches * scored.batch_size <= validation
  assert (scored.num_texts >= 20) == (validation >= 20)
  assert scored.rows_per_text == 1 or scored.num_texts // scored.rows_per_text >= 20
  for section in (chosen.pretraining, chosen.training):
    assert section.loop.num_steps * section.batch_size <= text_sizes.PASSES * train
    assert section.optimizer.warmup_steps < section.loop.num_steps
    assert section.loop.num_steps // section.loop.eval_every >= 4


def test_much_text_changes_nothing(rows, notes):
  rows(100_000, 10_000)
  assert fit_to_rows(experiment(notes), set(), notes) == {}


def test_batches_divide_over_shards(rows, notes):
  rows(20, 20)
  choices = fit_to_rows(experiment(notes), set(), notes, shards=8)
  chosen = with_choices(experiment(notes), choices)
  assert {chosen.evaluation.batch_size % 8, chosen.training.batch_size % 8} == {0}


def test_choices_come_back(tmp_path):
  """A relaunch reads them; a key that it gives itself has its own value, also in later launches."""
  given = with_choices(experiment(tmp_path), {'evaluation.num_texts': 16})
  assert read_choices(tmp_path, 'quickstart', given, set()) is None
  choices = {'evaluation.num_texts': 32, 'training.loop.num_steps': 40}
  write_choices(tmp_path, 'quickstart', {'data': dataclasses.asdict(DataConfig())}, choices)
  assert read_choices(tmp_path, 'quickstart', given, set()) == choices
  assert read_choices(tmp_path, 'quickstart', given, {'evaluation.num_texts'}) == {
      **choices, 'evaluation.num_texts': 16}
  (tmp_path / 'run.json').write_text('{"job": "pretrain"}')
  with pytest.raises(UserError, match='run.json .*chosen'):
    read_choices(tmp_path, 'quickstart', given, set())


def test_choices_of_another_job(tmp_path):
  """They are not taken. An expert of earlier code has the name of a quickstart."""
  given = experiment(tmp_path)
  write_choices(tmp_path, 'quickstart', {}, {})
  assert read_choices(tmp_path, 'expert', given, set()) == {}
  with pytest.raises(UserError, match=f"{tmp_path} .*'quickstart'.*'study'.*--workdir"):
    read_choices(tmp_path, 'study', given, set())
  write_choices(tmp_path, 'expert', {}, {})
  with pytest.raises(UserError, match=f"{tmp_path} .*'expert'.*'quickstart'.*--workdir"):
    read_choices(tmp_path, 'quickstart', given, set())
