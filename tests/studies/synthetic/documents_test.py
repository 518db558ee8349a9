import dataclasses
import hashlib

import numpy as np
import pytest

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.packing import prepare
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.data.sources import build_source, read_texts
from latent_deliberation.data.vocabularies import ByteVocabulary
from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.documents import (
  STREAMS,
  TASKS,
  VERSION,
  build,
  open_synthetic,
)
from latent_deliberation.studies.synthetic.pointer_chasing import PointerChasing


def synthetic(name='pointer_chasing', **fields):
  options = {'stories': 1.0} if name == 'word_problems' else {}  # which otherwise needs a file
  return DataConfig(source='synthetic', name=name, vocabulary='byte', **{
      'documents': 40, 'questions': 4, 'length': 32, 'options': options} | fields)


def test_missing_file_is_named_early():
  """It is named when the source is built, before any document is read."""
  with pytest.raises(UserError, match='no file /none.txt'):
    build_source(synthetic('word_problems', options={'train': '/none.txt'}))


@pytest.mark.parametrize('name', TASKS)
def test_number_determines_text(name):
  first, second = open_synthetic(synthetic(name)), open_synthetic(synthetic(name))
  numbers = range(40)
  texts = [first.read(number) for number in numbers]
  assert [second.read(np.int64(number)) for number in reversed(numbers)] == texts[::-1]
  assert len(set(texts)) == 40


@pytest.mark.parametrize('name', TASKS)
def test_seed_changes_texts(name):
  first, second = (open_synthetic(synthetic(name, seed=seed)) for seed in (0, 1))
  assert not {first.read(n) for n in range(40)} & {second.read(n) for n in range(40)}


def test_more_documents_change_none():
  small, large = (open_synthetic(synthetic(documents=count)) for count in (40, 1000))
  assert [small.read(n) for n in range(40)] == [large.read(n) for n in range(40)]
  for split in ('train', 'validation'):
    numbers = large.numbers(split)
    np.testing.assert_array_equal(small.numbers(split), numbers[numbers < 40])


@pytest.mark.parametrize('percent', [1, 5, 37, 99])
@pytest.mark.parametrize('documents', [2, 1000])
def test_splits(percent, documents):
  """They share nothing and have their percentage."""
  corpus = open_synthetic(synthetic(validation_percent=percent, documents=documents))
  train, validation = corpus.numbers('train'), corpus.numbers('validation')
  assert sorted([*train, *validation]) == list(range(documents))
  assert len(train) and len(validation)
  if documents == 1000:
    assert len(validation) == 10 * percent


def test_documents_are_pinned():
  # When this fails, the documents of existing configurations have changed: raise VERSION.
  names = sorted(TASKS, key=lambda name: STREAMS.get(name, name))
  texts = ''.join(open_synthetic(synthetic(name)).read(n) for name in names for n in range(20))
  assert (VERSION, hashlib.sha256(texts.encode()).hexdigest()[:16]) == (3, 'e474f88a22046bb3')


@pytest.mark.parametrize('fields', [
    {'name': 'state_tracking'}, {'seed': 1}, {'documents': 41}, {'questions': 5},
    {'options': {'hops': 3}},
])
def test_fingerprint_tells_documents_apart(fields):
  config = synthetic()
  other = dataclasses.replace(config, **fields)
  assert open_synthetic(other).fingerprint != open_synthetic(config).fingerprint
  defaults = dataclasses.replace(config, options=dataclasses.asdict(PointerChasing()))
  assert open_synthetic(defaults).fingerprint == open_synthetic(config).fingerprint


def test_graphs_asked_is_no_text():
  """The file of questions changes neither documents nor fingerprint."""
  config = synthetic('graphs')
  other = dataclasses.replace(config, options={'asked': 'prosqa_test.json'})
  assert open_synthetic(other).fingerprint == open_synthetic(config).fingerprint
  assert open_synthetic(other).read(1) == open_synthetic(config).read(1)


def test_rows_hold_the_documents(tmp_path):
  config = synthetic(length=256, text_key='document')
  directory, vocabulary = prepare(config, tmp_path), ByteVocabulary()
  corpus = open_synthetic(config)
  for split in ('train', 'validation'):
    texts = {corpus.read(number) for number in corpus.numbers(split)}
    assert set(read_texts(build_source(config), split, 'document', 0)) == texts
    row = PackedRows(directory / split).take([0])
    first = row.tokens[0][row.segments[0] == 1]
    assert first[0] == vocabulary.bos_id and first[-1] == vocabulary.eos_id
    assert vocabulary.decode(first[1:-1].tolist()) in texts


def test_rows_of_other_options(tmp_path):
  prepare(synthetic(), tmp_path)
  with pytest.raises(UserError, match=r'data.options: .* saved, .*nodes.* now'):
    prepare(synthetic(options={'nodes': 9}), tmp_path)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('hop', {}, r"'hop': choose one of \('pointer_chasing', 'state_tracking', 'graphs', 'arith"),
    ('pointer_chasing', {'node': 8}, "pointer_chasing .*'node': .*'nodes'.*'nodes', 'hops', 'sk"),
    ('state_tracking', {'xyz': 8}, "state_tracking .*'xyz': .*'group', 'modulus', 'len"),
    ('pointer_chasing', {'nodes': 1}, 'pointer_chasing: nodes = 1: .*2 and 26'),
])
def test_bad_task_or_option_is_named(name, options, message):
  """The error lists what is known, under the name of the task."""
  with pytest.raises(UserError, match=message):
    build(name, options)
  with pytest.raises(UserError, match=message):
    open_synthetic(synthetic(name, options=options))
