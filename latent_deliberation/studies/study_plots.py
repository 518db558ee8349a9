"""The plots of a study. Each is a PNG, written whole or not at all."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.headless import Axes, Figure, FigureCanvasAgg, MaxNLocator
from latent_deliberation.evaluation.perplexity import (
  FEWEST_TEXTS,
  FROZEN,
  MEAN,
  OWN,
  SHUFFLED,
  ZERO,
)
from latent_deliberation.evaluation.plots import save_figure, trim_axes
from latent_deliberation.studies.study_result import controlled_arm, count_examples

# Okabe and Ito's palette, which colour-blind readers can tell apart; black is the frozen decoder.
COLOURS = ('#0072B2', '#009E73', '#D55E00', '#CC79A7', '#E69F00', '#56B4E9', '#F0E442')
DASHES = {SHUFFLED: '--', ZERO: ':', MEAN: '-.'}
MAX_LINES = 6  # of a panel; 'own' with its controls has 5, the frozen decoder included
MAX_COLUMNS = 3
# Titles of diagnostics, with units. docs/evaluation.md explains them.
TITLES = {
    'gain': 'gain over the frozen decoder,\nnats per token (above 0 is better)',
    'content': "content: gain over another text's\nlatents, nats per token (above 0 is better)",
    'norm': "size of the latents,\nin sizes of the decoder's embeddings",
    'moved': "distance of the latents from their start,\nin sizes of the decoder's embeddings",
    'gate': 'size of the gate (root mean square),\n0 at the start',
    'effective_rank': 'effective rank of the outputs:\ndirections in use'}


def plot_study(summary: Mapping[str, Any], path: Path) -> None:
  """Draws accuracy by difficulty, or change of perplexity by position, with 95% intervals.

  A control has the colour of its arm, in dashes. Many arms are spread over small panels of one
  scale, each of which repeats the frozen decoder and own latents. There is no interval over too few
  texts or questions.

  Args:
    summary: result of `summarise_study`, or the content of a results.json.
    path: file of the PNG.
  """
  if 'by_position' in summary:
    rows, value, scale = summary['by_position'], 'change_pct', 1
    labels = 'ahead position', 'change of perplexity, % (below 0 is better)'
  else:
    rows = summary['by_difficulty'] or {'overall': summary['overall']}
    value, scale, labels = 'accuracy', 100, ('difficulty', 'accuracy, %')
  is_judged = np.array([count_examples(summary, row) >= FEWEST_TEXTS for row in rows])
  panels = _spread(summary['arms'])
  columns = min(len(panels), MAX_COLUMNS)
  lines = -(-len(panels) // columns)
  is_alone = len(panels) == 1
  size = (7, 5) if is_alone else (4.4 * columns, 4.2 * lines)
  figure = Figure(figsize=size, layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
  for axes, names in zip(grid.flat, panels, strict=False):
    _draw_arms(axes, rows, names, value, scale, is_judged, is_alone)
    axes.set_xticks(range(len(rows)), labels=list(rows))
    axes.set_xlabel(labels[0])
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.12 if is_alone else -0.18),
                ncols=4 if is_alone else 2, fontsize=9, frameon=False)
  for axes in grid[:, 0]:
    axes.set_ylabel(labels[1], fontsize=10 if is_alone else 9)
  if 'by_position' in summary:
    _scale_changes(grid[0, 0], rows)
  _remove(grid.flat[len(panels):])
  save_figure(figure, path)


def _spread(names: Mapping[str, Any]) -> list[list[str]]:
  """Returns the names of each panel. An arm and its controls share one."""
  families: dict[str, list[str]] = {}
  for name in names:
    if name != FROZEN:
      families.setdefault(controlled_arm(name) or name, []).append(name)
  # A family that would overfill a panel begins the next one, after what all are compared with.
  common = [FROZEN, OWN] if OWN in families else [FROZEN]
  panels = [[FROZEN]]
  for family in families.values():
    if len(panels[-1]) > 1 and len(panels[-1]) + len(family) > MAX_LINES:
      panels.append(list(common))
    panels[-1] += family
  return panels


def _draw_arms(axes: Axes, rows: Mapping[str, Any], names: Sequence[str], value: str,
               scale: float, is_judged: np.ndarray, is_alone: bool) -> None:
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
    bars = np.where(is_judged, np.maximum([middle - low, high - middle], 0), np.nan)
    dashes = DASHES[name.rpartition('/')[2]] if controlled_arm(name) else '-'
    # One arm of a panel has controls, so their names need not repeat its own.
    label = name if is_alone else name.rpartition('/')[2]
    axes.errorbar(places, middle, bars, label=label,
                  color=colours[arm], linestyle=dashes, marker='o', markersize=4, capsize=2)
  trim_axes(axes)


def _remove(panels: Iterable[Axes]) -> None:
  """Removes the panels of a grid that nothing is drawn in."""
  for axes in panels:
    axes.remove()


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
    diagnostics: rows of {'step': ..., quantity: ...} by run, such as 'own, seed 0'; the seeds of an
      arm share a colour. None stands for a value that is not finite. A quantity without any value
      has no panel.
    path: file of the PNG.
  """
  # Quantities in the order in which they first occur.
  quantities = list(dict.fromkeys(
      name for rows in diagnostics.values() for row in rows for name, value in row.items()
      if name != 'step' and value is not None))
  arms = {run: run.rpartition(', seed ')[0] or run for run in diagnostics}
  colours = dict(zip(dict.fromkeys(arms.values()), itertools.cycle(COLOURS), strict=False))
  columns = max(min(len(quantities), MAX_COLUMNS), 1)
  lines = max(-(-len(quantities) // columns), 1)
  figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(lines, columns, squeeze=False).flat
  for axes, quantity in zip(grid, quantities, strict=False):
    for run, rows in diagnostics.items():
      points = [(row['step'], row[quantity]) for row in rows if row.get(quantity) is not None]
      if points:
        # Markers, since a run may have been evaluated only once.
        axes.plot(*zip(*points, strict=True), color=colours[arms[run]], marker='o', markersize=3,
                  label=arms[run])
    if quantity in ('gain', 'content'):
      axes.axhline(0, color='black', linewidth=1, linestyle='--')
    axes.set_title(TITLES.get(quantity, quantity.replace('_', ' ')), fontsize=9)
    axes.set_xlabel('step')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    trim_axes(axes)
  _remove(grid[len(quantities):])
  # One legend for all panels, with each arm once.
  handles = {label: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
  figure.legend(handles.values(), handles, loc='outside lower center', ncols=4, frameon=False,
                title='A line for each seed.')
  save_figure(figure, path)
