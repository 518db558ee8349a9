"""The 2 x 3 table: each cell is the decoder's own score of the answers, read whole."""

import json

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts.retrieval import Library, format_question
from latent_deliberation.experts.retrieval_trial import (
  ARMS,
  COMPARISONS,
  RetrievalTrial,
  format_summary,
  hash_of,
  long_enough,
  passages_of,
  read_questions,
  run_trial,
  summarise,
  write_summary,
)
from tests.serving import small_server

pytest.importorskip('bm25s')
TOKENIZER, MIX = small_server.decoder().tokenizer, {'stars': 1.0}


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / 'data'
  (folder / 'sciq').mkdir(parents=True)
  lines = [{'question': f'What is {word}?', 'correct_answer': f'a{word}', 'distractor1': 'b',
            'distractor2': 'cc', 'distractor3': 'd', 'support': f'It is {word} here.'}
           for word in ('ice', 'law', 'rose', 'star')]
  lines.append({**lines[0], 'support': ''})
  (folder / 'sciq' / 'validation.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (folder / 'pubmed_qa').mkdir()
  (folder / 'pubmed_qa' / 'labeled.jsonl').write_text(json.dumps({
      'QUESTION': 'Does it?', 'CONTEXTS': ['One.', 'Two.'], 'final_decision': 'maybe'}))
  return folder


@pytest.fixture
def experts():
  return small_server.experts()


def trial_on(experts, questions, tmp_path):
  library = Library(passages_of(questions, TOKENIZER, 40), experts, tmp_path / 'store')
  return RetrievalTrial(experts, TOKENIZER, library, MIX)


def test_questions(data):
  """Questions come in a fixed order, with the right answer and the text that holds it."""
  found = read_questions(data, 'sciq', 0)
  assert len(found) == 4 and found == read_questions(data, 'sciq', 0)
  assert read_questions(data, 'sciq', 2) == found[:2]
  ice = next(question for question in found if 'ice' in question.text)
  assert (ice.answers, ice.right, ice.context) == (
      ('aice', 'b', 'cc', 'd'), 0, 'It is ice here.')
  question, = read_questions(data, 'pubmed_qa', 0)
  assert (question.answers[question.right], question.context) == ('maybe', 'One. Two.')
  with pytest.raises(UserError, match='sciq/sciq/validation.jsonl is missing'):
    read_questions(data / 'sciq', 'sciq', 0)


@pytest.mark.parametrize('content, message', [
    (b'{"question": 3}', "document 0 of .* is no question of sciq .*correct_answer"),
    (b'{"QUESTION": "a', 'cannot be read'), (b'\xff', 'cannot be read'), (b'\n', 'no document'),
    (b'{"question": "a", "correct_answer": "b", "distractor1": "c", "distractor2": "d", '
     b'"distractor3": "e", "support": 3}', 'document 0 of .* is no question of sciq')])
def test_strange_questions(data, content, message):
  (data / 'sciq/validation.jsonl').write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_questions(data, 'sciq', 0)


def test_cells_are_scores_of_whole_texts(experts, data, tmp_path):
  """Each way gives what the engine gives when everything is read anew."""
  questions = read_questions(data, 'sciq', 0)
  one, other = questions[0], questions[3]
  record = trial_on(experts, questions, tmp_path).ask(one, other)
  assert record['found'] and record['passage'] == one.name
  engine, encode, more = experts.engine, TOKENIZER.encode, TOKENIZER.encode_more
  outputs = lambda state: experts.outputs(state, [MIX])  # noqa: E731

  def score(state):
    return [float(engine.score_on(state, [more(f' {answer}')])[0].sum()) for answer in one.answers]

  def with_latents(state, from_state):
    return engine.attach(state, experts.read_latents(state, outputs(from_state)))

  alone, alone_other = (engine.read([encode(format_question(each.text, False))])
                        for each in (one, other))
  passage, passage_other = (engine.read([encode(each.context)]) for each in (one, other))
  ids, ids_other = (more(format_question(each.text, True)) for each in (one, other))
  follows, follows_other = engine.read_on(passage, [ids]), engine.read_on(
      passage_other, [ids_other])
  expected = {
      'none': alone, 'expert': with_latents(alone, alone), 'retrieved': follows,
      'other': with_latents(alone, alone_other),
      'retrieved, expert': engine.read_on(with_latents(passage, passage), [ids]),
      'retrieved, other': engine.read_on(with_latents(passage, passage_other), [ids]),
      'retrieved, expert at the question': with_latents(follows, follows),
      'retrieved, other at the question': with_latents(follows, follows_other)}
  assert list(record['answers']) and set(record['answers']) == set(ARMS) == set(expected)
  for name, state in expected.items():
    np.testing.assert_allclose(record['answers'][name], score(state), atol=2e-4, err_msg=name)
  values = [record['answers'][name][0] for name in ARMS]
  assert len({round(value, 5) for value in values}) == len(ARMS)


def test_trial_resumes(experts, data, tmp_path, monkeypatch):
  """A trial that was cut off asks only what is left, and a line that was cut off again."""
  questions, path = read_questions(data, 'sciq', 0), tmp_path / 'records.jsonl'
  whole = run_trial(trial_on(experts, questions, tmp_path), questions, path, {'a': 1})
  lines = path.read_text().split('\n')
  path.write_text('\n'.join(lines[:3]) + '\n' + lines[3][:20])
  asked, trial = [], trial_on(experts, questions, tmp_path)
  ask = trial.ask
  monkeypatch.setattr(trial, 'ask', lambda one, other: asked.append(one.name) or ask(one, other))
  again = run_trial(trial, questions, path, {'a': 1})
  assert asked == [question.name for question in questions[2:]]
  for one, other in zip(whole, again, strict=True):
    for name in ARMS:
      np.testing.assert_allclose(one['answers'][name], other['answers'][name], atol=1e-4)
  assert len(path.read_text().splitlines()) == 5
  with pytest.raises(UserError, match='another trial'):
    run_trial(trial, questions, path, {'a': 2})


def records_of(gains):
  """Records of 60 questions whose arms differ from the plain one by these nats."""
  random = np.random.default_rng(0)
  found = []
  for number in range(60):
    base = random.normal(-3, 1, 2)
    found.append({'name': f'q/{number}', 'right': number % 2, 'found': number % 3 > 0,
                  'seconds': {'read': 0.5}, 'answers': {
                      arm: [float(base[at] + gains.get(arm, 0) * (at == number % 2) +
                                  random.normal(0, 0.05)) for at in range(2)] for arm in ARMS}})
  return found


def test_summary_says_what_is_shown(tmp_path):
  """Means, paired intervals and verdicts follow the records."""
  result = summarise(records_of({'retrieved': 1.0, 'retrieved, expert': 0.5, 'expert': 0.2,
                                 'retrieved, expert at the question': 1.5}))
  saved = result['saved']
  assert saved['retrieval alone']['mean'] == pytest.approx(1.0, abs=0.05)
  low, high = saved['both over retrieval alone']['ci95']
  assert low < -0.5 < high < 0
  assert (result['questions'], result['chance']) == (60, 0.5)
  assert result['found'] == pytest.approx(2 / 3)
  assert set(saved) == set(COMPARISONS)
  page = format_summary('sciq', result)
  assert '**With latents after the passage, retrieval alone is better.**' in page
  assert 'With latents after the question, retrieval and the expert are better' in page
  assert 'retrieval saves more than the expert' in page
  assert write_summary(tmp_path / 'out.json', {'sciq': result}, {}) == page
  assert (tmp_path / 'out.png').stat().st_size > 5000
  assert json.loads((tmp_path / 'out.json').read_text())['results']['sciq'] == result


def test_short_questions_are_left_out(data):
  """Latents replace the last tokens, so a question needs as many."""
  questions = read_questions(data, 'sciq', 0)
  assert long_enough(questions, TOKENIZER, 16, 64) == questions
  longest = max(len(question.context) for question in questions) + 1
  assert {len(question.context) + 1
          for question in long_enough(questions, TOKENIZER, longest, 64)} == {longest}
  assert long_enough(questions, TOKENIZER, 60, 64) == []
  # A passage is cut, and what is left has to be long enough.
  assert long_enough(questions, TOKENIZER, 16, 16) == questions
  assert long_enough(questions, TOKENIZER, 16, 15) == []


def test_hash_of_questions(data):
  questions = read_questions(data, 'sciq', 0)
  assert hash_of(questions) != hash_of(questions[::-1]) and len(hash_of(questions)) == 16
