import dataclasses
import hashlib
import json
import resource
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_deliberation.data import packing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.online import OnlineBatches
from latent_deliberation.data.packing import RowFiles, fill_rows, pack, prepare
from latent_deliberation.data.rows import Framing, PackedRows, Recipe, smallest_dtype
from latent_deliberation.data.sources import build_source, read_texts
from latent_deliberation.data.tasks import Documents, iterate
from latent_deliberation.data.vocabularies import ByteVocabulary, load_vocabulary
from latent_deliberation.errors import UserError
from latent_deliberation.paths import kept_vocabulary
from tests import tiny_tokenizer

BOS, EOS = 2, 1
FRAMING = Framing(BOS, EOS)


def fill(documents, length, framing=FRAMING):
  rows = list(fill_rows([np.array(d, np.int32) for d in documents], length, framing))
  return [tokens.tolist() for tokens, _ in rows], [segments.tolist() for _, segments in rows]


@pytest.mark.parametrize(('documents', 'length', 'tokens', 'segments'), [
    # Short documents share a row.
    ([[BOS, 5, EOS], [BOS, 6, 7, EOS]], 8,
     [[BOS, 5, EOS, BOS, 6, 7, EOS, 0]], [[1, 1, 1, 2, 2, 2, 2, 0]]),
    # A long document continues in the next row, after a BOS.
    ([[BOS, 5, 6, 7, 8, 9, EOS]], 4,
     [[BOS, 5, 6, 7], [BOS, 8, 9, EOS]], [[1, 1, 1, 1], [1, 1, 1, 1]]),
    # A document begins in the room that another left.
    ([[BOS, 5, EOS], [BOS, 6, 7, EOS]], 5,
     [[BOS, 5, EOS, BOS, 6], [BOS, 7, EOS, 0, 0]], [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]),
    # A single last place is padded.
    ([[BOS, 5, EOS], [BOS, 6, EOS]], 4,
     [[BOS, 5, EOS, 0], [BOS, 6, EOS, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]),
    ([], 4, [], []),
])
def test_fill_rows(documents, length, tokens, segments):
  assert fill(documents, length) == (tokens, segments)


BODIES = st.lists(st.integers(3, 99), max_size=30)  # of documents, between BOS and EOS


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(BODIES, min_size=1, max_size=12), st.integers(2, 40), st.sampled_from([EOS, BOS]),
       st.sampled_from([0, BOS]))
def test_segments_come_back(bodies, length, eos, pad):
  """Tokens alone tell the segments, also where BOS ends documents or fills rows."""
  framing = Framing(BOS, eos, pad)
  tokens, segments = map(np.array, fill([[BOS, *body, eos] for body in bodies], length, framing))
  if not tokens.size:  # documents without a token, which begin with their end
    assert eos == BOS and not any(bodies)
    return
  np.testing.assert_array_equal(framing.segments(tokens), segments)
  # No token of a text is lost, and segments count up from the beginning of a row.
  kept = tokens[(tokens != BOS) & (tokens != eos) & (segments > 0)].tolist()
  assert kept == [token for body in bodies for token in body]
  assert (tokens[segments == 0] == pad).all()
  steps = np.diff(segments, axis=1, prepend=0)
  assert set(steps[segments > 0].tolist()) <= {0, 1}


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(BODIES, min_size=1, max_size=12), st.integers(2, 40))
def test_rows_lose_nothing(bodies, length):
  """No token is lost or moved, every segment begins with BOS, and rows are full."""
  documents = [[BOS, *body, EOS] for body in bodies]
  tokens, segments = map(np.array, fill(documents, length))
  # Without BOS and padding, the rows are the documents one after the other.
  kept = tokens[(tokens != BOS) & (tokens != 0)].tolist()
  assert kept == [token for document in documents for token in document[1:]]
  # BOS is where a segment begins, and nowhere else.
  np.testing.assert_array_equal(FRAMING.segments(tokens), segments)
  begins = (np.diff(segments, axis=1, prepend=0) != 0) & (segments > 0)
  np.testing.assert_array_equal(tokens == BOS, begins)
  # A segment ends with EOS, or with the end of its row, where the document continues.
  assert (tokens[:, :-1][begins[:, 1:]] == EOS).all()
  # Padding is at the end of a row, at most one place but for the last row.
  padding = (tokens == 0).sum(axis=1)
  assert all((row[length - count:] == 0).all() for row, count in zip(tokens, padding, strict=True))
  assert (padding[:-1] <= 1).all() and padding[-1] <= length - 2


@pytest.mark.parametrize(('vocabulary_size', 'dtype'), [(65_536, np.uint16), (65_537, np.int32)])
def test_smallest_dtype_is_written(tmp_path, vocabulary_size, dtype):
  recipe = Recipe(task='t', split='train', source_fingerprint='', vocabulary_hash='',
                  vocabulary_size=vocabulary_size, length=4, seed=0, max_tokens=0)
  files = RowFiles(tmp_path, recipe, FRAMING, np.full(vocabulary_size, 3))
  last = vocabulary_size - 1
  files.write([(np.array([BOS, last, EOS, 0]), np.array([1, 1, 1, 0]))])
  tokens = np.load(tmp_path / 'tokens-00000.npy')
  assert tokens.dtype == dtype
  assert tokens.tolist() == [[BOS, last, EOS, 0]]
  assert (files.rows, files.tokens) == (1, 3)


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


@pytest.mark.parametrize('fields', [
    {'vocabulary': 'byte'}, {'vocabulary': 'sentencepiece', 'vocabulary_size': 340},
    {'vocabulary': 'sentencepiece', 'vocabulary_path': 'tokenizer.json'}])
def test_texts_come_back(corpus_directory, tmp_path, fields):
  """Every text comes back from the rows, unchanged."""
  if 'vocabulary_path' in fields:
    fields = {**fields, 'vocabulary_path': str(tiny_tokenizer.write(tmp_path / 'given'))}
  config = local(corpus_directory, **fields)
  directory = prepare(config, tmp_path)
  vocabulary = (ByteVocabulary() if config.vocabulary == 'byte'
                else load_vocabulary(kept_vocabulary(tmp_path)))
  for split in ('train', 'validation'):
    rows = PackedRows(directory / split)
    texts = list(read_texts(build_source(config), split, 'text', 0))
    assert sorted(read_back(rows, vocabulary)) == sorted(texts)
    assert rows.manifest.documents == len(texts)
    assert rows.manifest.text_bytes == sum(len(text.encode()) for text in texts)
    batch = rows.take(np.arange(len(rows)))
    assert rows.manifest.tokens == (batch.segments > 0).sum() == (batch.tokens > 0).sum()
    assert rows.vocabulary_size == vocabulary.vocab_size > batch.tokens.max()


def test_segments_are_read_back(corpus_directory, tmp_path):
  """No segments are written, and those that are read back are those that fill_rows gave."""
  config = local(corpus_directory)
  directory = prepare(config, tmp_path) / 'train'
  assert sorted(path.name for path in directory.iterdir()) == [
      'checksums.npy', 'manifest.json', 'tokens-00000.npy']
  documents = Documents.open(config, tmp_path)
  filled = list(fill_rows(iterate(documents.stream('train', config.seed)), config.length, FRAMING))
  rows = PackedRows(directory)
  assert (rows.manifest.format_version, rows.manifest.bos_id) == (2, BOS)
  batch = rows.take(np.arange(len(rows)))
  np.testing.assert_array_equal(batch.tokens, [tokens for tokens, _ in filled])
  np.testing.assert_array_equal(batch.segments, [segments for _, segments in filled])


def test_fingerprint_is_that_of_version_1(corpus_directory, tmp_path):
  """Rows that are packed again have the fingerprint that earlier code gave to the same rows."""
  rows = PackedRows(prepare(local(corpus_directory), tmp_path) / 'train')
  batch = rows.take(np.arange(len(rows)))
  # The layout of version 1: one file of tokens and one of segments, both in the hash.
  content = hashlib.sha256()
  for values, largest in ((batch.tokens, rows.vocabulary_size - 1), (batch.segments, rows.length)):
    content.update(values.astype(smallest_dtype(largest)))
  manifest = dataclasses.asdict(rows.manifest) | {
      'content_hash': content.hexdigest(), 'format_version': 1}
  for name in ('bos_id', 'eos_id', 'pad_id'):
    del manifest[name]
  written = json.dumps(manifest, indent=2, sort_keys=True).encode() + b'\n'
  assert rows.fingerprint == hashlib.sha256(written).hexdigest()


def test_packing_is_deterministic(corpus_directory, tmp_path):
  first, second = (prepare(local(corpus_directory), tmp_path / name) for name in ('a', 'b'))
  for split in ('train', 'validation'):
    assert PackedRows(first / split).fingerprint == PackedRows(second / split).fingerprint


def test_file_size_changes_no_row(corpus_directory, tmp_path):
  config = local(corpus_directory)
  documents = Documents.open(config, tmp_path)
  recipe = documents.recipe(config, 'train')
  large, small = (PackedRows(pack(documents, recipe, tmp_path / str(size), tokens_per_file=size))
                  for size in (10_000, 96))
  assert len(list((tmp_path / '96/train').glob('tokens-*'))) == -(-len(small) // 3)
  everything = np.arange(len(large))
  np.testing.assert_array_equal(small.take(everything).tokens, large.take(everything).tokens)


def test_max_tokens(corpus_directory, tmp_path):
  """A limit packs that many whole rows, from the same start."""
  full = PackedRows(prepare(local(corpus_directory), tmp_path / 'full') / 'train')
  limited = PackedRows(prepare(local(corpus_directory, max_tokens=100), tmp_path / 'few') / 'train')
  assert len(limited) == 3
  np.testing.assert_array_equal(limited.take([0, 1, 2]).tokens, full.take([0, 1, 2]).tokens)
  assert 1 <= limited.manifest.documents < full.manifest.documents


def test_packed_rows_are_kept(corpus_directory, tmp_path, monkeypatch):
  directory = prepare(local(corpus_directory), tmp_path)
  monkeypatch.setattr(packing, 'pack', None)
  assert prepare(local(corpus_directory), tmp_path) == directory == tmp_path / 'rows'


def test_missing_split_is_packed_alone(corpus_directory, tmp_path):
  directory = prepare(local(corpus_directory), tmp_path)
  before = (directory / 'train' / 'manifest.json').stat().st_mtime_ns
  shutil.rmtree(directory / 'validation')
  prepare(local(corpus_directory), tmp_path)
  assert len(PackedRows(directory / 'validation')) > 0
  assert (directory / 'train' / 'manifest.json').stat().st_mtime_ns == before


def test_online_packs_only_validation(corpus_directory, tmp_path):
  directory = prepare(local(corpus_directory, mode='online'), tmp_path)
  assert {path.name for path in directory.iterdir()} == {'validation', 'source.json'}


@pytest.mark.parametrize(('fields', 'message'), [
    ({'length': 16}, 'length: 32 saved, 16 now'),
    ({'seed': 5}, 'seed: 0 saved, 5 now'),
    ({'max_tokens': 64}, 'max_tokens: 0 saved, 64 now'),
    ({'validation_percent': 50}, r'something else:\n  data.validation_percent: \d+ saved, 50 now'),
    ({'length': 16, 'validation_percent': 50},
     r'data.validation_percent: \d+ saved, 50 now\n  data.length: 32 saved, 16 now'),
    ({'vocabulary': 'sentencepiece', 'vocabulary_size': 340},
     'vocabulary_size: 260 saved, 340 now'),
])
def test_another_configuration_is_refused(corpus_directory, tmp_path, fields, message):
  """The error has both values."""
  directory = prepare(local(corpus_directory), tmp_path)
  before = PackedRows(directory / 'train').fingerprint
  with pytest.raises(UserError, match=f'(?s){message}.*another directory'):
    prepare(local(corpus_directory, **fields), tmp_path)
  assert PackedRows(directory / 'train').fingerprint == before


def test_changed_corpus_is_refused(corpus_directory, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(corpus_directory, copy)
  prepare(local(copy), tmp_path / 'work')
  (copy / 'odd' / '1.txt').write_text('changed')
  with pytest.raises(UserError, match='else:\n  files: .*contents'):
    prepare(local(copy), tmp_path / 'work')
  # Names of files are told apart, not only their hash.
  (copy / 'odd' / '1.txt').rename(copy / 'odd' / 'new.txt')
  with pytest.raises(UserError, match=r'files added: 1 \(odd/new.txt\)\n  files removed: 1 \('):
    prepare(local(copy), tmp_path / 'work')
  # Rows of earlier code have hashes alone.
  (tmp_path / 'work/rows/source.json').unlink()
  with pytest.raises(UserError, match='source_fingerprint: .* saved, .* now'):
    prepare(local(copy), tmp_path / 'work')


def test_rows_without_their_source(corpus_directory, tmp_path, caplog):
  """Complete rows are used where their source is missing, if the configuration fits them."""
  texts, workdir = tmp_path / 'texts', tmp_path / 'work'
  shutil.copytree(corpus_directory, texts)
  directory = prepare(local(texts), workdir)
  shutil.rmtree(texts)
  with caplog.at_level('WARNING'):
    assert prepare(local(texts), workdir) == directory
  assert 'no file matches' in caplog.text and 'are used as they are' in caplog.text
  # Another place that has no files is a mistake, and not the absence of the same files.
  with pytest.raises(UserError, match=r'(?s)no file matches .*else:\n  data.files: .*absent'):
    prepare(local(tmp_path / 'absent'), workdir)
  # What decides the rows is compared, too.
  for key, value in (('validation_percent', 40), ('text_key', 'body'), ('vocabulary_size', 999)):
    with pytest.raises(UserError, match=f'data.{key}: .* saved, {value!r} now'):
      prepare(local(texts, **{key: value}), workdir)
  (directory / 'source.json').write_text('[]')
  with pytest.raises(UserError, match=r'source.json is damaged .*delete it'):
    prepare(local(texts), workdir)
  (directory / 'source.json').unlink()
  with pytest.raises(UserError, match='seed: 0 saved, 1 now'):
    prepare(local(texts, seed=1), workdir)
  with pytest.raises(UserError, match='no file matches'):
    prepare(local(texts, mode='online'), workdir)
  shutil.rmtree(directory / 'validation')
  with pytest.raises(UserError, match='no file matches'):
    prepare(local(texts), workdir)


def test_missing_vocabulary_is_no_missing_text(corpus_directory, tmp_path):
  """Rows are not used as they are where the text is there and the vocabulary is misspelt."""
  prepare(local(corpus_directory), tmp_path)
  with pytest.raises(UserError, match='no vocabulary at .*typo.model'):
    prepare(local(corpus_directory, vocabulary='sentencepiece', vocabulary_path='typo.model'),
            tmp_path)


def test_interrupted_packing(corpus_directory, tmp_path, monkeypatch):
  """It leaves no split, and the next packing succeeds."""
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
  assert {path.name for path in directory.iterdir()} == {'source.json', 'train', 'validation'}
  assert not (directory / 'train' / 'tokens-00009.npy').exists()


def test_rows_are_never_overwritten(corpus_directory, tmp_path):
  config = local(corpus_directory)
  directory = prepare(config, tmp_path)
  documents = Documents.open(config, tmp_path)
  with pytest.raises(UserError, match='rows/train exists'):
    pack(documents, documents.recipe(config, 'train'), directory)


def add_mixture(name, texts_and_rates, *preprocessors):
  names = []
  for index, (texts, rate) in enumerate(texts_and_rates):
    def dataset_fn(split, shuffle_files, seed=None, texts=texts):
      return tf.data.Dataset.from_tensor_slices({'targets': texts})
    task_name = f'{name}_{index}'
    seqio.TaskRegistry.remove(task_name)
    seqio.TaskRegistry.add(
        task_name, seqio.FunctionDataSource(dataset_fn, ('train', 'validation')),
        {'targets': seqio.Feature(ByteVocabulary(), add_eos=False)},
        (seqio.preprocessors.tokenize, *preprocessors))
    names.append((task_name, rate))
  seqio.MixtureRegistry.remove(name)
  seqio.MixtureRegistry.add(name, names)
  return DataConfig(source='mixture', name=name, length=32)


def test_mixture_without_limit(tmp_path):
  """Every document is packed once."""
  config = add_mixture('once', [(['a' * 9] * 5, 1.0), (['b' * 50] * 3, 9.0)])
  rows = PackedRows(prepare(config, tmp_path) / 'train')
  assert sorted(read_back(rows, ByteVocabulary())) == ['a' * 9] * 5 + ['b' * 50] * 3


def test_mixture_with_limit(tmp_path):
  """Training text repeats at its rates, and validation does not repeat."""
  config = add_mixture('rated', [(['a' * 14] * 3, 1.0), (['b' * 14] * 3, 3.0)])
  directory = prepare(dataclasses.replace(config, max_tokens=8192), tmp_path)
  assert PackedRows(directory / 'validation').manifest.documents == 6
  rows = PackedRows(directory / 'train')
  tokens = rows.take(np.arange(len(rows))).tokens
  assert len(rows) == 256
  share = (tokens == 4 + ord('b')).sum() / (tokens >= 4).sum()
  assert 0.68 < share < 0.82


def test_bos_inside_a_document_is_refused(tmp_path):
  """It would be read as the beginning of another document, packed or online."""
  insert = seqio.map_over_dataset(
      lambda example: {'targets': tf.concat([example['targets'], [BOS, 9]], axis=0)})
  config = add_mixture('inner', [(['ab', 'cd'], 1.0)], insert)
  with pytest.raises(UserError, match='inner: .*BOS id 2 .*preprocessors'):
    prepare(config, tmp_path)
  assert not list((tmp_path / 'rows').iterdir())
  with pytest.raises(UserError, match='inner: .*BOS id 2 .*preprocessors'):
    OnlineBatches(config, tmp_path, 2, 0)(0)


def test_empty_split_is_refused(tmp_path):
  config = add_mixture('empty', [(['', ''], 1.0)])
  with pytest.raises(UserError, match="empty has no token in split 'train'"):
    prepare(config, tmp_path)
  assert list((tmp_path / 'rows').iterdir()) == []


def test_manifest_is_readable(corpus_directory, tmp_path):
  text = (prepare(local(corpus_directory), tmp_path) / 'train' / 'manifest.json').read_text()
  fields = json.loads(text)
  assert fields['recipe']['length'] == 32
  assert text.count('\n') > 10


@pytest.mark.parametrize('part', [0.01, 0.3, 0.5, 0.9, 0.99])
def test_full_disk(corpus_directory, tmp_path, part):
  """A disk that is full anywhere in a file is named, and nothing is left of the split."""
  config = local(corpus_directory)
  prepare(config, tmp_path / 'whole')
  size = (tmp_path / 'whole/rows/train/tokens-00000.npy').stat().st_size
  before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * size), most))
    with pytest.raises(UserError, match=r'tokens-00000.npy .*File too large.*free some space'):
      prepare(config, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
  assert list((tmp_path / 'rows').iterdir()) == []
