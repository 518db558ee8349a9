"""The picture of attention shows what the paper says, and what the model does."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.evaluation.plots import KINDS, plot_visibility, visibility

SEGMENTS, ANCHORS = np.array([1, 1, 1, 1, 2, 2, 2]), np.array([2, 5])


def draw(matrix: np.ndarray) -> list[str]:
  """'.' nothing, 't' trunk sees trunk, 'c' trace sees the cached trunk, 'z' latents, 'a' ahead."""
  return [''.join('.tcza'[cell] for cell in row) for row in matrix]


def small_pictures(latents: str) -> tuple[list[str], list[str]]:
  config = DeliberationConfig(num_latents=2, num_ahead=2, num_traces=2, latents=latents)
  coprocessor, decoder = visibility(SEGMENTS, ANCHORS, config)
  return draw(coprocessor), draw(decoder)


TRUNK = [
  't............',
  'tt...........',
  'ttt..........',
  'tttt.........',
  '....t........',
  '....tt.......',
  '....ttt......',
]


@pytest.mark.parametrize('latents', ['paper', 'anchored', 'refining'])
def test_soft_tokens_see_their_document_up_to_the_anchor(latents):
  assert small_pictures(latents)[0] == [
    'ccc....z...',
    'ccc....zz..',
    '....cc...z.',
    '....cc...zz',
  ]


@pytest.mark.parametrize('latents', ['paper', 'anchored'])
def test_behind_the_anchor_a_trace_sees_the_anchor_its_latents_and_its_ahead_tokens(latents):
  assert small_pictures(latents)[1] == TRUNK + [
    'ccc....z.....',
    'ccc....zz....',
    'ccc....zza...',
    '....cc....z..',
    '....cc....zz.',
    '....cc....zza',
  ]


def test_refining_latents_hide_the_tokens_that_they_replace():
  assert small_pictures('refining')[1] == TRUNK + [
    'c......z.....',
    'c......zz....',
    'c......zza...',
    '..........z..',
    '..........zz.',
    '..........zza',
  ]


@pytest.mark.parametrize('latents', ['anchored', 'refining'])
def test_the_picture_shows_every_kind_of_cell(tmp_path, latents):
  plot_visibility(tmp_path / 'visibility.png', latents)
  image = imread(tmp_path / 'visibility.png')
  assert image.shape[0] > image.shape[1] > 1000
  for colour in KINDS.values():
    share = (np.abs(image[..., :3] - to_rgb(colour)).max(axis=-1) < 0.01).mean()
    assert share > 0.005, colour
