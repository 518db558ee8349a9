"""The plots of a study. Each is a PNG, written whole or not at all."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.headless import Axes, Figure, FigureCanvasAgg
from latent_deliberation.evaluation.perplexity import FROZEN
from latent_deliberation.evaluation.plots import save_figure, trim_axes
from latent_deliberation.studies.study_result import controlled_arm

# Okabe and Ito's palette, which colour-blind readers can tell apart; black is the frozen decoder.
COLOURS = ('#0072B2', '#009E73', '#D55E00', '#CC79A7', '#E69F00', '#56B4E9', '#F0E442')
DASHES = {'shuffled': '--', 'zero': ':', 'mean': '-.'}
MAX_LINES = 9  # of a panel: 'own' with its controls, the tuned decoders and the frozen decoder


def plot_study(summary: Mapping[str, Any], path: Path) -> None:
  """Draws accuracy by difficulty, or change of perplexity by position, with 95% intervals.

  A control has the colour of its arm, in dashes. Many arms are spread over panels.

  Args:
    summary: result of `summarise_study`, or the content of a results.json.
    path: file of the PNG.
  """
  if 'by_position' in summary:
    rows, value, scale = summary['by_position'], 'change_pct', 1
    labels = 'ahead position', 'change of perplexity, %'
  else:
    rows = summary['by_difficulty'] or {'overall': summary['overall']}
    value, scale, labels = 'accuracy', 100, ('difficulty', 'accuracy, %')
  panels = _spread(summary['arms'])
  figure = Figure(figsize=(7 * len(panels), 5), layout='constrained')
  FigureCanvasAgg(figure)
  all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axes, names in zip(all_axes, panels, strict=True):
    _draw_arms(axes, rows, names, value, scale)
    axes.set_xticks(range(len(rows)), labels=list(rows))
    axes.set_xlabel(labels[0])
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.12),
                ncols=4 if len(panels) == 1 else 3, fontsize=9, frameon=False)
  all_axes[0].set_ylabel(labels[1])
  if 'by_position' in summary:
    _scale_changes(all_axes[0], rows)
  save_figure(figure, path)


def _spread(names: Mapping[str, Any]) -> list[list[str]]:
  """Returns the names of each panel. An arm and its controls share one; all have the decoder."""
  families: dict[str, list[str]] = {}
  for name in names:
    if name != FROZEN:
      families.setdefault(controlled_arm(name) or name, []).append(name)
  # A family that would overfill a panel begins the next one.
  panels = [[FROZEN]]
  for family in families.values():
    if len(panels[-1]) > 1 and len(panels[-1]) + len(family) > MAX_LINES:
      panels.append([FROZEN])
    panels[-1] += family
  return panels


def _draw_arms(axes: Axes, rows: Mapping[str, Any], names: Sequence[str], value: str,
               scale: float) -> None:
  colours = {FROZEN: 'black'}
  palette = itertools.cycle(COLOURS)
  for at, name in enumerate(names):
    arm = controlled_arm(name) or name
    if arm not in colours:
      colours[arm] = next(palette)
    middle = scale * np.array([row[name][value] for row in rows.values()])
    low, high = scale * np.transpose([row[name]['ci95'] for row in rows.values()])
    # Side by side, so that bars do not hide one another. Rounding may put a mean past its end.
    places = np.arange(len(rows)) + 0.04 * (at - (len(names) - 1) / 2)
    dashes = DASHES[name.rpartition('/')[2]] if controlled_arm(name) else '-'
    axes.errorbar(places, middle, np.maximum([middle - low, high - middle], 0), label=name,
                  color=colours[arm], linestyle=dashes, marker='o', markersize=4, capsize=2)
  trim_axes(axes)


def _scale_changes(axes: Axes, rows: Mapping[str, Any]) -> None:
  """Scales the axis so that small changes can be read, even if controls are far away."""
  def reach(arms: Iterable[str]) -> float:
    return max([0.1, *(np.abs(row[name]['ci95']).max() for name in arms for row in rows.values())])

  names = list(next(iter(rows.values())))
  near, far = reach(name for name in names if not controlled_arm(name)), reach(names)
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:+g}' if value else '0')
  if far > 3 * near:
    # Latents of the wrong form can multiply perplexity by thousands: logarithmic beyond `near`.
    axes.set_yscale('symlog', linthresh=near)
    axes.set_ylim(-1.5 * near, 1.5 * far)
    ticks = 10.0 ** np.arange(np.ceil(np.log10(near / 2)), np.ceil(np.log10(1.5 * far)))
    axes.set_yticks([-ticks[0], 0, *ticks], labels=[f'{-ticks[0]:+g}', '0', *(
      f'{tick:+g}' for tick in ticks)])


def plot_diagnostics(diagnostics: Mapping[str, Sequence[Mapping[str, float | None]]],
                     path: Path) -> None:
  """Draws the diagnostics of training, with a panel for each quantity and a line for each run.

  Args:
    diagnostics: rows of {'step': ..., quantity: ...} by run; None stands for a value that is not
      finite.
    path: file of the PNG.
  """
  # Quantities in the order in which they first occur.
  quantities = list(dict.fromkeys(
      name for rows in diagnostics.values() for row in rows for name in row if name != 'step'))
  columns = min(len(quantities), 3)
  lines = -(-len(quantities) // columns)
  figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(lines, columns, squeeze=False).flat
  for axes, quantity in zip(grid, quantities, strict=False):
    for (run, rows), colour in zip(diagnostics.items(), itertools.cycle(COLOURS), strict=False):
      points = [(row['step'], row[quantity]) for row in rows if row.get(quantity) is not None]
      if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=run)
    axes.set_title(quantity.replace('_', ' '), fontsize=11)
    axes.set_xlabel('step')
    trim_axes(axes)
  # The last row may have empty panels.
  for axes in grid[len(quantities):]:
    axes.remove()
  # One legend for all panels, with each run once.
  handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
  figure.legend(handles.values(), handles, loc='outside lower center', ncols=4, frameon=False)
  save_figure(figure, path)
