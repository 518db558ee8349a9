import json
import sysconfig
from pathlib import Path

import pytest

from latent_deliberation.data.corpus import open_corpus
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError


def configure(*files, **fields):
  return DataConfig(source='text', files=tuple(map(str, files)), **fields)


def texts(corpus, split):
  return [corpus.read(number) for number in corpus.numbers(split)]


def write_two(directory: Path) -> Path:
  for name in ('a', 'b'):
    (directory / f'{name}.txt').write_text(name)
  return directory


def test_every_document_is_in_one_split(corpus_directory):
  """Every document is in exactly one split, unchanged."""
  corpus = open_corpus(configure(corpus_directory, validation_percent=30))
  expected = [path.read_text(encoding='utf-8') for path in corpus_directory.rglob('*.txt')]
  expected += [json.loads(line)['text']
               for line in (corpus_directory / 'more.jsonl').read_text().split('\n') if line]
  assert len(expected) == 40
  assert sorted(texts(corpus, 'train') + texts(corpus, 'validation')) == sorted(expected)
  assert 4 <= len(corpus.numbers('validation')) <= 20


def test_whitespace_is_kept(tmp_path):
  write_two(tmp_path)
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf one\r\n\ttwo \r three\n\n')
  corpus = open_corpus(configure(tmp_path))
  assert '\ufeff one\r\n\ttwo \r three\n\n' in texts(corpus, 'train') + texts(corpus, 'validation')


def test_place_of_files_does_not_matter(corpus_directory, tmp_path):
  """Split and fingerprint are the same for a copy of the files."""
  copy = tmp_path / 'elsewhere'
  for path in corpus_directory.rglob('*'):
    if path.is_file():
      target = copy / path.relative_to(corpus_directory)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
  first, second = open_corpus(configure(corpus_directory)), open_corpus(configure(copy))
  assert texts(first, 'validation') == texts(second, 'validation')
  assert first.fingerprint == second.fingerprint


def test_new_files_move_no_document(corpus_directory, tmp_path):
  config = configure(corpus_directory, tmp_path / '*.txt', validation_percent=30)
  (tmp_path / 'x0.txt').write_text('new 0')
  before = set(texts(open_corpus(config), 'validation'))
  for number in range(1, 20):
    (tmp_path / f'x{number}.txt').write_text(f'new {number}')
  assert before <= set(texts(open_corpus(config), 'validation'))


def test_no_split_is_empty(tmp_path):
  for percent in (1, 99):
    corpus = open_corpus(configure(write_two(tmp_path), validation_percent=percent))
    assert len(corpus.numbers('train')) == len(corpus.numbers('validation')) == 1


@pytest.mark.parametrize('change', ['contents', 'name'])
def test_fingerprint_changes_with_any_file(tmp_path, change):
  before = open_corpus(configure(write_two(tmp_path))).fingerprint
  if change == 'contents':
    (tmp_path / 'b.txt').write_text('c')
  else:
    (tmp_path / 'b.txt').rename(tmp_path / 'c.txt')
  assert open_corpus(configure(tmp_path)).fingerprint != before


def test_overlapping_patterns(tmp_path):
  corpus = open_corpus(configure(write_two(tmp_path), tmp_path / '*.txt'))
  assert len(corpus.file_of) == 2


def test_glob_of_any_kind(tmp_path):
  for name in ('a.md', 'b.md'):
    (tmp_path / name).write_text(name)
  corpus = open_corpus(configure(tmp_path / '*.md'))
  assert sorted(texts(corpus, 'train') + texts(corpus, 'validation')) == ['a.md', 'b.md']


def test_glob_without_match(tmp_path):
  with pytest.raises(UserError, match=r"no file matches '.*nothing-\*\.txt'"):
    open_corpus(configure(tmp_path / 'nothing-*.txt'))


def test_directory_without_text(tmp_path):
  (tmp_path / 'image.png').write_bytes(b'\x89PNG')
  with pytest.raises(UserError, match='no file matches'):
    open_corpus(configure(tmp_path))


def test_empty_files_are_refused(tmp_path):
  for name in ('a.txt', 'b.txt'):
    (tmp_path / name).touch()
  with pytest.raises(UserError, match='0 documents .* 2 files'):
    open_corpus(configure(tmp_path))


def test_single_document_is_refused(tmp_path):
  (tmp_path / 'all.txt').write_text('one document')
  with pytest.raises(UserError, match='1 documents.*at least 2.*split -C 64k'):
    open_corpus(configure(tmp_path / 'all.txt'))


def test_binary_file_is_named(tmp_path):
  (write_two(tmp_path) / 'b.txt').write_bytes(b'text\0\1')
  with pytest.raises(UserError, match=r'b\.txt: NUL at byte 4'):
    open_corpus(configure(tmp_path))


def test_file_that_is_not_utf8(tmp_path):
  (write_two(tmp_path) / 'b.txt').write_bytes('naïve größe'.encode('latin-1'))
  with pytest.raises(UserError, match=r'b\.txt: not utf-8 text at byte 2 .*iconv'):
    open_corpus(configure(tmp_path))


@pytest.mark.parametrize(('line', 'message'), [
    (b'{"text": "cut', r'lines\.jsonl:2: not JSON'),
    (b'["text"]', r"lines\.jsonl:2: no text under text_key = 'text', found list"),
    (b'{"body": "a", "id": 1}', r"lines\.jsonl:2: no text under .* found \['body', 'id'\]"),
    (b'{"text": 7}', r"lines\.jsonl:2: no text under text_key = 'text'"),
    (b'{"text": "\xff"}', r'lines\.jsonl: not utf-8 text at byte 25 '),
    (b'{"text": "a\\u0000b"}', r'lines\.jsonl:2: .*NUL'),
    (b'{"text": "a\\ud800"}', r'lines\.jsonl:2: half a surrogate pair at character 1'),
])
def test_bad_line_is_named(tmp_path, line, message):
  (tmp_path / 'lines.jsonl').write_bytes(b'{"text": "ok"}\n' + line + b'\n{"text": "ok"}\n')
  with pytest.raises(UserError, match=message):
    open_corpus(configure(tmp_path))


def test_text_key(tmp_path):
  (tmp_path / 'lines.jsonl').write_text('{"body": "one"}\n\n{"body": "two"}')
  corpus = open_corpus(configure(tmp_path, text_key='body'))
  assert sorted(texts(corpus, 'train') + texts(corpus, 'validation')) == ['one', 'two']


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
  for name in ('ast.py', 'json/tool.py', 'LICENSE.txt', 'test/test_ast.py', 'lib.so',
               'site-packages/pip/main.py', 'idlelib/idle_test/test_a.py', '__pycache__/x.txt'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'# {name}')
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  return tmp_path


def test_stdlib_files(small_stdlib):
  """Sources and texts of the standard library, without tests and packages."""
  corpus = open_corpus(DataConfig())
  assert [file.name for file in corpus.files] == ['LICENSE.txt', 'ast.py', 'json/tool.py']


def test_stdlib_encodings(small_stdlib):
  """Sources may declare an encoding. Unreadable ones are left out."""
  (small_stdlib / 'latin.py').write_bytes('# coding: latin-1\n# größe'.encode('latin-1'))
  (small_stdlib / 'broken.py').write_bytes('# coding: utf-8\n# größe'.encode('latin-1'))
  corpus = open_corpus(DataConfig())
  assert '# coding: latin-1\n# größe' in texts(corpus, 'train') + texts(corpus, 'validation')
  assert 'broken.py' not in {file.name for file in corpus.files}


def test_interpreter_without_sources(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  with pytest.raises(UserError, match="use source = 'text'"):
    open_corpus(DataConfig())


def test_real_stdlib_is_a_corpus():
  corpus = open_corpus(DataConfig())
  assert corpus.size.sum() > 3e6
  assert not [file.name for file in corpus.files if 'site-packages' in file.name]


def test_giant_document_is_trained_on(tmp_path):
  """It would otherwise make up most of the validation text."""
  for number in range(100):
    (tmp_path / f'{number}.txt').write_text(f'document {number}')
  config = configure(tmp_path, validation_percent=20)
  held_out = texts(open_corpus(config), 'validation')
  giant = tmp_path / f'{held_out[0].split()[1]}.txt'
  giant.write_text('word ' * 1000)
  assert texts(open_corpus(config), 'validation') == held_out[1:]
