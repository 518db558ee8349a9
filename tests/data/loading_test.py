"""Data are made once, from what the config names, and refused where they do not fit it."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from latent_deliberation import locks
from latent_deliberation.data import loading
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.loading import (
  check_pieces,
  open_batches,
  open_rows,
  prepare_data,
  validation_batches,
)
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.sharding import MeshConfig, make_mesh
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.train import train_coprocessor
from tests import finished, tiny_tokenizer


def prepare(experiment, directory):
  prepare_data(experiment.data, experiment.decoder.vocab_size, directory)


def open_split(experiment, directory, split='train'):
  return open_rows(directory, split, length=experiment.data.length,
                   vocab_size=experiment.decoder.vocab_size)


def read_validation(directory, num_batches):
  experiment = finished.experiment()
  return validation_batches(
      open_split(experiment, directory, 'validation'), num_batches,
      experiment.evaluation.batch_size, make_mesh(experiment.mesh), experiment.rules)


def files_of(directory: Path) -> dict[Path, int]:
  return {path: path.stat().st_mtime_ns for path in directory.rglob('*') if path.is_file()}


def test_data_are_made_once(quickstart):
  before = files_of(quickstart / 'rows')
  assert before
  prepare(finished.experiment(), quickstart)
  assert files_of(quickstart / 'rows') == before


@pytest.mark.parametrize('name', ['rows', 'rows/train', 'rows/validation'])
def test_rows_in_place_of_their_data(quickstart, name):
  """The directory above is named, and nothing is written."""
  for use in (prepare, open_split):
    with pytest.raises(UserError, match=f'{quickstart}/{name} .* {quickstart}$'):
      use(finished.experiment(), quickstart / name)
  assert not (quickstart / name / 'rows').exists()


def test_two_launches_pack_once(tmp_path, monkeypatch):
  """Of two launches on one directory, the second waits and uses what the first packed."""
  packed = []

  def pack(config, directory):
    if not (directory / 'rows').exists():
      packed.append(threading.get_ident())
      time.sleep(0.2)
      for split in ('train', 'validation'):
        (directory / 'rows' / split).mkdir(parents=True)

  monkeypatch.setattr('latent_deliberation.data.packing.prepare', pack)
  monkeypatch.setattr(locks, 'POLL_SECONDS', 0.01)
  launches = [threading.Thread(target=prepare, args=(finished.experiment(), tmp_path))
              for _ in range(2)]
  for launch in launches:
    launch.start()
  for launch in launches:
    launch.join(30)
  assert len(packed) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['rows']
  # Complete rows may be on a disk that is read-only.
  monkeypatch.setattr(loading, 'lock', lambda *unused, **options: pytest.fail('a lock'))
  prepare(finished.experiment(), tmp_path)


@pytest.mark.parametrize('content, message', [
    (b'', 'corpus has 0 documents .* 2 files'),
    (b'ab\0cd', 'bad.txt: NUL at byte 2,'),
    (b'abc\xff\xfe', 'bad.txt: not utf-8 text at byte 3 .*convert it'),
])
def test_corpus_that_is_not_text(content, message, tmp_path):
  """It is refused before anything is trained."""
  texts = tmp_path / 'texts'
  texts.mkdir()
  (texts / 'bad.txt').write_bytes(content)
  (texts / 'empty.txt').write_bytes(b'')
  experiment = finished.experiment(data__files=(str(texts),))
  with pytest.raises(UserError, match=message):
    pretrain(experiment, tmp_path / 'run', tmp_path / 'run')
  assert not (tmp_path / 'run/rows').exists()


def test_missing_files_are_named(tmp_path):
  experiment = finished.experiment(data__files=('nothing/*.txt',))
  with pytest.raises(UserError, match="no file matches 'nothing/.*.txt' .*seen from"):
    prepare(experiment, tmp_path)


def test_vocabulary_without_padding(tmp_path):
  """Rows of a vocabulary that gives id 0 to a token are packed and read, and lose no token."""
  import sentencepiece
  model, words = tmp_path / 'llama.model', 'one two three four five '
  with model.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=file,
        model_type='char', vocab_size=17, unk_id=0, bos_id=1, eos_id=2, minloglevel=2)
  for number in range(40):
    (tmp_path / f'{number}.txt').write_text(words * 5 + 'Z' * number)  # unknown, so id 0
  experiment = finished.experiment(
      data__files=(f'{tmp_path}/*.txt',), data__vocabulary='sentencepiece',
      data__vocabulary_path=str(model))
  prepare(experiment, tmp_path)
  rows = PackedRows(tmp_path / 'rows/train')
  assert rows.manifest.pad_id == 1
  batch = rows.take(np.arange(len(rows)))
  inside = batch.segments > 0
  assert inside.sum() == rows.manifest.tokens
  assert (batch.tokens[~inside] == 1).all() and (batch.tokens[inside] == 0).sum() > 20
  # Each text ends once.
  assert (batch.tokens[inside] == 2).sum() == rows.manifest.documents


def test_rows_must_fit_the_decoder(quickstart):
  """Rows of another length, or of a larger vocabulary, are refused."""
  with pytest.raises(UserError, match='64 tokens, data.length is 32'):
    open_split(finished.experiment(data__length=32), quickstart)
  experiment = finished.experiment(  # whose size is not known before
      decoder__vocab_size=200, data__vocabulary='sentencepiece', data__vocabulary_path='some.model')
  with pytest.raises(UserError, match='260 pieces, .* 200 embeddings'):
    open_split(experiment, quickstart)


def test_too_few_validation_rows(quickstart):
  with pytest.raises(UserError, match=r'evaluation.batch_size = 8 need 800 rows, .*num_texts'):
    read_validation(quickstart, 100)


def test_validation_is_the_same(quickstart):
  first, again = (read_validation(quickstart, 2) for _ in range(2))
  for one, other in zip(first, again, strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
  assert not np.array_equal(first[0].tokens, first[1].tokens)


def test_pretraining_has_another_order(quickstart):
  """A coprocessor does not begin with the rows that its decoder began with."""
  mesh = make_mesh(MeshConfig())
  first = [open_batches(finished.experiment(), quickstart, section, mesh)(0).tokens
           for section in ('pretraining', 'training', 'training')]
  np.testing.assert_array_equal(first[1], first[2])
  assert not np.array_equal(first[0], first[1])


def test_row_ranges_of_sections(quickstart):
  """A decoder and its coprocessor may read different text."""
  experiment = finished.experiment(
      pretraining__row_range_percent=(0, 50), training__row_range_percent=(50, 100))
  rows = open_split(experiment, quickstart)
  half = {row.tobytes() for row in rows.take(np.arange(len(rows) // 2)).tokens}
  for section, inside in (('pretraining', True), ('training', False)):
    batches = open_batches(experiment, quickstart, section, make_mesh(MeshConfig()))
    assert all((row.tobytes() in half) == inside
               for step in range(4) for row in batches(step).tokens)


def test_rows_without_seqio(quickstart, tmp_path, monkeypatch):
  monkeypatch.setattr(loading.importlib.util, 'find_spec', lambda name: None)
  prepare(finished.experiment(), quickstart)
  batches = open_batches(finished.experiment(), quickstart, 'training', make_mesh(MeshConfig()))
  assert batches(0).tokens.shape == (8, 64)
  with pytest.raises(UserError, match='rows does not exist, and seqio is not installed'):
    prepare(finished.experiment(), tmp_path)


def test_read_only_directory(tmp_path):
  """It is named before the text is read."""
  (tmp_path / 'file').write_text('')
  experiment = finished.experiment(data__files=('nothing/*.txt',))
  with pytest.raises(UserError, match='file/data cannot be written to'):
    prepare(experiment, tmp_path / 'file/data')


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_training_on_a_stream(tmp_path, quickstart):
  experiment = finished.experiment(data__mode='online')
  decoder = pretrain(experiment, tmp_path / 'decoder', tmp_path)
  train_coprocessor(experiment, decoder, tmp_path / 'coprocessor', tmp_path)
  assert not (tmp_path / 'rows/train').exists()
  for run, steps in (('decoder', 4), ('coprocessor', 2)):
    losses = [row['loss'] for row in read_metrics(tmp_path / run / METRICS_FILE)]
    assert len(losses) == steps and np.isfinite(losses).all()
  assert list((tmp_path / 'coprocessor/checkpoints/data/2').rglob('iterator*'))


@pytest.mark.parametrize('overrides, message', [
    ({'decoder__vocab_size': 259}, 'the byte vocabulary: 260 pieces, but decoder.vocab_size.* 259'),
    ({'data__vocabulary': 'sentencepiece', 'data__vocabulary_size': 300},
     'data.vocabulary_size: 300 pieces, but decoder.vocab_size.* 260')])
def test_vocabulary_must_fit_decoder(overrides, message, tmp_path):
  """A vocabulary of other size is refused before any work."""
  with pytest.raises(UserError, match=message):
    prepare(finished.experiment(**overrides), tmp_path / 'data')
  assert not (tmp_path / 'data').exists()


@pytest.mark.usefixtures('one_device')
def test_no_second_vocabulary(tmp_path, quickstart):
  """A Hugging Face directory does not say which; with --data of its own the rows do."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  weights.save(tmp_path / 'decoder', config, params, format='huggingface')
  experiment = finished.experiment(data__vocabulary='sentencepiece', data__vocabulary_size=262)
  with pytest.raises(UserError, match='decoder does not name the vocabulary'):
    train_coprocessor(experiment, tmp_path / 'decoder', tmp_path / 'run', tmp_path / 'data')
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize('is_kept', [False, True])
def test_vocabulary_of_another_model(tmp_path, quickstart, is_kept):
  """A decoder that does not name its vocabulary has a tokenizer, which must give the same ids."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  own = tiny_tokenizer.write(tmp_path / 'own')
  weights.save(tmp_path / 'decoder', config, params, format='huggingface', tokenizer=own)
  checkpoint = weights.open_checkpoint(tmp_path / 'decoder')

  def check(used, **data):
    here = '' if is_kept else str(used)
    loading.check_known_vocabulary(DataConfig(**{'vocabulary_path': here, **data}),
                                   used.parent if is_kept else tmp_path, checkpoint)

  check(own)
  # The same tokens with another end of a text, and then other merges.
  check(tiny_tokenizer.write(tmp_path / 'base', config={**tiny_tokenizer.ENDS,
                                                        'eos_token': '<other>'}))
  other = tiny_tokenizer.write(tmp_path / 'other', tiny_tokenizer.describe(merges=()))
  with pytest.raises(UserError, match=f'{other} gives other ids than .*decoder/tokenizer.json'):
    check(other)
  # What has no such file is not compared.
  check(other, vocabulary='byte', vocabulary_path='')
  check(other, source='mixture', name='m', vocabulary_path='')


@pytest.mark.parametrize('vocab_size, content, message', [
    (300, None, 'vocabulary.model: 320 pieces, but decoder.vocab_size.* is 300'),
    (320, b'pieces', r'vocabulary.model \(6 bytes\) is not a SentencePiece model')])
def test_tokenizer_must_fit_decoder(vocab_size, content, message, tmp_path):
  """A tokenizer of other size, or a damaged one, is refused before any work."""
  import sentencepiece
  path = tmp_path / 'vocabulary.model'
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the quick brown fox jumps over'] * 20), model_writer=file,
        vocab_size=320, model_type='bpe', byte_fallback=True, hard_vocab_limit=False, pad_id=0,
        eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
  if content is not None:
    path.write_bytes(content)
  experiment = finished.experiment(
      data__vocabulary='sentencepiece', data__vocabulary_path=str(path),
      decoder__vocab_size=vocab_size)
  with pytest.raises(UserError, match=message.replace('320', str(pieces))):
    prepare(experiment, tmp_path / 'data')
  assert not (tmp_path / 'data').exists()


def test_tokenizer_json_must_fit_decoder(tmp_path):
  """A tokenizer.json with more tokens than embeddings, or a damaged one, is refused."""
  path = tiny_tokenizer.write(tmp_path)
  config = DataConfig(vocabulary_path=str(path))
  check_pieces(config, 265)
  with pytest.raises(UserError, match='tokenizer.json: 265 pieces.*decoder.vocab_size.* is 264'):
    check_pieces(config, 264)
  path.write_bytes(b'{}')
  with pytest.raises(UserError, match=r'tokenizer.json \(2 bytes\)'):
    check_pieces(config, 265)
