"""Scores of a card, and what routers need, from measurements that are known."""

import dataclasses
import json

import numpy as np
import pytest

from latent_deliberation.data.loading import validation_texts
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import HeldOut
from latent_deliberation.evaluation.gating import Places
from latent_deliberation.evaluation.perplexity import AheadNLL
from latent_deliberation.experts import measuring
from latent_deliberation.experts.measuring import (
  as_held_out,
  base_name,
  compare_scores,
  experiment_of,
  fit_routing,
  portable,
  routed_batches,
  saved_nats,
  summarise_arms,
)
from latent_deliberation.experts.routing import cosines
from latent_deliberation.sharding import MeshConfig
from tests import finished
from tests.experts import small

RANDOM = np.random.default_rng(0)


def arm(total, texts=40):
  """Scores with 5 targets of each text at three ahead positions."""
  return AheadNLL(np.broadcast_to(total, (texts, 3)) * 1.0, np.full((texts, 3), 5))


def test_saved_nats_are_summed_over_ahead_tokens():
  """Means of positions add up; positions beyond the training's are left out."""
  frozen = arm([10.0, 20.0, 30.0])
  found = saved_nats(arm([5.0, 10.0, 0.0]), frozen, num_ahead=2)
  assert found == {'nats': 3.0, 'ci95': [3.0, 3.0]}
  noisy = AheadNLL(frozen.total - RANDOM.normal(5, 5, (40, 3)), frozen.count)
  low, high = saved_nats(noisy, frozen, num_ahead=2)['ci95']
  assert low < saved_nats(noisy, frozen, num_ahead=2)['nats'] < high
  # Roughly: the spread of the mean of 40 texts, over two positions, of 5 targets each.
  assert (high - low) == pytest.approx(2 * 1.96 * np.sqrt(2) * 5 / 5 / np.sqrt(40), rel=0.4)


def test_few_texts_give_no_interval():
  assert saved_nats(arm([5.0] * 3, 19), arm([6.0] * 3, 19), 3) == {
      'nats': pytest.approx(0.6), 'ci95': None}


def test_summary_is_json():
  arms = {'frozen': arm([10.0, 20.0, 30.0]), 'own': arm([9.0, 19.0, 29.0]),
          'zero': arm([10.0, 20.0, 30.0])}
  found = json.loads(json.dumps(summarise_arms(arms, (1, 2), 2)))
  assert found['gain']['own']['nats'] == pytest.approx(0.4) and found['gain']['zero']['nats'] == 0
  assert 'frozen' not in found['gain'] and found['texts'] == 40
  assert found['all_positions']['own']['change_pct'][0] == pytest.approx(100 * np.expm1(-0.2))


def places(mean, gain, texts, count=400, width=6):
  hidden = (RANDOM.standard_normal((count, width)) * 0.2 + mean).astype(np.float32)
  return Places(hidden, np.zeros(count), gain(hidden), np.arange(count) % texts)


def test_routing_separates_texts_and_predicts_gains():
  """The centroid points from general to own text, and the head has the sign of the gain."""
  axis = np.eye(6, dtype=np.float32)
  own = places(axis[0], lambda hidden: 0.5 + 0 * hidden[:, 0], texts=20)
  general = places(axis[1], lambda hidden: -0.5 + 0 * hidden[:, 0], texts=20, count=900)
  found = fit_routing(own, general)
  np.testing.assert_allclose(found.centroid, (axis[0] - axis[1]) / np.sqrt(2), atol=0.1)
  np.testing.assert_allclose(found.origin, axis[1], atol=0.05)
  for each, is_own in ((own, True), (general, False)):
    near = cosines(each.hidden, found.origin, found.centroid) > found.threshold
    gains = each.hidden @ found.gain_weight + found.gain_bias > 0
    assert np.mean(near == is_own) > 0.95 and np.mean(gains == is_own) > 0.95


def test_head_is_not_led_by_noise():
  """Gains are a tenth of their noise; predictions still tell own text from general text."""
  axis = np.eye(128, dtype=np.float32)

  def noisy(mean):
    return lambda hidden: mean + 3 * RANDOM.standard_normal(len(hidden))

  found = fit_routing(places(axis[0], noisy(0.3), texts=20, width=128),
                      places(axis[1], noisy(-0.3), texts=20, width=128))
  own, general = (places(axis[number], noisy(0), texts=20, width=128).hidden @ found.gain_weight
                  for number in (0, 1))
  assert abs(own.mean() - general.mean()) > 5 * (own.std() + general.std()) / 2


def test_head_weighs_gain_against_harm():
  """Between two texts that overlap, the head takes less where harm is larger, and nothing without
  a gain on own text.
  """
  axis = np.eye(6, dtype=np.float32)

  def share_taken(gain, harm):
    random = np.random.default_rng(0)
    texts = []
    for mean, saved in ((0.15 * axis[0], gain), (-0.15 * axis[0], -harm)):
      hidden = (random.standard_normal((1000, 6)) * 0.2 + mean).astype(np.float32)
      texts.append(Places(hidden, np.zeros(1000), np.full(1000, saved), np.arange(1000) % 20))
    found = fit_routing(*texts)
    return np.mean(texts[0].hidden @ found.gain_weight + found.gain_bias > 0)

  little, much = share_taken(1.0, 0.05), share_taken(1.0, 5.0)
  assert 0.95 > little > 2 * much > 0
  assert share_taken(-0.1, 0.1) == 0 and share_taken(0.1, -0.1) > 0.9


@pytest.mark.parametrize('rows, batches', [
    (500, range(4, 12)), (48, range(4, 12)), (47, range(4, 11)), (32, range(4, 8)),
    (31, range(7)), (16, range(4))])
def test_routing_is_on_rows_that_are_not_scored(rows, batches):
  """Where fewer are left than are scored, it is on all of them."""
  config = dataclasses.replace(finished.experiment().evaluation, num_texts=16, batch_size=4)
  assert routed_batches(config, rows) == batches


def test_places_are_of_their_rows(monkeypatch):
  """The rows after the scored ones, with the numbers of their texts; no entropy is measured."""
  experiment = finished.experiment(evaluation__num_texts=4, evaluation__batch_size=4)
  taken = {}
  monkeypatch.setattr(measuring, 'validation_batches', lambda rows, count, *unused: list(
      range(count)))
  monkeypatch.setattr(measuring, 'place_batches', lambda batches, *unused: batches)
  monkeypatch.setattr(measuring, 'score_places', lambda deliberator, params, decoder_params,
                      batches, labels, **options: taken.update(
                          options, batches=batches, labels=labels))
  rows = range(30)
  measuring.find_places(experiment, {}, {}, HeldOut(rows, [], np.array([])), None)
  assert taken['batches'] == [1, 2] and taken['with_entropy'] is False
  np.testing.assert_array_equal(taken['labels'], validation_texts(
      rows, 12, experiment.evaluation.rows_per_text)[4:])


def test_routing_needs_texts():
  few = places(np.zeros(6), lambda hidden: hidden[:, 0], texts=2)
  with pytest.raises(UserError, match='4 texts: a gate needs 5'):
    fit_routing(few, few)


def test_settings_of_a_card():
  """They come back as an experiment in a known dtype, without paths and devices of this machine."""
  experiment = dataclasses.replace(
      finished.experiment(computation__dtype='auto'), decoder_from='/home/me/decoder',
      mesh=MeshConfig(fsdp=8))
  settings = portable(experiment, 'stars')
  assert '/home' not in json.dumps(settings) and str(finished.TEXTS) not in json.dumps(settings)
  found = experiment_of(small.card(recipe={'settings': settings}))
  assert found.data.files == ('stars',) and found.decoder_from == 'decoder'
  assert found.mesh == MeshConfig()
  assert 'auto' not in (found.computation.dtype, found.computation.activations)
  assert found.evaluation == experiment.evaluation and found.training == experiment.training
  for recipe in ({}, {'settings': 3}, {'settings': {**settings, 'colour': 'red'}}):
    with pytest.raises(UserError, match='settings|colour'):
      experiment_of(small.card(recipe=recipe))


@pytest.mark.parametrize('decoder, name', [
    ('gemma3-270m', 'gemma3-270m'), ('a/b/decoder', 'decoder'), ('hf://ORG/NAME', 'hf://ORG/NAME')])
def test_names_of_decoders(decoder, name):
  assert base_name(decoder) == name


def test_sample_is_text_again():
  """Positions follow from segments."""
  tokens = np.array([[2, 5, 6, 2, 7], [8, 9, 2, 5, 0], [2, 5, 5, 5, 5], [2, 6, 6, 6, 6]])
  segments = np.array([[1, 1, 1, 2, 2], [0, 0, 1, 1, 0], [1] * 5, [1] * 5])
  held_out = as_held_out(
      {'tokens': tokens, 'segments': segments, 'texts': np.array([0, 0, 1, 1])}, 2)
  first, second = held_out.batches
  np.testing.assert_array_equal(first.segments, [[1, 1, 1, 2, 2], [0, 0, 1, 1, 0]])
  np.testing.assert_array_equal(first.positions, [[0, 1, 2, 0, 1], [0, 0, 0, 1, 0]])
  np.testing.assert_array_equal(second.tokens, tokens[2:])
  for rows, texts in ((tokens[:3], [0, 0, 1]), (tokens, [0, 0, 1]), (-tokens, [0, 0, 1, 1])):
    with pytest.raises(UserError, match='the sample has rows'):
      as_held_out({'tokens': rows, 'segments': segments, 'texts': np.array(texts)}, 2)


def test_scores_hold_to_rounding():
  """The same rows and places give the same nats and interval, wherever the card's interval ends."""
  def scored(nats, ci95=None):
    return {'gain': {'own': {'nats': nats, 'ci95': ci95}}}
  for card, now, holds in (
      (scored(0.2, [0.1, 0.3]), scored(0.21, [0.11, 0.31]), True),
      (scored(0.2, [0.1, 0.3]), scored(0.25, [0.1, 0.3]), False),
      (scored(0.2, [0.1, 0.3]), scored(0.2, [-0.1, 0.3]), False),
      (scored(0.2, [0.1, 0.3]), scored(0.2), False),
      (scored(0.2), scored(0.21), True), (scored(0.2), scored(0.3), False),
      (scored('much'), scored(0.2), False), ({}, scored(0.2), False)):
    assert compare_scores(card, now)['holds'] == holds
