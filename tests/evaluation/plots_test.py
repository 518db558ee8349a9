"""Curves are drawn, each arm in its colour, whatever was measured."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from latent_deliberation.evaluation.plots import COLOURS, DPI, plot_changes, plot_losses


def make_summary(**changes: float) -> dict:
  """A summary of arms that change perplexity by so many percent at every ahead position."""
  ahead = np.arange(1, 33)
  curves = {
    name: {'change_pct': (change / ahead).tolist(),
           'ci95': np.stack([change / ahead - 0.2, change / ahead + 0.2], axis=1).tolist()}
    for name, change in {'frozen': 0.0, **changes}.items()}
  return {'positions': [1, 2, 4, 8, 16, 32], 'num_ahead': 16, 'all_positions': curves}


def has_colour(image: np.ndarray, colour: str) -> bool:
  return bool((np.abs(image[..., :3] - to_rgb(colour)).max(axis=-1) < 0.01).any())


def test_changes_show_each_measured_arm_and_no_other(tmp_path):
  plot_changes(make_summary(own=-3.0, shuffled=1.0), tmp_path / 'changes.png')
  image = imread(tmp_path / 'changes.png')
  assert image.shape[:2] == (5 * DPI, 7 * DPI)
  assert {name for name in COLOURS if has_colour(image, COLOURS[name])} == {'own', 'shuffled'}


def test_an_arm_far_away_adds_a_close_up_of_own_latents(tmp_path):
  plot_changes(make_summary(own=-3.0, zero=900.0), tmp_path / 'changes.png')
  assert imread(tmp_path / 'changes.png').shape[:2] == (5 * DPI, 11 * DPI)


@pytest.mark.parametrize('arms', [{'own': 0.0}, {'own': 0.0, 'zero': 50.0}, {'constant': 1.0}])
def test_changes_can_be_drawn_without_a_gain_or_without_own_latents(tmp_path, arms):
  summary = make_summary(**arms)
  if 'own' in arms:  # as at step 0, when refining latents are exactly the frozen decoder
    summary['all_positions']['own']['ci95'] = [[0.0, 0.0]] * 32
  plot_changes(summary, tmp_path / 'changes.png')
  image = imread(tmp_path / 'changes.png')
  assert all(has_colour(image, COLOURS[name]) for name in arms)


def test_losses_have_a_panel_for_each_model(tmp_path):
  curve = (list(range(10, 110, 10)), list(np.linspace(5.0, 3.0, 10)))
  sizes = []
  for count in (1, 2):
    panels = {f'model {at}': {'training': curve, 'validation': curve} for at in range(count)}
    plot_losses(panels, tmp_path / 'losses.png')
    image = imread(tmp_path / 'losses.png')
    assert has_colour(image, '#0072B2') and has_colour(image, '#D55E00')
    sizes.append(image.shape[:2])
  assert sizes == [(4 * DPI, round(4.8 * DPI)), (4 * DPI, round(9.6 * DPI))]


@pytest.mark.parametrize('curves', [
  {'training': ([], []), 'validation': ([], [])},
  {'training': ([1], [3.0]), 'validation': ([], [])},
])
def test_losses_of_a_run_of_few_steps_can_be_drawn(tmp_path, curves):
  plot_losses({'decoder': curves}, tmp_path / 'losses.png')
  image = imread(tmp_path / 'losses.png')
  assert has_colour(image, '#0072B2') == bool(curves['training'][0])
  assert not has_colour(image, '#D55E00')
