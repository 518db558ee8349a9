"""Curves have an arm in its colour each; the picture of attention shows what the model does."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.evaluation.plots import (
  COLOURS,
  DPI,
  KINDS,
  attention_cells,
  plot_attention,
  plot_changes,
  plot_gates,
  plot_training,
)
from tests import finished


def make_summary(**changes: float) -> dict:
  """A summary of arms that change perplexity by so many percent at every ahead position."""
  ahead = np.arange(1, 33)
  curves = {
    name: {'change_pct': (change / ahead).tolist(),
           'ci95': np.stack([change / ahead - 0.2, change / ahead + 0.2], axis=1).tolist()}
    for name, change in {'frozen': 0.0, **changes}.items()}
  return {'positions': [1, 2, 4, 8, 16, 32], 'num_ahead': 16, 'texts': 100,
          'all_positions': curves}


def has_colour(image: np.ndarray, colour: str) -> bool:
  return bool((np.abs(image[..., :3] - to_rgb(colour)).max(axis=-1) < 0.01).any())


def test_changes_show_measured_arms(tmp_path):
  plot_changes(make_summary(own=-3.0, shuffled=1.0), tmp_path / 'changes.png')
  image = imread(tmp_path / 'changes.png')
  assert image.shape[:2] == (5 * DPI, 7 * DPI)
  assert {name for name in COLOURS if has_colour(image, COLOURS[name])} == {'own', 'shuffled'}


def test_far_arm_adds_a_close_up(tmp_path):
  plot_changes(make_summary(own=-3.0, zero=900.0), tmp_path / 'changes.png')
  assert imread(tmp_path / 'changes.png').shape[:2] == (5 * DPI, 11 * DPI)


@pytest.mark.parametrize('arms', [{'own': 0.0}, {'own': 0.0, 'zero': 50.0}, {'constant': 1.0}])
def test_changes_without_gain_or_own(tmp_path, arms):
  summary = make_summary(**arms)
  if 'own' in arms:  # as at step 0, when refining latents are exactly the frozen decoder
    summary['all_positions']['own']['ci95'] = [[0.0, 0.0]] * 32
  plot_changes(summary, tmp_path / 'changes.png')
  image = imread(tmp_path / 'changes.png')
  assert all(has_colour(image, COLOURS[name]) for name in arms)


def test_losses_have_a_panel_each(tmp_path):
  curve = (list(range(10, 110, 10)), list(np.linspace(5.0, 3.0, 10)))
  sizes = []
  for count in (1, 2):
    panels = {f'model {at}': {'training': curve, 'validation': curve} for at in range(count)}
    plot_training(panels, tmp_path / 'losses.png')
    image = imread(tmp_path / 'losses.png')
    assert has_colour(image, '#0072B2') and has_colour(image, '#D55E00')
    sizes.append(image.shape[:2])
  assert sizes == [(4 * DPI, round(4.8 * DPI)), (4 * DPI, round(9.6 * DPI))]


def test_gains_replace_losses(tmp_path):
  """A model with latents shows gain and content, and no loss."""
  loss, gain = ([10, 20], [3.0, 2.9]), ([10, 20], [0.0, 0.01])
  plot_training({'coprocessor': {'training': loss, 'validation': loss, 'gain': gain,
                                 'content': ([], [])}}, tmp_path / 'losses.png')
  image = imread(tmp_path / 'losses.png')
  assert has_colour(image, '#0072B2')
  assert not has_colour(image, '#D55E00')  # of content and of validation losses


def test_weak_intervals_are_not_drawn(tmp_path):
  """Fewer than 20 texts leave bands out."""
  for texts, band in ((20, True), (19, False)):
    plot_changes({**make_summary(own=-3.0), 'texts': texts}, tmp_path / 'changes.png')
    image = imread(tmp_path / 'changes.png')
    mixed = '#D0E4F0'  # own's blue at 18% on white
    share = (np.abs(image[..., :3] - to_rgb(mixed)).max(axis=-1) < 0.02).mean()
    assert (share > 0.005) == band


def test_gates_have_a_colour_each(tmp_path):
  curve = {'fractions': [0.0, 0.5, 1.0], 'thresholds': [None, 0.2, 0.0], 'gain': [0.0, 0.02, 0.03],
           'low': [0.0, 0.01, 0.02], 'high': [0.0, 0.03, 0.04]}
  curves = {'learned': curve, 'random': curve | {'gain': [0.0, 0.01, 0.03]}}
  plot_gates({'curves': curves, 'texts': 20}, tmp_path / 'gate.png')
  image = imread(tmp_path / 'gate.png')
  assert [has_colour(image, colour) for colour in COLOURS.values()] == [True, True, False, False]


@pytest.mark.parametrize('curves', [
  {'training': ([], []), 'validation': ([], [])},
  {'training': ([1], [3.0]), 'validation': ([], [])},
])
def test_losses_of_few_steps(tmp_path, curves):
  plot_training({'decoder': curves}, tmp_path / 'losses.png')
  image = imread(tmp_path / 'losses.png')
  assert has_colour(image, '#0072B2') == bool(curves['training'][0])
  assert not has_colour(image, '#D55E00')


SEGMENTS, ANCHORS = np.array([1, 1, 1, 1, 2, 2, 2]), np.array([2, 5])


def draw(matrix: np.ndarray) -> list[str]:
  """'.' nothing, 't' trunk sees trunk, 'c' trace sees the cached trunk, 'z' latents, 'a' ahead."""
  return [''.join('.tcza'[cell] for cell in row) for row in matrix]


def small_pictures(latents: str) -> tuple[list[str], list[str]]:
  config = DeliberationConfig(num_latents=2, num_ahead=2, num_traces=2, latents=latents)
  coprocessor, decoder = attention_cells(SEGMENTS, ANCHORS, config)
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
def test_soft_tokens_see_up_to_anchor(latents):
  assert small_pictures(latents)[0] == [
    'ccc....z...',
    'ccc....zz..',
    '....cc...z.',
    '....cc...zz',
  ]


@pytest.mark.parametrize('latents', ['paper', 'anchored'])
def test_traces_after_the_anchor(latents):
  """A trace sees the text up to its anchor, its latents and its ahead tokens."""
  assert small_pictures(latents)[1] == TRUNK + [
    'ccc....z.....',
    'ccc....zz....',
    'ccc....zza...',
    '....cc....z..',
    '....cc....zz.',
    '....cc....zza',
  ]


def test_refining_latents_hide_replaced_tokens():
  assert small_pictures('refining')[1] == TRUNK + [
    'c......z.....',
    'c......zz....',
    'c......zza...',
    '..........z..',
    '..........zz.',
    '..........zza',
  ]


@pytest.mark.parametrize('latents', ['anchored', 'refining'])
def test_picture_shows_every_kind(tmp_path, latents):
  plot_attention(tmp_path / 'visibility.png', latents)
  image = imread(tmp_path / 'visibility.png')
  assert image.shape[0] > image.shape[1] > 1000
  for colour in KINDS.values():
    share = (np.abs(image[..., :3] - to_rgb(colour)).max(axis=-1) < 0.01).mean()
    assert share > 0.005, colour


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'TkAgg'])
def test_backend_of_a_notebook(backend):
  """A backend that is not installed, or that has no screen, ends nothing."""
  code = ('import os, latent_deliberation.evaluation.headless\n'
          "print(os.environ['MPLBACKEND'])")
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env={**finished.environment(), 'MPLBACKEND': backend}, timeout=60)
  assert process.stdout == f'{backend}\n', process.stderr
