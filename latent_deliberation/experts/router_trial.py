"""Judges routers on prompts of several domains: what each saves, and what the best choice would.

The references are the plain decoder ('none'), the best expert of each prompt or none ('oracle'),
the best expert of each text or none ('best by text'), the expert that is named after the prompt's
domain ('by hand'), the one that saves most over all prompts ('best single'), and all together with
equal weights ('average of all').

Regret is what a choice saves less than the oracle, in nats a prompt. The oracle sees the answer of
every prompt, and so gains from noise, too: no router reaches it. 'Best by text' takes the same for
all prompts of a text, which leaves little to noise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import save_figure
from latent_deliberation.experts.attach import Experts, Mix
from latent_deliberation.experts.card import NONE
from latent_deliberation.experts.routing import ROUTERS, choose, make_router
from latent_deliberation.experts.texts import Cut, mix_cuts
from latent_deliberation.experts.trial import (
  Trial,
  documents_of_cuts,
  draw_intervals,
  format_interval,
  interval_of,
  try_mixes,
)
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.tables import markdown_table

ORACLE, BY_TEXT, BY_HAND, SINGLE, AVERAGE = (
    'oracle', 'best by text', 'by hand', 'best single', 'average of all')
REFERENCES = (NONE, ORACLE, BY_TEXT, BY_HAND, SINGLE, AVERAGE)
TARGET = 0.25  # of the regret of none, at most, for a router that is good enough


@dataclasses.dataclass(frozen=True)
class Choices:
  """What a way of choosing takes for each of n prompts.

  Attributes:
    expert: int [n], number of the expert; -1 for none.
    saved: float [n], nats that it saves.
  """
  expert: np.ndarray
  saved: np.ndarray


def judge_routers(experts: Experts, cuts: Sequence[Cut], routers: Sequence[str] = tuple(ROUTERS),
                  batch_size: int = 8) -> tuple[Trial, dict[str, Any]]:
  """Scores prompts with every expert and every router; returns the trial and its judgement.

  Args:
    experts: experts to choose among.
    cuts: prompts. A domain that has the name of an expert is its own; the others are of no expert.
    routers: names of routers.
    batch_size: prompts that are read together.
  """
  names = experts.names
  mixes: dict[str, Mix] = {name: {name: 1.0} for name in names}
  if experts.add_up:
    mixes[AVERAGE] = {name: 1 / len(names) for name in names}
  made = {name: make_router(name, experts.known()) for name in routers}
  trial = try_mixes(experts, cuts, mixes, made, batch_size)
  return trial, summarise_trial(trial, names, {
      name: choose(router, trial.scores[name]) for name, router in made.items()})


def summarise_trial(trial: Trial, names: Sequence[str],
                    chosen: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
  """Returns the judgement as JSON values.

  Args:
    trial: scores of each expert alone, and of AVERAGE where experts add up.
    names: names of the experts.
    chosen: router -> expert that it chooses for each prompt, or None.
  """
  ways = _references(trial, names)
  for router, picks in chosen.items():
    expert = np.array([-1 if pick is None else names.index(pick) for pick in picks])
    ways[router] = Choices(expert, _pick(trial.saved, expert))
  documents = documents_of_cuts(trial.cuts)
  oracle, by_text = ways[ORACLE].saved, float(ways[BY_TEXT].saved.mean())
  result: dict[str, Any] = {
      'experts': list(names), 'domains': trial.domains, 'prompts': len(trial.cuts),
      'ahead': len(trial.cuts[0].ahead), 'plain_nats': float(trial.plain.mean()),
      'seconds': dict(trial.seconds), 'each_prompt': _each_prompt(trial, ways, names), 'ways': {}}
  none = float(oracle.mean())
  for name, way in ways.items():
    by_domain = {domain: interval_of(way.saved[rows], documents[rows])
                 for domain in trial.domains if (rows := trial.of(domain)).any()}
    harmed = [domain for domain, found in by_domain.items()
              if found['ci95'] is not None and found['ci95'][1] < 0]
    regret = interval_of(oracle - way.saved, documents)
    reaches = none > 0 and regret['mean'] <= TARGET * none and not harmed
    if reaches and any(found['ci95'] is None for found in by_domain.values()):
      reaches = None  # harm on a text of few documents cannot be told from noise
    result['ways'][name] = {
        'saved': interval_of(way.saved, documents), 'regret': regret, 'by_domain': by_domain,
        'confusion': _confusion(trial, way.expert, names), 'harmed': harmed,
        'share_of_none': regret['mean'] / none if none > 0 else None,
        'share_by_text': 1 - float(way.saved.mean()) / by_text if by_text > 0 else None,
        'reaches_target': reaches}
  foreign = np.array([cut.domain not in names for cut in trial.cuts])
  if foreign.any():
    for name, way in ways.items():
      result['ways'][name]['of_no_domain'] = interval_of(way.saved[foreign], documents[foreign])
  return result


def _references(trial: Trial, names: Sequence[str]) -> dict[str, Choices]:
  count = len(trial.cuts)
  alone = trial.saved[:, [trial.names.index(name) for name in names]]
  best = np.where(alone.max(axis=1) > 0, alone.argmax(axis=1), -1)
  hand = np.array([names.index(cut.domain) if cut.domain in names else -1 for cut in trial.cuts])
  single = np.full(count, int(alone.mean(axis=0).argmax()))
  none, by_text = np.full(count, -1), np.full(count, -1)
  for domain in trial.domains:
    rows = trial.of(domain)
    means = alone[rows].mean(axis=0)
    by_text[rows] = means.argmax() if means.max() > 0 else -1
  ways = {NONE: none, ORACLE: best, BY_TEXT: by_text, BY_HAND: hand, SINGLE: single}
  found = {name: Choices(expert, _pick(alone, expert)) for name, expert in ways.items()}
  if AVERAGE in trial.names:
    found[AVERAGE] = Choices(np.full(count, -2), trial.saved[:, trial.names.index(AVERAGE)])
  return found


def _each_prompt(trial: Trial, ways: Mapping[str, Choices],
                 names: Sequence[str]) -> dict[str, Any]:
  """Returns what each expert saves on each prompt, and what each way takes there; None for none."""
  return {
      'document': documents_of_cuts(trial.cuts).tolist(), 'plain': trial.plain.round(4).tolist(),
      'saved': {name: saved.round(4).tolist()
                for name, saved in zip(trial.names, trial.saved.T, strict=True)},
      'chosen': {name: [names[number] if number >= 0 else None for number in way.expert.tolist()]
                 for name, way in ways.items() if name != AVERAGE}}


def _pick(saved: np.ndarray, expert: np.ndarray) -> np.ndarray:
  """Returns what the chosen experts save; 0 where none is chosen."""
  return np.where(expert >= 0, saved[np.arange(len(saved)), np.maximum(expert, 0)], 0.0)


def _confusion(trial: Trial, expert: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, int]]:
  """Returns domain -> what was chosen -> number of prompts."""
  labels = [*names, NONE]
  return {domain: {label: int(np.sum(trial.of(domain) & (expert == number)))
                   for number, label in zip((*range(len(names)), -1), labels, strict=True)}
          for domain in trial.domains}


# --- Two experts at once ---


def judge_pairs(experts: Experts, cuts: Mapping[str, Sequence[Cut]],
                pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer,
                batch_size: int = 8) -> dict[str, Any]:
  """Scores the sum of two experts on prompts with a passage of each one's text, against each alone.

  Args:
    cuts: prompts by domain.
    pairs: names of two experts that are domains, too.
  """
  result = {}
  for one, other in pairs:
    mixed = mix_cuts(cuts[one], cuts[other], tokenizer)
    both = {f'{one} + {other}': {one: 1.0, other: 1.0},
            f'half of {one} + half of {other}': {one: 0.5, other: 0.5}}
    trial = try_mixes(experts, mixed, {one: {one: 1.0}, other: {other: 1.0}, **both},
                      batch_size=batch_size)
    documents = documents_of_cuts(mixed)
    columns = dict(zip(trial.names, trial.saved.T, strict=True))
    found = {name: interval_of(saved, documents) for name, saved in columns.items()}
    found['above the better one'] = {
        name: interval_of(columns[name] - max(columns[one], columns[other], key=np.mean), documents)
        for name in both}
    result[f'{one}+{other}'] = found
  return result


# --- For people ---


def format_trial(result: Mapping[str, Any]) -> str:
  """Returns the judgement as a page of GitHub Markdown."""
  domains = result['domains']
  saved = [[name, format_interval(way['saved']), format_interval(way['regret']),
            *('-' if way[share] is None else f'{100 * way[share]:.0f}%'
              for share in ('share_of_none', 'share_by_text')),
            *(format_interval(way['by_domain'][domain]) for domain in domains),
            {True: 'yes', False: 'no', None: 'not shown'}[way['reaches_target']]]
           for name, way in result['ways'].items()]
  header = ['choice', 'saved', 'regret', 'of none', 'by text', *domains, 'target']
  parts = [
      '# Which expert for which text', markdown_table(header, saved),
      f'Nats saved on the {result["ahead"]} tokens after a prompt, against the plain decoder, with '
      f'95% intervals (bootstrap over documents). There are {result["prompts"]} prompts. Regret is '
      'what a choice saves less than the oracle, which takes the best expert of each prompt or '
      'none. It sees the answer, and so gains from noise, too. "Best by text" takes one for all '
      'prompts of a text. "Of none" and "by text" are the regret against these two, as shares of '
      f'that of none. The target is at most {TARGET:.0%} of none, and no text that is worse than '
      'with none beyond its interval; it is not shown where a text has no interval.']
  if any('of_no_domain' in way for way in result['ways'].values()):
    parts += ['## Text of no expert', markdown_table(
        ['choice', 'saved'], [[name, format_interval(way['of_no_domain'])]
                              for name, way in result['ways'].items()])]
  labels = [*result['experts'], NONE]
  for name, way in result['ways'].items():
    if name in REFERENCES:
      continue
    parts += [f'## Chosen by {name}', markdown_table(
        ['text', *labels], [[domain, *(str(row[label]) for label in labels)]
                            for domain, row in way['confusion'].items()])]
  if result.get('pairs'):
    parts += ['## Two experts on mixed text', *(_format_pair(pair, found)
                                                for pair, found in result['pairs'].items())]
  token = result['seconds'].get('decoded token')  # an older trial did not time it
  parts += ['## Cost', markdown_table(
      ['what', 'milliseconds for a batch', 'in decoded tokens'],
      [[name, f'{1e3 * seconds:.2f}', f'{seconds / token:.2f}' if token else '-']
       for name, seconds in result['seconds'].items()])]
  return '\n\n'.join(parts) + '\n'


def _format_pair(pair: str, found: Mapping[str, Any]) -> str:
  rows = [[name, format_interval(each), format_interval(found['above the better one'][name])
           if name in found['above the better one'] else '-']
          for name, each in found.items() if name != 'above the better one']
  return markdown_table([pair, 'saved', 'above the better one alone'], rows)


def plot_trial(result: Mapping[str, Any], path: Path) -> None:
  """Draws what each choice saves, and what each router takes for each text, as a PNG."""
  routers = [name for name in result['ways'] if name not in REFERENCES]
  figure = Figure(figsize=(5 + 3.4 * len(routers), 4.6), layout='constrained')
  FigureCanvasAgg(figure)
  first, *others = figure.subplots(1, 1 + len(routers), squeeze=False, width_ratios=[
      1.4, *[1] * len(routers)])[0]
  draw_intervals(first, {name: way['saved'] for name, way in result['ways'].items()})
  first.set_xlabel(f'nats saved on {result["ahead"]} tokens (above 0 is better)')
  labels = [*result['experts'], NONE]
  for axes, name in zip(others, routers, strict=True):
    table = np.array([[row[label] for label in labels]
                      for row in result['ways'][name]['confusion'].values()], float)
    table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(table, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(range(len(labels)), labels=labels, rotation=90)
    axes.set_yticks(range(len(result['domains'])), labels=result['domains'])
    axes.set_title(f'chosen by {name}', fontsize=10)
  for axes in others[:1]:
    axes.set_ylabel('text of the prompt')
  save_figure(figure, path)
