"""Texts by name: folders and globs, telling words, and prompts cut out of documents."""

import dataclasses
import gzip
import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts.texts import (
  CutSizes,
  cut_documents,
  documents_of,
  keywords_of,
  mix_cuts,
  sample_passages,
)
from latent_deliberation.inference.tokenizer import ByteTokenizer

SIZES = CutSizes(shortest=5, longest=9, ahead=4, count=12)
DOCUMENTS = [f'{letter}' * 40 for letter in 'abc'] + ['short']


def test_folder_stands_for_every_kind_of_text(tmp_path):
  """txt, md, JSON lines, packed or not; commas separate, and what is no text is left out."""
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes/a.txt').write_text('one')
  (tmp_path / 'notes/b.md').write_text('two')
  (tmp_path / 'notes/c.pdf').write_bytes(b'%PDF')
  with gzip.open(tmp_path / 'notes/d.jsonl.gz', 'wt') as file:
    file.write(json.dumps({'text': 'three'}) + '\n' + json.dumps({'text': 'four'}) + '\n')
  (tmp_path / 'e.txt').write_text('five')
  assert sorted(documents_of(f'{tmp_path}/notes,{tmp_path}/e.txt')) == [
      'five', 'four', 'one', 'three', 'two']
  assert sorted(documents_of(f'{tmp_path}/notes/*.txt,{tmp_path}/e.txt')) == ['five', 'one']
  (tmp_path / 'only').mkdir()
  for name in ('x.md', 'y.md'):
    (tmp_path / 'only' / name).write_text(name)
  assert sorted(documents_of(str(tmp_path / 'only'))) == ['x.md', 'y.md']


def test_absent_and_empty_text(tmp_path):
  for text in ('', ' , '):
    with pytest.raises(UserError, match="source = 'text' needs files"):
      documents_of(text)
  with pytest.raises(UserError, match='no file matches'):
    documents_of(str(tmp_path / 'nothing'))
  (tmp_path / 'one.txt').write_text('alone')
  with pytest.raises(UserError, match='needs at least 2'):
    documents_of(str(tmp_path))


def test_passages_are_of_all_parts_and_documents(tmp_path):
  """A large folder and a long document get no more than a small one, while that lasts."""
  lines = {'large': [f'{number:03}' * 10 for number in range(300)],
           'small': ['a' * 1000, 'b' * 35, 'c' * 3]}
  for name, texts in lines.items():
    (tmp_path / f'{name}.jsonl').write_text(
        ''.join(json.dumps({'body': text}) + '\n' for text in texts))
  large, small = (str(tmp_path / f'{name}.jsonl') for name in lines)
  found = sample_passages(f'{large},{small}', 1800, 10, text_key='body')
  assert 1800 <= sum(map(len, found)) < 1810 and max(map(len, found)) == 10
  mine = [passage for passage in found if passage[0] in 'abc']
  assert abs(2 * sum(map(len, mine)) - 1800) <= 20
  assert sorted(passage[0] for passage in mine[:3]) == ['a', 'b', 'c']  # one of each document
  assert found == sample_passages(f'{large},{small}', 1800, 10, text_key='body')
  assert min(len(passage) for passage in mine if passage[0] == 'b') == 8  # and none of 5
  # All there is, each once, though a file is named twice.
  everything = sample_passages(f'{small},{tmp_path}/sm*.jsonl', 10**6, 10, text_key='body')
  assert ''.join(sorted(''.join(everything))) == 'a' * 1000 + 'b' * 35 + 'c' * 3


def test_keywords_tell_a_text_apart():
  """Frequent words of both are none, nor is one that occurs once, nor one that is rarer here."""
  own = ['the comet and the orbit', 'the comet, a Planet and an orbit', 'once']
  general = ['the cat and the dog sat and then the planet'] * 30
  assert keywords_of(own, general) == ['comet', 'orbit']
  assert keywords_of(own, general, number=1) == ['comet']
  assert keywords_of([], general) == []


def test_cuts_are_what_documents_hold():
  """A prompt and its tokens ahead are neighbours in one document, which gives one after another."""
  tokenizer = ByteTokenizer()
  cuts = cut_documents('letters', DOCUMENTS, tokenizer, SIZES)
  assert len(cuts) == 12 and {cut.document for cut in cuts} == {0, 1, 2}
  for cut in cuts:
    assert cut.ids[0] == tokenizer.bos and tokenizer.decode(cut.ids) == cut.prompt
    assert SIZES.shortest <= len(cut.ids) - 1 <= SIZES.longest and len(cut.ahead) == 4
    assert cut.prompt + tokenizer.decode(cut.ahead) in DOCUMENTS[cut.document]
  assert cut_documents('letters', DOCUMENTS, tokenizer, SIZES) == cuts
  assert cut_documents('letters', DOCUMENTS, tokenizer, SIZES, seed=1) != cuts


def test_shortest_document_that_can_be_cut():
  cut, = cut_documents('x', ['a' * 9], ByteTokenizer(), CutSizes(5, 9, 4, 1))
  assert len(cut.ids) == 6 and len(cut.ahead) == 4
  with pytest.raises(UserError, match="'x' has no document of 9 tokens"):
    cut_documents('x', ['a' * 8], ByteTokenizer(), SIZES)


def test_mixed_cuts_have_both_texts():
  """The later passage goes on, and alternates."""
  tokenizer = ByteTokenizer()
  one, other = (cut_documents(name, [letter * 60] * 2, tokenizer, SIZES)
                for name, letter in (('a', 'a'), ('b', 'b')))
  mixed = mix_cuts(one, other, tokenizer)
  for number, cut in enumerate(mixed):
    last = 'ab'[number % 2]
    assert tokenizer.decode(cut.ids) == cut.prompt and set(cut.prompt) == {'a', 'b', '\n'}
    assert cut.prompt.endswith(last) and set(tokenizer.decode(cut.ahead)) == {last}
    assert cut.ids.count(tokenizer.bos) == 1 and cut.domain == 'a+b'


def test_mixed_cuts_of_one_document_are_not_independent():
  """Four pairs of two documents and of four count as two."""
  few, many = (cut_documents(name, [letter * 60 for letter in letters], ByteTokenizer(),
                             dataclasses.replace(SIZES, count=4))
               for name, letters in (('a', 'ab'), ('b', 'cdef')))
  for pair in ((few, many), (many, few)):
    mixed = mix_cuts(*pair, ByteTokenizer())
    assert [cut.document for cut in mixed] == [0, 1, 0, 1]


def test_bad_sizes():
  for sizes, message in (
      (dict(shortest=0), 'shortest = 0'), (dict(longest=1, shortest=2), 'longest = 1'),
      (dict(ahead=0), 'ahead = 0'), (dict(count=-1), 'count = -1')):
    with pytest.raises(UserError, match=message):
      CutSizes(**sizes)
