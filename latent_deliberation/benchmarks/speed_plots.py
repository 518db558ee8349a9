"""Plots of speed: inference and a train step, against other ways and libraries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import COLOURS, save_figure, trim_axes


def plot_speed(result: Mapping[str, Any], path: Path) -> None:
  """Draws the speed of inference against transformers, and the cost of an augmentation.

  Args:
    result: result of `inference_speed.benchmark`.
    path: PNG to write.
  """
  figure = Figure(figsize=(11, 5), layout='constrained')
  FigureCanvasAgg(figure)
  speed, cost = figure.subplots(1, 2)

  # Left: ratios of speed, two bars a case.
  cases = list(result['decode_ratio_vs_transformers'])
  for name, colour, side in (('decode', COLOURS['own'], -0.2), ('prefill', COLOURS['zero'], 0.2)):
    ratios = result[f'{name}_ratio_vs_transformers']
    bars = speed.bar(np.arange(len(cases)) + side, [ratios[case] for case in cases], 0.38,
                     color=colour, label=name)
    speed.bar_label(bars, fmt='%.1f', fontsize=8)
  speed.axhline(1, color='black', linewidth=1, linestyle='--', label='transformers')
  speed.set_xticks(range(len(cases)), [case.replace('_batch', '\nbatch ') for case in cases])
  speed.set_ylabel('tokens/s over those of transformers')
  speed.legend(frameon=False)

  # Right: decode steps that an augmentation takes.
  costs = result['augmentation_in_decode_steps']
  names = [case.replace('_batch', ', batch ').replace('_latents', ', ') for case in costs]
  cost.barh(names, list(costs.values()), color=COLOURS['constant'])
  cost.invert_yaxis()
  cost.set_xlabel('decode steps that an augmentation takes (size, batch, latents)')
  cost.tick_params('y', labelsize=8)
  for axes in (speed, cost):
    trim_axes(axes)
  cost.grid(axis='x', color='#DDDDDD', linewidth=0.6)
  cost.grid(visible=False, axis='y')
  save_figure(figure, path)


def plot_step_ratios(result: Mapping[str, Any], path: Path) -> None:
  """Draws the time of the others over the time of ours.

  Args:
    result: result of `step_speed.benchmark`.
    path: PNG to write.
  """
  bars = [(f'{other}: {case.replace("_", " and ")}', ratio, COLOURS[colour])
          for kind, colour in (('step', 'own'), ('decoder', 'zero'))
          for case, measured in result[kind].items()
          for other, ratio in measured['over_ours'].items()]
  names, ratios, colours = zip(*bars, strict=True)
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.bar_label(axes.barh(names, ratios, color=colours), fmt='%.1f', fontsize=8, padding=2)
  axes.axvline(1, color='black', linewidth=1, linestyle='--')
  axes.invert_yaxis()
  axes.set_xlabel('time over ours')
  axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path)


def plot_harness(result: Mapping[str, Any], path: Path) -> None:
  """Draws items per second of each program, a panel for each task.

  Args:
    result: result of `harness_speed.benchmark`.
    path: PNG to write.
  """
  tasks = result['items_per_second']
  figure = Figure(figsize=(5 * len(tasks), 3.5), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (name, speeds) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(),
                                  strict=True):
    bars = axes.barh(list(speeds), list(speeds.values()),
                     color=['#999999', *[COLOURS['own']] * (len(speeds) - 1)])
    axes.bar_label(bars, fmt='%.1f', fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set_xlabel('items per second')
    axes.set_title(name, fontsize=11)
    axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path)
