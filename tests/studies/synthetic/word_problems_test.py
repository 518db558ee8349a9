import dataclasses
import re

import numpy as np
import pytest

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.documents import open_synthetic
from latent_deliberation.studies.synthetic.word_problems import (
  LARGEST,
  WordProblems,
  find_equations,
  read_problems,
  tell_story,
)

LINE = 'Tom has {0} pens. He buys 2 more. How many now?||<<{0}+2={1}>> #### {1}'


@pytest.fixture
def files(tmp_path):
  """A training file of 60 questions, and one to ask of 7, with 0, 1 and 2 equations."""
  train, asked = tmp_path / 'train.txt', tmp_path / 'asked.txt'
  train.write_text('\n'.join(LINE.format(n, n + 2) for n in range(100, 160)) + '\n')
  asked.write_text('\n'.join(
      ['None given?||#### 1'] + ['One?||<<1+1=2>> #### 2'] * 3
      + ['Two?||<<1+1=2>> <<2+1=3>> #### 3'] * 2
      + ['Three?||<<1+1=2>> <<2+1=3>> <<3+1=4>> #### 1,004']))
  return str(train), str(asked)


def draw(task, count=400, held_out=False):
  return [task.document(np.random.default_rng(seed), 1, held_out) for seed in range(count)]


def test_both_forms_have_their_share(files):
  """They differ in the sign after the question."""
  texts = draw(WordProblems(train=files[0], chains=0.25))
  direct, chains = ([text for text in texts if (' ||' in text) == written]
                    for written in (False, True))
  assert 0.15 < len(chains) / len(texts) < 0.35
  assert 'Tom has 101 pens. He buys 2 more. How many now?\n103;' in direct
  assert 'Tom has 101 pens. He buys 2 more. How many now? || <<101+2=103>> #### 103;' in chains
  assert all(text.count('\n') == 1 for text in direct)
  assert not any('\n' in text for text in chains)
  assert not any('||' in text for text in draw(WordProblems(train=files[0], chains=0.0)))


def test_splits_share_no_question(files):
  task = WordProblems(train=files[0], chains=0.0)
  train, validation = set(draw(task)), set(draw(task, held_out=True))
  assert len(train) == 57 and len(validation) == 3
  assert not train & validation


def test_stories_have_their_share(files):
  texts = draw(WordProblems(train=files[0], stories=0.75))
  assert 0.65 < np.mean(['How many now?' not in text for text in texts]) < 0.85
  texts = draw(WordProblems(stories=1.0, chains=1.0, skew=1.0))
  counts = np.bincount([text.count('<<') for text in texts])
  assert len(counts) == 6 and counts[1] > 2 * counts[2] > 2 * counts[3]


def test_file_is_asked_in_its_order(files):
  task = WordProblems(train=files[0], asked=files[1], steps=2)
  asked = task.examine(np.random.default_rng(0), 3)
  assert [each.difficulty for each in asked] == [1, 1, 1, 2, 2, 2]
  assert [each.question for each in asked] == ['None given?\n', *['One?\n'] * 2, *['Two?\n'] * 2,
                                               'Three?\n']
  assert asked[-1].answer == '1004;'
  chain = task.ask_for_chain(asked[-1])
  assert (chain.question, chain.answer) == ('Three? ||', ' 1004;')


def test_stories_are_asked_without_file():
  task = WordProblems(stories=1.0)
  asked = task.examine(np.random.default_rng(0), 4)
  assert [each.difficulty for each in asked] == [k for k in range(1, 6) for _ in range(4)]
  assert all(each.question[-1] in task.anchors for each in asked)


@pytest.mark.parametrize(('chain', 'equations'), [
    ('<<16-3-4=9>> <<9*2=18>>', ['16-3-4=9', '9*2=18']),
    ('It is 32 / 2 = $16 million, and $16 +12 = $28.50 then.', ['32/2=16', '16+12=28.50']),
    ('They walk 4 x 1,200=4,800 m, (4+2)*3 = 18 days', ['4*1200=4800', '(4+2)*3=18']),
    ('There are 5 pens', []),
])
def test_find_equations(chain, equations):
  assert find_equations(chain) == equations


def test_chains_without_equations(tmp_path):
  """Chains of products of long numbers stay as they are."""
  path = tmp_path / 'products.txt'
  path.write_text('1 2 * 3 0||3 6 + 0 0 0 #### 3 6 0\n' * 2)
  task = WordProblems(train=str(path), asked=str(path), equations=False, chains=1.0)
  assert set(draw(task, 5)) == {'1 2 * 3 0 || 3 6 + 0 0 0 #### 3 6 0;'}
  assert [each.difficulty for each in task.examine(np.random.default_rng(0), 9)] == [1, 1]


@pytest.mark.parametrize(('line', 'message'), [
    ('How many?', r"asked.txt:2: not of the form 'question\|\|chain #### answer', but 'How many"),
    ('How many?||1+1=2', 'asked.txt:2: not of the form'),
    ('How many?||1+1=2 ####', 'asked.txt:2: not of the form'),
    ('||1+1=2 #### 2', 'asked.txt:2: not of the form'),
    ('a||b||c #### 2', 'asked.txt:2: not of the form'),
    ('How many?||1+1=2 #### 2;3', "asked.txt:2: the answer '2;3' holds ';'"),
    ('How▁many?||1+1=2 #### 2', "asked.txt:2: it holds '▁', SentencePiece's own sign"),
    ('How\0many?||1+1=2 #### 2', 'asked.txt:2: it holds .*, NUL'),
])
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'asked.txt'
  path.write_text(f'Right?||<<1+1=2>> #### 2\n{line}\n', encoding='utf-8')
  with pytest.raises(UserError, match=message):
    read_problems(path)


def test_bad_file_is_named(tmp_path):
  with pytest.raises(UserError, match='no file .*none.txt'):
    read_problems(tmp_path / 'none.txt')
  (tmp_path / 'empty.txt').write_text('\n')
  with pytest.raises(UserError, match='empty.txt is empty'):
    read_problems(tmp_path / 'empty.txt')
  (tmp_path / 'bytes.txt').write_bytes(b'a\xff')
  with pytest.raises(UserError, match='bytes.txt is not UTF-8 text at byte 1'):
    read_problems(tmp_path / 'bytes.txt')


@pytest.mark.parametrize(('options', 'message'), [
    ({}, "train = '' with stories = 0.0"),
    ({'stories': 1.5}, 'stories = 1.5: .*0 and 1'),
    ({'stories': 1.0, 'chains': -0.1}, 'chains = -0.1: .*0 and 1'),
    ({'stories': 1.0, 'steps': 0}, 'steps = 0: .*between 1 and'),
    ({'stories': 1.0, 'equations': 1}, 'equations = 1: .*True or False'),
    ({'train': 7}, 'train = 7: .*path'),
])
def test_bad_options_are_named(options, message):
  with pytest.raises(UserError, match=message):
    WordProblems(**options)


def test_fingerprint_follows_training_file(files):
  train, asked = files
  config = DataConfig(source='synthetic', name='word_problems', questions=1, documents=9,
                      options={'train': train, 'asked': asked})
  before = open_synthetic(config).fingerprint
  with open(asked, 'a') as file:
    file.write('\nMore?||<<1+1=2>> #### 2')
  assert open_synthetic(config).fingerprint == before
  with open(train, 'a') as file:
    file.write('More?||<<1+1=2>> #### 2')
  assert open_synthetic(config).fingerprint != before
  other = dataclasses.replace(config, options={**config.options, 'chains': 0.1})
  assert open_synthetic(other).fingerprint != before


OPERATIONS = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '/': int.__floordiv__}


@pytest.mark.parametrize('steps', [1, 3, 9])
def test_story_equations_lead_to_answer(steps):
  for seed in range(200):
    story = tell_story(np.random.default_rng(seed), steps)
    equations = re.findall(r'<<(\d+)([-+*/])(\d+)=(\d+)>>', story.chain)
    assert len(equations) == steps == story.steps
    quantity = int(equations[0][0])
    assert re.search(rf'\b{quantity}\b', story.text.split('.')[0])
    for left, sign, right, result in equations:
      assert int(left) == quantity and (sign != '/' or quantity % int(right) == 0)
      quantity = int(result)
      assert quantity == OPERATIONS[sign](int(left), int(right)) and 0 <= quantity <= LARGEST
    assert story.answer == str(quantity)


def test_story_sentences():
  """Each change has a sentence, which names a number that is added or taken."""
  for seed in range(200):
    story = tell_story(np.random.default_rng(seed), 4)
    _, *changes, _ = re.split(r'(?<=\.) ', story.text)
    equations = re.findall(r'<<\d+([-+*/])(\d+)=', story.chain)
    assert len(changes) == len(equations)
    for sentence, (sign, operand) in zip(changes, equations, strict=True):
      assert (operand in sentence) == (sign in '+-'), (sentence, sign, operand)


def test_stories_are_drawn():
  """The same draw gives the same story."""
  first, again = ([tell_story(np.random.default_rng(seed), 3) for seed in range(50)]
                  for _ in range(2))
  assert first == again
  assert len({story.text for story in first}) == 50
  assert len({story.answer for story in first}) > 3
