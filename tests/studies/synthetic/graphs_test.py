import collections
import json
import re

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.graphs import AskedGraph, Graphs, read_prosqa

TASKS = [Graphs(), Graphs(nodes=26, steps=11), Graphs(nodes=26, steps=3), Graphs(nodes=6, steps=1)]


def read(asked):
  """Arrows of a context, the start and the two candidates of a question."""
  assert asked.context[-1] == ';' and asked.question[2] == '?' and asked.question[-1].isupper()
  arrows = list(zip(asked.context[:-1:2], asked.context[1:-1:2], strict=True))
  return arrows, asked.question[3].lower(), asked.question[:2]


def distances(arrows, start):
  """Breadth first: the length of the shortest path to every node that can be reached."""
  found, front = {start: 0}, [start]
  for node in front:
    for tail, head in arrows:
      if tail == node and head not in found:
        found[head] = found[node] + 1
        front.append(head)
  return found


@pytest.mark.parametrize('task', TASKS)
def test_answer_is_reached(task):
  """One candidate alone is reached, by a path of the difficulty."""
  rng = np.random.default_rng(0)
  for difficulty in (None, *task.difficulties):
    for _ in range(8):
      for asked in task.ask(rng, 6, difficulty):
        arrows, start, candidates = read(asked)
        found = distances(arrows, start)
        assert [node for node in candidates if node in found] == [asked.answer]
        assert found[asked.answer] == asked.difficulty
        assert difficulty in (None, asked.difficulty)


@pytest.mark.parametrize('task', TASKS)
def test_candidates_are_twins(task):
  rng = np.random.default_rng(1)
  for _ in range(40):
    for asked in task.ask(rng, 4):
      arrows, _, candidates = read(asked)
      nodes = {node for arrow in arrows for node in arrow}
      assert len(nodes) == task.nodes
      tails, heads = ([tail for tail, _ in arrows], [head for _, head in arrows])
      depths = [len([n for n in nodes if node in distances(arrows, n)]) for node in candidates]
      heights = [len(distances(arrows, node)) for node in candidates]
      assert tails.count(candidates[0]) == tails.count(candidates[1])
      assert heads.count(candidates[0]) == heads.count(candidates[1]) > 0
      assert depths[0] == depths[1] and heights[0] == heights[1]
      assert len(set(arrows)) == len(arrows)


def test_candidates_look_alike():
  """Order, letter and place in the text do not tell the candidates apart."""
  rng, counts, total = np.random.default_rng(2), collections.Counter(), 2000
  for _ in range(total):
    asked, = Graphs().ask(rng, 1)
    _, _, (first, second) = read(asked)
    other = second if asked.answer == first else first
    counts['first'] += asked.answer == first
    counts['smaller'] += asked.answer < other
    counts['earlier'] += asked.context.index(asked.answer) < asked.context.index(other)
  for count in counts.values():
    assert abs(count - total / 2) < 5 * np.sqrt(total) / 2


def test_both_candidates_may_be_connected():
  """Being connected does not always tell the candidates apart."""
  rng, connected = np.random.default_rng(3), 0
  for _ in range(100):
    asked, = Graphs().ask(rng, 1)
    arrows, start, candidates = read(asked)
    both_ways = arrows + [(head, tail) for tail, head in arrows]
    connected += set(candidates) <= set(distances(both_ways, start))
  assert connected > 40


def test_skew():
  asked = Graphs(steps=3, skew=0.5).ask(np.random.default_rng(0), 30_000)
  counts = collections.Counter(question.difficulty for question in asked)
  assert counts[1] / counts[2] == pytest.approx(np.exp(0.5), rel=0.1)
  assert counts[2] / counts[3] == pytest.approx(np.exp(0.5), rel=0.1)


def test_links():
  """They are arrows of the context, mixed with the questions."""
  task = Graphs(nodes=10, steps=3, links=40)
  context, text = task.document(np.random.default_rng(0), 5).split(';')
  arrows = {context[place:place + 2] for place in range(0, len(context), 2)}
  items = re.findall(r'[a-z]{2}\?[A-Z][a-z]|[A-Z][a-z]', text)
  links = [item.lower() for item in items if '?' not in item]
  assert ''.join(items) == text
  assert len(arrows) == 10 and set(links) <= arrows and len(set(links)) > 5
  assert len(links) == 40 and len(items) == 45
  assert not all('?' in item for item in items[-5:])


def test_links_change_no_test_question():
  plain, linked = (Graphs(links=links).examine(np.random.default_rng(0), 3) for links in (0, 9))
  assert plain == linked


@pytest.mark.parametrize(('options', 'message'), [
    ({'links': -1}, 'links = -1: .*0 and 1000'),
    ({'nodes': 10}, 'nodes = 10: .*12 and 26.*steps = 4'),
    ({'nodes': 17}, 'nodes = 17 is odd'),
    ({'steps': 12}, 'steps = 12: .*1 and 11'),
    ({'steps': '4'}, "steps = '4': .*integer"),
    ({'skew': 11}, 'skew = 11: .*-10 and 10'),
    ({'asked': 3}, "asked = 3: .*path"),
])
def test_bad_option_is_named(options, message):
  with pytest.raises(UserError, match=message):
    Graphs(**options)


def test_graphs_of_a_file(tmp_path):
  # 0 -> 1 -> 2 and 3 -> 4, of 7 nodes; then a graph that is too large for 16 letters.
  item = {'idx_to_symbol': list('abcdefg'), 'edges': [[0, 1], [1, 2], [3, 4]], 'root': 0,
          'target': 2, 'neg_target': 4, 'steps': ['one', 'two']}
  path = tmp_path / 'prosqa.json'
  path.write_text(json.dumps([item] * 20 + [{**item, 'idx_to_symbol': list(range(17))}]))
  task = Graphs(asked=str(path))
  questions = task.examine(np.random.default_rng(0), 100)
  assert len(questions) == 20
  for asked in questions:
    arrows, start, candidates = read(asked)
    assert len(arrows) == 3 and asked.difficulty == 2
    found = distances(arrows, start)
    assert [node for node in candidates if node in found] == [asked.answer]
    assert found[asked.answer] == 2
  assert len({asked.context for asked in questions}) == 20
  assert {asked.question.index(asked.answer) for asked in questions} == {0, 1}
  assert len(task.examine(np.random.default_rng(0), 7)) == 7
  with pytest.raises(UserError, match='prosqa.json has no graph of at most nodes = 6 nodes'):
    Graphs(nodes=6, steps=1, asked=str(path)).examine(np.random.default_rng(0), 7)


ITEM = {'question': 'Every gerpus is a terpus. Sally is a gerpus. Is Sally a hilpus or terpus?',
        'answer': 'Sally is a terpus.',
        'steps': ['Sally is a gerpus.', 'Every gerpus is a terpus.'],
        'idx_to_symbol': ['Sally', 'gerpus', 'terpus', 'hilpus'], 'edges': [[0, 1], [1, 2]],
        'root': 0, 'target': 2, 'neg_target': 3}


def write(path, items):
  path.write_text(items if isinstance(items, str) else json.dumps(items))
  return path


def test_read_prosqa(tmp_path):
  """An item is its graph."""
  assert read_prosqa(write(tmp_path / 'prosqa.json', [ITEM])) == [
      AskedGraph(nodes=4, arrows=((0, 1), (1, 2)), root=0, target=2, other=3, steps=2)]


@pytest.mark.parametrize(('content', 'message'), [
    ('[{', 'is not JSON'),
    ('{"a": 1}', 'holds no list of questions'),
    ('[]', 'holds no list of questions'),
    ('[1]', 'item 0: not an object'),
    ([ITEM, {**ITEM, 'steps': []}], 'item 1: not an object'),
    ([{**ITEM, 'target': 4}], 'item 0: not an object'),
    ([{**ITEM, 'edges': [[0, 1, 2]]}], 'item 0: not an object'),
    ([{**ITEM, 'root': '0'}], 'item 0: not an object'),
    ([{**ITEM, 'root': 0.0}], 'item 0: not an object'),
    ([{**ITEM, 'root': False}], 'item 0: not an object'),
    ([{**ITEM, 'steps': 'ab'}], 'item 0: not an object'),
    ([{**ITEM, 'steps': ['one']}], 'item 0: not an object'),
    ([{**ITEM, 'edges': []}], 'item 0: not an object'),
    ([{**ITEM, 'neg_target': 1}], 'item 0: not an object'),
    ([{**ITEM, 'root': 2, 'steps': []}], 'item 0: not an object'),
    ([{key: value for key, value in ITEM.items() if key != 'neg_target'}], 'item 0: not an object'),
])
def test_file_that_is_not_prosqa(tmp_path, content, message):
  with pytest.raises(UserError, match=f'other.json.*{message}'):
    read_prosqa(write(tmp_path / 'other.json', content))


def test_missing_prosqa_file(tmp_path):
  with pytest.raises(UserError, match='none.json'):
    read_prosqa(tmp_path / 'none.json')
