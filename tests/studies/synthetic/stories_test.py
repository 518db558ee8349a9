import re

import numpy as np
import pytest

from latent_deliberation.studies.synthetic.word_problems import LARGEST, tell_story

OPERATIONS = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '/': int.__floordiv__}


@pytest.mark.parametrize('steps', [1, 3, 9])
def test_equations_follow_from_each_other_and_lead_to_the_answer(steps):
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


def test_each_change_has_a_sentence_and_what_is_added_or_taken_stands_in_it():
  for seed in range(200):
    story = tell_story(np.random.default_rng(seed), 4)
    _, *changes, _ = re.split(r'(?<=\.) ', story.text)
    equations = re.findall(r'<<\d+([-+*/])(\d+)=', story.chain)
    assert len(changes) == len(equations)
    for sentence, (sign, operand) in zip(changes, equations, strict=True):
      assert (operand in sentence) == (sign in '+-'), (sentence, sign, operand)


def test_stories_are_drawn_and_the_same_draw_gives_the_same_story():
  first, again = ([tell_story(np.random.default_rng(seed), 3) for seed in range(50)]
                  for _ in range(2))
  assert first == again
  assert len({story.text for story in first}) == 50
  assert len({story.answer for story in first}) > 3
