"""The report of a study: its figures, and how people read them."""

import json

import numpy as np
import pytest

from latent_deliberation.studies.study_report import format_study, summarise_study, write_study
from tests.studies.results import answer, make_arm, questions, read, texts


def test_questions_as_plain_json():
  """The keys are the documented ones."""
  summary = summarise_study(questions(), samples=50)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert set(summary) == {
    'name', 'items', 'items_by_difficulty', 'overall', 'by_difficulty', 'content_effect',
    'mcnemar', 'arms', 'seeds', 'bootstrap', 'diagnostics', 'command', 'machine', 'seconds',
    'git_commit', 'config'}
  assert list(summary['by_difficulty']) == ['1', '2']
  for arms in (summary['overall'], *summary['by_difficulty'].values()):
    assert list(arms) == ['frozen', 'own', 'shuffled', 'constant']
    for arm in arms.values():
      assert set(arm) == {'accuracy', 'ci95', 'by_seed', 'change', 'change_ci95', 'nll',
                          'nll_ci95', 'nll_change', 'nll_change_ci95'}
  assert set(summary['content_effect']['1']['own']) == {
    'accuracy', 'ci95', 'nll_saved', 'nll_saved_ci95'}
  assert set(summary['arms']['own']) == {
    'kind', 'trained', 'total', 'flops_per_token', 'train_flops', 'seconds', 'note'}
  assert (summary['items'], summary['items_by_difficulty']) == (40, {'1': 20, '2': 20})
  assert summary['seeds'] == {'frozen': [0], 'own': [0, 1], 'shuffled': [0, 1], 'constant': [0, 1]}
  assert summary['bootstrap'] == {'samples': 50, 'seed': 0}


def test_accuracies_are_means_over_seeds():
  """Changes are against the frozen decoder."""
  own = summarise_study(questions(), samples=200)['overall']['own']
  assert own['by_seed'] == [0.6, 0.7]
  assert own['accuracy'] == pytest.approx(0.65)
  assert own['ci95'][0] < 0.65 < own['ci95'][1]
  assert own['change'] == pytest.approx(0.45)
  assert own['nll_change'] == pytest.approx(1.1 - 2.0)
  assert own['nll_change_ci95'] == pytest.approx([-0.9, -0.9])


def test_difficulty_counts_its_questions():
  difficulty = np.where(np.arange(40) < 24, 1, 5)  # 24 = the items that own's first seed has right
  rows = summarise_study(questions(difficulty=difficulty), samples=50)['by_difficulty']
  assert rows['1']['own']['by_seed'] == [1.0, 1.0]
  assert rows['5']['own']['by_seed'] == [0.0, 0.25]


def test_content_effect_of_own():
  """Own against shuffled: above zero where content helps."""
  effect = summarise_study(questions(), samples=50)['content_effect']['overall']['own']
  assert effect['accuracy'] == pytest.approx(0.65 - 0.2)
  assert effect['nll_saved'] == pytest.approx(2.5 - 1.1)


def test_content_effect_of_every_arm():
  """Every arm that has a shuffled control."""
  arms = {**questions().arms, 'rank8': make_arm(answer(0.5)),
          'rank8/shuffled': make_arm(answer(0.4))}
  summary = summarise_study(questions(arms=arms), samples=50)
  effects = summary['content_effect']['overall']
  assert list(effects) == ['own', 'rank8']
  assert effects['rank8']['accuracy'] == pytest.approx(0.1)
  assert list(summary['mcnemar']['overall']) == [
    'own vs frozen', 'own vs shuffled', 'own vs constant',
    'rank8 vs frozen', 'rank8 vs rank8/shuffled', 'rank8 vs constant']


def test_mcnemar_pairs_seeds():
  """In order; the one frozen run meets them all."""
  tests = summarise_study(questions(), samples=50)['mcnemar']['overall']
  assert tests['own vs frozen'] == [
    {'seed': 0, 'own_only': 16, 'frozen_only': 0, 'p': pytest.approx(2 / 2**16)},
    {'seed': 1, 'own_only': 20, 'frozen_only': 0, 'p': pytest.approx(2 / 2**20)}]
  assert [row['own_only'] for row in tests['own vs constant']] == [12, 16]


def test_no_difficulty_leaves_overall():
  summary = summarise_study(questions(difficulty=None), samples=50)
  assert summary['by_difficulty'] == {}
  assert list(summary['content_effect']) == list(summary['mcnemar']) == ['overall']


def test_text_as_plain_json():
  """The keys are the documented ones."""
  summary = summarise_study(texts(), samples=50)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert list(summary['by_position']) == list(summary['content_effect']) == ['1', '4']
  for arms in summary['by_position'].values():
    assert list(arms) == ['frozen', 'own', 'shuffled']
    assert set(arms['own']) == {'perplexity', 'change_pct', 'ci95', 'by_seed'}
  assert (summary['texts'], summary['targets']) == (24, {'1': 24, '4': 24})
  assert summary['reached'] == summary['targets']


def test_perplexity_changes_with_mean_loss():
  """The mean is over all seeds."""
  summary = summarise_study(texts(), samples=50)
  row, effect = summary['by_position']['4'], summary['content_effect']['4']
  nll = read(2.0).nll[3]
  assert row['frozen']['perplexity'] == pytest.approx(np.exp(nll))
  assert row['own']['by_seed'] == pytest.approx([np.exp(nll - 0.15), np.exp(nll - 0.05)])
  for change, nats in ((row['frozen'], 0.0), (row['own'], -0.1), (effect['own'], -0.2)):
    percent = 100 * np.expm1(nats)
    assert change['change_pct'] == pytest.approx(percent, abs=1e-9)
    assert change['ci95'] == pytest.approx([percent, percent], abs=1e-9)


def test_infinite_diagnostics_become_none():
  diagnostics = {'own, seed 0': [{'step': np.int64(10), 'gate': np.float32(0.5)},
                                 {'step': 20, 'gate': float('nan')}], 'own, seed 1': []}
  summary = summarise_study(questions(diagnostics=diagnostics), samples=50)
  assert summary['diagnostics'] == {
    'own, seed 0': [{'step': 10.0, 'gate': 0.5}, {'step': 20.0, 'gate': None}]}


def rows_of(page: str, corner: str) -> list[list[list[str]]]:
  """The tables whose first header is `corner`: their rows, header first, as lists of cells."""
  tables = [part.splitlines() for part in page.split('\n\n') if part.startswith(f'| {corner} |')]
  return [[[cell.strip() for cell in line.strip('|').split('|')]
           for line in (table[0], *table[2:])] for table in tables]


def test_page_of_questions():
  """Every table has every arm and difficulty."""
  page = format_study(summarise_study(questions(), samples=100))
  accuracy, change, loss, content, mcnemar = rows_of(page, 'difficulty')
  for table in (accuracy, change, loss, content, mcnemar):
    assert [row[0] for row in table] == ['difficulty', '1', '2', 'overall']
  assert accuracy[0][1:] == ['frozen', 'own', 'shuffled', 'constant']
  assert change[0] == loss[0] == ['difficulty', 'own', 'shuffled', 'constant']
  assert accuracy[3][2].startswith('65.0 [')
  assert change[3][1].startswith('+45.0 [+')
  assert loss[3][1] == '-0.900 [-0.900, -0.900]'
  assert content[3][1].startswith('+45.0 [+') and content[3][1].endswith(
      '; +1.400 [+1.400, +1.400] nats')
  assert mcnemar[3][1] == '16:0, p = 3.1e-05<br>20:0, p = 1.9e-06'


def test_page_states_costs_and_run():
  page = format_study(summarise_study(questions(), samples=100))
  header, frozen, own, *_ = rows_of(page, 'arm')[0]
  assert dict(zip(header, own, strict=True)) == {
    'arm': 'own', 'kind': 'coprocessor', 'trained': '1,234,567', 'parameters': '7,654,321',
    'FLOPs per predicted token, frozen = 1': '1.50', 'FLOPs of training': '1.00e+12',
    'seconds, with scoring': '61, 61', 'seeds': '0, 1', 'note': 'same steps as constant'}
  assert frozen[0] == 'frozen'
  for words in ('## pointer_chasing', '`python launch/study.py`', '2 cores', 'abc', '40 questions',
                '100 draws', "'shuffled' is those of another question"):
    assert words in page


def test_page_without_controls():
  """It has neither a content effect nor a test."""
  arms = {name: arm for name, arm in questions().arms.items() if name != 'shuffled'}
  page = format_study(summarise_study(questions(arms=arms), samples=50))
  assert len(rows_of(page, 'difficulty')) == 3
  assert not any(word in page for word in ('Content effect', 'McNemar', 'shuffled', 'controls'))


def test_page_of_frozen_alone():
  page = format_study(summarise_study(questions(arms={'frozen': make_arm(answer(0.2))}), 50))
  assert len(rows_of(page, 'difficulty')) == 1


def test_page_of_text():
  """It has perplexity and changes at each position."""
  arms = {**texts().arms, 'zero': make_arm(read(12.0))}
  page = format_study(summarise_study(texts(arms=arms), samples=50))
  changes, content = rows_of(page, 'ahead')
  assert changes[0] == ['ahead', 'frozen', 'own', 'shuffled', 'zero']
  assert [row[0] for row in changes[1:]] == ['1', '4']
  assert changes[2][1:3] == ['7.486', '-9.52 [-9.52, -9.52]']
  assert changes[2][4].startswith('+2.2e+06 [')
  assert content[2][1] == '-18.13 [-18.13, -18.13]'


def test_own_latents_against_constant():
  """Paired on the same texts, for each arm that has content; only where there are soft tokens."""
  arms = {**texts().arms, 'constant': make_arm(read(1.95), read(2.05), kind='soft tokens')}
  summary = summarise_study(texts(arms=arms), samples=50)
  percent = 100 * np.expm1(-0.1)
  for position in ('1', '4'):
    assert list(summary['against_constant'][position]) == ['own']
    change = summary['against_constant'][position]['own']
    assert [change['change_pct'], *change['ci95']] == pytest.approx([percent] * 3, abs=1e-9)
  page = format_study(summary)
  assert rows_of(page, 'ahead')[2][1:] == [['1', '-9.52 [-9.52, -9.52]'],
                                           ['4', '-9.52 [-9.52, -9.52]']]
  assert 'against_constant' not in summarise_study(texts(), samples=50)
  assert 'Against constant' not in format_study(summarise_study(texts(), samples=50))


def test_latents_of_two_arms():
  """Those of another arm against those of 'own', and the content of the two."""
  arms = {**texts().arms, '8 latents': make_arm(read(1.85)),
          '8 latents/shuffled': make_arm(read(2.15))}
  summary = summarise_study(texts(arms=arms), samples=50)
  # 'own' has 1.9 nats, and 2.1 with another text's latents.
  for table, difference in (('against_own', -0.05), ('content_against_own', -0.1)):
    for position in ('1', '4'):
      assert list(summary[table][position]) == ['8 latents']
      change = summary[table][position]['8 latents']
      expected = 100 * np.expm1(difference)
      assert [change['change_pct'], *change['ci95']] == pytest.approx([expected] * 3, abs=1e-9)
  against, content = rows_of(format_study(summary), 'ahead')[2:]
  assert against[1] == ['1', '-4.88 [-4.88, -4.88]']
  assert content[1] == ['1', '-9.52 [-9.52, -9.52]']
  assert 'against_own' not in summarise_study(texts(), samples=50)


def test_few_questions_have_no_interval():
  """A difficulty with 19 questions has means alone, and the page says so."""
  page = format_study(summarise_study(
    questions(difficulty=np.where(np.arange(40) < 21, 1, 5)), samples=50))
  for table in rows_of(page, 'difficulty')[:4]:
    assert all('[' in cell for cell in table[1][1:]) and all('[' in cell for cell in table[3][1:])
    assert not any('[' in cell for cell in table[2][1:])
  assert 'Too few questions for an interval: 5 (19).' in page


def test_few_texts_have_no_interval():
  """Positions that 19 texts reach have means alone."""
  summary = summarise_study(texts(), samples=50)
  assert 'Too few' not in format_study(summary)
  summary['reached']['4'] = 19
  changes, content = rows_of(format_study(summary), 'ahead')
  assert changes[2][2] == '-9.52' and content[2][1] == '-18.13' and '[' in changes[1][2]
  assert 'Too few texts for an interval: 4 (19).' in format_study(summary)


@pytest.mark.parametrize('study', [questions, texts])
def test_written_study_reads_back(tmp_path, study):
  summary = summarise_study(study(diagnostics={'own': [{'step': 1, 'gate': 0.1}]}), samples=50)
  write_study(summary, tmp_path / 'pointer_chasing')
  stored = json.loads((tmp_path / 'pointer_chasing' / 'results.json').read_text())
  page = (tmp_path / 'pointer_chasing' / 'results.md').read_text()
  assert stored == summary
  assert page == format_study(stored)
  files = {path.name for path in (tmp_path / 'pointer_chasing').iterdir()}
  pictures = files - {'results.json', 'results.md'}
  assert pictures == {'results.png', 'diagnostics.png'}
  assert all(f']({picture})' in page for picture in pictures)


def test_no_diagnostics_no_picture(tmp_path):
  write_study(summarise_study(questions(config={'workdir': tmp_path}), samples=50), tmp_path)
  assert not (tmp_path / 'diagnostics.png').exists()
  assert 'diagnostics.png' not in (tmp_path / 'results.md').read_text()
  assert json.loads((tmp_path / 'results.json').read_text())['config'] == {
    'workdir': str(tmp_path)}
