"""Curves of a study are drawn, whatever was measured."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from latent_deliberation.evaluation.plots import DPI
from latent_deliberation.studies.study_plots import COLOURS, plot_diagnostics, plot_study
from latent_deliberation.studies.study_report import summarise_study
from tests.studies.results import answer, make_arm, questions, read, texts


def colours_in(path) -> set[str]:
  image = imread(path)[..., :3]
  return {colour for colour in COLOURS
          if (np.abs(image - to_rgb(colour)).max(axis=-1) < 0.01).any()}


@pytest.mark.parametrize('study, arms', [(questions, 2), (texts, 1)])
def test_controls_share_the_colour_of_arms(tmp_path, study, arms):
  plot_study(summarise_study(study(), samples=50), tmp_path / 'results.png')
  assert imread(tmp_path / 'results.png').shape[:2] == (5 * DPI, 7 * DPI)
  assert colours_in(tmp_path / 'results.png') == set(COLOURS[:arms])


def test_many_arms_take_small_panels(tmp_path):
  """At most six lines share a panel, and three panels a line."""
  main = ('frozen', 'own', 'shuffled', 'zero', 'mean', 'constant')
  tuned = ('joint', 'finetuned', 'lora')
  many = tuple(f'rank{rank}{control}' for rank in (1, 2, 4) for control in ('', '/shuffled'))
  for names, size in ((main, (5, 7)), ((*main, *tuned), (4.2, 8.8)),
                      ((*main, *tuned, *many), (8.4, 13.2))):
    arms = {name: make_arm(answer(0.5)) for name in names}
    plot_study(summarise_study(questions(arms=arms), samples=50), tmp_path / 'results.png')
    expected = tuple(round(inches * DPI) for inches in size)
    assert imread(tmp_path / 'results.png').shape[:2] == expected


def test_own_latents_are_in_every_panel(tmp_path):
  names = ('frozen', 'own', 'shuffled', 'zero', 'mean', 'constant', 'joint', 'lora')
  arms = {name: make_arm(answer(0.5)) for name in names}
  plot_study(summarise_study(questions(arms=arms), samples=50), tmp_path / 'results.png')
  image = imread(tmp_path / 'results.png')[..., :3]
  blue = (np.abs(image - to_rgb(COLOURS[0])).max(axis=-1) < 0.01).any(axis=0)
  assert blue[:len(blue) // 2].any() and blue[len(blue) // 2:].any()


def test_overall_is_drawn_without_difficulty(tmp_path):
  plot_study(summarise_study(questions(difficulty=None), samples=50), tmp_path / 'results.png')
  assert colours_in(tmp_path / 'results.png') == set(COLOURS[:2])


def test_ruinous_control_leaves_arms_apart(tmp_path):
  for worst in (2.0, 12.0):
    arms = {'frozen': make_arm(read(2.0)), 'own': make_arm(read(1.9)),
            'zero': make_arm(read(worst)), 'constant': make_arm(read(1.99))}
    plot_study(summarise_study(texts(arms=arms), samples=50), tmp_path / 'results.png')
    image = imread(tmp_path / 'results.png')[..., :3]
    own, constant = (
      np.flatnonzero((np.abs(image - to_rgb(colour)).max(axis=-1) < 0.01).sum(axis=1) > 200).max()
      for colour in COLOURS[:2])
    assert own - constant > 50  # pixels; one line on a linear axis up to 2,000,000%


def test_diagnostics_panels_and_lines(tmp_path):
  """A panel for each quantity that has values, a line for each run."""
  rows = [{'step': step, 'gate': 0.1 * step, 'content': None if step == 3 else 1.0 / step,
           'effective_rank': 2.0, 'latent_norm_ratio': 0.5, 'norm': None} for step in range(1, 6)]
  plot_diagnostics({'own, seed 0': rows, 'own, seed 1': rows[:3], 'lora, seed 0': rows[:2]},
                   tmp_path / 'diagnostics.png')
  height, width = imread(tmp_path / 'diagnostics.png').shape[:2]
  assert (height, width) == (round(6.4 * DPI), round(12.6 * DPI))
  assert colours_in(tmp_path / 'diagnostics.png') == set(COLOURS[:2])


def test_one_evaluation_is_drawn(tmp_path):
  """A run that was evaluated once has a marker."""
  plot_diagnostics({'own': [{'step': 4, 'gate': 0.1}]}, tmp_path / 'diagnostics.png')
  image = imread(tmp_path / 'diagnostics.png')[..., :3]
  above = image[:len(image) * 3 // 4]  # the legend is below
  assert (np.abs(above - to_rgb(COLOURS[0])).max(axis=-1) < 0.01).any()


def test_one_quantity_has_one_panel(tmp_path):
  plot_diagnostics({'own': [{'step': 1, 'gate': 0.1}, {'step': 2, 'gate': 0.2}]},
                   tmp_path / 'diagnostics.png')
  assert imread(tmp_path / 'diagnostics.png').shape[1] == round(4.2 * DPI)
