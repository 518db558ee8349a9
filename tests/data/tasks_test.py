import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.sources import build_source, read_texts
from latent_deliberation.data.tasks import Documents, build_task, iterate
from latent_deliberation.data.vocabularies import ByteVocabulary
from latent_deliberation.errors import UserError

BYTES = {'vocabulary': 'byte'}


def local(corpus_directory, **fields):
  return DataConfig(source='text', files=(str(corpus_directory),), **(BYTES | fields))


def decode(documents):
  return [ByteVocabulary().decode(tokens[1:-1].tolist()) for tokens in documents]


def register(name, source, preprocessors=(seqio.preprocessors.tokenize,), feature='targets',
             vocabulary=None):
  seqio.TaskRegistry.remove(name)
  features = {feature: seqio.Feature(vocabulary or ByteVocabulary(), add_eos=False)}
  return seqio.TaskRegistry.add(name, source, features, preprocessors)


def function_source(texts, splits=('train', 'validation'), feature='targets'):
  def dataset_fn(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({feature: texts})
  return seqio.FunctionDataSource(dataset_fn, splits, num_input_examples=dict.fromkeys(splits, 3))


@pytest.fixture(scope='module')
def tfds_directory(tmp_path_factory):
  """Two prepared data sets: 'both' has a validation split, 'lone' has none."""
  directory = tmp_path_factory.mktemp('tfds')
  features = tfds.features.FeaturesDict({'body': tfds.features.Text(), 'id': np.int64})
  for name, splits in (('both', {'train': 20, 'validation': 5}), ('lone', {'train': 20})):
    folder = directory / name / '1.0.0'
    folder.mkdir(parents=True)
    for split, size in splits.items():
      with tf.io.TFRecordWriter(str(folder / f'{name}-{split}.tfrecord-00000-of-00001')) as file:
        for i in range(size):
          file.write(features.serialize_example({'body': f'{split} document {i}', 'id': i}))
    template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=folder, filetype_suffix='tfrecord')
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[
        tfds.core.SplitInfo(name=split, shard_lengths=[size], num_bytes=size,
                            filename_template=template) for split, size in splits.items()])
  return directory


def remote(tfds_directory, name, **fields):
  return DataConfig(source='tfds', name=name, data_dir=str(tfds_directory),
                    **(BYTES | {'text_key': 'body'} | fields))


def test_every_document_comes_once(corpus_directory, tmp_path):
  """Documents are whole, from BOS to EOS."""
  config = local(corpus_directory)
  documents = Documents.open(config, tmp_path)
  for split in ('train', 'validation'):
    stream = list(iterate(documents.stream(split, seed=0)))
    assert all((tokens[0], tokens[-1], tokens.dtype) == (2, 1, np.int32) for tokens in stream)
    assert sorted(decode(stream)) == sorted(read_texts(build_source(config), split, 'text', 0))


def test_seed_determines_the_order(corpus_directory, tmp_path):
  documents = Documents.open(local(corpus_directory), tmp_path)
  orders = [decode(iterate(documents.stream('train', seed))) for seed in (1, 1, 2**31 - 2)]
  assert orders[0] == orders[1] != orders[2]


def test_hosts_share_the_documents(corpus_directory, tmp_path):
  documents = Documents.open(local(corpus_directory), tmp_path)
  shares = [decode(iterate(documents.stream('train', 0, seqio.ShardInfo(index, 3))))
            for index in range(3)]
  assert sorted(sum(shares, [])) == sorted(decode(iterate(documents.stream('train', 0))))
  assert min(map(len, shares)) > 5


def test_host_reads_only_its_documents(corpus_directory, monkeypatch):
  source = build_source(local(corpus_directory))
  read, original = [], type(source.corpus).read
  monkeypatch.setattr(type(source.corpus), 'read',
                      lambda corpus, number: read.append(number) or original(corpus, number))
  own = list(source.get_dataset('train', shard_info=seqio.ShardInfo(1, 3)).as_numpy_iterator())
  assert len(read) == len(own) < 20


def test_more_hosts_than_documents(corpus_directory):
  with pytest.raises(UserError, match=r'has \d documents for 30 processes'):
    build_source(local(corpus_directory)).get_dataset(
        'validation', shard_info=seqio.ShardInfo(0, 30))


def test_repeated_stream_reorders(corpus_directory, tmp_path):
  documents = Documents.open(local(corpus_directory), tmp_path)
  size = len(list(iterate(documents.stream('train', 0))))
  twice = decode(iterate(documents.stream('train', 0, repeat=True).take(2 * size)))
  assert sorted(twice[:size]) == sorted(twice[size:])
  assert twice[:size] != twice[size:]


def test_task_names(corpus_directory, tmp_path):
  """They tell corpora and vocabularies apart."""
  for name in ('a', 'b'):
    (tmp_path / f'{name}.txt').write_text(name)
  configs = [
      local(corpus_directory), local(tmp_path), local(corpus_directory, validation_percent=9)]
  names = [build_task(config, build_source(config), ByteVocabulary()).name for config in configs]
  assert len(set(names)) == 3
  assert names[0] == build_task(configs[0], build_source(configs[0]), ByteVocabulary()).name


def test_task_in_a_seqio_mixture(corpus_directory, tmp_path):
  task = Documents.open(local(corpus_directory), tmp_path).provider
  seqio.TaskRegistry.remove(task.name)
  seqio.TaskRegistry.add_provider(task.name, task)
  seqio.MixtureRegistry.remove('house')
  seqio.MixtureRegistry.add('house', [(task.name, 1.0)])
  mixed = Documents.open(DataConfig(source='mixture', name='house'), tmp_path)
  alone = Documents.open(local(corpus_directory), tmp_path)
  assert sorted(decode(iterate(mixed.stream('train', 0)))) == sorted(
      decode(iterate(alone.stream('train', 0))))


def test_tfds_keeps_its_validation_split(tfds_directory, tmp_path):
  documents = Documents.open(remote(tfds_directory, 'both:1.0.0'), tmp_path)
  for split, size in (('train', 20), ('validation', 5)):
    assert sorted(decode(iterate(documents.stream(split, 0)))) == sorted(
        f'{split} document {i}' for i in range(size))


def test_tfds_without_validation_split(tfds_directory, tmp_path):
  config = remote(tfds_directory, 'lone:1.0.0', validation_percent=25)
  documents = Documents.open(config, tmp_path)
  train, validation = (decode(iterate(documents.stream(split, 0)))
                       for split in ('train', 'validation'))
  assert len(validation) == 5
  assert sorted(train + validation) == sorted(f'train document {i}' for i in range(20))


def test_tfds_fingerprints_differ(tfds_directory, tmp_path):
  both, lone = (Documents.open(remote(tfds_directory, f'{name}:1.0.0'), tmp_path)
                for name in ('both', 'lone'))
  assert both.source_fingerprint != lone.source_fingerprint
  assert both.provider.name != lone.provider.name


def test_unknown_tfds_name(tfds_directory, tmp_path):
  with pytest.raises(UserError, match="'absent:1.0.0' in .*tfds"):
    Documents.open(remote(tfds_directory, 'absent:1.0.0'), tmp_path)


def test_tfds_is_never_downloaded(tmp_path):
  with pytest.raises(UserError, match="'ag_news_subset:1.0.0'.*tfds build"):
    Documents.open(remote(tmp_path, 'ag_news_subset:1.0.0'), tmp_path)


@pytest.mark.parametrize('key', ['text', 'id'])
def test_tfds_feature_without_text(tfds_directory, tmp_path, key):
  with pytest.raises(UserError, match=rf"text_key = '{key}', its features are \['body', 'id'\]"):
    Documents.open(remote(tfds_directory, 'both:1.0.0', text_key=key), tmp_path)


def test_unregistered_mixture(tmp_path):
  with pytest.raises(UserError, match="name = 'absent'.*import the module"):
    Documents.open(DataConfig(source='mixture', name='absent'), tmp_path)


def test_mixture_without_validation_split(tmp_path):
  register('train_only', function_source(['a'], splits=('train',)))
  with pytest.raises(UserError, match=r"has the splits \['train'\], and lacks \['validation'\]"):
    Documents.open(DataConfig(source='mixture', name='train_only'), tmp_path)


def test_mixture_without_targets(tmp_path):
  register('inputs_only', function_source(['a'], feature='inputs'), feature='inputs')
  with pytest.raises(UserError, match=r"has the features \['inputs'\] and no 'targets'"):
    Documents.open(DataConfig(source='mixture', name='inputs_only'), tmp_path)


def test_mixture_with_foreign_vocabulary(tmp_path):
  register('foreign', function_source(['a']), vocabulary=seqio.ByteVocabulary())
  with pytest.raises(UserError, match='foreign: .* ByteVocabulary'):
    Documents.open(DataConfig(source='mixture', name='foreign'), tmp_path)


def test_padding_id_is_refused(tmp_path):
  pad = seqio.map_over_dataset(
      lambda example: {'targets': tf.concat([example['targets'], [0, 5]], axis=0)})
  register('padded', function_source(['a']), (seqio.preprocessors.tokenize, pad))
  documents = Documents.open(DataConfig(source='mixture', name='padded'), tmp_path)
  with pytest.raises(UserError, match='padded: .* id 0, which is padding'):
    list(iterate(documents.stream('train', 0)))


def test_bos_and_eos_come_once(tmp_path):
  """Those of the task are not doubled. Empty documents are left out."""
  frame = seqio.map_over_dataset(
      lambda example: {'targets': tf.concat([[2], example['targets'], [1]], axis=0)})
  register('framed', function_source(['ab']), (seqio.preprocessors.tokenize, frame))
  register('bare', function_source(['ab', '']))
  for name in ('framed', 'bare'):
    documents = Documents.open(DataConfig(source='mixture', name=name), tmp_path)
    assert [tokens.tolist() for tokens in iterate(documents.stream('train', 0))] == [
        [2, 101, 102, 1]]
