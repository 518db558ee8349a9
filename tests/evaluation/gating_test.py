"""A gate finds the places where latents gain, if the hidden state tells them; chance does not."""

import jax
import numpy as np
import pytest

from latent_deliberation.deliberation.traces import sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import gating
from latent_deliberation.evaluation.gating import FRACTIONS as FRACTIONS_OF_FILE
from latent_deliberation.evaluation.gating import (
  Places,
  compare_gates,
  fit_and_hold_out,
  fit_linear_gate,
  format_gates,
  gain_curve,
  score_places,
)
from latent_deliberation.evaluation.perplexity import make_scorer
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import tiny

FRACTIONS = (0.0, 0.1, 0.5, 1.0)


def synthetic(texts=40, seed=0, signal=1.0):
  """Places whose gain depends on two of eight hidden channels; entropy knows nothing of it."""
  random = np.random.default_rng(seed)
  hidden = random.normal(3, 2, (texts * 50, 8))
  gain = signal * (hidden[:, 1] - hidden[:, 6]) + random.normal(0.5, 1, len(hidden))
  return Places(hidden.astype(np.float32), random.random(len(hidden)), gain,
                np.repeat(np.arange(texts), 50))


def test_learned_gate_beats_chance():
  """Here the hidden state tells the gain, and entropy does not."""
  curves = compare_gates(fit_linear_gate(synthetic()), synthetic(seed=1), FRACTIONS, samples=200)
  for name in ('entropy', 'random'):
    assert curves['learned'].low[1] > curves[name].high[1]
    assert abs(curves[name].above_chance[1]) < 0.1 * curves['learned'].above_chance[1]
  learned = curves['learned']
  np.testing.assert_allclose(
      learned.above_chance, learned.gain - learned.fractions * learned.gain[-1])
  assert 0 < learned.above_low[1] < learned.above_chance[1] < learned.above_high[1]
  # Texts that gain more do so with any gate: paired with chance, they differ less.
  assert learned.above_high[2] - learned.above_low[2] < learned.high[2] - learned.low[2]
  assert curves['learned'].gain[2] > 0.9 * np.sort(synthetic(seed=1).gain)[1000:].sum() / 2000


def test_gates_agree_at_the_ends():
  """No place, or every place, is augmented."""
  places = synthetic(seed=2)
  for curve in compare_gates(fit_linear_gate(synthetic()), places, FRACTIONS, samples=50).values():
    assert curve.gain[0] == curve.low[0] == curve.high[0] == 0
    np.testing.assert_allclose(curve.gain[-1], places.gain.mean())
    assert curve.low[-1] < curve.gain[-1] < curve.high[-1]


def test_gate_of_noise_is_chance():
  curves = compare_gates(fit_linear_gate(synthetic(signal=0.0)), synthetic(seed=3, signal=0.0),
                         FRACTIONS, samples=200)
  assert abs(curves['learned'].gain[2] - curves['random'].gain[2]) < 0.1


def test_threshold_takes_its_fraction():
  places = synthetic()
  curve = gain_curve(places, places.entropy, FRACTIONS, samples=10)
  taken = [(places.entropy >= threshold).mean() for threshold in curve.thresholds]
  np.testing.assert_allclose(taken, FRACTIONS)
  assert gain_curve(places, places.gain, (0.5,), 10).gain > curve.gain[2]


def test_held_out_scores_are_of_other_texts():
  """A gain that is known in its own text alone is fitted there, and not found from outside."""
  text = np.repeat(np.arange(20), 10)
  hidden = np.eye(20, dtype=np.float32)[text]
  places = Places(hidden, np.zeros(200), np.where(text % 2, 1.0, -1.0), text)
  fitted, held_out = fit_and_hold_out(places)
  assert np.corrcoef(fitted.score(hidden), places.gain)[0, 1] > 0.9
  assert np.corrcoef(held_out, places.gain)[0, 1] < 0.1
  _, found = fit_and_hold_out(synthetic())
  assert np.corrcoef(found, synthetic().gain)[0, 1] > 0.3


def test_too_few_texts_are_refused():
  with pytest.raises(UserError, match='4 texts.* 5 or more'):
    fit_linear_gate(synthetic(texts=4))


def test_places_match_scoring(decoder_params, monkeypatch):
  batch = tiny.packed_batch([(7, 4, 8), (9, 6), (19,), (3, 16)])
  deliberator = tiny.deliberator(num_traces=5)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  options = dict(loss_chunk=7, seed=3, mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
                 rules=DEFAULT_RULES)
  places = score_places(deliberator, params, decoder_params, [batch],
                        np.array([4, 4, 5, 6]), **options)
  scorer = make_scorer(deliberator, ('frozen', 'own'), num_traces=5, num_ahead=4, **options)
  sums, _ = scorer(params, decoder_params, batch, 0)
  gain = np.asarray(sums['frozen'] - sums['own']).sum(axis=1)
  for label, rows in ((4, [0, 1]), (5, [2]), (6, [3])):
    np.testing.assert_allclose(places.gain[places.text == label].sum(), gain[rows].sum(), atol=1e-4)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 4)
  traces = jax.device_get(sample_traces(keys, batch, deliberator.config))
  hidden, logits, _ = tiny.read(decoder_params, batch.tokens, batch.positions, batch.segments)
  at = traces.anchors[0][traces.valid[0]]
  np.testing.assert_allclose(places.hidden[:len(at)], hidden[0, at], atol=1e-5)
  log_p = jax.nn.log_softmax(logits[0, at])
  np.testing.assert_allclose(places.entropy[:len(at)], -(np.exp(log_p) * log_p).sum(-1), atol=1e-4)
  # The whole output head is not computed for those who need no entropy.
  monkeypatch.setattr(gating, 'entropy', lambda logits: pytest.fail('measured'))
  without = score_places(deliberator, params, decoder_params, [batch], np.array([4, 4, 5, 6]),
                         with_entropy=False, **options)
  assert np.isnan(without.entropy).all() and without.entropy.shape == places.gain.shape
  for part in ('hidden', 'gain', 'text'):
    np.testing.assert_allclose(getattr(without, part), getattr(places, part), atol=1e-5)


@pytest.mark.parametrize('texts, shown', [(20, True), (19, False)])
def test_intervals_of_few_texts_are_not_printed(texts, shown):
  curves = compare_gates(fit_linear_gate(synthetic()), synthetic(seed=1), FRACTIONS_OF_FILE, 20)
  result = {'texts': texts, 'curves': {name: vars(curve) for name, curve in curves.items()}}
  head, none, *_, every = format_gates(result).splitlines()
  assert (f'Too few texts for an interval: {texts}' in head) != shown
  assert ('[' in every) == shown
  assert none.split()[:2] == ['0%', 'learned'] and every.split()[0] == '100%'
