import numpy as np
import pytest

from latent_deliberation.data.packing import RowFiles, fill_rows
from latent_deliberation.data.rows import Recipe

BOS, EOS = 2, 1


def fill(documents, length):
  rows = list(fill_rows([np.array(d, np.int32) for d in documents], length, BOS))
  return [tokens.tolist() for tokens, _ in rows], [segments.tolist() for _, segments in rows]


def test_short_documents_share_a_row():
  assert fill([[BOS, 5, EOS], [BOS, 6, 7, EOS]], 8) == (
      [[BOS, 5, EOS, BOS, 6, 7, EOS, 0]], [[1, 1, 1, 2, 2, 2, 2, 0]])


def test_a_long_document_goes_on_in_the_next_row_after_a_bos():
  assert fill([[BOS, 5, 6, 7, 8, 9, EOS]], 4) == (
      [[BOS, 5, 6, 7], [BOS, 8, 9, EOS]], [[1, 1, 1, 1], [1, 1, 1, 1]])


def test_a_document_begins_in_the_room_that_another_left():
  assert fill([[BOS, 5, EOS], [BOS, 6, 7, EOS]], 5) == (
      [[BOS, 5, EOS, BOS, 6], [BOS, 7, EOS, 0, 0]], [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]])


def test_a_single_last_place_is_padded():
  assert fill([[BOS, 5, EOS], [BOS, 6, EOS]], 4) == (
      [[BOS, 5, EOS, 0], [BOS, 6, EOS, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]])


def test_no_document_makes_no_row():
  assert fill([], 4) == ([], [])


@pytest.mark.parametrize('length', [2, 3, 7, 64, 1000])
def test_joined_segments_are_the_documents_again(length):
  random = np.random.RandomState(0)
  documents = [[BOS, *random.randint(3, 50, size), EOS] for size in random.randint(1, 90, 200)]
  joined = []
  for tokens, segments in zip(*fill(documents, length), strict=True):
    tokens, segments = np.array(tokens), np.array(segments)
    for segment in range(1, segments.max() + 1):
      part = tokens[segments == segment].tolist()
      assert part[0] == BOS
      if joined and joined[-1][-1] != EOS:
        joined[-1] += part[1:]
      else:
        joined.append(part)
  assert joined == documents


@pytest.mark.parametrize(('vocabulary_size', 'dtype'), [(65_536, np.uint16), (65_537, np.int32)])
def test_files_are_as_small_as_the_vocabulary_allows(tmp_path, vocabulary_size, dtype):
  recipe = Recipe(task='t', split='train', source_fingerprint='', vocabulary_hash='',
                  vocabulary_size=vocabulary_size, length=4, seed=0, max_tokens=0)
  files = RowFiles(tmp_path, recipe, np.full(vocabulary_size, 3))
  last = vocabulary_size - 1
  files.write([(np.array([BOS, last, EOS, 0]), np.array([1, 1, 1, 0]))])
  tokens = np.load(tmp_path / 'tokens-00000.npy')
  assert tokens.dtype == dtype
  assert tokens.tolist() == [[BOS, last, EOS, 0]]
  assert (files.rows, files.tokens) == (1, 3)
