"""What experts' commands are asked for: refused before any work, or named without directories."""

import dataclasses
import sys
from pathlib import Path

import pytest

from latent_deliberation.cli import expert_commands
from latent_deliberation.cli import make_expert as module
from latent_deliberation.cli.attached import parse_expert
from latent_deliberation.cli.expert_commands import Options, run
from latent_deliberation.cli.make_expert import ExpertRequest, make_expert
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import GENERAL
from tests import finished

GIVEN = frozenset({'training.loop.num_steps', 'training.batch_size'})


@pytest.mark.parametrize('values, message', [
    ({'name': 'A'}, "name = 'A'"), ({'name': GENERAL}, 'text of no domain'),
    ({'description': 'two\nlines'}, 'give one line'), ({'licence': 'a\tb'}, 'give one line'),
    ({'minutes': -1.0}, 'minutes = -1'), ({'minutes': float('nan')}, 'minutes = nan')])
def test_bad_requests(values, message):
  with pytest.raises(UserError, match=message):
    ExpertRequest(**{'name': 'a', 'text': 'b', **values})


@pytest.mark.parametrize('values, request_values, places, message', [
    ({}, {}, ('runs/a', 'runs/a'), 'one holds the other'),
    ({}, {}, ('runs/a', 'runs/a/package'), 'one holds the other'),
    ({}, {}, ('runs/a/../b/work', 'runs/b'), 'one holds the other'),
    ({}, {'text': 'a\nb'}, ('work', 'out'), "cannot be printed, 'a"),
    ({}, {'general': 'a\x1b[0m'}, ('work', 'out'), 'cannot be printed'),
    ({'decoder_from': 'models/a\x1b'}, {}, ('work', 'out'), 'cannot be printed'),
    ({'data__mode': 'online'}, {}, ('work', 'out'), "data.mode = 'online'.*packed"),
    ({}, {'minutes': 5.0}, ('work', 'out'), 'minutes=5 and training.loop.num_steps = 2'),
    ({'decoder_from': ''}, {}, ('work', 'out'), '--decoder is missing')])
def test_what_cannot_end_well_is_refused(values, request_values, places, message, tmp_path,
                                         monkeypatch):
  """Before anything is made."""
  monkeypatch.chdir(tmp_path)
  experiment = finished.experiment(**{'decoder_from': 'd', **values})
  request = ExpertRequest(**{'name': 'a', 'text': 'notes', **request_values})
  with pytest.raises(UserError, match=message):
    make_expert(experiment, request, *map(Path, places), GIVEN)
  assert not any(tmp_path.iterdir())


def test_request_of_a_workdir(tmp_path):
  """The same files may be written in another way, and a damaged file is named."""
  request = ExpertRequest('a', 'notes,more/', 'stdlib')
  module._keep_request(tmp_path, request)
  module._keep_request(tmp_path, dataclasses.replace(request, text='./notes/, more', general=''))
  with pytest.raises(UserError, match="text: 'notes,more/' saved, 'notes' now"):
    module._keep_request(tmp_path, dataclasses.replace(request, text='notes'))
  for content in ('{"name": ', '[3]', ''):
    (tmp_path / module.REQUEST_FILE).write_text(content)
    with pytest.raises(UserError, match='expert_request.json is damaged'):
      module._keep_request(tmp_path, request)


@pytest.mark.parametrize('given, named', [
    ('', "Python's standard library"), ('/home/me/notes', 'notes'),
    ('/data/law/train.jsonl,/data/poetry/train.jsonl', 'law/train.jsonl, poetry/train.jsonl'),
    ('/data/a.txt,/data/b.txt', 'a.txt, b.txt')])
def test_text_is_named_without_directories(given, named):
  """A folder is named only where it tells files apart."""
  assert module._name_text(given) == named


def test_command_is_without_directories(monkeypatch):
  monkeypatch.setattr(sys, 'argv', [
      'x', 'train', '--text', '/data/secret', '--description=Notes on TCP/IP',
      '--config=/home/me/mine.py', '--config.deliberation.lora_rank=8', '--output=/tmp/e'])
  request = ExpertRequest('a', '/data/a/x.txt,/data/b/x.txt', 'gs://bucket/y.txt', 7.5)
  assert module._command(request, '/models/gemma') == (
      'python launch/experts.py train --decoder=gemma --text=a/x.txt,b/x.txt '
      '--general=gs://bucket/y.txt --name=a --minutes=7.5 --config=mine.py '
      '--config.deliberation.lora_rank=8')


@pytest.mark.parametrize('written, choice, router', [
    ('none', None, ''), ('auto', 'auto', 'gain'), ('auto:bm25', 'auto', 'bm25'),
    ('law', {'law': 1.0}, ''), ('law:0.5, stars:-1e-3', {'law': 0.5, 'stars': -1e-3}, ''),
    ('a/b:c', {'a/b:c': 1.0}, ''), ('law@0123456789abcdef:2', {'law@0123456789abcdef': 2.0}, '')])
def test_what_the_flag_asks_for(written, choice, router):
  assert parse_expert(written) == (choice, router)


@pytest.mark.parametrize('written', ['auto:best', ',', 'law,law', 'law:1,law:2'])
def test_bad_flags(written):
  with pytest.raises(UserError, match=f'--expert={written}'):
    parse_expert(written)


def test_prompt_in_the_home_directory(tmp_path, monkeypatch):
  """route reads the file that --text names, also where '~' stands for the home directory."""
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'prompt.txt').write_text('A comet is')
  read = []
  monkeypatch.setattr(expert_commands, 'check_unicode', lambda text, name: read.append(text))
  with pytest.raises(UserError, match='--decoder is missing'):
    run('route', [], Options(text='~/prompt.txt'))
  assert read == ['A comet is']


@pytest.mark.parametrize('command, words, options, message', [
    ('', [], {}, 'no command'), ('trains', [], {}, 'trains: give one of'),
    ('list', ['x'], {}, 'takes no words'), ('search', [], {}, 'give words'),
    ('show', [], {}, 'give one'), ('show', ['a', 'b'], {}, 'give one'),
    ('add', [], {}, 'address of an expert'), ('add', ['x'], {}, 'give --index'),
    ('publish', ['x'], {}, 'give --index'), ('compare', ['x'], {}, 'give --text'),
    ('route', [], {}, 'give --text'), ('evaluate', [], {}, 'give --domain'),
    ('evaluate', [], {'domain': ('a=b',)}, 'give --output'),
    ('compare', ['x'], {'text': 'y', 'output': 'a.txt'}, 'ends in .json'),
    ('remove', ['moon'], {}, 'no expert moon')])
def test_bad_commands(command, words, options, message, monkeypatch, tmp_path):
  monkeypatch.setenv('LATENT_DELIBERATION_EXPERTS', str(tmp_path))
  with pytest.raises(UserError, match=message):
    run(command, words, Options(**options))
