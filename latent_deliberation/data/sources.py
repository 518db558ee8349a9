"""Sources of text, as seqio data sources of documents.

How to add a source of text:
  1. Write a function that makes a `Corpus` from a DataConfig. corpus.py is an example.
  2. Name it in CORPORA, and add its name to SOURCES in data_config.py.
  3. If it reads keys of DataConfig that only some sources read, such as `files`, add it to
     KEYS_OF_SOURCES in data_config.py.
Splitting, shuffling, sharding among processes, packing and resuming then work as for every source.
A seqio task or mixture needs no code here: register it, and set source = 'mixture'.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from absl import logging

from latent_deliberation.data.data_config import SOURCES, DataConfig
from latent_deliberation.data.host_tensorflow import seqio, tf
from latent_deliberation.errors import MissingError, UserError

SPLITS = ('train', 'validation')
# Documents that TensorFlow reads in one call. A call takes longer than to read a short document.
TOGETHER = 16

# data.source -> 'module:function', which makes a Corpus from a DataConfig. Modules are imported by
# name when they are needed, so that reading files does not load the studies.
CORPORA = {
    'stdlib': 'latent_deliberation.data.corpus:open_corpus',
    'text': 'latent_deliberation.data.corpus:open_corpus',
    'synthetic': 'latent_deliberation.studies.synthetic.documents:open_synthetic',
}
OTHERS = ('tfds', 'mixture')  # `build_source` and tasks.py read these without a Corpus
assert {*CORPORA, *OTHERS} == set(SOURCES), 'CORPORA and SOURCES in data_config.py differ'


class Corpus(Protocol):
  """Documents by number, of the splits 'train' and 'validation'.

  Attributes:
    text_key: key of the text in the examples that seqio reads.
    fingerprint: hash of everything that determines the documents.
  """
  text_key: str
  fingerprint: str

  def numbers(self, split: str) -> np.ndarray:
    """Returns the numbers of the documents of a split, int64 [n]."""

  def read(self, number: int) -> str:
    """Returns the text of one document."""

  def describe(self) -> str:
    """Returns a line about the documents, for the log."""


class CorpusSource(seqio.DataSource):
  """A corpus as a seqio data source, with examples {text_key: string}.

  It shuffles all documents anew each epoch. It shards by document, and a process reads only its
  own documents. With seqio's FunctionDataSource every process would read all of them. Its iterators
  can be checkpointed, since documents are read by number and not from a Python generator.
  """

  def __init__(self, corpus: Corpus):
    self.corpus = corpus
    super().__init__(
        splits=SPLITS, num_input_examples={split: len(corpus.numbers(split)) for split in SPLITS},
        performs_internal_shuffling=True)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def get_dataset(self, split: str = 'train', shuffle: bool = True, seed: int | None = None,
                  shard_info: seqio.ShardInfo | None = None, *, sequence_length=None,
                  use_cached: bool = False, num_epochs: int | None = 1) -> tf.data.Dataset:
    """Returns the documents of a split. Raises UserError if there are fewer than shards."""
    numbers = self.corpus.numbers(split)
    if shard_info:
      if len(numbers) < shard_info.num_shards:
        raise UserError(f'split {split!r} has {len(numbers)} documents for '
                        f'{shard_info.num_shards} processes: use fewer processes, or packed rows')
      # This process reads every n-th document.
      numbers = numbers[shard_info.index::shard_info.num_shards]
    dataset = tf.data.Dataset.from_tensor_slices(numbers)
    if shuffle:
      # The buffer holds the numbers of all documents, so every order is equally likely.
      dataset = dataset.shuffle(len(numbers), seed=seed)
    return dataset.batch(TOGETHER).map(self._read, num_parallel_calls=tf.data.AUTOTUNE).unbatch()

  def _read(self, numbers: tf.Tensor) -> dict[str, tf.Tensor]:
    # Stateless, because tf.data does not checkpoint iterators with stateful functions.
    texts = tf.numpy_function(self._read_together, [numbers], tf.string, stateful=False)
    return {self.corpus.text_key: tf.ensure_shape(texts, (None,))}

  def _read_together(self, numbers: np.ndarray) -> np.ndarray:
    return np.array([self.corpus.read(number).encode() for number in numbers], object)


def build_source(config: DataConfig) -> seqio.DataSource:
  """Returns the documents of a configuration. A mixture brings its own sources.

  Raises:
    ValueError: the source is a mixture.
    UserError: see the functions in CORPORA, and `_open_tfds`.
  """
  if config.source == 'mixture':
    raise ValueError(f'the mixture {config.name!r} brings its own sources: take it from its task')
  if config.source == 'tfds':
    return _open_tfds(config)
  module, _, function = CORPORA[config.source].partition(':')
  corpus = getattr(importlib.import_module(module), function)(config)
  logging.info('the corpus has %s', corpus.describe())
  return CorpusSource(corpus)


def _open_tfds(config: DataConfig) -> seqio.TfdsDataSource:
  """Returns a prepared data set. If it has no 'validation' split, the start of 'train' becomes it.

  Raises:
    MissingError: there is no such prepared data set.
    UserError: it has no split 'train', or no string feature text_key.
  """
  place = config.data_dir or "TFDS's default directory"
  try:
    info = seqio.TfdsDataSource(config.name, config.data_dir or None).tfds_dataset.info
    splits = sorted(info.splits)
  except Exception as error:  # TFDS raises half a dozen unrelated classes here
    raise MissingError(f'TFDS cannot open {config.name!r} in {place}: {error}') from error
  if not splits:
    raise MissingError(f'TFDS knows {config.name!r}, but {place} does not hold it prepared: '
                       'run tfds build, or set data_dir to the folder above the data set')
  if 'train' not in splits:
    raise UserError(f"{config.name!r} has the splits {splits} and no 'train': choose a data set "
                    'that has one')
  feature = info.features[config.text_key] if config.text_key in info.features else None
  if feature is None or feature.tf_dtype != tf.string:
    raise UserError(f'{config.name!r} has no text under text_key = {config.text_key!r}, its '
                    f'features are {sorted(info.features)}: set text_key to the one with the text')
  # Without a validation split, the start of 'train' is held out.
  held_out = f'{config.validation_percent}%'
  slices = {'train': 'train', 'validation': 'validation'}
  if 'validation' not in splits:
    slices = {'train': f'train[{held_out}:]', 'validation': f'train[:{held_out}]'}
  # Read-only, so that nothing is downloaded or built without the user's knowledge.
  return seqio.TfdsDataSource(config.name, config.data_dir or None, splits=slices, read_only=True)


def source_fingerprint(source: seqio.DataSource) -> str:
  """Returns a hash of the documents of a source.

  For local text the hash input is the contents, for synthetic documents everything that determines
  them. For TFDS it is the name and the sizes of the shards. For other sources it is only the name
  that seqio knows, so a change of their documents goes unnoticed.
  """
  if isinstance(source, CorpusSource):
    return source.corpus.fingerprint
  if isinstance(source, seqio.TfdsDataSource):
    info = source.tfds_dataset.info
    known = [source.tfds_dataset.name, {
        name: [split.num_bytes, split.shard_lengths] for name, split in info.splits.items()}]
  else:
    # Nothing else about the documents is known.
    known = repr(source)
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def read_texts(source: seqio.DataSource, split: str, text_key: str, seed: int) -> Iterator[str]:
  """Yields the texts of a split in shuffled order."""
  dataset = source.get_dataset(split, shuffle=True, seed=seed)
  for example in dataset.as_numpy_iterator():
    yield example[text_key].decode()
