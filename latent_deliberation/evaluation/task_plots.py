"""The picture of benchmarks: what each arm changes, by task, with paired intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.evaluation.headless import Axes, Figure, FigureCanvasAgg
from latent_deliberation.evaluation.perplexity import CHAIN, FEWEST_TEXTS, FROZEN, MEAN
from latent_deliberation.evaluation.plots import COLOURS, MARKERS, save_figure, trim_axes
from latent_deliberation.evaluation.task_report import NAMES

_COLOURS = {**COLOURS, MEAN: '#56B4E9', CHAIN: '#000000'}
_MARKERS = {**MARKERS, MEAN: 'v', CHAIN: 'x'}
# Panels: figure, factor, and what the axis shows.
_PANELS = (('nats', -1.0, 'nats saved on the gold answer (right is better)'),
           ('correct', 100.0, 'points of accuracy (right is better)'))


def plot_tasks(summary: Mapping[str, Any], path: Path) -> None:
  """Draws differences to the frozen decoder; tasks of too few items have no interval.

  Args:
    summary: result of `task_report.summarise`, or the content of a results.json.
    path: file of the PNG.
  """
  tasks = summary['tasks']
  arms = [name for name in dict.fromkeys(arm for task in tasks.values() for arm in task['arms'])
          if name != FROZEN]
  figure = Figure(figsize=(11, 1.8 + 0.28 * len(tasks) * max(len(arms), 1)), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (key, scale, label) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS,
                                       strict=True):
    for number, arm in enumerate(arms):
      _draw(axes, tasks, arm, key, scale, (number + 1) / (len(arms) + 1) - 0.5)
    axes.axvline(0, color='black', linewidth=1, linestyle='--')
    axes.set_yticks(range(len(tasks)), labels=list(tasks))
    axes.set_xlabel(label)
    axes.margins(y=0.05)
    trim_axes(axes)
  axes.invert_yaxis()
  handles, labels = axes.get_legend_handles_labels()
  if handles:
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
  save_figure(figure, path)


def _draw(axes: Axes, tasks: Mapping[str, Any], arm: str, key: str, scale: float,
          offset: float) -> None:
  """Draws an arm's differences, a little above or below the line of each task."""
  places, values, errors = [], [], []
  for place, task in enumerate(tasks.values()):
    found = task['arms'].get(arm, {}).get('difference', {}).get(key)
    if found is None:
      continue
    value = scale * found['value']
    ends = found['ci95'] if found['ci95'] and len(task['items']) >= FEWEST_TEXTS else (
        found['value'], found['value'])
    low, high = sorted(scale * end for end in ends)
    places.append(place + offset)
    values.append(value)
    errors.append((max(value - low, 0), max(high - value, 0)))
  if places:
    axes.errorbar(values, places, xerr=list(zip(*errors, strict=True)), fmt=_MARKERS[arm],
                  color=_COLOURS[arm], markersize=5, linewidth=1.2, label=NAMES[arm])
  else:
    axes.plot([], [], _MARKERS[arm], color=_COLOURS[arm], label=NAMES[arm])
