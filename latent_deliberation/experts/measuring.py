"""Measures an expert: its scores with every control, what routers need to know, and both again.

A score is the change of the decoder's loss on held-out text, at the same places for every arm. It
is kept in the card with a 95% interval over texts.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.optimize
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.build import build_deliberator, load_frozen, open_frozen
from latent_deliberation.data.loading import validation_batches, validation_texts
from latent_deliberation.data.rows import positions_in_segments
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.evaluate import (
  HeldOut,
  place_batches,
  score_arms,
)
from latent_deliberation.evaluation.gating import (
  LearnedGate,
  Places,
  fit_and_hold_out,
  score_places,
)
from latent_deliberation.evaluation.perplexity import (
  FEWEST_TEXTS,
  FROZEN,
  OWN,
  AheadNLL,
  bootstrap_weights,
  check_paired,
  relative_change,
)
from latent_deliberation.experiment import EvaluationConfig, Experiment, bind
from latent_deliberation.experts.card import Card, numbers_of
from latent_deliberation.experts.package import Expert, Routing
from latent_deliberation.experts.routing import cosines
from latent_deliberation.paths import with_current_names
from latent_deliberation.sharding import MeshConfig, make_mesh

SCORED_WITH = ('batch_size', 'num_texts', 'rows_per_text')  # keys of `evaluation` kept with scores
ROUTING_ROWS = 2  # times as many rows as are scored, beyond those, for centroid and gain head
OWN_SHARE = 0.1  # of the texts that a decoder meets: a guess, for the odds before a text is read
LEAST_HARM = 1e-3  # nats; an expert that gains on general text, too, counts as harming by this
HOLDS_WITHIN = 0.02  # nats that a score may differ by when it is measured again: rounding
# Largest values that a card may ask for, since anybody may have written it.
_MOST = {'bootstrap_samples': 10_000, 'num_traces': 512, 'num_ahead': 512}


# --- Scores ---


def summarise_arms(arms: Mapping[str, AheadNLL], positions: tuple[int, ...], num_ahead: int,
                   samples: int = 2000) -> dict[str, Any]:
  """Returns the scores of a text as a card has them.

  'gain' has the nats that each arm saves at a place, summed over the first `num_ahead` tokens, with
  its interval: None where fewer than FEWEST_TEXTS texts reach all of them. 'all_positions' has the
  change of perplexity at each ahead position, as in a report.

  Args:
    arms: scores by arm, merged by text.
    positions: ahead positions to mark in a picture.
    num_ahead: number of ahead tokens of the training.
    samples: draws of the bootstrap.
  """
  frozen = arms[FROZEN]
  reached = np.count_nonzero(frozen.count, axis=0)
  changes = {name: relative_change(arm, frozen, samples) for name, arm in arms.items()}
  return {
      'texts': len(frozen.count), 'reached': reached.tolist(), 'positions': list(positions),
      'num_ahead': num_ahead, 'perplexity': np.exp(frozen.nll).tolist(),
      'gain': {name: saved_nats(arm, frozen, num_ahead, samples) for name, arm in arms.items()
               if name != FROZEN},
      'all_positions': {
          name: {'change_pct': change.percent.tolist(),
                 'ci95': np.stack([change.low, change.high], axis=1).tolist()}
          for name, change in changes.items()}}


def saved_nats(arm: AheadNLL, frozen: AheadNLL, num_ahead: int, samples: int = 2000,
               seed: int = 0) -> dict[str, Any]:
  """Returns the 'nats' that an arm saves at a place, and 'ci95', a paired bootstrap over texts."""
  check_paired({'arm': arm, FROZEN: frozen})
  saved, count = (frozen.total - arm.total)[:, :num_ahead], frozen.count[:, :num_ahead]
  nats = float((saved.sum(axis=0) / count.sum(axis=0)).sum())
  if np.count_nonzero(count, axis=0).min() < FEWEST_TEXTS:
    return {'nats': nats, 'ci95': None}
  weights = bootstrap_weights(len(count), samples, seed)
  drawn = ((weights @ saved) / np.maximum(weights @ count, 1)).sum(axis=1)
  return {'nats': nats, 'ci95': np.percentile(drawn, (2.5, 97.5)).tolist()}


def measure(experiment: Experiment, params: Params, soft_tokens: Params | None,
            decoder_params: Params, held_out: HeldOut, mesh: Mesh) -> dict[str, Any]:
  """Scores an expert and its controls on held-out text; returns what `summarise_arms` does.

  Args:
    experiment: configuration of the training, with the `evaluation` to do.
    params: parameters of the coprocessor.
    soft_tokens: those of constant soft tokens; None leaves this control out.
    decoder_params: the frozen weights.
    held_out: the text.
    mesh: devices.
  """
  arms = score_arms(experiment, params, soft_tokens, decoder_params, held_out.batches, mesh)
  config = experiment.evaluation
  return {**{key: getattr(config, key) for key in SCORED_WITH}, **summarise_arms(
      {name: arm.merged(held_out.texts) for name, arm in arms.items()}, config.positions,
      experiment.deliberation.num_ahead, config.bootstrap_samples)}


def on_mesh(params: Params, mesh: Mesh) -> Params:
  """Puts parameters that are on one device on all devices of a mesh, whole."""
  return jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


# --- What routers need ---


def routed_batches(config: EvaluationConfig, num_rows: int) -> range:
  """Returns which batches of held-out rows tell routers about an expert.

  They come after the scored ones. Where fewer are left than are scored, all batches are taken.
  """
  scored = config.num_texts // config.batch_size
  last = min(num_rows // config.batch_size, (1 + ROUTING_ROWS) * scored)
  return range(scored if last >= 2 * scored else 0, last)


def find_places(experiment: Experiment, params: Params, decoder_params: Params,
                held_out: HeldOut, mesh: Mesh) -> Places:
  """Returns hidden states and gains at places of held-out text; see `routed_batches`."""
  config, rows = experiment.evaluation, held_out.rows
  routed = routed_batches(config, len(rows))
  batches = validation_batches(rows, routed.stop, config.batch_size, mesh, experiment.rules)
  labels = validation_texts(rows, routed.stop * config.batch_size, config.rows_per_text)
  deliberator = build_deliberator(experiment).with_traces(
      config.num_traces, experiment.deliberation.num_ahead)
  return score_places(
      deliberator, params, decoder_params,
      place_batches(batches[routed.start:], f'{FROZEN}, {OWN}', mesh, experiment.rules),
      labels[routed.start * config.batch_size:],
      loss_chunk=experiment.computation.loss_chunk, seed=experiment.seed, mesh=mesh,
      rules=experiment.rules, with_entropy=False)


def fit_routing(own: Places, general: Places) -> Routing:
  """Fits what routers know of an expert, from places of its own text and of general text.

  Raises:
    UserError: there are too few texts for a gain head.
  """
  # Texts of the two are different texts. The head sees as many places of either.
  number = min(len(own.gain), len(general.gain))
  both = [_drawn(own, number), _drawn(general, number)]
  both[1] = dataclasses.replace(both[1], text=both[1].text + own.text.max() + 1)
  head = _fit_head(Places(*(
      np.concatenate([getattr(places, field.name) for places in both])
      for field in dataclasses.fields(Places))), np.repeat([1.0, 0.0], number))
  origin = general.hidden.mean(axis=0)
  centroid = own.hidden.mean(axis=0) - origin
  centroid = centroid / max(float(np.linalg.norm(centroid)), 1e-12)
  threshold = _separate(*(cosines(places.hidden, origin, centroid) for places in (own, general)))
  return Routing(centroid, origin, threshold, head.weight.astype(np.float32), head.bias)


def _fit_head(places: Places, is_own: np.ndarray) -> LearnedGate:
  """Fits a linear score that is above zero where the expert is expected to save nats.

  The gain of a single place is mostly noise, and whose text it is in is known. So the head gives
  the log-odds that a place is in own text. The expert saves nats on average where the odds are
  above harm / gain, with its mean harm on general text and its mean gain on its own. The score is
  what the log-odds are above that.

  Args:
    places: places of both texts.
    is_own: float [n], 1 for places of own text and 0 for others.
  """
  head, held_out = fit_and_hold_out(dataclasses.replace(places, gain=is_own))
  slope, level = _log_odds(held_out, is_own)
  gain, harm = places.gain[is_own > 0].mean(), -places.gain[is_own == 0].mean()
  if gain <= 0:
    return LearnedGate(np.zeros_like(head.weight), -1.0)  # never chosen
  balance = np.log(max(harm, LEAST_HARM) / gain) + np.log(1 / OWN_SHARE - 1)
  return LearnedGate(slope * head.weight, float(slope * head.bias + level - balance))


def _log_odds(scores: np.ndarray, is_own: np.ndarray) -> tuple[float, float]:
  """Returns slope and level of the log-odds over scores [n] (Platt 1999), for even numbers."""
  # The targets are not quite 1 and 0, so texts that are told apart without an error have odds, too.
  target = (is_own * len(is_own) / 2 + 1) / (len(is_own) / 2 + 2)

  def loss(line: np.ndarray) -> float:
    odds = line[0] * scores + line[1]
    return float(np.mean(np.logaddexp(0, odds) - target * odds))

  slope, level = scipy.optimize.minimize(loss, (1.0, 0.0)).x
  return (float(slope), float(level)) if slope > 0 else (0.0, 0.0)  # else nothing tells them apart


def _drawn(places: Places, number: int) -> Places:
  chosen = np.zeros(len(places.gain), bool)
  chosen[np.random.default_rng(0).permutation(len(chosen))[:number]] = True
  return places.where(chosen)


def _separate(own: np.ndarray, other: np.ndarray) -> float:
  """Returns the threshold that most of `own` are above and most of `other` are not."""
  candidates = np.unique(np.concatenate([own, other]))
  own, other = np.sort(own), np.sort(other)
  right = (1 - np.searchsorted(own, candidates, 'right') / len(own)
           + np.searchsorted(other, candidates, 'right') / len(other))
  return float(candidates[np.argmax(right)])


# --- Again ---


def portable(experiment: Experiment, name: str) -> dict[str, Any]:
  """Returns an experiment for a card: JSON values, without paths and devices of this machine.

  An 'auto' of dtype or activations becomes what it stands for here: scores differ by dtype.
  """
  data, computation = experiment.data, experiment.computation
  resolved = computation.on(jax.default_backend())
  if data.source == 'text':
    data = dataclasses.replace(data, files=(name,))
  experiment = dataclasses.replace(
      experiment, data=dataclasses.replace(data, vocabulary_path='', data_dir=''),
      mesh=MeshConfig(), computation=dataclasses.replace(
          computation, dtype=resolved.dtype, activations=resolved.activations),
      decoder_from=base_name(experiment.decoder_from),
      coprocessor_from=base_name(experiment.coprocessor_from))
  return json.loads(json.dumps(dataclasses.asdict(experiment)))


def base_name(decoder: str) -> str:
  """Returns the name of a decoder without the directories before it; 'hf://ORG/NAME' stays."""
  return decoder if decoder.startswith('hf:/') else Path(decoder).name


def experiment_of(card: Card) -> Experiment:
  """Returns the experiment of a card. Raises UserError where its recipe has none."""
  settings = card.recipe.get('settings')
  if not isinstance(settings, Mapping):
    raise UserError(f'the card of {card.name} has no settings in its recipe: its scores cannot be '
                    'measured again')
  return bind(with_current_names(settings), where=f'settings of {card.name}')


def as_held_out(sample: Mapping[str, np.ndarray], batch_size: int) -> HeldOut:
  """Returns the rows of a package's sample as text to score."""
  tokens, segments = sample['tokens'], sample['segments']
  if len(tokens) != len(sample['texts']) or len(tokens) % batch_size or (
      tokens.shape != segments.shape or min(tokens.min(), segments.min()) < 0):
    raise UserError(f'the sample has rows {tokens.shape} and {len(sample["texts"])} texts, for '
                    f'batches of {batch_size}: add the expert again')
  batch = Batch(tokens, segments, positions_in_segments(segments))
  return HeldOut(None, [Batch(*(part[first:first + batch_size] for part in (
      batch.tokens, batch.segments, batch.positions)))
                        for first in range(0, len(tokens), batch_size)], sample['texts'])


def measure_again(expert: Expert, sample: Mapping[str, Mapping[str, np.ndarray]],
                  decoder_dir: Path) -> dict[str, dict[str, Any]]:
  """Measures the scores of a card again, on the sample of its package and one device.

  Constant soft tokens are not in the package, so this control is left out.

  Args:
    expert: the expert.
    sample: see `package.read_sample`.
    decoder_dir: its decoder.

  Returns: name of a text -> 'card' and 'now', both with nats by arm, and 'holds'.

  Raises:
    UserError: the decoder or the sample does not fit the expert, or its card asks for too much.
  """
  # The coprocessor itself says how its latents are made.
  experiment = dataclasses.replace(
      experiment_of(expert.card), deliberation=expert.coprocessor.config)
  for key, most in _MOST.items():
    check_integer(f'evaluation.{key} in the card of {expert.card.name}',
                  getattr(experiment.evaluation, key), 1, most)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])  # a sample need not divide over more
  checkpoint = open_frozen(experiment.decoder, decoder_dir)
  decoder_params, found = load_frozen(experiment, checkpoint, mesh)
  if found != expert.card.base['fingerprint']:
    raise UserError(f'the decoder has the fingerprint {found}, and {expert.card.name} was made for '
                    f'{expert.card.base["fingerprint"]}: give that decoder')
  results = {}
  for name, rows in sample.items():
    if rows['tokens'].max() >= experiment.decoder.vocab_size:
      raise UserError(f'the sample of {expert.card.name} has tokens that its decoder has not: do '
                      'not use this package')
    # The places depend on the rows that were scored together.
    known = expert.card.scores.get(name)
    known = known if isinstance(known, Mapping) else {}
    batch_size = known.get('batch_size', experiment.evaluation.batch_size)
    check_integer(f'scores.{name}.batch_size', batch_size, 2)
    held_out = as_held_out(rows, batch_size)
    now = measure(experiment, on_mesh(expert.coprocessor.params, mesh), None, decoder_params,
                  held_out, mesh)
    results[name] = compare_scores(known, now)
  return results


def compare_scores(card: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
  """Compares the scores of a card with those of now, on the same rows and places.

  They hold if they are the same but for rounding: the nats of each arm, and the ends of its
  interval.
  """
  result = {'card': {}, 'now': {}, 'holds': True}
  for arm, found in now['gain'].items():
    known, again = (numbers_of(scores, arm) for scores in (card, now))
    result['now'][arm] = found['nats']
    if known is None:
      continue
    result['card'][arm] = known[0]
    if len(known) != len(again) or not np.allclose(known, again, rtol=0, atol=HOLDS_WITHIN):
      result['holds'] = False
  # A text that the card has no scores of says nothing in its favour.
  result['holds'] = result['holds'] and bool(result['card'])
  return result
