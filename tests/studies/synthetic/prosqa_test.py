"""ProsQA's files are read as graphs, and what is none of them is named."""

import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.graphs import AskedGraph, read_prosqa

ITEM = {'question': 'Every gerpus is a terpus. Sally is a gerpus. Is Sally a hilpus or terpus?',
        'answer': 'Sally is a terpus.',
        'steps': ['Sally is a gerpus.', 'Every gerpus is a terpus.'],
        'idx_to_symbol': ['Sally', 'gerpus', 'terpus', 'hilpus'], 'edges': [[0, 1], [1, 2]],
        'root': 0, 'target': 2, 'neg_target': 3}


def write(path, items):
  path.write_text(items if isinstance(items, str) else json.dumps(items))
  return path


def test_an_item_is_its_graph(tmp_path):
  assert read_prosqa(write(tmp_path / 'prosqa.json', [ITEM])) == [
      AskedGraph(nodes=4, arrows=((0, 1), (1, 2)), root=0, target=2, other=3, steps=2)]


@pytest.mark.parametrize(('content', 'message'), [
    ('[{', 'is not JSON'),
    ('{"a": 1}', 'holds no list of questions'),
    ('[]', 'holds no list of questions'),
    ('[1]', 'item 0: not an object with'),
    ([ITEM, {**ITEM, 'steps': []}], 'item 1: not an object with'),
    ([{**ITEM, 'target': 4}], 'item 0: not an object with'),
    ([{**ITEM, 'edges': [[0, 1, 2]]}], 'item 0: not an object with'),
    ([{**ITEM, 'root': '0'}], 'item 0: not an object with'),
    ([{**ITEM, 'root': 0.0}], 'item 0: not an object with'),
    ([{**ITEM, 'root': False}], 'item 0: not an object with'),
    ([{**ITEM, 'steps': 'ab'}], 'item 0: not an object with'),
    ([{**ITEM, 'steps': ['one']}], 'item 0: not an object with'),
    ([{**ITEM, 'edges': []}], 'item 0: not an object with'),
    ([{**ITEM, 'neg_target': 1}], 'item 0: not an object with'),
    ([{**ITEM, 'root': 2, 'steps': []}], 'item 0: not an object with'),
    ([{key: value for key, value in ITEM.items() if key != 'neg_target'}], 'item 0: not an object'),
])
def test_a_file_that_is_not_prosqa_is_named(tmp_path, content, message):
  with pytest.raises(UserError, match=f'other.json.*{message}'):
    read_prosqa(write(tmp_path / 'other.json', content))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='none.json: give a JSON file'):
    read_prosqa(tmp_path / 'none.json')
