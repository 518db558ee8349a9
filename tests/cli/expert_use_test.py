"""ask, export and the table of retrieval, as commands: what they print, write and refuse."""

import json

import pytest

from latent_deliberation.cli import attached
from latent_deliberation.cli.expert_use import ask_documents, export_prompt, measure_retrieval
from latent_deliberation.errors import UserError
from latent_deliberation.experts.package import write_package
from latent_deliberation.files import lock
from tests.serving import small_server

pytest.importorskip('bm25s')


@pytest.fixture
def package(tmp_path, monkeypatch):
  """The directory of an expert; a decoder of any name is the tiny one."""
  monkeypatch.setattr(attached, 'load_decoder', lambda name: small_server.decoder())
  expert = small_server.expert('stars', 1)
  write_package(tmp_path / 'stars', expert.card, expert.coprocessor, routing=expert.routing)
  return str(tmp_path / 'stars')


def ask(tmp_path, expert, question='comet?', **changes):
  (tmp_path / 'documents').mkdir(exist_ok=True)
  (tmp_path / 'documents/a.txt').write_text('A comet is ice.')
  ask_documents(question, **{'decoder': 'tiny', 'documents': str(tmp_path / 'documents'),
                             'expert': expert, 'at': 'document', 'passage': 64, 'max_tokens': 4,
                             'length': 96, **changes})


def test_ask(package, tmp_path, capsys):
  """The answer comes with its source, its experts and its seconds."""
  ask(tmp_path, package)
  printed = capsys.readouterr().out
  assert 'from a.txt (BM25 0' in printed and 'experts: stars 1' in printed
  assert 'seconds: search' in printed
  ask(tmp_path, 'none', 'xylophone')
  printed = capsys.readouterr().out
  assert 'No document has a word of the question' in printed and 'experts: none' in printed


def test_ask_refuses(package, tmp_path):
  for changes, message in (({'documents': ''}, '--documents=DIR'),
                           ({'documents': str(tmp_path / 'no')}, 'no such folder'),
                           ({'question': 'who \udcff'}, 'the question .*not Unicode'),
                           ({'passage': 200}, '--passage=200 .*--length=96'),
                           ({'passage': 15}, 'passage = 15'), ({'max_tokens': 0}, 'max_tokens = 0'),
                           ({'question': ' '}, 'the question is empty'),
                           ({'decoder': ''}, '--decoder is missing')):
    with pytest.raises(UserError, match=message):
      ask(tmp_path, package, **changes)


def test_export(package, tmp_path, capsys):
  """Both files are written once, and again only with overwrite."""
  values = dict(decoder='tiny', expert=package, output=str(tmp_path / 'out'), length=96,
                format='prompt_embeds', overwrite=False)
  export_prompt('A comet is', **values)
  assert '11 embeddings, experts: stars' in capsys.readouterr().out
  assert json.loads((tmp_path / 'out/prompt_embeds.json').read_text())['experts'] == {'stars': 1.0}
  with pytest.raises(UserError, match='--text .*not Unicode'):
    export_prompt('\udcff', **{**values, 'output': str(tmp_path / 'none')})
  with pytest.raises(UserError, match='absent'):
    export_prompt('A comet', **{**values, 'output': str(tmp_path / 'none'), 'expert': 'absent'})
  assert not (tmp_path / 'none').exists()
  for changes, message in (({}, 'exist already'), ({'format': 'gguf'}, '--format=gguf'),
                           ({'output': ''}, '--output=DIR')):
    with pytest.raises(UserError, match=message):
      export_prompt('A comet is', **{**values, **changes})
  export_prompt('A comet is', **{**values, 'overwrite': True})


def test_measure_retrieval(package, tmp_path):
  """The table is written with its picture, and a second run asks nothing again."""
  folder = tmp_path / 'data/sciq'
  folder.mkdir(parents=True)
  (folder / 'validation.jsonl').write_text('\n'.join(json.dumps({
      'question': f'What is {word}?', 'correct_answer': 'a', 'distractor1': 'b',
      'distractor2': 'c', 'distractor3': 'd', 'support': f'It is {word}.'})
      for word in ('ice', 'law', 'rose')))
  values = dict(decoder='tiny', expert=package, data=tmp_path / 'data', sets=['sciq'], questions=2,
                passage=32, length=96)
  output = tmp_path / 'out.json'
  page = measure_retrieval(output, **values)
  assert '# sciq: 2 questions' in page
  assert output.with_suffix('.md').read_text() == page
  assert output.with_suffix('.png').exists()
  records = output.with_suffix('.sciq.jsonl').read_text()
  assert measure_retrieval(output, **values) == page
  assert output.with_suffix('.sciq.jsonl').read_text() == records
  for changes, message in (({'sets': ['squad']}, '--sets=squad'), ({'expert': 'none'}, 'none'),
                           ({'length': 32}, 'do not fit into --length=32: give --length='),
                           ({'questions': 1}, 'questions = 1'),
                           ({'passage': -1}, 'passage = -1'), ({'passage': 15}, 'passage = 15'),
                           ({'data': tmp_path}, 'sciq/validation.jsonl is missing')):
    with pytest.raises(UserError, match=message):
      measure_retrieval(output, **{**values, **changes})
  with lock(output.with_suffix('.lock'), f'writes {output}'):
    with pytest.raises(UserError, match=f'writes {output}: let it end'):
      measure_retrieval(output, **values)
