"""Tries experts on prompts, as they are used: what each saves on the tokens that follow.

Every batch of prompts is read once. Each way of attaching experts then makes its latents from the
same state and scores the same tokens, so differences are paired.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from latent_deliberation.evaluation.headless import Axes, Figure, FigureCanvasAgg
from latent_deliberation.evaluation.perplexity import FEWEST_TEXTS, bootstrap_weights
from latent_deliberation.evaluation.plots import save_figure, trim_axes
from latent_deliberation.experts.attach import Experts, Mix
from latent_deliberation.experts.routing import Query, Router
from latent_deliberation.experts.texts import Cut
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.progress import counted
from latent_deliberation.tables import format_estimate, markdown_table

SAMPLES = 2000  # draws of a bootstrap
TIMED = 8  # decoded tokens that are timed


@dataclasses.dataclass(frozen=True)
class Trial:
  """Scores of prompts.

  Attributes:
    cuts: the n prompts.
    names: names of the C ways of attaching experts; the plain decoder is none of them.
    saved: float64 [n, C], nats that each way saves on the tokens after a prompt.
    plain: float64 [n], nats of these tokens by the plain decoder.
    scores: router -> float64 [n, E], its scores.
    seconds: seconds for a batch of prompts: of each router, of a pass of one expert, and of a
      decoded token, all without compilation.
  """
  cuts: Sequence[Cut]
  names: Sequence[str]
  saved: np.ndarray
  plain: np.ndarray
  scores: Mapping[str, np.ndarray]
  seconds: Mapping[str, float]

  @property
  def domains(self) -> list[str]:
    """Names of the texts, in the order in which they were given."""
    return list(dict.fromkeys(cut.domain for cut in self.cuts))

  def of(self, domain: str) -> np.ndarray:
    """Returns which prompts are of a text, bool [n]."""
    return np.array([cut.domain == domain for cut in self.cuts])


def try_mixes(experts: Experts, cuts: Sequence[Cut], mixes: Mapping[str, Mix],
              routers: Mapping[str, Router] | None = None, batch_size: int = 8) -> Trial:
  """Scores prompts with each mix of experts, and has routers score them.

  Args:
    experts: attached experts.
    cuts: the prompts.
    mixes: weights by name, for each way of attaching experts.
    routers: routers by name.
    batch_size: prompts that are read together.

  Raises:
    UserError: a prompt is too short for latents; or see `Experts.mix`, such as for several experts
      that do not add up.
  """
  mixes = {name: experts.mix(mix) for name, mix in mixes.items()}
  for mix in mixes.values():
    experts.check_lengths([mix] * len(cuts), np.array([len(cut.ids) for cut in cuts]))
  engine, routers = experts.engine, routers or {}
  # Of similar lengths, so that little padding is read. The order is undone at the end.
  order = np.argsort([len(cut.ids) for cut in cuts], kind='stable')
  parts = [order[first:first + batch_size] for first in range(0, len(order), batch_size)]
  plain = np.zeros(len(cuts))
  saved = np.zeros((len(cuts), len(mixes)))
  scores: dict[str, np.ndarray] = {}
  seconds: dict[str, list[float]] = {name: [] for name in routers}
  for part in counted(parts, 'scoring prompts'):
    batch = [cuts[number] for number in part]
    # The last batch is filled up, so that no other program is compiled.
    batch += batch[:1] * (batch_size - len(batch))
    state = engine.read([cut.ids for cut in batch])
    ahead = [cut.ahead for cut in batch]
    before = _nats(engine.score_on(state, ahead))
    plain[part] = -before[:len(part)]
    for column, mix in enumerate(mixes.values()):
      latents = experts.augment(state, [mix] * batch_size)
      after = _nats(engine.score_on(engine.attach(state, latents), ahead))
      saved[part, column] = (after - before)[:len(part)]
    query = Query([cut.prompt for cut in batch], np.asarray(state.hidden), state)
    for name, router in routers.items():
      begun = time.perf_counter()
      found = router.scores(query)
      seconds[name].append(time.perf_counter() - begun)
      scores.setdefault(name, np.full((len(cuts), found.shape[1]), -np.inf))[part] = (
          found[:len(part)])
  # The first batch compiles.
  taken = {name: float(np.median(values[1:] or values)) for name, values in seconds.items()}
  return Trial(cuts, list(mixes), saved, plain, scores,
               {**taken, **_time_passes(experts, state, mixes)})


def _nats(rows: Sequence[np.ndarray]) -> np.ndarray:
  return np.array([row.sum(dtype=np.float64) for row in rows])


def _time_passes(experts: Experts, state: State, mixes: Mapping[str, Mix],
                 repeats: int = 5) -> dict[str, float]:
  """Returns the seconds of a pass of one expert and of a decoded token, for a batch."""
  engine, batch = experts.engine, len(state.position)
  one = next((mix for mix in mixes.values() if len(mix) == 1), None)

  def timed(work: Any) -> float:
    taken = []
    for _ in range(1 + repeats):
      begun = time.perf_counter()
      jax.block_until_ready(work())
      taken.append(time.perf_counter() - begun)
    return float(np.median(taken[1:]))

  def decode(tokens: int) -> Any:
    return [each.tokens for each in generate(engine, state, DecodingOptions(tokens))]

  # The first token needs no pass, and copying the state is in both.
  found = {'decoded token': (timed(lambda: decode(TIMED + 1)) - timed(lambda: decode(1))) / TIMED}
  if one:
    found['expert pass'] = timed(lambda: experts.augment(state, [one] * batch).logits)
  return found


def interval_of(values: np.ndarray, documents: np.ndarray, samples: int = SAMPLES,
                seed: int = 0) -> dict[str, Any]:
  """Returns the mean of values and its 95% interval, a bootstrap over documents.

  'ci95' is None over fewer than FEWEST_TEXTS documents.

  Args:
    values: float [n].
    documents: labels [n]; values of one document are not independent.
  """
  _, member = np.unique(documents, return_inverse=True)
  sums, counts = np.bincount(member, values), np.bincount(member)
  result = {'mean': float(values.mean()), 'prompts': len(values), 'ci95': None}
  if len(counts) < FEWEST_TEXTS:
    return result
  drawn = bootstrap_weights(len(counts), samples, seed)
  means = (drawn @ sums) / (drawn @ counts)
  return {**result, 'ci95': np.percentile(means, (2.5, 97.5)).tolist()}


def documents_of_cuts(cuts: Sequence[Cut]) -> np.ndarray:
  """Returns a label for the document of each prompt."""
  return np.array([f'{cut.domain}/{cut.document}' for cut in cuts])


def format_interval(found: Mapping[str, Any]) -> str:
  """Returns a mean and its interval as a cell of a table."""
  return format_estimate(found['mean'], found['ci95'])


# --- Comparison on one text ---


def compare_experts(trial: Trial) -> dict[str, Any]:
  """Returns what each way of attaching experts saves on each text, as JSON values."""
  documents = documents_of_cuts(trial.cuts)
  result = {}
  for domain in trial.domains:
    rows = trial.of(domain)
    result[domain] = {name: interval_of(trial.saved[rows, column], documents[rows])
                      for column, name in enumerate(trial.names)}
  return {'ahead': len(trial.cuts[0].ahead), 'saved': result,
          'plain_nats': {domain: float(trial.plain[trial.of(domain)].mean())
                         for domain in trial.domains}}


def format_comparison(result: Mapping[str, Any]) -> str:
  """Returns the comparison as a table of GitHub Markdown."""
  domains = list(result['saved'])
  names = list(result['saved'][domains[0]])
  rows = [[name, *(format_interval(result['saved'][domain][name]) for domain in domains)]
          for name in names]
  return '\n\n'.join([
      markdown_table(['expert', *domains], rows),
      f'Nats saved on the {result["ahead"]} tokens after a prompt, against the plain decoder. '
      'Above zero is better. In brackets: 95% intervals, bootstrap over documents.'])


def plot_comparison(result: Mapping[str, Any], path: Path) -> None:
  """Draws what each expert saves on each text, with its interval, as a PNG."""
  figure = Figure(figsize=(1.5 + 3.2 * len(result['saved']), 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(result['saved']), squeeze=False, sharey=True)[0]
  for axes, (domain, found) in zip(panels, result['saved'].items(), strict=True):
    draw_intervals(axes, found)
    axes.set_title(domain, fontsize=10)
  panels[0].set_xlabel(f'nats saved on {result["ahead"]} tokens (above 0 is better)')
  save_figure(figure, path)
  logging.info('picture: %s', path)


def draw_intervals(axes: Axes, found: Mapping[str, Mapping[str, Any]]) -> None:
  """Draws means with intervals as a row for each name, from the top."""
  places = np.arange(len(found))[::-1]
  for place, each in zip(places, found.values(), strict=True):
    low, high = each['ci95'] or (each['mean'], each['mean'])
    axes.plot([low, high], [place, place], color='#0072B2', linewidth=2)
    axes.plot(each['mean'], place, 'o', color='#0072B2', markersize=6)
  axes.axvline(0, color='black', linewidth=1, linestyle='--')
  axes.set_yticks(places, labels=list(found))
  axes.margins(y=0.1)
  trim_axes(axes)
