import dataclasses
import json
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf

from latent_deliberation.data import packing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.packing import pack, prepare
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.data.sources import build_source, read_texts
from latent_deliberation.data.tasks import Documents
from latent_deliberation.data.vocabularies import ByteVocabulary, load_vocabulary
from latent_deliberation.errors import UserError


def local(corpus_directory, **fields):
  fields = {'vocabulary': 'byte', 'length': 32} | fields
  return DataConfig(source='text', files=(str(corpus_directory),), **fields)


def read_back(rows, vocabulary):
  """The texts of packed rows, parts of a document joined."""
  batch = rows.take(np.arange(len(rows)))
  documents = []
  for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
    for segment in range(1, segments.max() + 1):
      part = tokens[segments == segment].tolist()
      assert part[0] == vocabulary.bos_id
      if documents and documents[-1][-1] != vocabulary.eos_id:
        documents[-1] += part[1:]
      else:
        documents.append(part[1:])
  assert all(document[-1] == vocabulary.eos_id for document in documents)
  return [vocabulary.decode(document[:-1]) for document in documents]


@pytest.mark.parametrize('fields', [{'vocabulary': 'byte'}, {'vocabulary_size': 340,
                                                             'vocabulary': 'sentencepiece'}])
def test_every_text_comes_back_from_the_rows_unchanged(corpus_directory, tmp_path, fields):
  config = local(corpus_directory, **fields)
  directory = prepare(config, tmp_path)
  vocabulary = (ByteVocabulary() if config.vocabulary == 'byte'
                else load_vocabulary(tmp_path / 'vocabulary.model'))
  for split in ('train', 'validation'):
    rows = PackedRows(directory / split)
    texts = list(read_texts(build_source(config), split, 'text', 0))
    assert sorted(read_back(rows, vocabulary)) == sorted(texts)
    assert rows.manifest.documents == len(texts)
    assert rows.manifest.text_bytes == sum(len(text.encode()) for text in texts)
    batch = rows.take(np.arange(len(rows)))
    assert rows.manifest.tokens == (batch.segments > 0).sum() == (batch.tokens > 0).sum()
    assert rows.vocabulary_size == vocabulary.vocab_size > batch.tokens.max()


def test_packing_twice_gives_the_same_rows(corpus_directory, tmp_path):
  first, second = (prepare(local(corpus_directory), tmp_path / name) for name in ('a', 'b'))
  for split in ('train', 'validation'):
    assert PackedRows(first / split).fingerprint == PackedRows(second / split).fingerprint


def test_small_files_hold_the_same_rows_as_large_ones(corpus_directory, tmp_path):
  config = local(corpus_directory)
  documents = Documents.open(config, tmp_path)
  recipe = documents.recipe(config, 'train')
  large, small = (PackedRows(pack(documents, recipe, tmp_path / str(size), tokens_per_file=size))
                  for size in (10_000, 96))
  assert len(list((tmp_path / '96/train').glob('tokens-*'))) == -(-len(small) // 3)
  everything = np.arange(len(large))
  np.testing.assert_array_equal(small.take(everything).tokens, large.take(everything).tokens)


def test_a_limit_packs_that_many_whole_rows_from_the_same_start(corpus_directory, tmp_path):
  full = PackedRows(prepare(local(corpus_directory), tmp_path / 'full') / 'train')
  limited = PackedRows(prepare(local(corpus_directory, max_tokens=100), tmp_path / 'few') / 'train')
  assert len(limited) == 3
  np.testing.assert_array_equal(limited.take([0, 1, 2]).tokens, full.take([0, 1, 2]).tokens)
  assert 1 <= limited.manifest.documents < full.manifest.documents


def test_what_is_packed_is_kept(corpus_directory, tmp_path, monkeypatch):
  directory = prepare(local(corpus_directory), tmp_path)
  monkeypatch.setattr(packing, 'pack', None)
  assert prepare(local(corpus_directory), tmp_path) == directory == tmp_path / 'rows'


def test_a_split_that_is_missing_is_packed_alone(corpus_directory, tmp_path):
  directory = prepare(local(corpus_directory), tmp_path)
  before = (directory / 'train' / 'manifest.json').stat().st_mtime_ns
  shutil.rmtree(directory / 'validation')
  prepare(local(corpus_directory), tmp_path)
  assert len(PackedRows(directory / 'validation')) > 0
  assert (directory / 'train' / 'manifest.json').stat().st_mtime_ns == before


def test_online_mode_packs_only_validation(corpus_directory, tmp_path):
  directory = prepare(local(corpus_directory, mode='online'), tmp_path)
  assert [path.name for path in directory.iterdir()] == ['validation']


@pytest.mark.parametrize(('fields', 'message'), [
    ({'length': 16}, 'length: packed 32, configured 16'),
    ({'seed': 5}, 'seed: packed 0, configured 5'),
    ({'max_tokens': 64}, 'max_tokens: packed 0, configured 64'),
    ({'validation_percent': 50}, "task: packed 'text_.*', configured 'text_"),
    ({'vocabulary': 'sentencepiece', 'vocabulary_size': 340},
     'vocabulary_size: packed 260, configured 340'),
])
def test_rows_of_another_configuration_are_refused_with_both_values(
    corpus_directory, tmp_path, fields, message):
  directory = prepare(local(corpus_directory), tmp_path)
  before = PackedRows(directory / 'train').fingerprint
  with pytest.raises(UserError, match=f'{message}.*another work directory'):
    prepare(local(corpus_directory, **fields), tmp_path)
  assert PackedRows(directory / 'train').fingerprint == before


def test_rows_of_a_changed_corpus_are_refused(corpus_directory, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(corpus_directory, copy)
  prepare(local(copy), tmp_path / 'work')
  (copy / 'odd' / '1.txt').write_text('changed')
  with pytest.raises(UserError, match='source_fingerprint: packed '):
    prepare(local(copy), tmp_path / 'work')


def test_rows_whose_source_stayed_elsewhere_are_taken_if_they_are_whole(
    corpus_directory, tmp_path, caplog):
  texts, workdir = tmp_path / 'texts', tmp_path / 'work'
  shutil.copytree(corpus_directory, texts)
  directory = prepare(local(texts), workdir)
  shutil.rmtree(texts)
  with caplog.at_level('WARNING'):
    assert prepare(local(texts), workdir) == directory
  assert 'no file matches' in caplog.text and 'are taken as they are' in caplog.text
  with pytest.raises(UserError, match='seed: packed 0, configured 1'):
    prepare(local(texts, seed=1), workdir)
  with pytest.raises(UserError, match='no file matches'):
    prepare(local(texts, mode='online'), workdir)
  shutil.rmtree(directory / 'validation')
  with pytest.raises(UserError, match='no file matches'):
    prepare(local(texts), workdir)


def test_an_interrupted_packing_leaves_no_split_and_the_next_one_succeeds(
    corpus_directory, tmp_path, monkeypatch):
  config, original = local(corpus_directory), packing.fill_rows

  def interrupted(*arguments):
    yield next(original(*arguments))
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(packing, 'fill_rows', interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepare(config, tmp_path)
  assert list((tmp_path / 'rows').iterdir()) == []
  # A killed process cannot clean up: its unfinished folder is replaced.
  (tmp_path / 'rows' / '.train.partial').mkdir()
  (tmp_path / 'rows' / '.train.partial' / 'tokens-00009.npy').write_bytes(b'garbage')
  directory = prepare(config, tmp_path)
  assert sorted(path.name for path in directory.iterdir()) == ['train', 'validation']
  assert not (directory / 'train' / 'tokens-00009.npy').exists()


def test_packed_rows_are_never_overwritten(corpus_directory, tmp_path):
  config = local(corpus_directory)
  directory = prepare(config, tmp_path)
  documents = Documents.open(config, tmp_path)
  with pytest.raises(UserError, match='train is there already'):
    pack(documents, documents.recipe(config, 'train'), directory)


def add_mixture(name, texts_and_rates):
  names = []
  for index, (texts, rate) in enumerate(texts_and_rates):
    def dataset_fn(split, shuffle_files, seed=None, texts=texts):
      return tf.data.Dataset.from_tensor_slices({'targets': texts})
    task_name = f'{name}_{index}'
    seqio.TaskRegistry.remove(task_name)
    seqio.TaskRegistry.add(
        task_name, seqio.FunctionDataSource(dataset_fn, ('train', 'validation')),
        {'targets': seqio.Feature(ByteVocabulary(), add_eos=False)},
        (seqio.preprocessors.tokenize,))
    names.append((task_name, rate))
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add(name, names)
  return DataConfig(source='mixture', name=name, length=32)


def test_a_mixture_is_packed_once_through_without_a_limit(tmp_path):
  config = add_mixture('once', [(['a' * 9] * 5, 1.0), (['b' * 50] * 3, 9.0)])
  rows = PackedRows(prepare(config, tmp_path) / 'train')
  assert sorted(read_back(rows, ByteVocabulary())) == ['a' * 9] * 5 + ['b' * 50] * 3


def test_up_to_a_limit_training_text_repeats_at_its_rates_and_validation_does_not(tmp_path):
  config = add_mixture('rated', [(['a' * 14] * 3, 1.0), (['b' * 14] * 3, 3.0)])
  directory = prepare(dataclasses.replace(config, max_tokens=8192), tmp_path)
  assert PackedRows(directory / 'validation').manifest.documents == 6
  rows = PackedRows(directory / 'train')
  tokens = rows.take(np.arange(len(rows))).tokens
  assert len(rows) == 256
  share = (tokens == 4 + ord('b')).sum() / (tokens >= 4).sum()
  assert 0.68 < share < 0.82


def test_a_split_without_a_token_is_refused(tmp_path):
  config = add_mixture('empty', [(['', ''], 1.0)])
  with pytest.raises(UserError, match="empty has no token in split 'train'"):
    prepare(config, tmp_path)
  assert list((tmp_path / 'rows').iterdir()) == []


def test_the_manifest_can_be_read_by_a_person(corpus_directory, tmp_path):
  text = (prepare(local(corpus_directory), tmp_path) / 'train' / 'manifest.json').read_text()
  fields = json.loads(text)
  assert fields['recipe']['length'] == 32
  assert text.count('\n') > 10
