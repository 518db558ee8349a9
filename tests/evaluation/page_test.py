"""A report as people read it."""

import json

import numpy as np

from latent_deliberation.evaluation.perplexity import AheadNLL
from latent_deliberation.evaluation.report import (
  Report,
  format_page,
  format_table,
  state_bar,
  summarise,
  write_report,
)

INTERVAL = [[-4.0, -2.0], [-2.0, 1.0]]


def make_summary(**changes) -> dict:
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
    'texts': 200, 'targets': [6400, 6000],
    'parameters': {'decoder': 1234567}, 'seconds': {'training': 61.25},
    'peak_memory_bytes': 3 * 2**29,
    'decoder_fingerprint': 'aa', 'git_commit': 'abc',
    'pictures': {'changes.png': 'Change by position'}, 'notes': ['Trained on prose.'],
  }
  return {**summary, **changes}


def test_the_table_is_aligned_and_marks_positions_beyond_training():
  header, *rows = format_table(make_summary()).splitlines()[:3]
  assert header.split('  ')[0] == 'ahead'
  assert [row.split() for row in rows] == [
    ['1', '12.346', '-3.00', '[-4.00,', '-2.00]', '-3.00', '[-4.00,', '-2.00]', '-5.00',
     '[-4.00,', '-2.00]'],
    ['32†', '40.000', '-0.50', '[-2.00,', '+1.00]', '-0.50', '[-2.00,', '+1.00]', '+1250.50',
     '[-2.00,', '+1.00]']]
  assert len({len(line) for line in (header, *rows)}) == 1


def test_the_legend_explains_the_mark_only_where_it_is_used():
  assert '† beyond the 16 ahead tokens' in format_table(make_summary())
  assert '†' not in format_table(make_summary(num_ahead=32))


def test_an_arm_that_was_not_measured_has_no_column():
  assert 'zero latents' not in format_table(make_summary())
  arms = make_summary()['arms']
  del arms['shuffled']
  table = format_table(make_summary(arms=arms, content_effect=None, bar=None))
  assert "another text's" not in table.splitlines()[0]
  assert table.endswith('Gain not measured: it needs the own and the shuffled latents.')


def test_a_missed_bar_is_stated_by_position():
  assert state_bar(make_summary()) == (
    'Gain not shown: own latents below the frozen decoder, with an interval that excludes zero, '
    "at 1, 2 but not at 4; below another text's latents at 1, 2, 4 (8 not scored), with an "
    'interval that excludes zero at 1 but not at 2, 4 (8 not scored).')


def test_a_bar_missed_everywhere_says_so():
  bar = {**make_summary()['bar'], 'own_below_frozen': {'1': False, '2': False, '4': False}}
  assert 'excludes zero, at none of 1, 2, 4;' in state_bar(make_summary(bar=bar))


def test_a_passed_bar_says_so():
  bar = {'passed': True, 'own_below_frozen': {at: True for at in '124'},
         'own_below_shuffled': {at: {'point': True, 'interval': True} for at in '1248'}}
  text = state_bar(make_summary(bar=bar))
  assert text.startswith('Gain shown') and 'not' not in text.replace('another', '')


def test_the_page_holds_table_pictures_notes_and_the_run():
  page = format_page(make_summary())
  change = '-3.00 [-4.00, -2.00]'
  for line in (f'| 1 | 12.346 | {change} | {change} | -5.00 [-4.00, -2.00] |',
               '![Change by position](changes.png)', 'Trained on prose.',
               '- parameters, decoder: 1,234,567', '- seconds, training: 61.2',
               '- peak memory: 1.50 GiB', '- git commit: abc',
               '- decoder weights: fingerprint aa, frozen'):
    assert line in page.splitlines()


def test_a_written_report_reads_back_and_renders_again(tmp_path):
  summary = make_summary()
  write_report(summary, tmp_path / 'run')
  stored = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert stored == summary
  assert (tmp_path / 'run' / 'report.md').read_text() == format_page(stored)
  assert len(list((tmp_path / 'run').iterdir())) == 2


def test_a_measured_report_can_be_written(tmp_path):
  count = np.ones((3, 2), int)
  report = Report(
    arms={name: AheadNLL(np.full((3, 2), 2.0), count) for name in ('frozen', 'own', 'shuffled')},
    positions=(1, 2), num_ahead=2, decoder_fingerprint='a', parameters={}, seconds={},
    peak_memory_bytes=0, git_commit='abc', config={'workdir': tmp_path})
  write_report(summarise(report), tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text())['config'] == {'workdir': str(tmp_path)}
  assert 'Gain not shown' in (tmp_path / 'report.md').read_text()
