"""The curves of a report, each a PNG written whole or not at all."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latent_deliberation.evaluation.controls import BASELINE
from latent_deliberation.evaluation.gating import GainCurve
from latent_deliberation.evaluation.report import LABELS
from latent_deliberation.files import write_whole

DPI = 130
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {'own': '#0072B2', 'shuffled': '#D55E00', 'constant': '#009E73', 'zero': '#CC79A7'}
MARKERS = {'own': 'o', 'shuffled': 's', 'constant': '^', 'zero': 'D'}


def plot_changes(summary: Mapping[str, Any], path: Path) -> None:
  """Change of perplexity by ahead position for every arm, with 95% intervals.

  A second panel shows own latents close up where another arm's change is far larger.

  Args:
    summary: of `report.summarise`, or a report.json.
    path: of the PNG.
  """
  arms = {name: arm for name, arm in summary['all_positions'].items() if name != BASELINE}
  low, high = _extent(arms.values())
  own_low, own_high = _extent([arms['own']] if 'own' in arms else arms.values())
  wide = high - low > 3 * (own_high - own_low)
  figure = Figure(figsize=(11 if wide else 7, 5), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
  for axes in panels:
    _draw_changes(axes, arms, summary)
  panels[0].set_ylabel('change of perplexity, %')
  if wide:
    # Linear within the reach of own latents, logarithmic beyond: both can be read.
    panels[0].set_yscale('symlog', linthresh=max(-own_low, own_high))
    panels[0].set_ylim(1.5 * low, 1.5 * high)
    panels[0].set_title('every arm')
    margin = 0.08 * (own_high - own_low)
    panels[1].set_ylim(own_low - margin, own_high + margin)
    panels[1].set_title('own latents, close up')
  for axes in panels:
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:+g}' if value else '0')
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
  save_figure(figure, path)


def _extent(arms: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
  """Lowest and highest end of all intervals, and at least 0.1% either side of zero."""
  ends = np.concatenate([(-0.1, 0.1), *(np.ravel(arm['ci95']) for arm in arms)])
  return float(ends.min()), float(ends.max())


def _draw_changes(axes: Axes, arms: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
  for name, arm in arms.items():
    ahead = np.arange(1, len(arm['change_pct']) + 1)
    low, high = np.transpose(arm['ci95'])
    axes.fill_between(ahead, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.plot(ahead, arm['change_pct'], color=COLOURS[name], marker=MARKERS[name], markersize=5,
              markevery=[at - 1 for at in summary['positions']], label=LABELS[name])
  axes.axhline(0, color='black', linewidth=1, linestyle='--', label=LABELS[BASELINE])
  axes.axvline(summary['num_ahead'], color='#666666', linewidth=1, linestyle=':',
               label=f'last ahead token of training ({summary["num_ahead"]})')
  axes.set_xscale('log', base=2)
  axes.set_xticks(summary['positions'], labels=[str(at) for at in summary['positions']])
  axes.minorticks_off()
  axes.set_xlabel('ahead position')
  trim_axes(axes)


def plot_losses(panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
                path: Path) -> None:
  """Losses by step, a panel for each model.

  Training is drawn as it was logged, and as a running mean over a tenth of the run.

  Args:
    panels: {'decoder': {'training': (steps, nats per token), 'validation': ...}, ...}; a curve
      of no steps is left out.
    path: of the PNG.
  """
  figure = Figure(figsize=(4.8 * len(panels), 4), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                   panels.items(), strict=True):
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    for name, (steps, values) in curves.items():
      if name == 'training':
        axes.plot(steps, values, color='#56B4E9', linewidth=0.6, alpha=0.5)
        span = max(len(values) // 10, 1)
        mean = np.convolve(values, np.full(span, 1 / span), mode='valid')
        axes.plot(steps[span // 2:][:len(mean)], mean, color='#0072B2', label=name)
      else:
        axes.plot(steps, values, color='#D55E00', marker='o', markersize=4, label=name)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel('step')
    axes.set_ylabel('loss, nats per token')
    if curves:
      axes.legend(frameon=False, fontsize=9)
    trim_axes(axes)
  save_figure(figure, path)


def plot_gates(curves: Mapping[str, GainCurve], path: Path) -> None:
  """Gain against the fraction of places that are augmented, for every gate."""
  figure = Figure(figsize=(7, 5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for (name, curve), colour in zip(curves.items(), COLOURS.values(), strict=False):
    axes.plot(curve.fractions, 1e3 * curve.gain, color=colour, label=f'{name} gate')
    axes.fill_between(curve.fractions, 1e3 * curve.low, 1e3 * curve.high, color=colour, alpha=0.15,
                      linewidth=0)
  axes.set_xlabel('fraction of places that are augmented')
  axes.set_ylabel('mean gain of a place, millinats on the tokens ahead')
  axes.legend(frameon=False)
  trim_axes(axes)
  save_figure(figure, path)


def trim_axes(axes: Axes) -> None:
  """Takes away the frame, and draws a light grid behind the data."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#DDDDDD', linewidth=0.6)
  axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a figure as a PNG, whole or not at all."""
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=DPI, format='png')
  write_whole(path, buffer.getvalue())
