"""A study as people read it."""

import json

import pytest

from latent_deliberation.studies.study_report import format_study, summarise_study, write_study
from tests.studies.results import answer, make_arm, questions, read, texts


def rows_of(page: str, corner: str) -> list[list[list[str]]]:
  """The tables whose first header is `corner`: their rows, header first, as lists of cells."""
  tables = [part.splitlines() for part in page.split('\n\n') if part.startswith(f'| {corner} |')]
  return [[[cell.strip() for cell in line.strip('|').split('|')]
           for line in (table[0], *table[2:])] for table in tables]


def test_the_page_of_a_study_of_questions_has_every_arm_and_difficulty_in_every_table():
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


def test_the_page_states_what_each_arm_costs_and_how_the_study_was_run():
  page = format_study(summarise_study(questions(), samples=100))
  header, frozen, own, *_ = rows_of(page, 'arm')[0]
  assert dict(zip(header, own, strict=True)) == {
    'arm': 'own', 'kind': 'coprocessor', 'trained': '1,234,567', 'parameters': '7,654,321',
    'FLOPs per predicted token, frozen = 1': '1.50', 'FLOPs of training': '1.00e+12',
    'seconds, with scoring': '61, 61', 'seeds': '0, 1', 'note': 'same steps as constant'}
  assert frozen[0] == 'frozen'
  for words in ('## hops', '`python launch/study.py`', '2 cores', 'abc', '40 questions',
                '100 draws'):
    assert words in page


def test_a_study_without_controls_has_neither_content_effect_nor_test():
  arms = {name: arm for name, arm in questions().arms.items() if name != 'shuffled'}
  page = format_study(summarise_study(questions(arms=arms), samples=50))
  assert len(rows_of(page, 'difficulty')) == 3
  assert 'Content effect' not in page and 'McNemar' not in page


def test_a_study_of_the_frozen_decoder_alone_can_be_written():
  page = format_study(summarise_study(questions(arms={'frozen': make_arm(answer(0.2))}), 50))
  assert len(rows_of(page, 'difficulty')) == 1


def test_the_page_of_a_study_of_text_has_perplexity_and_changes_at_each_position():
  arms = {**texts().arms, 'zero': make_arm(read(12.0))}
  page = format_study(summarise_study(texts(arms=arms), samples=50))
  changes, content = rows_of(page, 'ahead')
  assert changes[0] == ['ahead', 'frozen', 'own', 'shuffled', 'zero']
  assert [row[0] for row in changes[1:]] == ['1', '4']
  assert changes[2][1:3] == ['7.486', '-9.52 [-9.52, -9.52]']
  assert changes[2][4].startswith('+2.2e+06 [')
  assert content[2][1] == '-18.13 [-18.13, -18.13]'


@pytest.mark.parametrize('study', [questions, texts])
def test_a_written_study_reads_back_and_renders_again(tmp_path, study):
  summary = summarise_study(study(diagnostics={'own': [{'step': 1, 'gate': 0.1}]}), samples=50)
  write_study(summary, tmp_path / 'pointer_chasing')
  stored = json.loads((tmp_path / 'pointer_chasing' / 'results.json').read_text())
  page = (tmp_path / 'pointer_chasing' / 'results.md').read_text()
  assert stored == summary
  assert page == format_study(stored)
  pictures = {path.name for path in (tmp_path / 'pointer_chasing').iterdir()} - {'results.json', 'results.md'}
  assert pictures == {'results.png', 'diagnostics.png'}
  assert all(f']({picture})' in page for picture in pictures)


def test_a_study_without_diagnostics_has_no_picture_of_them(tmp_path):
  write_study(summarise_study(questions(config={'workdir': tmp_path}), samples=50), tmp_path)
  assert not (tmp_path / 'diagnostics.png').exists()
  assert 'diagnostics.png' not in (tmp_path / 'results.md').read_text()
  assert json.loads((tmp_path / 'results.json').read_text())['config'] == {
    'workdir': str(tmp_path)}
