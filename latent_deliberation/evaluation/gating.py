"""Fits gates, which say where latents are worth their cost before the coprocessor runs.

A gate gives every place in a text a score, from what the plain decoder knows there. A fraction of
all places, those with the highest scores, is augmented. The gain of a place is the fall of the
negative log-likelihood of the tokens ahead. It is measured at all places and counted at those that
are augmented. `inference.policy` turns a budget of decoded tokens into such a fraction.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.build import build_deliberator, load_frozen, open_frozen
from latent_deliberation.data.loading import check_rows_vocabulary
from latent_deliberation.deliberation.coprocessor_checkpoint import load_coprocessor
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.loss import entropy
from latent_deliberation.deliberation.traces import evaluation_keys, sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import find_trained, open_held_out, place_batches
from latent_deliberation.evaluation.perplexity import (
  FEWEST_TEXTS,
  FROZEN,
  OWN,
  arm_states,
  bootstrap_weights,
)
from latent_deliberation.evaluation.plots import plot_gates
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable, seal, whole_directory
from latent_deliberation.paths import GATE_FILE, GATE_WEIGHTS_FILE
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import check_batch, make_mesh

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of the features
FRACTIONS = tuple(np.round(np.linspace(0, 1, 21), 2).tolist())
PICTURE = 'gate.png'


@dataclasses.dataclass(frozen=True)
class Places:
  """Places in texts at which both the plain decoder and the augmented one were scored.

  Attributes:
    hidden: float32 [n, D] hidden state of the decoder.
    entropy: float64 [n] entropy of the decoder's next token, nats; NaN where it is not measured.
    gain: float64 [n] nats that latents save on the tokens ahead, summed.
    text: int [n] number of the text that holds the place.
  """
  hidden: np.ndarray
  entropy: np.ndarray
  gain: np.ndarray
  text: np.ndarray

  def where(self, chosen: np.ndarray) -> 'Places':
    """Returns the places where `chosen`, bool [n], is true."""
    return Places(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def score_places(deliberator: Deliberator, params: Params, decoder_params: Params,
                 batches: Iterable[Batch], labels: np.ndarray, *, loss_chunk: int, seed: int,
                 mesh: Mesh, rules: Mapping[str, Sequence[str]],
                 with_entropy: bool = True) -> Places:
  """Scores the plain decoder and own latents at places drawn from every text.

  Args:
    deliberator: decoder and coprocessor; its config says how many places a row has.
    params: weights of the coprocessor.
    decoder_params: weights of the decoder.
    batches: packed rows.
    labels: int [rows of all batches] number of the text that each row belongs to.
    loss_chunk: targets of a row whose logits exist at the same time.
    seed: seed of the draw.
    mesh: devices to compute on.
    rules: logical axis rules.
    with_entropy: whether to measure the entropy at each place, which takes the whole output head.
  """
  def score(params: Params, decoder_params: Params, batch: Batch, index: Array) -> tuple:
    keys = evaluation_keys(seed, index, batch)
    cap = deliberator.decoder.config.final_softcap
    with nn.logical_axis_rules(tuple(rules.items())):
      traces = sample_traces(keys, batch, deliberator.config).replace(delay=None)
      # Both arms share one prefill and the same traces.
      states = arm_states(deliberator, (FROZEN, OWN), params, decoder_params, batch, traces)
      plain, own = (ahead_nll(states[arm], traces, decoder_params, cap, loss_chunk)
                    for arm in (FROZEN, OWN))
      hidden = states[FROZEN][:, :, 0]  # at the anchor
      uncertainty = jnp.full(hidden.shape[:2], jnp.nan)
      if with_entropy:
        predict = functools.partial(
            deliberator.decoder.apply, {'params': decoder_params}, method='logits')
        # One trace at a time: all logits at once would be too many.
        uncertainty = jax.lax.map(lambda states: entropy(predict(states)),
                                  jnp.swapaxes(hidden, 0, 1)).swapaxes(0, 1)
    gain = jnp.sum((plain - own) * traces.ahead_valid, axis=-1)
    return hidden.astype(jnp.float32), uncertainty, gain, traces.valid

  compiled = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))
  # Fetch batch by batch. Keep valid traces, with the number of their text.
  found, row = [], 0
  for index, batch in enumerate(batches):
    with jax.set_mesh(mesh):
      hidden, uncertainty, gain, valid = jax.device_get(
          compiled(params, decoder_params, batch, jnp.asarray(index)))
    text = np.broadcast_to(labels[row:row + len(valid), None], valid.shape)
    found.append((hidden[valid], uncertainty[valid].astype(np.float64),
                  gain[valid].astype(np.float64), text[valid]))
    row += len(valid)
  return Places(*map(np.concatenate, zip(*found, strict=True)))


@dataclasses.dataclass(frozen=True)
class LearnedGate:
  """A linear prediction of the gain, from the decoder's hidden state.

  Attributes:
    weight: float64 [D].
    bias: nats at a hidden state of zero.
  """
  weight: np.ndarray
  bias: float

  def score(self, hidden: np.ndarray) -> np.ndarray:
    """Returns the nats [n] that latents are expected to save."""
    return hidden.astype(np.float64) @ self.weight + self.bias


def check_texts(texts: np.ndarray) -> None:
  """Raises UserError if these texts, distinct numbers [n], are too few to fit a gate on."""
  if len(texts) < 5:
    raise UserError(f'{len(texts)} texts: a gate needs 5 or more to be fitted on, and as many '
                    'others to be compared on. Raise evaluation.num_texts, the number of rows, or '
                    'lower evaluation.rows_per_text.')


def fit_linear_gate(places: Places) -> LearnedGate:
  """Fits the gain by ridge regression. A held-out fifth of the texts chooses the ridge.

  Raises:
    UserError: there are fewer than five texts.
  """
  return _ridge(places, _best_ridge(places))


def fit_and_hold_out(places: Places) -> tuple[LearnedGate, np.ndarray]:
  """Fits as `fit_linear_gate`; returns the gate, and scores [n] by gates of other texts alone.

  Raises:
    UserError: there are fewer than five texts.
  """
  ridge, scores = _best_ridge(places), np.zeros(len(places.gain))
  for texts in _fifths(places):
    held_out = np.isin(places.text, texts)
    scores[held_out] = _ridge(places.where(~held_out), ridge).score(places.hidden[held_out])
  return _ridge(places, ridge), scores


def _best_ridge(places: Places) -> float:
  held_out = np.isin(places.text, _fifths(places)[0])
  kept, rest = places.where(~held_out), places.where(held_out)

  def error(ridge: float) -> float:
    return float(np.mean((_ridge(kept, ridge).score(rest.hidden) - rest.gain) ** 2))

  return min(RIDGES, key=error)


def _fifths(places: Places) -> list[np.ndarray]:
  """Returns five parts of the texts. Places of one text are not independent."""
  texts = np.unique(places.text)
  check_texts(texts)
  texts = np.random.default_rng(0).permutation(texts)
  return [texts[:len(texts) // 5], *np.array_split(texts[len(texts) // 5:], 4)]


def _ridge(places: Places, ridge: float) -> LearnedGate:
  hidden = places.hidden.astype(np.float64)
  mean, level = hidden.mean(axis=0), places.gain.mean()
  centred = hidden - mean
  gram = centred.T @ centred / len(hidden)
  # The ridge is relative to the mean square of the features.
  gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
  weight = np.linalg.solve(gram, centred.T @ (places.gain - level) / len(hidden))
  return LearnedGate(weight, float(level - mean @ weight))


@dataclasses.dataclass(frozen=True)
class GainCurve:
  """Gain by the fraction of places that are augmented, as a mean over all places.

  Attributes, with one value for each fraction:
    fractions: fraction of places that are augmented.
    thresholds: lowest score of these places.
    gain: mean gain, nats.
    low, high: ends of its 95% interval (bootstrap over texts).
    above_chance: nats beyond the gain of as many places drawn by chance, which is expected to be
      that fraction of the gain of all places.
    above_low, above_high: ends of its 95% interval, paired.
  """
  fractions: np.ndarray
  thresholds: np.ndarray
  gain: np.ndarray
  low: np.ndarray
  high: np.ndarray
  above_chance: np.ndarray
  above_low: np.ndarray
  above_high: np.ndarray


def gain_curve(places: Places, scores: np.ndarray, fractions: Sequence[float], samples: int,
               seed: int = 0) -> GainCurve:
  """Computes the gain from the places with the highest scores, at each fraction of all places.

  Args:
    places: the places.
    scores: float [n] score that a gate gives each place.
    fractions: fractions of places to augment.
    samples: draws of the bootstrap.
    seed: seed of the bootstrap.
  """
  # Sum the gain of the chosen places by text, a column for each fraction.
  order = np.argsort(-scores, kind='stable')
  taken = np.round(np.asarray(fractions) * len(scores)).astype(int)
  rank = np.empty(len(scores), int)
  rank[order] = np.arange(len(scores))
  texts, member = np.unique(places.text, return_inverse=True)
  sums = np.zeros((len(texts), len(taken)))
  for column, count in enumerate(taken):
    np.add.at(sums[:, column], member, places.gain * (rank < count))
  counts = np.bincount(member)

  # Draw texts with replacement: places of one text are not independent.
  drawn = bootstrap_weights(len(texts), samples, seed)
  fractions = np.asarray(fractions)
  all_places = np.bincount(member, places.gain)[:, None]

  def mean_and_interval(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    resampled = (drawn @ sums) / (drawn @ counts)[:, None]
    return sums.sum(axis=0) / counts.sum(), *np.percentile(resampled, (2.5, 97.5), axis=0)

  # The lowest score that is still augmented. Nothing passes an infinite threshold.
  thresholds = np.where(taken > 0, scores[order[np.maximum(taken - 1, 0)]], np.inf)
  return GainCurve(fractions, thresholds, *mean_and_interval(sums),
                   *mean_and_interval(sums - fractions * all_places))


def compare_gates(fitted: LearnedGate, places: Places, fractions: Sequence[float], samples: int,
                  seed: int = 0) -> dict[str, GainCurve]:
  """Returns the curves of the learned gate, of the decoder's own uncertainty, and of chance."""
  random = np.random.default_rng(seed).random(len(places.gain))
  scores = {'learned': fitted.score(places.hidden), 'entropy': places.entropy, 'random': random}
  return {name: gain_curve(places, values, fractions, samples, seed)
          for name, values in scores.items()}


def fit_gate(experiment: Experiment, *, decoder_dir: Path, coprocessor_dir: Path,
             prepared_dir: Path, output: Path) -> dict[str, Any]:
  """Fits a gate on one half of the held-out texts, and compares gates on the other half.

  Args:
    experiment: configuration of the training, with the `evaluation` to do.
    decoder_dir: directory of the frozen decoder.
    coprocessor_dir: work directory of a training, or the coprocessor checkpoint that it wrote.
    prepared_dir: directory of prepared data.
    output: new directory for gate.json, gate.safetensors and gate.png.

  Returns: the content of gate.json.

  Raises:
    UserError: `output` exists or cannot be written.
    UserError: there are too few held-out texts, or a directory holds something else.
  """
  # Check everything that can be wrong before the long part.
  if output.exists():
    raise UserError(f'{output} exists already and is not overwritten. Name a new directory.')
  make_writable(output.absolute().parent)
  mesh = make_mesh(experiment.mesh)
  check_batch(experiment.evaluation.batch_size, 1, mesh, experiment.rules, 'evaluation')
  checkpoint = open_frozen(experiment.decoder, decoder_dir)
  held_out = open_held_out(experiment, prepared_dir, mesh)
  check_rows_vocabulary(held_out.rows, checkpoint)
  coprocessor_dir = find_trained(experiment, coprocessor_dir, held_out.rows)
  fitted_on = np.unique(held_out.texts)[::2]  # every second text fits, the others compare
  check_texts(fitted_on)

  # Score all places once, plain and augmented.
  decoder_params, decoder_fingerprint = load_frozen(experiment, checkpoint, mesh)
  params = load_coprocessor(
      coprocessor_dir, decoder_fingerprint=decoder_fingerprint, mesh=mesh, rules=experiment.rules,
      frozen_dtype=experiment.computation.frozen_dtype)
  deliberator = build_deliberator(experiment).with_traces(
      experiment.evaluation.num_traces, experiment.deliberation.num_ahead)
  places = score_places(
      deliberator, params, decoder_params,
      place_batches(held_out.batches, f'{FROZEN}, {OWN}', mesh, experiment.rules), held_out.texts,
      loss_chunk=experiment.computation.loss_chunk, seed=experiment.seed, mesh=mesh,
      rules=experiment.rules)

  # Fit, compare and write.
  first = np.isin(places.text, fitted_on)
  fitted, others = fit_linear_gate(places.where(first)), places.where(~first)
  curves = compare_gates(fitted, others, FRACTIONS, experiment.evaluation.bootstrap_samples)
  stored = save({'weight': fitted.weight.astype(np.float32),
                 'bias': np.array([fitted.bias], np.float32)})
  # JSON has no infinity, so a threshold that never opens becomes None.
  result = {
      'places': len(others.gain), 'texts': len(np.unique(others.text)),
      'num_ahead': experiment.deliberation.num_ahead, 'decoder': decoder_fingerprint,
      'curves': {name: {field: np.where(np.isfinite(values), values, None).tolist()
                        for field, values in vars(curve).items()}
                 for name, curve in curves.items()},
      'weights': hashlib.sha256(stored).hexdigest(), 'git_commit': git_commit()}
  with whole_directory(output) as partial:
    if jax.process_index() == 0:
      plot_gates(result, partial / PICTURE)
      (partial / GATE_WEIGHTS_FILE).write_bytes(stored)
      (partial / GATE_FILE).write_text(json.dumps(seal(result), indent=2) + '\n')
  return result


def format_gates(result: Mapping[str, Any]) -> str:
  """Returns gains at every fifth of all places, from the content of a gate.json, as lines."""
  is_judged = result['texts'] >= FEWEST_TEXTS
  lines = ['Fraction augmented; for each gate the mean gain of a place in millinats, and the part '
           'of it above chance. Above zero is better. '
           + (f'In brackets: 95% intervals over {result["texts"]} texts.' if is_judged else
              f'Too few texts for an interval: {result["texts"]}.')]
  form = '{:6.2f} [{:6.2f}, {:6.2f}]' if is_judged else '{:6.2f}'
  for number in range(0, len(FRACTIONS), 4):
    cells = (f'{name} ' + ', '.join(
        form.format(*(1e3 * curve[key][number] for key in keys))
        for keys in (('gain', 'low', 'high'), ('above_chance', 'above_low', 'above_high')))
        for name, curve in result['curves'].items())
    lines.append(f'{FRACTIONS[number]:4.0%}  ' + '  '.join(cells))
  return '\n'.join(lines)
