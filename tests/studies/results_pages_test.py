"""The pages of docs/results/ are rendered from JSON; old runs enter under current names."""

import json
import shutil

import numpy as np
import pytest

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.studies.results_pages import (
  add_result,
  check_pages,
  load_results,
  render_pages,
  write_pages,
)
from latent_deliberation.studies.study_report import summarise_study, write_study
from tests import finished
from tests.studies.results import answer, make_arm, questions, read, texts

DIRECTORY = finished.ROOT / 'docs' / 'results'
SUMMARY = {'summary': 'Latents help.'}


def row_of(pages: dict[str, str], title: str) -> list[str]:
  """Cells of a row of the index."""
  row, = (line for line in pages['README.md'].splitlines() if line.startswith(f'| [{title}]'))
  return [cell.strip() for cell in row.strip('|').split('|')]


def add(directory, tmp_path, study, name='mine', values=SUMMARY, overwrite=False):
  """Adds a study as if it had just been run."""
  write_study(summarise_study(study, samples=50), tmp_path / 'run')
  add_result(directory, name, tmp_path / 'run', values, overwrite)
  return render_pages(load_results(directory))


def test_committed_pages_are_rendered():
  """If this fails: python launch/render_results.py."""
  assert load_results(DIRECTORY)
  check_pages(DIRECTORY)


def test_committed_results_are_complete():
  """They have a summary, and say how they came about."""
  for name, result in load_results(DIRECTORY).items():
    assert {'summary', 'command', 'machine', 'git_commit', 'seconds'} <= set(result), name
    assert 'diagnostics' not in result
    assert (DIRECTORY / f'{name}.json').stat().st_size < 320_000


def test_typed_figure_is_found(tmp_path):
  copy = shutil.copytree(DIRECTORY, tmp_path / 'results')
  page = copy / 'quickstart.md'
  page.write_text(page.read_text().replace('24', '23', 1))
  (copy / 'no_json.md').write_text('typed')
  (copy / 'quickstart.png').unlink()
  with pytest.raises(UserError, match=r"'quickstart.md', 'quickstart.png', 'no_json.md'"):
    check_pages(copy)


def test_pages_and_plots_are_written(tmp_path):
  for name, study in (('questions', questions()), ('texts', texts())):
    add(tmp_path / 'results', tmp_path, study, name)
  written = write_pages(tmp_path / 'results')
  assert {path.name for path in written} == {'questions.md', 'texts.md', 'README.md'}
  check_pages(tmp_path / 'results')
  page = (tmp_path / 'results' / 'questions.md').read_text()
  assert page.startswith('# Pointer_chasing\n\nLatents help.\n') and '](questions.png)' in page
  assert 'python launch/study.py' in page and '| overall | 20.0' in page


def test_index_row_of_questions(tmp_path):
  """It is at the first difficulty at which the frozen decoder fails."""
  arms = {'frozen': make_arm(answer(0.85)), 'own': make_arm(answer(1.0)),
          'shuffled': make_arm(answer(0.5)), 'joint': make_arm(answer(0.9), kind='joint')}
  difficulty = [1] * 20 + [2] * 20  # the frozen decoder has all of 1 right, and 70% of 2
  study = questions(arms=arms, difficulty=np.array(difficulty))
  assert row_of(add(tmp_path, tmp_path, study), 'Pointer_chasing')[1:] == [
      'difficulty 2', '70.0', '**100.0**', '0.0', '-', '80.0 joint', '1']


def test_index_row_of_text(tmp_path):
  arms = {'frozen': make_arm(read(2.0)), '4 latents': make_arm(read(1.9)),
          '8 latents': make_arm(read(1.8)), '8 latents/shuffled': make_arm(read(2.1)),
          '16 constant': make_arm(read(2.0))}
  pages = add(tmp_path, tmp_path, texts(arms=arms))
  assert row_of(pages, 'Prose')[1:] == [
      'position 4', '7.49', '**-18.13%** (8 latents)', '+10.52%', '+0.00%', '-', '1']


def test_old_runs_get_current_names(tmp_path):
  """Arms, kinds, tests, config keys, config files and the work directory."""
  arms = {'frozen': make_arm(answer(0.2)), 'own': make_arm(answer(0.6)),
          'lora': make_arm(answer(0.5)), 'lora/shuffled': make_arm(answer(0.2)),
          'continued': make_arm(answer(0.4), kind='continued'),
          'adapted': make_arm(answer(0.3), kind='adapted')}
  config = {'experiment': {'training': {'portion': [0, 100]}}, 'lessons': {'skew': 0.0},
            'arms': {'adapted': {'learns': 'adapted'}, 'lora': {'learns': 'latents'}}}
  command = 'launch/study.py --config=configs/study/hops.py:full --workdir=/tmp/hops'
  add(tmp_path, tmp_path, questions(arms=arms, config=config, command=command))
  result = load_results(tmp_path)['mine']
  assert list(result['overall']) == [
      'frozen', 'own', 'lora coprocessor', 'lora coprocessor/shuffled', 'finetuned', 'lora']
  assert [arm['kind'] for arm in result['arms'].values()][-2:] == ['finetuned', 'lora']
  test = result['mcnemar']['overall']['lora coprocessor vs lora coprocessor/shuffled'][0]
  assert test['lora coprocessor_only'] == 12 and test['lora coprocessor/shuffled_only'] == 0
  assert result['config']['arms'] == {
      'lora': {'learns': 'lora'}, 'lora coprocessor': {'learns': 'latents'}}
  assert result['config']['arm_data_options'] == {'skew': 0.0}
  assert result['command'] == (
      'python launch/study.py --config=configs/study/pointer_chasing.py:full --workdir=runs/mine')


def test_runs_of_today_keep_their_names(tmp_path):
  arms = {'frozen': make_arm(answer(0.2)), 'lora': make_arm(answer(0.5), kind='lora')}
  add(tmp_path, tmp_path, questions(arms=arms))
  assert list(load_results(tmp_path)['mine']['overall']) == ['frozen', 'lora']


def test_quickstart_can_be_added(quickstart, tmp_path):
  add_result(tmp_path, 'tiny', quickstart, SUMMARY | {'machine': '2 cores'})
  page = render_pages(load_results(tmp_path))['tiny.md']
  report = json.loads((quickstart / 'report.json').read_text())
  assert page.startswith('# Tiny\n\nLatents help.\n') and '- machine: 2 cores' in page
  assert f'{report["arms"]["frozen"]["perplexity"][0]:.3f}' in page


def test_places_of_files_are_left_out(tmp_path):
  """A committed result names files, and not where they were."""
  config = {'data': {'vocabulary_path': '/home/somebody/gemma/tokenizer.model'}, 'seed': 1}
  add(tmp_path, tmp_path, questions(config=config))
  assert load_results(tmp_path)['mine']['config']['data'] == {'vocabulary_path': 'tokenizer.model'}


def test_summary_is_needed_once(tmp_path):
  with pytest.raises(UserError, match='mine has no summary.*--set'):
    add(tmp_path, tmp_path, questions(), values={})
  add(tmp_path, tmp_path, questions())
  with pytest.raises(UserError, match='mine.json .*--overwrite'):
    add(tmp_path, tmp_path, questions(seconds=7.0), values={})
  add(tmp_path, tmp_path, questions(seconds=7.0), values={}, overwrite=True)
  result = load_results(tmp_path)['mine']
  assert (result['summary'], result['seconds']) == ('Latents help.', 7.0)


def test_bad_additions_are_refused(tmp_path):
  with pytest.raises(MissingError, match='nothing has no results.json'):
    add_result(tmp_path, 'mine', tmp_path / 'nothing', SUMMARY)
  (tmp_path / 'results.json').write_text('{"identity": {}, "bootstrap": {}, "tasks": {}}')
  with pytest.raises(UserError, match=f'{tmp_path}/results.json .*study or a quickstart'):
    add_result(tmp_path / 'pages', 'mine', tmp_path, SUMMARY)
  with pytest.raises(UserError, match=r"--set=sumary=.*'summary'"):
    add(tmp_path, tmp_path, questions(), values={'sumary': ''})


def test_damaged_or_absent_results(tmp_path):
  with pytest.raises(MissingError, match=f'{tmp_path} has no results'):
    check_pages(tmp_path)
  (tmp_path / 'cut.json').write_text('{"name": ')
  with pytest.raises(UserError, match='cut.json is not JSON'):
    check_pages(tmp_path)
