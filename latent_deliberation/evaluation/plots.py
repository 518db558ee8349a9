"""Pictures of a report: its curves, and who may attend to whom.

Each is a PNG, written whole or not at all. The picture of attention is made from the masks of the
model.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Batch
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.traces import place
from latent_deliberation.evaluation.headless import (
  Axes,
  Figure,
  FigureCanvasAgg,
  ListedColormap,
  MaxNLocator,
  Patch,
)
from latent_deliberation.evaluation.perplexity import (
  CONSTANT,
  FEWEST_TEXTS,
  FROZEN,
  OWN,
  SHUFFLED,
  ZERO,
)
from latent_deliberation.evaluation.report import LABELS, texts_at
from latent_deliberation.files import write_whole
from latent_deliberation.model.attention import AttentionMaskSpec, cached_mask, fresh_mask

DPI = 130
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {OWN: '#0072B2', SHUFFLED: '#D55E00', CONSTANT: '#009E73', ZERO: '#CC79A7'}
MARKERS = {OWN: 'o', SHUFFLED: 's', CONSTANT: '^', ZERO: 'D'}


def plot_changes(summary: Mapping[str, Any], path: Path) -> None:
  """Draws the change of perplexity by ahead position for every arm, with 95% intervals.

  There is no interval where too few texts reach the position. If another arm changes far more than
  own latents, a second panel shows own latents close up.

  Args:
    summary: result of `report.summarise`, or the content of a report.json.
    path: file of the PNG.
  """
  is_judged = np.array(texts_at(summary)) >= FEWEST_TEXTS
  arms = {name: _curve(arm, is_judged) for name, arm in summary['all_positions'].items()
          if name != FROZEN}
  # A second panel where other arms would flatten own latents.
  low, high = _extent(arms.values())
  own_low, own_high = _extent([arms['own']] if 'own' in arms else arms.values())
  wide = high - low > 3 * (own_high - own_low)
  figure = Figure(figsize=(11 if wide else 7, 5), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
  for axes in panels:
    _draw_changes(axes, arms, summary)
  panels[0].set_ylabel('change of perplexity, % (below 0 is better)')
  if wide:
    # Linear within the range of own latents, logarithmic beyond it.
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


def _curve(arm: Mapping[str, Any], is_judged: np.ndarray) -> dict[str, Any]:
  """Returns changes and intervals of an arm; an interval over too few texts has no width."""
  change = np.array(arm['change_pct'])
  return {'change_pct': change,
          'ci95': np.where(is_judged[:, None], arm['ci95'], change[:, None])}


def _extent(arms: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
  """Returns the lowest and highest end of all intervals, at least 0.1% either side of zero."""
  ends = np.concatenate([(-0.1, 0.1), *(np.ravel(arm['ci95']) for arm in arms)])
  return float(ends.min()), float(ends.max())


def _draw_changes(axes: Axes, arms: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
  for name, arm in arms.items():
    ahead = np.arange(1, len(arm['change_pct']) + 1)
    low, high = np.transpose(arm['ci95'])
    axes.fill_between(ahead, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.plot(ahead, arm['change_pct'], color=COLOURS[name], marker=MARKERS[name], markersize=5,
              markevery=[at - 1 for at in summary['positions']], label=LABELS[name])
  # The frozen decoder is the zero line.
  axes.axhline(0, color='black', linewidth=1, linestyle='--', label=LABELS[FROZEN])
  axes.axvline(summary['num_ahead'], color='#666666', linewidth=1, linestyle=':',
               label=f'last ahead token of training ({summary["num_ahead"]})')
  axes.set_xscale('log', base=2)
  axes.set_xticks(summary['positions'], labels=[str(at) for at in summary['positions']])
  axes.minorticks_off()
  axes.set_xlabel('ahead position')
  trim_axes(axes)


Curve = tuple[Sequence[int], Sequence[float]]  # steps and values
GAINS = {'gain': 'gain: over the frozen decoder', 'content': "content: over another text's latents"}


def plot_training(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
  """Draws a training in a panel for each model: what latents gain by step, or the loss.

  The loss of training is drawn as it was logged, and as a running mean over a tenth of the run.

  Args:
    panels: {'decoder': {'training': curve, 'validation': curve}, ...}, in nats per token. A model
      with a curve 'gain' or 'content' has these drawn and no losses. Curves may be empty.
    path: file of the PNG.
  """
  figure = Figure(figsize=(4.8 * len(panels), 4), layout='constrained')
  FigureCanvasAgg(figure)
  first = None  # panel of gains, whose scale the others share
  for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                   panels.items(), strict=True):
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if set(curves) & set(GAINS):
      if first:
        axes.sharey(first)
      first = first or axes
      _draw_gains(axes, curves)
    else:
      _draw_losses(axes, curves)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel('step')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if curves:
      # Below the panel, since curves may be anywhere inside.
      axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=9)
    trim_axes(axes)
  save_figure(figure, path)


def _draw_gains(axes: Axes, curves: Mapping[str, Curve]) -> None:
  for (name, label), colour in zip(GAINS.items(), ('#0072B2', '#D55E00'), strict=True):
    if name in curves:
      axes.plot(*curves[name], color=colour, marker='o', markersize=4, label=label)
  axes.axhline(0, color='black', linewidth=1, linestyle='--')
  axes.margins(y=0.1)
  axes.set_ylabel('gain, nats per token (above 0 is better)')


def _draw_losses(axes: Axes, curves: Mapping[str, Curve]) -> None:
  for name, (steps, values) in curves.items():
    if name == 'training':
      # The logged loss is noisy, so it is faint below its running mean.
      axes.plot(steps, values, color='#56B4E9', linewidth=0.6, alpha=0.5)
      # A running mean, drawn at the middle of its span. A single point needs a marker.
      span = max(len(values) // 10, 1)
      mean = np.convolve(values, np.full(span, 1 / span), mode='valid')
      axes.plot(steps[span // 2:][:len(mean)], mean, color='#0072B2', label=name,
                marker='o' if len(mean) == 1 else '', markersize=4)
    else:
      axes.plot(steps, values, color='#D55E00', marker='o', markersize=4, label=name)
  axes.set_ylabel('loss, nats per token')


def plot_gates(result: Mapping[str, Any], path: Path) -> None:
  """Draws the gain of every gate against the fraction of places that are augmented.

  Args:
    result: content of a gate.json: 'curves' by gate, and the number of 'texts'.
    path: file of the PNG.
  """
  figure = Figure(figsize=(7, 5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for (name, curve), colour in zip(result['curves'].items(), COLOURS.values(), strict=False):
    # Gains are small, so they are shown in thousandths of a nat.
    gain, low, high = (1e3 * np.array(curve[field]) for field in ('gain', 'low', 'high'))
    axes.plot(curve['fractions'], gain, color=colour, label=f'{name} gate')
    if result['texts'] >= FEWEST_TEXTS:
      axes.fill_between(curve['fractions'], low, high, color=colour, alpha=0.15, linewidth=0)
  # As many places drawn by chance have that fraction of the gain of all places.
  everywhere = 1e3 * curve['gain'][-1]
  axes.plot([0, 1], [0, everywhere], color='black', linewidth=1, linestyle=':', label='chance')
  axes.axhline(0, color='black', linewidth=1, linestyle='--')
  if result['texts'] < FEWEST_TEXTS:
    axes.set_title(f'Too few texts for intervals: {result["texts"]}', fontsize=10)
  axes.set_xlabel('fraction of places that are augmented')
  axes.set_ylabel('mean gain of a place, millinats on the tokens ahead (above 0 is better)',
                  fontsize=9)
  axes.legend(frameon=False)
  trim_axes(axes)
  save_figure(figure, path)


def trim_axes(axes: Axes) -> None:
  """Removes the top and right of the frame, and draws a light grid under the data."""
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#DDDDDD', linewidth=0.6)
  axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
  """Writes a figure as a PNG, whole or not at all."""
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=DPI, format='png')
  write_whole(path, buffer.getvalue())


KINDS = {  # kinds of cells in the picture of attention, in Okabe and Ito's colours
  'nothing': '#F2F2F2',
  'trunk sees trunk': '#999999',
  'trace sees trunk': '#56B4E9',
  'trace sees its latents': '#E69F00',
  'trace sees its ahead tokens': '#009E73',
}
TRUNK_TRUNK, TRACE_TRUNK, TRACE_LATENT, TRACE_AHEAD = range(1, len(KINDS))
GLOBAL_WINDOW = 2**30  # of a global layer


def plot_attention(path: Path, latents: str = 'refining') -> None:
  """Draws an illustration of who may attend to whom, in layers without a window.

  It has a trunk of two documents and three traces, with two latents and three ahead tokens each.

  Args:
    path: file of the PNG.
    latents: 'paper', 'anchored' or 'refining'.
  """
  # A trunk a0 ... a7 b0 ... b5 with two anchors in a and one in b.
  segments, anchors = np.repeat([1, 2], [8, 6]), np.array([2, 4, 11])
  config = DeliberationConfig(num_latents=2, num_ahead=3, num_traces=3, latents=latents)
  coprocessor, decoder = attention_cells(segments, anchors, config)
  # Names of trunk tokens, of soft tokens, and of what the decoder reads in each trace.
  trunk = [f'{"ab"[segment - 1]}{position}' for segment, position in
           zip(segments, _positions(segments), strict=True)]
  soft = {f'trace\nat {trunk[anchor]}': ['s1', 's2'] for anchor in anchors}
  fed = {f'trace\nat {trunk[anchor]}': ['z1', 'z2', *trunk[anchor + 1:anchor + config.num_ahead]]
         for anchor in anchors}
  figure = Figure(figsize=(8.2, 10.8), layout='constrained')
  FigureCanvasAgg(figure)
  above, below = figure.subplots(2, 1, height_ratios=(len(coprocessor), len(decoder)))
  _draw_cells(above, coprocessor, soft, {'trunk': trunk, **soft})
  _draw_cells(below, decoder, {'trunk': trunk, **fed}, {'trunk': trunk, **fed})
  above.set_xlim(below.get_xlim())  # cells of one size
  above.set_title('Coprocessor: soft tokens s read the cache and become latents z', loc='left')
  where = 'replace the last tokens' if latents == 'refining' else 'follow the anchor'
  below.set_title(f'Decoder: latents z {where}, ahead tokens follow', loc='left')
  figure.legend(handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()],
                loc='outside lower center', ncols=3, frameon=False,
                title='Illustration: what a row may attend to in layers without a window. The '
                      'trunk packs two documents, a and b.')
  save_figure(figure, path)


def _draw_cells(axes: Axes, matrix: np.ndarray, rows: Mapping[str, list[str]],
                columns: Mapping[str, list[str]]) -> None:
  """Draws a cell for each query (row) and key (column); their names are given by group."""
  axes.pcolormesh(matrix, cmap=ListedColormap(KINDS.values()), vmin=-0.5, vmax=len(KINDS) - 0.5,
                  edgecolors='white', linewidth=1)
  axes.set(aspect='equal', ylim=(len(matrix), 0))
  row_names, column_names = sum(rows.values(), []), sum(columns.values(), [])
  axes.set_yticks(np.arange(len(row_names)) + 0.5, row_names, fontsize=8)
  axes.set_xticks(np.arange(len(column_names)) + 0.5, column_names, fontsize=8)
  axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
  axes.spines[:].set_visible(False)
  # Names of the groups of rows, and lines between groups.
  end = 0
  for name, members in rows.items():
    axes.text(-1.9, end + len(members) / 2, name, rotation=90, ha='center', va='center', fontsize=9)
    end += len(members)
    axes.hlines(end, 0, matrix.shape[1], color='black', linewidth=0.5)
  for end in np.cumsum([len(members) for members in columns.values()]):
    axes.vlines(end, 0, len(matrix), color='black', linewidth=0.5)


def attention_cells(segments: np.ndarray, anchors: np.ndarray,
                    config: DeliberationConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns who may attend to whom in the coprocessor's pass and in the decoder's second pass.

  Rows are queries, columns are keys, and a cell is an index into KINDS. The coprocessor's rows are
  the soft tokens of each trace. The decoder's rows are the trunk, then latents and ahead tokens of
  each trace. The last ahead token is left out, since it is only a target. Columns are the trunk,
  then the traces.

  Args:
    segments: [T] document of each trunk token, 1, 2, ... in order, without padding.
    anchors: [M] trunk indices.
    config: settings of deliberation.

  Returns:
    [M Z, T + M Z] and [T + M (Z + A - 1), T + M (Z + A - 1)].
  """
  trunk = jnp.asarray(segments, jnp.int32)[None]
  batch = Batch(tokens=trunk, segments=trunk, positions=jnp.asarray(_positions(segments))[None])
  placement = place(batch, jnp.asarray(anchors, jnp.int32)[None], config, config.num_ahead)
  coprocessor = _trace_cells(
    batch, placement.latent_positions, placement.segments, placement.coprocessor_prefix_length,
    config.num_latents)
  # The decoder reads latents and all ahead tokens but the last.
  fed = jnp.concatenate([placement.latent_positions, placement.ahead_positions[..., :-1]], axis=2)
  traces = _trace_cells(
    batch, fed, placement.segments, placement.decoder_prefix_length, config.num_latents)
  # Above the traces, the trunk sees itself. It never sees a trace.
  nothing_cached = jnp.zeros((1, 1), jnp.int32)
  allowed = AttentionMaskSpec(trunk[:, None], nothing_cached)
  prefill = fresh_mask(batch.positions[:, None], allowed, jnp.array(GLOBAL_WINDOW))[0, 0]
  decoder = np.zeros((traces.shape[1], traces.shape[1]), int)
  decoder[:len(segments), :len(segments)] = TRUNK_TRUNK * np.asarray(prefill)
  decoder[len(segments):] = traces
  return coprocessor, decoder


def _trace_cells(batch: Batch, positions: Array, segments: Array, prefix_length: Array,
                 num_latents: int) -> np.ndarray:
  """Returns the cells [M Q, T + M Q] of the traces of one text; `positions` is [1, M, Q]."""
  _, traces, length = positions.shape
  allowed = AttentionMaskSpec(jnp.broadcast_to(segments[..., None], positions.shape), prefix_length)
  window = jnp.array(GLOBAL_WINDOW)
  cached = cached_mask(positions, allowed, batch.positions, batch.segments, window)[0]
  fresh = fresh_mask(positions, allowed, window)[0]
  kinds = np.where(np.arange(length) < num_latents, TRACE_LATENT, TRACE_AHEAD)
  # A trace sees no other trace, so its own cells are blocks on the diagonal.
  own = np.zeros((traces, length, traces, length), int)
  each = np.arange(traces)
  own[each, :, each] = fresh * kinds
  size = traces * length
  return np.concatenate(
    [TRACE_TRUNK * np.asarray(cached).reshape(size, -1), own.reshape(size, size)], axis=1)


def _positions(segments: np.ndarray) -> np.ndarray:
  """Returns the index of each token within its document."""
  return (np.arange(len(segments)) - np.searchsorted(segments, segments)).astype(np.int32)
