import bz2
import gzip
import json
import lzma
import sysconfig
from pathlib import Path

import pytest

from latent_deliberation.data.corpus import open_corpus
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.text_files import decode, list_files
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
  assert ' one\r\n\ttwo \r three\n\n' in texts(corpus, 'train') + texts(corpus, 'validation')


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


def test_empty_name():
  with pytest.raises(UserError, match="no file matches ''"):
    open_corpus(DataConfig(source='text', files=('',)))


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


def everything(corpus):
  return sorted(texts(corpus, 'train') + texts(corpus, 'validation'))


def json_lines(*values):
  return ''.join(json.dumps({'text': value}) + '\n' for value in values)


@pytest.mark.parametrize('name', [
    'sweep lr[1e-2]', 'a*b', 'why?', 'back\\slash', '[!x]', '**'])
def test_path_with_signs_of_a_pattern(tmp_path, name):
  """A path that exists is no pattern, as a file, a directory or the beginning of a glob."""
  folder = tmp_path / name
  folder.mkdir()
  (folder / 'part[1].jsonl').write_text(json_lines('one', 'two'))
  (tmp_path / 'part1.jsonl').write_text(json_lines('another'))
  for given in (folder / 'part[1].jsonl', folder, folder / '*.jsonl'):
    corpus = open_corpus(configure(given))
    assert everything(corpus) == ['one', 'two']
    assert [file.name for file in corpus.files] == ['part[1].jsonl']


@pytest.mark.parametrize('name', [
    '.ipynb_checkpoints/a-checkpoint.txt', '.a.txt', '._a.txt', '.nfs0001.txt', '~$a.txt',
    'old.bak/a.txt', '.git/x/a.txt'])
def test_directory_without_stray_files(tmp_path, caplog, name):
  path = write_two(tmp_path) / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('nobody meant this')
  with caplog.at_level('INFO'):
    assert everything(open_corpus(configure(tmp_path))) == ['a', 'b']
  assert 'left out 1 hidden' in caplog.text
  assert everything(open_corpus(configure(tmp_path, path))) == ['a', 'b', 'nobody meant this']


@pytest.mark.parametrize('name', ['a.txt~', '#a.txt#', 'a.txt.bak', 'a.txt.orig', 'a.txt.part'])
def test_wildcard_without_backups(tmp_path, name):
  (write_two(tmp_path) / name).write_text('nobody meant this')
  assert everything(open_corpus(configure(tmp_path / '*'))) == ['a', 'b']


def test_files_of_other_kinds_are_logged(tmp_path, caplog):
  (write_two(tmp_path) / 'c.md').write_text('c')
  (tmp_path / 'd.html').write_text('d')
  with caplog.at_level('INFO'):
    assert everything(open_corpus(configure(tmp_path))) == ['a', 'b', 'c']
  assert '1 files .html' in caplog.text


def test_equal_documents_are_in_one_split(tmp_path, caplog):
  """No held-out text is trained on under another name, whatever its file."""
  for number in range(60):
    for name in (f'{number}.txt', f'copy of {number}.txt'):
      (tmp_path / name).write_text(f'note {number} ' * 40)
  (tmp_path / 'again.jsonl').write_text(json_lines(*(f'note {n} ' * 40 for n in range(30))))
  with caplog.at_level('INFO'):
    corpus = open_corpus(configure(tmp_path, validation_percent=20))
  assert '90 documents are equal' in caplog.text
  assert len(corpus.numbers('validation')) > 10
  assert not set(texts(corpus, 'train')) & set(texts(corpus, 'validation'))


def test_copies_hold_out_more_and_never_less(tmp_path):
  """What was held out stays so when copies come, and the fingerprint tells a changed split."""
  for number in range(60):
    (tmp_path / f'{number}.txt').write_text(f'note {number}')
  config = configure(tmp_path, validation_percent=20)
  before = set(texts(open_corpus(config), 'validation'))
  for number in range(60):
    (tmp_path / f'copy of {number}.txt').write_text(f'note {number}')
  assert before < set(texts(open_corpus(config), 'validation'))


def test_only_equal_documents(tmp_path):
  for name in ('a', 'b', 'c'):
    (tmp_path / f'{name}.txt').write_text('the same')
  with pytest.raises(UserError, match='1 documents .* 3 files'):
    open_corpus(configure(tmp_path))


HELD_OUT = ['note 1', 'note 18', 'note 20', 'note 27', 'note 39']
FINGERPRINT = '1a55fa551ac9f90f8cb511c52dd52ef62cc8b194021c5824eb84c1af444787de'


def test_split_and_fingerprint_of_older_code(tmp_path):
  """Files that older code read the same way keep their split and fingerprint."""
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text(f'note {number}')
  (tmp_path / 'lines.jsonl').write_text(json_lines('one', 'two'))
  corpus = open_corpus(configure(tmp_path, validation_percent=10))
  assert sorted(texts(corpus, 'validation')) == HELD_OUT
  assert corpus.fingerprint == FINGERPRINT


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
def test_byte_order_mark(tmp_path, encoding, name):
  content = 'größe' if name == 'a.txt' else json_lines('größe', 'x')
  mark = '\ufeff' if encoding[-2:] in ('le', 'be') else ''
  (tmp_path / 'b.txt').write_text('b')
  (tmp_path / name).write_text(mark + content, encoding=encoding)
  assert everything(open_corpus(configure(tmp_path)))[-1] == ('größe' if name == 'a.txt' else 'x')
  assert 'größe' in everything(open_corpus(configure(tmp_path)))


def test_byte_order_marks_of_joined_files(tmp_path):
  """As `cat` leaves them, within a file of JSON lines; within a text they are characters."""
  lines = ['\ufeff' + json_lines(text) for text in ('a', 'b\ufeffc')]
  (tmp_path / 'a.jsonl').write_text(''.join(lines), encoding='utf-8')
  assert everything(open_corpus(configure(tmp_path))) == ['a', 'b\ufeffc']


def test_utf16_without_a_mark(tmp_path):
  (write_two(tmp_path) / 'b.txt').write_text('two', encoding='utf-16-le')
  with pytest.raises(UserError, match=r'b\.txt: NUL at byte 1.*iconv -f utf-16'):
    open_corpus(configure(tmp_path))


@pytest.mark.parametrize('sign', ['\u2028', '\u2029', '\x85', '\v', '\f', '\x1c'])
def test_signs_within_a_json_line(tmp_path, sign):
  line = json.dumps({'text': f'a{sign}b'}, ensure_ascii=False)
  (tmp_path / 'a.jsonl').write_text(line + '\r\n' + json_lines('c'), encoding='utf-8', newline='')
  assert everything(open_corpus(configure(tmp_path))) == [f'a{sign}b', 'c']


@pytest.mark.parametrize('name', ['a.ndjson', 'a.JSONL', 'a.NDJson', 'a.jsonlines', 'a.LDJSON',
                                  'a.json'])
def test_other_names_of_json_lines(tmp_path, name):
  (tmp_path / name).write_text(json_lines('one', 'two'))
  assert everything(open_corpus(configure(tmp_path / name))) == ['one', 'two']
  if name != 'a.json':
    assert everything(open_corpus(configure(tmp_path))) == ['one', 'two']


def test_json_lines_under_an_unknown_name(tmp_path, caplog):
  for name in ('part-0', 'part-1'):
    (tmp_path / name).write_text(json_lines(name, 'two'))
  assert len(everything(open_corpus(configure(tmp_path / 'part-*')))) == 2
  assert caplog.text.count("'text'") == 1 and 'part-0' in caplog.text


@pytest.mark.parametrize(('ending', 'module'), [('.gz', gzip), ('.bz2', bz2), ('.XZ', lzma)])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_compressed(tmp_path, ending, module, encoding):
  (tmp_path / 'a.txt').write_text('plain')
  content = json_lines('one', 'zwei größer', 'three').encode(encoding)
  (tmp_path / f'a.jsonl{ending}').write_bytes(module.compress(content))
  corpus = open_corpus(configure(tmp_path))
  assert everything(corpus) == ['one', 'plain', 'three', 'zwei größer']
  copies = corpus.files[0].plain.parent
  assert copies != tmp_path and copies.is_dir()
  del corpus
  assert not copies.exists()


def test_compressed_beside_the_same_unpacked(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json_lines('one', 'two'))
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(json_lines('one', 'two').encode()))
  assert everything(open_corpus(configure(tmp_path))) == ['one', 'two']


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.txt.zst', b'\x28\xb5\x2f\xfd', 'a.txt.zst .*zstd -d a.txt.zst'),
    ('a.txt.gz', gzip.compress(b'text' * 99, mtime=0)[:20], 'a.txt.gz cannot be unpacked .*again'),
    ('a.txt.gz', b'no gzip', 'a.txt.gz cannot be unpacked'),
    ('a.txt.bz2', b'no bzip2', 'a.txt.bz2 cannot be unpacked'),
    ('a.txt.gz', gzip.compress(b'\xff\xfe\xff', mtime=0), 'a.txt.gz: not utf-16'),
    ('a.json', b'[{"text": "a"}]', r"a.json:1: no text .*jq -c '\.\[\]'.* \.txt"),
    ('a.json', b'{\n  "text": "a"\n}', 'a.json:1: not JSON .*jq'),
    ('a.jsonl', b'{"text": null}', "a.jsonl:1: no text .*'text', but None: leave the line out"),
    ('a.jsonl', b'{"id": ' + b'1' * 5000 + b', "text": "x"}', 'a.jsonl:1: .*5000 digits.*leave'),
    ('a.jsonl', b'{"m": ' + b'[' * 10**5 + b']' * 10**5 + b'}', 'a.jsonl:1: .*leave the line out'),
])
def test_file_that_cannot_be_read(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    open_corpus(configure(tmp_path / name))


def test_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(write_two(tmp_path)))
  assert everything(open_corpus(configure('~'))) == everything(open_corpus(configure('~/*.txt')))


def test_links(tmp_path):
  """Text behind links counts, also where a link leads up; a file with two names has the first."""
  for name in ('notes/a.txt', 'other/b.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f'text of {name}')
  notes = tmp_path / 'notes'
  (notes / 'more').symlink_to(tmp_path / 'other')
  (notes / 'up').symlink_to(notes)
  (notes / 'z.txt').symlink_to(notes / 'a.txt')
  assert [file.name for file in list_files([str(notes)])] == ['a.txt', 'more/b.txt']


def test_compressed_files_that_are_asked_for(tmp_path):
  """A pattern of compressed files alone does not lose those that are there unpacked, too."""
  for name in ('a', 'b'):
    (tmp_path / f'{name}.txt.gz').write_bytes(gzip.compress(name.encode()))
  (tmp_path / 'a.txt').write_text('a')
  found = list_files([str(tmp_path / '*.gz')])
  assert [file.name for file in found] == ['a.txt.gz', 'b.txt.gz']
  assert [file.name for file in list_files([str(tmp_path)])] == ['a.txt', 'b.txt.gz']


def test_encoding_that_is_none_of_text(tmp_path):
  (tmp_path / 'a.py').write_text('# coding: rot13\nprint(1)\n')
  with pytest.raises(UserError, match='a.py: its first lines declare the encoding rot13'):
    decode((tmp_path / 'a.py').read_bytes(), tmp_path / 'a.py')


def test_blank_first_line_after_a_mark(tmp_path):
  lines = b'\xef\xbb\xbf\n' + b''.join(b'{"text": "a%d"}\n' % number for number in range(9))
  (tmp_path / 'a.jsonl').write_bytes(lines)
  corpus = open_corpus(configure(tmp_path / 'a.jsonl'))
  assert len(texts(corpus, 'train') + texts(corpus, 'validation')) == 9
