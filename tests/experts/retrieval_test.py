"""Documents are found, read and augmented once, and a question after one is as if read whole."""

import json

import numpy as np
import pytest
from absl import logging
from safetensors import SafetensorError

from latent_deliberation.errors import UserError
from latent_deliberation.experts import passages
from latent_deliberation.experts.passages import read_passages
from latent_deliberation.experts.retrieval import (
  Library,
  ask,
  format_question,
  open_library,
)
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.model.checkpoints import safetensors_io
from tests.serving import small_server

pytest.importorskip('bm25s')
TEXTS = {'comets.txt': 'A comet is ice.\n\nIt has a tail.', 'law.txt': 'A contract binds two.',
         'verse.md': 'The rose is red.'}
TOKENIZER = small_server.decoder().tokenizer


@pytest.fixture
def documents(tmp_path):
  folder = tmp_path / 'documents'
  folder.mkdir()
  for name, text in TEXTS.items():
    (folder / name).write_text(text)
  return folder


@pytest.fixture(scope='module')
def experts():
  return small_server.experts()


@pytest.fixture
def library(documents, experts):
  return open_library(documents, experts, TOKENIZER)


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


def answer(library, experts, question='comet tail?', **options):
  return ask(library, experts, TOKENIZER, question, **{'max_tokens': 8, **options})


def expected(experts, text, choice, question, at):
  """The answer by `session.generate`, from whole texts that are read anew."""
  options = DecodingOptions(8, eos=(TOKENIZER.eos,), num_ids=TOKENIZER.size,
                            stop=lambda tokens: TOKENIZER.decode(tokens).endswith('\n'),
                            policy=ONCE if choice and at == 'question' else NEVER)
  prompt = format_question(question, bool(text))
  if at == 'question' or not choice:
    source = experts.source([choice]) if choice else None
    completion, = generate(experts.engine, [TOKENIZER.encode(text + prompt)], options, None, source)
  else:
    state = experts.engine.read([TOKENIZER.encode(text)])
    state = experts.engine.attach(state, experts.augment(state, [{choice: 1.0}]))
    state = experts.engine.read_on(state, [TOKENIZER.encode_more(prompt)])
    completion, = generate(experts.engine, state, options)
  return TOKENIZER.decode(completion.tokens).strip()


@pytest.mark.parametrize('choice, at', [
    (None, 'document'), ('stars', 'document'), ('stars', 'question'), ('law', 'document')])
def test_answer_follows_its_document(library, experts, choice, at):
  """It is what the decoder says after the passage and the question, with latents where asked."""
  for _ in range(2):  # made, and then from disk
    found = answer(library, experts, choice=choice, at=at)
    assert found.text == expected(experts, TEXTS['comets.txt'], choice, 'comet tail?', at)
    assert found.source == 'comets.txt' and found.score > 0
    assert found.experts == ({choice: 1.0} if choice else {}) and not found.fault
  assert set(found.seconds) == {'search', 'read', 'decode'}


def test_caches_are_kept(documents, experts):
  """What was read and augmented once is on disk, by content; what changed is made anew."""
  first = open_library(documents, experts, TOKENIZER)
  answer(first, experts, choice='stars')
  assert (first.made, first.found) == (2, 0)
  again = open_library(documents, experts, TOKENIZER)
  (documents / 'comets.txt').rename(documents / 'renamed.txt')  # the content is the same
  answer(again, experts, choice='stars')
  assert (again.made, again.found) == (0, 2)
  answer(again, experts, choice={'stars': 0.5})  # only the latents are others
  assert (again.made, again.found) == (1, 3)
  (documents / 'renamed.txt').write_text('A comet has lost its tail.')
  changed = open_library(documents, experts, TOKENIZER)
  found = answer(changed, experts, choice='stars')
  assert (changed.made, changed.found) == (2, 0)
  assert found.text == expected(experts, 'A comet has lost its tail.', 'stars', 'comet tail?',
                                'document')


@pytest.mark.parametrize('damage', [
    lambda content: content[:-9], lambda content: content[:-9] + b'A' * 9, lambda content: b''])
def test_damaged_caches_are_made_anew(documents, experts, warnings, damage):
  """A cut file and one with other values are noticed, and repaired."""
  library = open_library(documents, experts, TOKENIZER)
  before = answer(library, experts, choice='stars')
  store = documents / '.latent_deliberation'
  files = [*store.rglob('*.safetensors'), *store.rglob('*.latents')]
  assert len(files) == 2
  for path in files:
    path.write_bytes(damage(path.read_bytes()))
  again = open_library(documents, experts, TOKENIZER)
  assert answer(again, experts, choice='stars').text == before.text
  assert (again.made, again.found) == (2, 0) and len(warnings) == 2
  repaired = open_library(documents, experts, TOKENIZER)
  assert answer(repaired, experts, choice='stars').text == before.text
  assert (repaired.made, repaired.found) == (0, 2)


def test_full_disk_leaves_the_answer(documents, experts, warnings, monkeypatch):
  """What cannot be kept is a warning."""
  def full(*unused, **options):
    raise SafetensorError('No space left on device (os error 28)')

  expected = answer(open_library(documents, experts, TOKENIZER), experts, choice='stars').text
  monkeypatch.setattr(safetensors_io, 'save_file', full)
  library = open_library(documents, experts, TOKENIZER, store=documents / 'other')
  assert answer(library, experts, choice='stars').text == expected
  assert len(warnings) == 1 and 'No space left' in warnings[0]


def test_folder_that_cannot_be_written(documents, experts, warnings):
  """Caches are then made each time, and the answer is the same."""
  expected_text = answer(open_library(documents, experts, TOKENIZER), experts, choice='stars').text
  (documents / 'file').write_text('')
  library = open_library(documents, experts, TOKENIZER, store=documents / 'file')
  for _ in range(2):
    assert answer(library, experts, choice='stars').text == expected_text
  assert (library.made, library.found) == (4, 0) and len(warnings) == 4


def test_prepare_reads_everything(documents, experts):
  library = open_library(documents, experts, TOKENIZER)
  library.prepare({'law': 1.0})
  assert library.made == 6
  answer(library, experts, choice='law')
  assert library.made == 6


def test_no_document_is_found(library, experts):
  """The answer says so, and is the decoder's own, with latents at the end of the question."""
  for question in ('xylophone', '?!...'):
    found = answer(library, experts, question, choice='stars')
    assert (found.source, found.score, found.experts) == ('', 0.0, {'stars': 1.0})
    assert found.text == expected(experts, '', 'stars', question, 'question')


def test_faults_leave_the_plain_answer(library, experts, monkeypatch, warnings):
  plain = answer(library, experts)
  assert answer(library, experts, choice='moon').text == plain.text

  def fail(*unused):
    raise RuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(experts, 'augment', fail)
  found = answer(library, experts, choice='stars', at='question')
  assert found.text == plain.text and not found.experts and 'RESOURCE' in found.fault


def test_bad_documents_are_left_out(documents, experts, warnings, monkeypatch):
  """Documents that are empty, binary, compressed, malformed or huge; the others are read."""
  (documents / 'empty.txt').write_text(' \n\n ')
  (documents / 'binary.txt').write_bytes(b'a\0b')
  (documents / 'latin.txt').write_bytes('Grüße'.encode('latin-1'))
  (documents / 'packed.txt.gz').write_bytes(b'\x1f\x8b')
  (documents / 'huge.txt').write_text('x' * 3000)
  (documents / 'lines.jsonl').write_text('{"text": "One line."}\n{"words": 3}\n')
  (documents / 'null.jsonl').write_text('{"text": null}\n')
  (documents / 'half.jsonl').write_text('{"text": "\\ud800"}\n')
  (documents / 'deep').mkdir()
  (documents / 'deep/law.txt').write_text('Another one.')
  monkeypatch.setattr(passages, 'MOST_BYTES', 2000)
  sources = [passage.source for passage in read_passages(documents, TOKENIZER)]
  assert sources == ['comets.txt', 'deep/law.txt', 'law.txt', 'verse.md']
  assert len(warnings) == 8
  for name in ('empty', 'binary', 'latin', 'packed', 'huge', 'lines', 'null', 'half'):
    assert any(name in said for said in warnings)


def test_long_documents_are_cut(tmp_path):
  """Passages hold whole paragraphs where they fit, and every word once, in order."""
  text = '\n\n'.join([*(f'Paragraph {n} has words.' for n in range(9)), 'w ' * 400, 'x' * 300])
  (tmp_path / 'long.txt').write_text(text)
  passages = read_passages(tmp_path, TOKENIZER, 64)
  assert all(len(passage.ids) <= 64 for passage in passages)
  assert ' '.join(passage.text for passage in passages).split()[:36] == text.split()[:36]
  letters = lambda text: ''.join(text.split())  # noqa: E731
  assert letters(''.join(passage.text for passage in passages)) == letters(text)
  assert passages[0].source == 'long.txt, passage 1'
  assert 'Paragraph 0 has words.\n\nParagraph 1 has words.' in passages[0].text


def test_bad_questions(library, experts, tmp_path):
  for call, message in (
      (lambda: answer(library, experts, ' '), 'question is empty'),
      (lambda: answer(library, experts, 'comet ' * 40), 'the question.*room for 96'),
      (lambda: answer(library, experts, at='start'), "at = 'start'"),
      (lambda: read_passages(tmp_path / 'none', TOKENIZER), 'none'),
      (lambda: read_passages(library._store.parent, TOKENIZER, 3), 'passage = 3')):
    with pytest.raises(UserError, match=message):
      call()


def test_search_finds_the_words(experts, tmp_path):
  """The passage with most of the rare words comes first."""
  texts = ['the cat sat', 'the dog ran', 'the cat ran far', 'quasars shine']
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  library = Library(read_passages(tmp_path, TOKENIZER), experts, tmp_path / 'store')
  found = library.search('Which CAT ran?', 3)
  assert found[0][0].text == 'the cat ran far' and len(found) == 3
  assert np.all(np.diff([score for _, score in found]) <= 0)
  assert library.search('Quasars!')[0][0].text == 'quasars shine'
