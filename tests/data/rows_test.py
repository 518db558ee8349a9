import dataclasses
import hashlib
import json
import os
import re
import resource

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latent_deliberation.data import rows as rows_module
from latent_deliberation.data.packing import RowFiles
from latent_deliberation.data.rows import (
  ALL_ROWS,
  CHECKSUMS_FILE,
  MANIFEST_FILE,
  Framing,
  Manifest,
  PackedRows,
  PermutedBatches,
  Recipe,
  positions_in_segments,
)
from latent_deliberation.errors import UserError

BOS = 2
RECIPE = Recipe(task='t', split='train', source_fingerprint='s', vocabulary_hash='v',
                vocabulary_size=100, length=6, seed=0, max_tokens=0)
SEGMENTS = [1, 1, 1, 2, 2, 0]
PROPERTY = settings(max_examples=40, deadline=None, database=None)


def row_of(number):
  """Tokens with SEGMENTS, from which `numbers` reads the number."""
  return [BOS, 10 + number, 3, BOS, 5, 0]


def write_rows(directory, rows=10, rows_per_file=4, recipe=RECIPE):
  directory.mkdir(exist_ok=True)
  all_rows = [(np.array(row_of(number)), np.array(SEGMENTS)) for number in range(rows)]
  files = RowFiles(directory, recipe, Framing(BOS, 1), np.ones(recipe.vocabulary_size, np.int32))
  for start in range(0, rows, rows_per_file):
    files.write(all_rows[start:start + rows_per_file])
  files.close()
  manifest = Manifest(recipe=recipe, rows=rows, tokens=files.tokens, documents=1,
                      text_bytes=files.text_bytes, rows_per_file=rows_per_file,
                      content_hash=files.content_hash, bos_id=BOS)
  (directory / MANIFEST_FILE).write_bytes(manifest.seal())
  return directory


@pytest.fixture
def directory(tmp_path):
  return write_rows(tmp_path / 'train')


@pytest.fixture
def old_directory(tmp_path):
  """A folder of format version 1, with segments that do not follow from its tokens."""
  directory = tmp_path / 'old'
  directory.mkdir()
  for file in range(2):
    tokens = [[10 + number] * 6 for number in range(2 * file, 2 * file + 2)]
    np.save(directory / f'tokens-{file:05d}.npy', np.array(tokens, np.uint16))
    np.save(directory / f'segments-{file:05d}.npy', np.array([SEGMENTS] * 2, np.uint16))
  fields = {'recipe': dataclasses.asdict(RECIPE), 'rows': 4, 'tokens': 20, 'documents': 1,
            'text_bytes': 20, 'rows_per_file': 2, 'content_hash': 'c', 'format_version': 1}
  (directory / MANIFEST_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
  return directory


def numbers(batch):
  return (batch.tokens[:, 1] - 10).tolist()


def test_take_in_any_order(directory):
  rows = PackedRows(directory)
  assert (len(rows), rows.length, rows.vocabulary_size) == (10, 6, 100)
  batch = rows.take([9, 0, 5, 9])
  assert numbers(batch) == [9, 0, 5, 9]
  assert batch.tokens[0].tolist() == row_of(9)
  assert batch.segments[0].tolist() == SEGMENTS
  assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0]
  for part in (batch.tokens, batch.segments, batch.positions):
    assert (type(part), part.dtype, part.shape) == (np.ndarray, np.int32, (4, 6))


def test_format_version_1_is_read(old_directory):
  """Its segments come from files, and its fingerprint is that of the stored manifest."""
  rows = PackedRows(old_directory)
  batch = rows.take([3, 0])
  assert numbers(batch) == [3, 0]
  assert batch.segments.tolist() == [SEGMENTS] * 2
  assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0]
  manifest = (old_directory / MANIFEST_FILE).read_bytes()
  assert rows.fingerprint == hashlib.sha256(manifest).hexdigest()


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
  """A split may have more files than a process may have open."""
  monkeypatch.setattr(rows_module, 'MAPPED_FILES', 4)
  directory = write_rows(tmp_path / 'train', rows=60, rows_per_file=1)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/dev/fd')) + 20, limits[1]))
  try:
    batch = PackedRows(directory).take(np.arange(60)[::-1])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert numbers(batch) == list(range(60))[::-1]


@pytest.mark.parametrize('indices', [[-1], [10], [0, 10]])
def test_take_outside_is_refused(directory, indices):
  with pytest.raises(IndexError, match='there are 10'):
    PackedRows(directory).take(indices)


@pytest.mark.parametrize('framing, tokens, segments', [
    (Framing(2, 1), [2, 5, 2, 2, 6, 0], [1, 1, 2, 3, 3, 0]),
    (Framing(2, 1), [2, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]),
    (Framing(2, 1), [2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1]),
    # BOS fills the row, and 0 is a token.
    (Framing(2, 1, 2), [2, 0, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]),
    (Framing(2, 1, 2), [2, 0, 1, 2, 1, 2], [1, 1, 1, 2, 2, 0]),
    (Framing(2, 1, 2), [2, 0, 1, 2, 3, 4], [1, 1, 1, 2, 2, 2]),
    # BOS ends documents as well.
    (Framing(2, 2, 2), [2, 0, 2, 2, 3, 4], [1, 1, 1, 2, 2, 2]),
    (Framing(2, 2, 2), [2, 5, 2, 2, 3, 2], [1, 1, 1, 2, 2, 2]),
    (Framing(2, 2, 2), [2, 5, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]),
    (Framing(2, 2), [2, 5, 2, 2, 3, 0], [1, 1, 1, 2, 2, 0])])
def test_segments(framing, tokens, segments):
  assert framing.segments(np.array([tokens])).tolist() == [segments]


def test_manifest_of_another_framing(tmp_path):
  """What fills rows is kept; without it, a manifest is that of version 2."""
  usual = PackedRows(write_rows(tmp_path)).manifest
  assert usual.framing.segments(np.array([[2, 5, 0]])).tolist() == [[1, 1, 0]]
  assert 'pad_id' not in json.loads(usual.to_json())
  other = dataclasses.replace(usual, format_version=3, eos_id=2, pad_id=2)
  read = Manifest.from_json(other.to_json(), tmp_path)
  assert read == other and read.framing == Framing(2, 2, 2)
  assert read.fingerprint == usual.fingerprint  # the hash of the vocabulary tells them apart


def test_positions_in_segments():
  segments = np.array([[1, 1, 2, 2, 2, 3], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
  assert positions_in_segments(segments).tolist() == [
      [0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_damaged_row(directory):
  """A row that changed is refused when it is read, and the others are not."""
  path = directory / 'tokens-00001.npy'
  tokens = np.load(path)
  tokens[2, 4] += 1  # row 6
  np.save(path, tokens)
  rows = PackedRows(directory)
  assert len(rows.take([5, 7]).tokens) == 2
  with pytest.raises(UserError, match=f'{directory}: 1 rows, the first of them 6, .*checksums.npy'):
    rows.take([5, 6, 7])
  # Rows of earlier code have no checksums.
  (directory / CHECKSUMS_FILE).unlink()
  assert len(PackedRows(directory).take([5, 6, 7]).tokens) == 3


def test_changed_manifest(directory):
  """A number that was changed is refused; a manifest of earlier code is read as it is."""
  path = directory / MANIFEST_FILE
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {'text_bytes': 7}))
  with pytest.raises(UserError, match=f'{path} has changed'):
    PackedRows(directory)
  del fields['checksum']
  path.write_text(json.dumps(fields))
  assert len(PackedRows(directory)) == 10


def test_fingerprint_follows_contents(tmp_path):
  first = PackedRows(write_rows(tmp_path / 'a'))
  assert PackedRows(write_rows(tmp_path / 'b')).fingerprint == first.fingerprint
  assert PackedRows(write_rows(tmp_path / 'c', rows=9)).fingerprint != first.fingerprint


def test_missing_manifest_is_named(tmp_path):
  with pytest.raises(UserError, match=r'no packed rows in .*manifest.json'):
    PackedRows(tmp_path)


@pytest.mark.parametrize('content', [b'', b'{}', b'[]', b'{"format_version": 1, "rows": 3}',
                                     b'{"format_version": 2, "rows": 3}'])
def test_foreign_manifest_is_named(directory, content):
  (directory / MANIFEST_FILE).write_bytes(content)
  with pytest.raises(UserError, match='manifest.json is not a manifest of packed rows'):
    PackedRows(directory)


def test_later_format_version_is_refused(directory):
  fields = json.loads((directory / MANIFEST_FILE).read_text()) | {'format_version': 7, 'new': 1}
  del fields['checksum']
  (directory / MANIFEST_FILE).write_text(json.dumps(fields))
  with pytest.raises(UserError, match=r'format version 7.* \(1, 2, 3\)'):
    PackedRows(directory)


def test_missing_file_is_named(directory, old_directory):
  (directory / 'tokens-00002.npy').unlink()
  with pytest.raises(UserError, match='tokens-00002.npy is missing'):
    PackedRows(directory)
  (old_directory / 'segments-00001.npy').unlink()
  with pytest.raises(UserError, match='segments-00001.npy is missing'):
    PackedRows(old_directory)


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_truncated_file_is_named(directory, size):
  path = directory / 'tokens-00001.npy'
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(UserError, match=r'tokens-00001.npy \(\d+ bytes\) is truncated'):
    PackedRows(directory)


@pytest.mark.parametrize('array', [np.zeros((4, 7), np.uint16), np.zeros((4, 6), np.int32)])
def test_file_of_another_packing_is_refused(directory, array):
  np.save(directory / 'tokens-00001.npy', array)
  with pytest.raises(UserError, match=r'tokens-00001.npy.*uint16 \[4, 6\]'):
    PackedRows(directory)


@pytest.mark.parametrize('batch_size', [1, 3, 10, 25])
def test_epochs_have_different_orders(directory, batch_size):
  """Every epoch holds each row once, in another order."""
  batches = PermutedBatches(PackedRows(directory), batch_size, seed=3)
  taken = []
  while len(taken) < 50:
    taken += numbers(batches(len(taken) // batch_size))
  epochs = [taken[start:start + 10] for start in range(0, 50, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 5


def test_order_is_pinned(directory):
  """The order depends on the seed alone: not on the batch size, and not on the machine."""
  rows = PackedRows(directory)
  by_two, by_five = PermutedBatches(rows, 2, seed=3), PermutedBatches(rows, 5, seed=3)
  assert sum((numbers(by_two(step)) for step in range(10)), []) == sum(
      (numbers(by_five(step)) for step in range(4)), [])
  # Pinned: a resumed run on another machine must see the same order.
  assert numbers(by_five(0)) == np.random.RandomState([3, 0]).permutation(10)[:5].tolist()
  assert numbers(PermutedBatches(rows, 10, 0)(0)) != numbers(PermutedBatches(rows, 10, 1)(0))


@pytest.mark.parametrize('own_rows', [[0, 1, 2], [1, 4], [5]])
def test_host_reads_its_rows(directory, own_rows):
  """A host reads its rows of the same global batch."""
  rows = PackedRows(directory)
  whole, part = PermutedBatches(rows, 6, 1), PermutedBatches(rows, 6, 1, np.array(own_rows))
  for step in (0, 1, 2, 77):
    assert numbers(part(step)) == [numbers(whole(step))[place] for place in own_rows]
  assert part.fingerprint == whole.fingerprint


class NumberedRows:
  """Rows that are their numbers, for properties of the order."""
  fingerprint = 'numbers'

  def __init__(self, count):
    self._count = count

  def __len__(self):
    return self._count

  def take(self, indices):
    return np.asarray(indices)


SIZES, BATCH_SIZES, SEEDS = st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32 - 1)
RANGES = st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda pair: pair[0] < pair[1])


@PROPERTY
@given(SIZES, BATCH_SIZES, SEEDS, st.just(ALL_ROWS) | RANGES)
def test_every_epoch_is_complete(size, batch_size, seed, row_range):
  """Every epoch holds each row of the range once, whatever batches span epochs."""
  expected = list(range(size * row_range[0] // 100, size * row_range[1] // 100))
  assume(expected)
  batches = PermutedBatches(NumberedRows(size), batch_size, seed, row_range_percent=row_range)
  count = 3 * len(expected)
  taken = np.concatenate([batches(step) for step in range(-(-count // batch_size))])[:count]
  assert all(sorted(epoch) == expected for epoch in taken.reshape(3, -1).tolist())


@PROPERTY
@given(SIZES, BATCH_SIZES, SEEDS, st.integers(1, 8), st.integers(0, 10**6))
def test_hosts_share_the_same_batch(size, batch_size, seed, hosts, step):
  """A step gives the same global batch for any number of hosts."""
  rows = NumberedRows(size)
  whole = PermutedBatches(rows, batch_size, seed)(step)
  parts = [PermutedBatches(rows, batch_size, seed, own_rows)(step)
           for own_rows in np.array_split(np.arange(batch_size), hosts)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


@PROPERTY
@given(st.integers(1, 500), st.sets(st.integers(1, 99), max_size=3), SEEDS)
def test_row_ranges_do_not_overlap(size, cuts, seed):
  """Ranges that follow each other hold every row once, taken together."""
  ends, taken = [0, *sorted(cuts), 100], []
  for row_range in zip(ends, ends[1:], strict=False):
    count = size * row_range[1] // 100 - size * row_range[0] // 100
    if count:
      taken += PermutedBatches(NumberedRows(size), count, seed,
                               row_range_percent=row_range)(0).tolist()
  assert sorted(taken) == list(range(size))


def test_empty_batches_are_refused(directory, tmp_path):
  rows = PackedRows(directory)
  with pytest.raises(UserError, match='batch_size = 0'):
    PermutedBatches(rows, 0, 0)
  with pytest.raises(UserError, match=r'\(0, 100\) of 0 packed rows'):
    PermutedBatches(PackedRows(write_rows(tmp_path / 'empty', rows=0)), 2, 0)
  with pytest.raises(UserError, match=r'row_range_percent = \(40, 49\) of 10 packed rows'):
    PermutedBatches(rows, 2, 0, row_range_percent=(40, 49))


@pytest.mark.parametrize('row_range_percent', [
    50, None, '05', (50, 0), (0, 200), (0, 30, 60), (0, 5.5)])
def test_bad_row_range_is_refused(directory, row_range_percent):
  with pytest.raises(UserError, match=re.escape(f'row_range_percent = {row_range_percent!r}: ')):
    PermutedBatches(PackedRows(directory), 2, 3, row_range_percent=row_range_percent)


@pytest.mark.parametrize('fields', [
    {'batch_size': 5}, {'seed': 2}, {'row_range_percent': (0, 50)},
    {'row_range_percent': (50, 100)}, {'rows': 'other'}])
def test_fingerprint_tells_sequences_apart(directory, tmp_path, fields):
  """run.json holds the fingerprint, so that a run cannot be resumed on other batches."""
  rows = PackedRows(directory)
  if 'rows' in fields:
    recipe = dataclasses.replace(RECIPE, source_fingerprint='x')
    fields = {'rows': PackedRows(write_rows(tmp_path / 'other', recipe=recipe))}
  same = {'rows': rows, 'batch_size': 6, 'seed': 1}
  fingerprints = [PermutedBatches(**arguments).fingerprint
                  for arguments in (same, same | {'own_rows': np.array([1, 4])}, same | fields)]
  assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_fingerprints_of_finished_runs():
  """The hash inputs of finished runs, under the name that a range of rows has on disk."""
  def sha256(**identity):
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

  rows = NumberedRows(10)
  assert PermutedBatches(rows, 6, 1).fingerprint == sha256(rows='numbers', batch_size=6, seed=1)
  assert PermutedBatches(rows, 6, 1, row_range_percent=(0, 50)).fingerprint == sha256(
      rows='numbers', batch_size=6, seed=1, portion=[0, 50])


def test_no_state_is_kept(directory, tmp_path):
  """The position is the step: nothing is saved, and files of older checkpoints are not read."""
  batches, state = PermutedBatches(PackedRows(directory), 6, 1), tmp_path / 'state'
  state.mkdir()
  batches.save(state, 7)
  assert not list(state.iterdir())
  (state / 'batches-7.json').write_text('{"step": 6')
  expected = numbers(batches(7))
  batches.restore(state, 7)
  assert numbers(batches(7)) == expected
