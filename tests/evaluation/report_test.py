"""The figures of a report."""

import json

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import AheadNLL, relative_change
from latent_deliberation.evaluation.report import Report, summarise

TEXTS, AHEAD = 20, 8


def make_report(effects: dict[str, object], noise: float = 0.0, ahead: int = AHEAD,
                **changes) -> Report:
  """A report of arms whose nll differs from the frozen decoder's by `effects`, nats."""
  rng = np.random.default_rng(0)
  count = rng.integers(1, 6, (TEXTS, ahead))
  base = rng.normal(3.0, 0.3, (TEXTS, ahead))
  arms = {'frozen': AheadNLL(base * count, count)}
  for name, effect in effects.items():
    spread = noise * rng.normal(size=count.shape)
    arms[name] = AheadNLL((base + effect + spread) * count, count)
  fields = dict(
    arms=arms, positions=(1, 2, 4, 8)[:ahead.bit_length()], num_ahead=4,
    decoder_fingerprint='aa', parameters={'decoder': 1000}, seconds={'training': 2.5},
    peak_memory_bytes=2**30, git_commit='abc', config={'seed': 0, 'dtype': np.dtype('float32')},
    pictures={'changes.png': 'changes'}, notes=('a note',))
  return Report(**{**fields, **changes})


EVERY_ARM = {'zero': 2.0, 'own': -0.05, 'constant': 0.01, 'shuffled': 0.02}


def test_a_summary_holds_every_figure_as_plain_json():
  summary = summarise(make_report(EVERY_ARM))
  stored = json.loads(json.dumps(summary, allow_nan=False, default=str))
  assert list(stored) == [
    'positions', 'num_ahead', 'arms', 'content_effect', 'bar', 'texts', 'targets',
    'all_positions', 'bootstrap', 'parameters', 'seconds', 'peak_memory_bytes',
    'decoder_fingerprint', 'git_commit', 'config', 'pictures', 'notes']
  assert list(stored['arms']) == ['frozen', 'own', 'shuffled', 'constant', 'zero']
  for arm, curve in zip(stored['arms'].values(), stored['all_positions'].values(), strict=True):
    assert [len(arm[name]) for name in ('nll', 'perplexity', 'change_pct')] == [4, 4, 4]
    assert np.shape(arm['ci95']) == (4, 2)
    assert np.shape(curve['ci95']) == (AHEAD, 2)
  stored['config']['dtype'] = summary['config']['dtype']
  assert stored == summary


def test_figures_are_those_of_the_positions_shown():
  report = make_report(EVERY_ARM, positions=(2, 5))
  summary = summarise(report, samples=500, seed=3)
  own = relative_change(report.arms['own'], report.arms['frozen'], samples=500, seed=3)
  arm = summary['arms']['own']
  np.testing.assert_allclose(arm['nll'], report.arms['own'].nll[[1, 4]])
  np.testing.assert_allclose(arm['perplexity'], np.exp(arm['nll']))
  np.testing.assert_allclose(arm['change_pct'], own.percent[[1, 4]])
  np.testing.assert_allclose(arm['ci95'], np.stack([own.low, own.high], axis=1)[[1, 4]])
  assert summary['targets'] == report.arms['own'].count.sum(axis=0)[[1, 4]].tolist()
  assert summary['texts'] == TEXTS


def test_the_frozen_decoder_does_not_differ_from_itself():
  frozen = summarise(make_report(EVERY_ARM))['arms']['frozen']
  assert frozen['change_pct'] == [0.0] * 4
  assert frozen['ci95'] == [[0.0, 0.0]] * 4


def test_the_content_effect_compares_own_with_shuffled_latents():
  content = summarise(make_report(EVERY_ARM))['content_effect']
  np.testing.assert_allclose(content['change_pct'], 100 * np.expm1(-0.07))


def test_the_bar_is_passed_when_own_latents_are_below_both():
  assert summarise(make_report(EVERY_ARM))['bar'] == {
    'passed': True,
    'own_below_frozen': {'1': True, '2': True, '4': True},
    'own_below_shuffled': {at: {'point': True, 'interval': True} for at in '1248'}}


def test_the_bar_is_missed_where_one_position_is_above():
  effect = np.full(AHEAD, -0.05)
  effect[1] = 0.01
  bar = summarise(make_report({'own': effect, 'shuffled': 0.02}))['bar']
  assert bar['own_below_frozen'] == {'1': True, '2': False, '4': True}
  assert not bar['passed']


def test_no_change_at_all_is_not_below():
  bar = summarise(make_report({'own': 0.0, 'shuffled': 0.0}))['bar']
  assert not any(bar['own_below_frozen'].values())
  assert bar['own_below_shuffled']['1'] == {'point': False, 'interval': False}


def test_below_the_frozen_decoder_needs_an_interval_that_excludes_zero():
  summary = summarise(make_report({'own': -0.001, 'shuffled': 0.0}, noise=0.01))
  for at, position in enumerate(('1', '2', '4')):
    assert summary['bar']['own_below_frozen'][position] == (
      summary['arms']['own']['ci95'][at][1] < 0)
  assert not all(summary['bar']['own_below_frozen'].values())


def test_below_shuffled_latents_needs_the_point_alone_and_states_the_interval():
  rng = np.random.default_rng(5)
  report = make_report({'own': -0.05})
  frozen, own = report.arms['frozen'], report.arms['own']
  # Far noisier than the gap: below on average, with an interval that reaches beyond zero.
  noise = rng.normal(size=own.count.shape) * own.count
  noise -= own.count * noise.sum(axis=0) / own.count.sum(axis=0)
  shuffled = AheadNLL(own.total + 0.01 * own.count + noise, own.count)
  bar = summarise(make_report({}, arms={'frozen': frozen, 'own': own, 'shuffled': shuffled}))['bar']
  assert bar['own_below_shuffled'] == {
    at: {'point': True, 'interval': False} for at in '1248'}
  assert bar['passed']


def test_the_bar_is_not_passed_where_a_position_was_not_scored():
  bar = summarise(make_report({'own': -0.05, 'shuffled': 0.02}, ahead=4))['bar']
  assert list(bar['own_below_shuffled']) == ['1', '2', '4']
  assert not bar['passed']


def test_a_report_without_shuffled_latents_has_no_bar():
  summary = summarise(make_report({'own': -0.05}))
  assert summary['bar'] is None and summary['content_effect'] is None
  assert list(summary['arms']) == ['frozen', 'own']


@pytest.mark.parametrize('positions', [(), (0, 1), (1, AHEAD + 1), (2, 1), (1, 1)])
def test_positions_that_were_not_scored_or_are_out_of_order_are_refused(positions):
  with pytest.raises(UserError, match=f'from 1 to the {AHEAD} ahead positions'):
    make_report({'own': 0.0}, positions=positions)


def test_arms_that_are_unknown_or_without_a_baseline_are_refused():
  with pytest.raises(UserError, match="arms .*'owm'"):
    make_report({'owm': 0.0})
  with pytest.raises(UserError, match="'frozen' is needed"):
    make_report({}, arms={'own': make_report({}).arms['frozen']})


def test_arms_that_are_not_paired_are_refused():
  own = AheadNLL(np.ones((3, AHEAD)), np.ones((3, AHEAD), int))
  with pytest.raises(UserError, match=r'own has .*\[3, 8\], frozen has \[20, 8\]'):
    make_report({}, arms={'frozen': make_report({}).arms['frozen'], 'own': own})
