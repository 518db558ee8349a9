"""Plots of plans of a train step: estimated seconds and memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.headless import Axes, Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import COLOURS, save_figure, trim_axes


def plot_plans(named: Mapping[str, Mapping[str, Any]], path: Path) -> None:
  """Draws memory of several plans, a bar each, and estimated seconds where there is an estimate.

  Args:
    named: plans by name, as in a plan.json; seconds are None without an estimate.
    path: PNG to write.
  """
  names, plans = list(named), list(named.values())
  are_timed = any(plan['compute_seconds'] is not None for plan in plans)
  figure = Figure(figsize=(11 if are_timed else 7, 1.6 + 0.5 * len(plans)), layout='constrained')
  FigureCanvasAgg(figure)
  *timed, memory = figure.subplots(1, 1 + are_timed, sharey=True, squeeze=False)[0]
  for seconds in timed:
    _draw_bars(seconds, names, {
        'compute': [plan['compute_seconds'] or 0 for plan in plans],
        'exposed collectives': [plan['exposed_seconds'] or 0 for plan in plans]})
    seconds.set_xlabel('estimated seconds of a step')
  _draw_bars(memory, names, {
      part: [plan['memory'][part] / 1e9 for plan in plans]
      for part in ('frozen', 'trainable', 'optimizer', 'activations', 'temporary')})
  memory.set_xlabel('GB on a chip, or on a virtual device')
  if plans[0]['hbm_capacity']:
    memory.axvline(plans[0]['hbm_capacity'] / 1e9, color='black', linestyle='--', linewidth=1)
  save_figure(figure, path)


def _draw_bars(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
  """Draws horizontal bars of stacked parts, the first name on top."""
  left = np.zeros(len(names))
  for (part, sizes), colour in zip(parts.items(), (*COLOURS.values(), '#E69F00'), strict=False):
    axes.barh(names, sizes, left=left, color=colour, label=part)
    left = left + sizes
  axes.yaxis.set_inverted(True)
  # Above the bars, which may reach anywhere inside.
  axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=min(3, len(parts)), frameon=False,
              fontsize=8)
  trim_axes(axes)
  axes.grid(axis='x', color='#DDDDDD', linewidth=0.6)
  axes.grid(visible=False, axis='y')
