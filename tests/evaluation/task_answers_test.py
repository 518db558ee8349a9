"""Texts do not depend on batches or stops: another example's latents are of the prompt before."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip('lm_eval')

from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.arm_model import ArmModel, Writing
from latent_deliberation.evaluation.ledger import Ledger
from latent_deliberation.evaluation.task_answers import Settings, TaskAnswers
from latent_deliberation.evaluation.task_run import Plan, run_tasks
from latent_deliberation.inference import session
from latent_deliberation.inference.policy import ONCE
from latent_deliberation.inference.session import DecodingOptions

DRAWN = {'do_sample': True, 'temperature': 2.0, 'max_gen_toks': 8}


@pytest.fixture(scope='module')
def loud(model):
  """A model with a large gate, so that texts tell whose latents they have."""
  own = CoprocessorCheckpoint(**{**vars(model.own), 'params': {
      **model.own.params, 'gate': 100 * model.own.params['gate']}})
  return ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, own=own,
                  max_length=256)


def texts_of(model, prompts, arm, batch_size=0, skip=()):
  """Texts by the number of their prompt."""
  writing = Writing(DecodingOptions(12), batch_size=batch_size)
  return {number: text for written, _ in model.write(prompts, arm, writing, skip)
          for number, text in zip(written.numbers, written.texts, strict=True)}


def test_repeated_texts_lend_no_latents(loud):
  """The latents of an equal prompt would be the prompt's own."""
  same, other = (loud.tokenizer.encode(text) for text in (
      'Document 5: the 5th of the forty. Document 1:', 'Document 7: of the forty. Document 2:' * 2))
  own, shuffled = (texts_of(loud, [same, same, other], arm) for arm in ('own', 'shuffled'))
  assert shuffled[0] == shuffled[1] != own[1] == own[0]


def test_shuffled_texts(loud):
  """A text has the latents of the next shorter prompt, whatever is written beside it."""
  prompts = [loud.tokenizer.encode('Document 5: ' + 'the 5th of the forty. ' * (1 + number % 3)
                                   + f'Document {number}:' + ' the' * number)
             for number in range(6)]
  order = sorted(range(6), key=lambda number: (len(prompts[number]), number))
  engine = loud.engine('shuffled')
  options = session.with_ends(DecodingOptions(12, policy=ONCE), loud.tokenizer, ())
  expected = {}
  for place, number in enumerate(order):
    before = order[place - 1] if place else order[1]
    # The latents of two texts are exchanged.
    *_, completion = session.generate(engine, [prompts[before], prompts[number]], options)
    expected[number] = session.text_of(completion, loud.tokenizer, (), prompts[number])
  assert texts_of(loud, prompts, 'shuffled') == expected
  assert texts_of(loud, prompts, 'shuffled', batch_size=2) == expected
  assert texts_of(loud, prompts, 'own') != expected
  # A run goes on where some in the middle are finished.
  for skip in ((order[1], order[3]), (order[2],), order[:4]):
    assert texts_of(loud, prompts, 'shuffled', skip=skip) == {
        number: text for number, text in expected.items() if number not in skip}


def test_length_of_caches(model):
  """A cache has room for the longest text of a task, and never for more than the decoder reads."""
  lengths = [model.engine('own', longest).model.plan.global_slots
             for longest in (1, 128, 129, model.max_length + 99, None)]
  assert lengths == [128, 128, 256, *[model.max_length + 1] * 2]
  assert model.engine('own', 40) is model.engine('own', 100)
  with pytest.raises(UserError, match=str(model.max_length + 1)):
    next(model.write([[5] * model.max_length], 'own', Writing(DecodingOptions(2))))


def test_drawn_texts(model, tmp_path):
  """Texts that are drawn after the same prompt differ, and are kept; greedy ones are the same."""
  prompts = ['Document 1: the'] * 4 + ['Document 2']
  write = lambda generation, path: TaskAnswers(  # noqa: E731
      model, ('frozen',), Settings(), Ledger(path)).write('t', prompts, generation, 'frozen')
  drawn = write(DRAWN, tmp_path / 'a')
  assert len(set(drawn[:4])) > 1
  lines = (tmp_path / 'a').read_text()
  assert write(DRAWN, tmp_path / 'a') == drawn and (tmp_path / 'a').read_text() == lines
  assert len(set(write({'max_gen_toks': 8}, tmp_path / 'a')[:4])) == 1
  # Greedy texts after one prompt are written once.
  assert len(json.loads((tmp_path / 'a').read_text().splitlines()[-1])['keys']) == 2


@pytest.mark.parametrize('place', ['end', 'before:Answer:'])
def test_latents_that_are_not_finite(model, place):
  """They end a benchmark: its texts and scores would be the frozen decoder's, or no numbers."""
  own = CoprocessorCheckpoint(**{**vars(model.own), 'params': {
      **model.own.params, 'gate': np.nan * model.own.params['gate']}})
  broken = ArmModel(model.config, model.params, model.fingerprint, model.tokenizer, own=own,
                    max_length=256)
  answers = TaskAnswers(broken, ('frozen', 'own'), Settings(place), Ledger(None))
  prompt = 'Document 5: the 5th of the forty. Answer:'
  with pytest.raises(UserError, match="task t: the arm 'own' gives an answer nan nats"):
    answers.score('t', [(prompt, ' the')], ['t 0'])
  with pytest.raises(UserError, match="arm 'own': the coprocessor failed"):
    answers.write('t', [prompt], {'max_gen_toks': 8}, 'own')


def test_stopped_in_a_task(model, data, tmp_path):
  """A run that was stopped in the middle of a task goes on, and has the same results."""
  plan = Plan(('triviaqa', 'piqa'), ('frozen', 'own', 'shuffled', 'zero'), str(data))
  settings = Settings(batch_size=2)
  whole = run_tasks(model, plan, settings, tmp_path / 'whole')['tasks']
  lines = (tmp_path / 'whole/answers.jsonl').read_text().splitlines(keepends=True)
  authors = [json.loads(line).get('arm') for line in lines]
  # In the middle of a text's arm, and between texts and the scores of their gold answers.
  for count in (authors.index('shuffled') + 1, authors.index(None)):
    shutil.copytree(tmp_path / 'whole', output := tmp_path / f'cut_{count}')
    shutil.rmtree(output / 'tasks')
    (output / 'answers.jsonl').write_text(''.join(lines[:count]))
    again = run_tasks(model, plan, settings, output)['tasks']
    assert sorted((output / 'answers.jsonl').read_text().splitlines(keepends=True)[:count]
                  ) == sorted(lines[:count])
    for task, values in whole.items():
      for arm, outcomes in values['arms'].items():
        assert again[task]['arms'][arm]['texts'] == outcomes['texts']
        np.testing.assert_allclose(again[task]['arms'][arm]['nats'], outcomes['nats'], atol=1e-4)
