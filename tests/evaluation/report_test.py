"""The report of an evaluation: its figures, and how people read them."""

import json

import numpy as np
import pytest

from latent_deliberation.evaluation.perplexity import AheadNLL, relative_change
from latent_deliberation.evaluation.report import (
  Report,
  format_page,
  format_table,
  state_gain,
  summarise,
  write_report,
)

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


def test_summary_is_plain_json():
  summary = summarise(make_report(EVERY_ARM))
  stored = json.loads(json.dumps(summary, allow_nan=False, default=str))
  assert list(stored) == [
    'positions', 'num_ahead', 'arms', 'content_effect', 'bar', 'texts', 'rows', 'documents',
    'reached',
    'targets', 'all_positions', 'bootstrap', 'parameters', 'seconds', 'peak_memory_bytes',
    'decoder_fingerprint', 'git_commit', 'config', 'pictures', 'notes']
  assert list(stored['arms']) == ['frozen', 'own', 'shuffled', 'constant', 'zero']
  for arm, curve in zip(stored['arms'].values(), stored['all_positions'].values(), strict=True):
    assert [len(arm[name]) for name in ('nll', 'perplexity', 'change_pct')] == [4, 4, 4]
    assert np.shape(arm['ci95']) == (4, 2)
    assert np.shape(curve['ci95']) == (AHEAD, 2)
  stored['config']['dtype'] = summary['config']['dtype']
  assert stored == summary


def test_figures_are_of_shown_positions():
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


def test_frozen_does_not_change():
  frozen = summarise(make_report(EVERY_ARM))['arms']['frozen']
  assert frozen['change_pct'] == [0.0] * 4
  assert frozen['ci95'] == [[0.0, 0.0]] * 4


def test_content_effect():
  """It compares own with shuffled latents."""
  content = summarise(make_report(EVERY_ARM))['content_effect']
  np.testing.assert_allclose(content['change_pct'], 100 * np.expm1(-0.07))


def test_bar_is_passed():
  """Own latents are below both other arms."""
  assert summarise(make_report(EVERY_ARM))['bar'] == {
    'passed': True,
    'own_below_frozen': {'1': True, '2': True, '4': True},
    'own_below_shuffled': {at: {'point': True, 'interval': True} for at in '1248'}}


def test_one_position_misses_the_bar():
  effect = np.full(AHEAD, -0.05)
  effect[1] = 0.01
  bar = summarise(make_report({'own': effect, 'shuffled': 0.02}))['bar']
  assert bar['own_below_frozen'] == {'1': True, '2': False, '4': True}
  assert not bar['passed']


def test_no_change_is_not_below():
  bar = summarise(make_report({'own': 0.0, 'shuffled': 0.0}))['bar']
  assert not any(bar['own_below_frozen'].values())
  assert bar['own_below_shuffled']['1'] == {'point': False, 'interval': False}


def test_below_frozen_needs_interval():
  summary = summarise(make_report({'own': -0.001, 'shuffled': 0.0}, noise=0.01))
  for at, position in enumerate(('1', '2', '4')):
    assert summary['bar']['own_below_frozen'][position] == (
      summary['arms']['own']['ci95'][at][1] < 0)
  assert not all(summary['bar']['own_below_frozen'].values())


def test_below_shuffled_needs_point():
  """The point estimate decides; the interval is stated."""
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


def test_unscored_position_misses_the_bar():
  bar = summarise(make_report({'own': -0.05, 'shuffled': 0.02}, ahead=4))['bar']
  assert list(bar['own_below_shuffled']) == ['1', '2', '4']
  assert not bar['passed']


def test_no_bar_without_shuffled():
  summary = summarise(make_report({'own': -0.05}))
  assert summary['bar'] is None and summary['content_effect'] is None
  assert list(summary['arms']) == ['frozen', 'own']


@pytest.mark.parametrize('positions', [(), (0, 1), (1, AHEAD + 1), (2, 1), (1, 1)])
def test_bad_positions_are_refused(positions):
  """They were not scored, or are out of order."""
  with pytest.raises(ValueError, match=f'positions = .* 1 to the {AHEAD}'):
    make_report({'own': 0.0}, positions=positions)


def test_bad_arms_are_refused():
  """They are unknown, or lack the baseline."""
  with pytest.raises(ValueError, match="arms .*'owm'"):
    make_report({'owm': 0.0})
  with pytest.raises(ValueError, match=r"arms = \['own'\]: .*'frozen'"):
    make_report({}, arms={'own': make_report({}).arms['frozen']})


def test_unpaired_arms_are_refused():
  own = AheadNLL(np.ones((3, AHEAD)), np.ones((3, AHEAD), int))
  with pytest.raises(ValueError, match=r'own has .*\[3, 8\], frozen has \[20, 8\]'):
    make_report({}, arms={'frozen': make_report({}).arms['frozen'], 'own': own})


INTERVAL = [[-4.0, -2.0], [-2.0, 1.0]]


def written_summary(**changes) -> dict:
  """A small summary written by hand, in the form of report.summarise."""
  arm = {'change_pct': [-3.0, -0.5], 'ci95': INTERVAL}
  summary = {
    'positions': [1, 32], 'num_ahead': 16,
    'arms': {'frozen': {'perplexity': [12.3456, 40.0], **arm}, 'own': arm, 'shuffled': arm},
    'content_effect': {'change_pct': [-5.0, 1250.5], 'ci95': INTERVAL},
    'bar': {
      'passed': False,
      'own_below_frozen': {'1': True, '2': True, '4': False},
      'own_below_shuffled': {'1': {'point': True, 'interval': True},
                             '2': {'point': True, 'interval': False},
                             '4': {'point': True, 'interval': False}}},
    'texts': 200, 'reached': [200] * 32, 'targets': [6400, 6000],
    'parameters': {'decoder': 1234567}, 'seconds': {'training': 61.25},
    'peak_memory_bytes': 3 * 2**29,
    'decoder_fingerprint': 'aa', 'git_commit': 'abc',
    'pictures': {'changes.png': 'Change by position'}, 'notes': ['Trained on prose.'],
  }
  return {**summary, **changes}


def test_table_is_aligned():
  """It marks positions beyond the training."""
  header, *rows = format_table(written_summary()).splitlines()[:3]
  assert header.split('  ')[0] == 'ahead'
  assert [row.split() for row in rows] == [
    ['1', '12.346', '-3.00', '[-4.00,', '-2.00]', '-3.00', '[-4.00,', '-2.00]', '-5.00',
     '[-4.00,', '-2.00]'],
    ['32†', '40.000', '-0.50', '[-2.00,', '+1.00]', '-0.50', '[-2.00,', '+1.00]', '+1250.50',
     '[-2.00,', '+1.00]']]
  assert len({len(line) for line in (header, *rows)}) == 1


def test_legend_explains_used_mark():
  assert '† beyond the 16 ahead tokens' in format_table(written_summary())
  assert '†' not in format_table(written_summary(num_ahead=32))


def test_missing_arm_has_no_column():
  assert 'zero latents' not in format_table(written_summary())
  arms = written_summary()['arms']
  del arms['shuffled']
  table = format_table(written_summary(arms=arms, content_effect=None, bar=None))
  assert "another text's" not in table.splitlines()[0]
  assert 'shuffled' not in table.splitlines()[-2] and 'Gain not measured' in table.splitlines()[-1]


RULE = ('To pass, own latents must be below the frozen decoder at positions 1, 2 and 4, with the '
        "whole interval. They must also be below another text's latents at positions 1, 2, 4 and "
        '8.')


def test_missed_bar_is_stated():
  """It names the positions that fail, those without a score, and those that must pass."""
  assert state_gain(written_summary()) == (
    'Gain not shown. Against the frozen decoder, own latents fail at position 4. There is no score '
    f'at position 8. {RULE}')


def test_parts_of_few_documents_are_no_evidence():
  """Texts that are parts of 7 documents are not independent."""
  assert state_gain(written_summary(documents=7)).startswith(
      'Too few documents to tell whether latents gain: 7 are held out, and 20 are needed. The 200 ')
  assert state_gain(written_summary(documents=20)) == state_gain(written_summary())
  for documents, passed in ((7, False), (20, True), (None, True)):
    summary = summarise(make_report(EVERY_ARM, documents=documents))
    assert summary['bar']['passed'] == passed


def test_bar_missed_everywhere():
  below = {at: {'point': at == '8', 'interval': False} for at in '1248'}
  bar = {'passed': False, 'own_below_frozen': dict.fromkeys('124', False),
         'own_below_shuffled': below}
  assert state_gain(written_summary(bar=bar)) == (
    'Gain not shown. Against the frozen decoder, own latents fail at positions 1, 2 and 4. Against '
    f"another text's latents, own latents fail at positions 1, 2 and 4. {RULE}")


@pytest.mark.parametrize('changes', [{'texts': 19, 'reached': None, 'all_positions': {
    'frozen': {'change_pct': [0.0] * 32}}}, {'reached': [200, 200, 19, 200, 200, 200, 200, 200]}])
def test_too_few_texts_are_no_evidence(changes):
  """No gain is shown from fewer than 20 texts, whatever was computed from them."""
  bar = {'passed': True, 'own_below_frozen': dict.fromkeys('124', True),
         'own_below_shuffled': {at: {'point': True, 'interval': True} for at in '1248'}}
  text = state_gain(written_summary(bar=bar, **changes))
  assert text.startswith('Too few texts for an interval: 19.') and 'Gain' not in text
  assert 'evaluation.rows_per_text' in text


def test_too_few_texts_have_no_intervals():
  """The table has an interval only where 20 texts or more reach the position."""
  header, first, last = format_table(written_summary(reached=[19] * 31 + [20])).splitlines()[:3]
  assert first.split() == ['1', '12.346', '-3.00', '-3.00', '-5.00']
  assert last.split()[:3] == ['32†', '40.000', '-0.50'] and '[-2.00, +1.00]' in last
  legend = format_table(written_summary(texts=2, rows=24, reached=[2] * 32)).splitlines()[3]
  assert 'over 2 texts of 24 packed rows.' in legend and '95%' not in legend


def test_few_texts_miss_the_bar():
  """One text too few that reaches a judged position."""
  report = make_report(EVERY_ARM)
  for arm in report.arms.values():
    arm.total[0, 3] = arm.count[0, 3] = 0
  assert not summarise(report)['bar']['passed']


def test_passed_bar_is_stated():
  bar = {'passed': True, 'own_below_frozen': {at: True for at in '124'},
         'own_below_shuffled': {at: {'point': True, 'interval': True} for at in '1248'}}
  text = state_gain(written_summary(bar=bar))
  assert text.startswith('Gain shown') and 'not' not in text.replace('another', '')


def test_page_holds_everything():
  """Table, pictures, notes and the run."""
  page = format_page(written_summary())
  change = '-3.00 [-4.00, -2.00]'
  for line in (f'| 1 | 12.346 | {change} | {change} | -5.00 [-4.00, -2.00] |',
               '![Change by position](changes.png)', 'Trained on prose.',
               '- parameters, decoder: 1,234,567', '- seconds, training: 61.2',
               '- peak memory: 1.50 GiB', '- git commit: abc',
               '- decoder weights: fingerprint aa, frozen'):
    assert line in page.splitlines()


def test_written_report_reads_back(tmp_path):
  summary = written_summary()
  write_report(summary, tmp_path / 'run')
  stored = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert stored == summary
  assert (tmp_path / 'run' / 'report.md').read_text() == format_page(stored)
  assert len(list((tmp_path / 'run').iterdir())) == 2


def test_measured_report_is_written(tmp_path):
  count = np.ones((3, 2), int)
  report = Report(
    arms={name: AheadNLL(np.full((3, 2), 2.0), count) for name in ('frozen', 'own', 'shuffled')},
    positions=(1, 2), num_ahead=2, decoder_fingerprint='a', parameters={}, seconds={},
    peak_memory_bytes=0, git_commit='abc', config={'workdir': tmp_path})
  write_report(summarise(report), tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text())['config'] == {'workdir': str(tmp_path)}
  assert 'Too few texts for an interval: 3' in (tmp_path / 'report.md').read_text()
