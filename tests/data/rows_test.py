import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from latent_deliberation.data.packing import RowFiles
from latent_deliberation.data.rows import (
  MANIFEST_FILE,
  Manifest,
  PackedRows,
  PermutedBatches,
  Recipe,
  positions_in_segments,
)
from latent_deliberation.errors import UserError

RECIPE = Recipe(task='t', split='train', source_fingerprint='s', vocabulary_hash='v',
                vocabulary_size=100, length=6, seed=0, max_tokens=0)


def write_rows(directory, rows=10, rows_per_file=4, recipe=RECIPE):
  """Rows whose first token is their number."""
  directory.mkdir(exist_ok=True)
  segments = np.array([1, 1, 1, 2, 2, 0])
  all_rows = [(np.array([number, 2, 3, 4, 5, 0]), segments) for number in range(rows)]
  files = RowFiles(directory, recipe, np.ones(recipe.vocabulary_size, np.int32))
  for start in range(0, rows, rows_per_file):
    files.write(all_rows[start:start + rows_per_file])
  manifest = Manifest(recipe=recipe, rows=rows, tokens=files.tokens, documents=1,
                      text_bytes=files.text_bytes, rows_per_file=rows_per_file,
                      content_hash=files.content_hash)
  (directory / MANIFEST_FILE).write_bytes(manifest.to_json())
  return directory


@pytest.fixture
def directory(tmp_path):
  return write_rows(tmp_path / 'train')


def numbers(batch):
  return batch.tokens[:, 0].tolist()


def test_reading_rows_needs_neither_tensorflow_nor_seqio():
  code = ('import sys, latent_deliberation.data.rows; '
          'sys.exit(str({"tensorflow", "seqio", "sentencepiece"} & set(sys.modules) or 0))')
  done = subprocess.run([sys.executable, '-c', code], check=False, capture_output=True, text=True)
  assert done.stderr.strip() == '0', done.stderr


def test_rows_are_taken_in_any_order_from_any_file(directory):
  rows = PackedRows(directory)
  assert (len(rows), rows.length, rows.vocabulary_size) == (10, 6, 100)
  batch = rows.take([9, 0, 5, 9])
  assert numbers(batch) == [9, 0, 5, 9]
  assert batch.tokens[0].tolist() == [9, 2, 3, 4, 5, 0]
  assert batch.segments[0].tolist() == [1, 1, 1, 2, 2, 0]
  assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0]
  for part in (batch.tokens, batch.segments, batch.positions):
    assert (type(part), part.dtype, part.shape) == (np.ndarray, np.int32, (4, 6))


@pytest.mark.parametrize('indices', [[-1], [10], [0, 10]])
def test_a_row_that_is_not_there_is_refused(directory, indices):
  with pytest.raises(IndexError, match='there are 10'):
    PackedRows(directory).take(indices)


def test_positions_start_anew_with_each_segment():
  segments = np.array([[1, 1, 2, 2, 2, 3], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
  assert positions_in_segments(segments).tolist() == [
      [0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_the_fingerprint_follows_the_contents(tmp_path):
  first = PackedRows(write_rows(tmp_path / 'a'))
  assert PackedRows(write_rows(tmp_path / 'b')).fingerprint == first.fingerprint
  assert PackedRows(write_rows(tmp_path / 'c', rows=9)).fingerprint != first.fingerprint


def test_a_folder_without_rows_is_named(tmp_path):
  with pytest.raises(UserError, match=r'no packed rows in .*manifest.json is missing'):
    PackedRows(tmp_path)


@pytest.mark.parametrize('content', [b'', b'{}', b'[]', b'{"format_version": 1, "rows": 3}'])
def test_a_foreign_manifest_is_named(directory, content):
  (directory / MANIFEST_FILE).write_bytes(content)
  with pytest.raises(UserError, match='manifest.json is not a manifest of packed rows'):
    PackedRows(directory)


def test_another_format_version_is_refused_with_both(directory):
  fields = json.loads((directory / MANIFEST_FILE).read_text()) | {'format_version': 7, 'new': 1}
  (directory / MANIFEST_FILE).write_text(json.dumps(fields))
  with pytest.raises(UserError, match='format version 7, this code reads 1'):
    PackedRows(directory)


@pytest.mark.parametrize('kind', ['tokens', 'segments'])
def test_a_missing_file_is_named(directory, kind):
  (directory / f'{kind}-00002.npy').unlink()
  with pytest.raises(UserError, match=f'{kind}-00002.npy is missing'):
    PackedRows(directory)


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_truncated_file_is_named(directory, size):
  path = directory / 'tokens-00001.npy'
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(UserError, match=r'tokens-00001.npy \(\d+ bytes\) is truncated'):
    PackedRows(directory)


@pytest.mark.parametrize('array', [np.zeros((4, 7), np.uint16), np.zeros((4, 6), np.int32)])
def test_a_file_of_another_packing_is_refused_with_both_shapes(directory, array):
  np.save(directory / 'tokens-00001.npy', array)
  with pytest.raises(UserError, match=r'promises uint16 \[4, 6\]'):
    PackedRows(directory)


@pytest.mark.parametrize('batch_size', [1, 3, 10, 25])
def test_every_epoch_holds_each_row_once_in_another_order(directory, batch_size):
  batches = PermutedBatches(PackedRows(directory), batch_size, seed=3)
  taken = []
  while len(taken) < 50:
    taken += numbers(batches(len(taken) // batch_size))
  epochs = [taken[start:start + 10] for start in range(0, 50, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 5


def test_the_order_is_the_same_whatever_the_batch_size_and_whoever_computes_it(directory):
  rows = PackedRows(directory)
  by_two, by_five = PermutedBatches(rows, 2, seed=3), PermutedBatches(rows, 5, seed=3)
  assert sum((numbers(by_two(step)) for step in range(10)), []) == sum(
      (numbers(by_five(step)) for step in range(4)), [])
  # Pinned: a resumed run on another machine must see the same order.
  assert numbers(by_five(0)) == np.random.RandomState([3, 0]).permutation(10)[:5].tolist()


def test_another_seed_gives_another_order(directory):
  rows = PackedRows(directory)
  assert numbers(PermutedBatches(rows, 10, 0)(0)) != numbers(PermutedBatches(rows, 10, 1)(0))


@pytest.mark.parametrize('mine', [[0, 1, 2], [1, 4], [5]])
def test_a_host_reads_its_rows_of_the_same_global_batch(directory, mine):
  rows = PackedRows(directory)
  whole, part = PermutedBatches(rows, 6, 1), PermutedBatches(rows, 6, 1, np.array(mine))
  for step in (0, 1, 2, 77):
    assert numbers(part(step)) == [numbers(whole(step))[place] for place in mine]
  assert part.fingerprint == whole.fingerprint


def test_an_empty_batch_is_refused(directory):
  with pytest.raises(UserError, match='batch_size = 0: at least 1'):
    PermutedBatches(PackedRows(directory), 0, 0)


def test_no_rows_make_no_batches(directory, tmp_path):
  with pytest.raises(UserError, match='0 to 100 percent of 0 packed rows are none'):
    PermutedBatches(PackedRows(write_rows(tmp_path / 'empty', rows=0)), 2, 0)
  with pytest.raises(UserError, match='40 to 49 percent of 10 packed rows are none'):
    PermutedBatches(PackedRows(directory), 2, 0, row_range_percent=(40, 49))


@pytest.mark.parametrize(('row_range_percent', 'expected'), [
    ((0, 40), {0, 1, 2, 3}), ((40, 100), {4, 5, 6, 7, 8, 9}), ((45, 55), {4})])
def test_every_epoch_of_a_portion_holds_each_of_its_rows_once(directory, row_range_percent, expected):
  batches = PermutedBatches(PackedRows(directory), len(expected), 3, row_range_percent=row_range_percent)
  for epoch in range(3):
    assert sorted(numbers(batches(epoch))) == sorted(expected)


@pytest.mark.parametrize('row_range_percent', [50, None, '05', (50, 0), (0, 200), (0, 30, 60), (0, 5.5)])
def test_what_is_no_portion_is_refused(directory, row_range_percent):
  with pytest.raises(UserError, match=re.escape(f'row_range_percent = {row_range_percent!r}: two whole numbers')):
    PermutedBatches(PackedRows(directory), 2, 3, row_range_percent=row_range_percent)


def test_a_portion_is_part_of_a_sequence_and_of_what_is_saved_of_it(directory, tmp_path):
  rows = PackedRows(directory)
  whole, half = PermutedBatches(rows, 2, 3), PermutedBatches(rows, 2, 3, row_range_percent=(0, 50))
  assert whole.fingerprint != half.fingerprint
  half.save(tmp_path, 7)
  with pytest.raises(UserError, match=r'row_range_percent: saved \[0, 50\], now \[50, 100\]'):
    PermutedBatches(rows, 2, 3, row_range_percent=(50, 100)).restore(tmp_path, 7)


def test_a_saved_state_is_accepted_on_another_number_of_hosts(directory, tmp_path):
  PermutedBatches(PackedRows(directory), 6, 1).save(tmp_path, 7)
  PermutedBatches(PackedRows(directory), 6, 1, np.array([1, 4])).restore(tmp_path, 7)


def test_a_step_that_was_not_saved_is_named(directory, tmp_path):
  batches = PermutedBatches(PackedRows(directory), 6, 1)
  batches.save(tmp_path, 7)
  with pytest.raises(UserError, match='no data state for step 8'):
    batches.restore(tmp_path, 8)


@pytest.mark.parametrize(('batch_size', 'seed', 'message'), [
    (5, 1, 'batch_size: saved 6, now 5'), (6, 2, 'seed: saved 1, now 2')])
def test_another_sequence_is_refused_with_both(directory, tmp_path, batch_size, seed, message):
  PermutedBatches(PackedRows(directory), 6, 1).save(tmp_path, 7)
  with pytest.raises(UserError, match=message):
    PermutedBatches(PackedRows(directory), batch_size, seed).restore(tmp_path, 7)


def test_a_state_of_other_rows_is_refused(directory, tmp_path):
  PermutedBatches(PackedRows(directory), 6, 1).save(tmp_path, 7)
  other = write_rows(tmp_path / 'other', recipe=dataclasses.replace(RECIPE, source_fingerprint='x'))
  with pytest.raises(UserError, match="rows: saved '.*', now '"):
    PermutedBatches(PackedRows(other), 6, 1).restore(tmp_path, 7)


def test_a_damaged_state_is_named(directory, tmp_path):
  batches = PermutedBatches(PackedRows(directory), 6, 1)
  batches.save(tmp_path, 7)
  (tmp_path / 'batches-7.json').write_text('{"step":')
  with pytest.raises(UserError, match='batches-7.json is not a data state'):
    batches.restore(tmp_path, 7)
