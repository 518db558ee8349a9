"""seqio tasks over documents, and the stream of documents that packing and online batches read."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_deliberation.data.data_config import PAD_ID, DataConfig
from latent_deliberation.data.host_tensorflow import seqio, tf, without_greetings
from latent_deliberation.data.rows import Recipe
from latent_deliberation.data.sources import SPLITS, build_source, read_texts, source_fingerprint
from latent_deliberation.data.vocabularies import (
  Vocabulary,
  check_vocabulary,
  framing_of,
  open_vocabulary,
  vocabulary_hash,
)
from latent_deliberation.errors import UserError

SHUFFLED_DOCUMENTS = 1000  # shuffle buffer for sources that only shuffle their files


def build_task(config: DataConfig, source: seqio.DataSource, vocabulary: Vocabulary) -> seqio.Task:
  """Returns the task that reads and tokenises documents, one example {'targets': int32 [n]} each.

  Its name contains a hash of the source and the vocabulary. It is not registered, because its files
  may change. seqio.TaskRegistry.add_provider(task.name, task) makes it usable in a mixture.
  """
  identity = json.dumps([source_fingerprint(source), config.text_key, config.validation_percent,
                         vocabulary_hash(vocabulary)])
  return seqio.Task(
      f'{config.source}_{hashlib.sha256(identity.encode()).hexdigest()[:12]}', source,
      output_features={'targets': seqio.Feature(vocabulary, add_eos=False)},
      preprocessors=[
          functools.partial(seqio.preprocessors.rekey, key_map={'targets': config.text_key}),
          functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      ],
      shuffle_buffer_size=None if source.performs_internal_shuffling else SHUFFLED_DOCUMENTS)


@dataclasses.dataclass(frozen=True)
class Documents:
  """The tokenised documents of a configuration.

  Attributes:
    provider: a task made here, or a registered task or mixture.
    vocabulary: vocabulary of its targets.
    source_fingerprint: hash of the documents that it reads.
  """
  provider: seqio.Task | seqio.Mixture
  vocabulary: Vocabulary
  source_fingerprint: str

  @classmethod
  def open(cls, config: DataConfig, prepared_dir: Path) -> 'Documents':
    """Opens the source, then trains or loads the vocabulary in `prepared_dir`.

    Raises:
      UserError: no such mixture is registered, or it lacks targets or a split.
      UserError: see `build_source`, `open_vocabulary` and `check_vocabulary`.
    """
    if config.source == 'mixture':
      return cls._of_mixture(config.name)
    source = build_source(config)
    vocabulary = open_vocabulary(
        config, prepared_dir, lambda: read_texts(source, 'train', config.text_key, config.seed))
    return cls(build_task(config, source, vocabulary), vocabulary, source_fingerprint(source))

  @classmethod
  def _of_mixture(cls, name: str) -> 'Documents':
    # Packing needs a registered provider with both splits and targets.
    registered = sorted([*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()])
    if name not in registered:
      raise UserError(f'name = {name!r} is no registered seqio task or mixture: import the module '
                      f'that registers it. Registered are {registered}')
    provider = seqio.get_mixture_or_task(name)
    missing = sorted(set(SPLITS) - set(provider.splits))
    if missing:
      raise UserError(f'{name!r} has the splits {sorted(provider.splits)}, and lacks {missing}: '
                      "give its source both, for instance by slicing, {'train': 'train[5%:]', "
                      "'validation': 'train[:5%]'}")
    if 'targets' not in provider.output_features:
      raise UserError(f'{name!r} has the features {sorted(provider.output_features)} and no '
                      "'targets', which a decoder reads: name the feature with the text so")
    vocabulary = provider.output_features['targets'].vocabulary
    check_vocabulary(vocabulary, name)
    # The documents of a mixture are determined by its tasks, their sources and their rates.
    parts = [[task.name, source_fingerprint(task.source)] for task in seqio.get_subtasks(provider)]
    if isinstance(provider, seqio.Mixture):
      parts.append([provider.get_rate(task) for task in provider.tasks])
    return cls(provider, vocabulary, hashlib.sha256(json.dumps(parts).encode()).hexdigest())

  def recipe(self, config: DataConfig, split: str) -> Recipe:
    """Returns the recipe of rows that are packed from these documents."""
    return Recipe(
        task=self.provider.name, split=split, source_fingerprint=self.source_fingerprint,
        vocabulary_hash=vocabulary_hash(self.vocabulary),
        vocabulary_size=self.vocabulary.vocab_size, length=config.length, seed=config.seed,
        max_tokens=config.max_tokens)

  def stream(self, split: str, seed: int, shard: seqio.ShardInfo | None = None,
             repeat: bool = False) -> tf.data.Dataset:
    """Returns whole documents in shuffled order, int32 [n] each, from BOS to EOS.

    BOS and EOS are added where the task has not added them. Documents without a token are left out.
    Where id 0 fills rows, a document that holds it stops the stream with
    tf.errors.InvalidArgumentError: packing would lose it.

    Args:
      split: 'train' or 'validation'.
      seed: seed of the order.
      shard: this process's share of the documents.
      repeat: whether to continue forever, with a mixture at its rates. Otherwise every document
        comes once, and a mixture keeps its rates only until one of its tasks runs out.
    """
    # The tasks of a mixture and their rates. A task alone has no rate.
    tasks = [task for task in seqio.get_subtasks(self.provider) if split in task.splits]
    rates = ([self.provider.get_rate(task) for task in tasks]
             if isinstance(self.provider, seqio.Mixture) else None)
    # Mixed here, since a seqio mixture ends when its first task runs out. Without a
    # sequence_length, seqio does not cut documents. Without a cache in memory, small data sets can
    # be checkpointed symbolically.
    dataset = tf.data.Dataset.sample_from_datasets([
        task.get_dataset(
            sequence_length=None, split=split, shuffle=True, seed=seed, shard_info=shard,
            num_epochs=None if repeat else 1, trim_output_features=False, try_in_mem_cache=False,
        ).map(lambda example: tf.cast(example['targets'], tf.int32)) for task in tasks
    ], rates, seed)
    return dataset.filter(lambda tokens: tf.size(tokens) > 0).map(self._frame)

  def _frame(self, tokens: tf.Tensor) -> tf.Tensor:
    framing = framing_of(self.vocabulary)
    if framing.pad_id != framing.bos_id:
      tf.debugging.assert_none_equal(tokens, PAD_ID, message=(
          f'{self.provider.name}: a document holds id {PAD_ID}, which is padding. Its task must '
          'not pad, and its vocabulary must not use the id'))
    # Each is added once, unless the task has added it.
    bos = tf.fill([tf.cast(tokens[0] != framing.bos_id, tf.int32)], framing.bos_id)
    eos = tf.fill([tf.cast(tokens[-1] != framing.eos_id, tf.int32)], framing.eos_id)
    return tf.concat([bos, tokens, eos], axis=0)


def iterate(dataset: tf.data.Dataset) -> Iterator[np.ndarray]:
  """Yields the elements of a dataset as numpy arrays. A document with id 0 raises UserError."""
  elements = dataset.as_numpy_iterator()
  try:
    with without_greetings():
      first = next(elements, None)
    if first is not None:
      yield first
      yield from elements
  except tf.errors.InvalidArgumentError as error:
    raise UserError(error.message) from error
