"""A ledger gives back what was added, also after a process was killed in the middle of a line."""

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.evaluation.ledger import Ledger, prompt_key, request_key


def test_memory():
  ledger = Ledger()
  ledger.add_scores('task', ['frozen', 'own'], ['k'], [[1.5, 2.0]], [[True, False]])
  assert ledger.score('task', 'own', 'k') == (2.0, False)
  assert ledger.score('task', 'own', 'other') is ledger.score('other', 'own', 'k') is None


def test_file(tmp_path):
  """Scores and texts are read again, and a line that is not whole is dropped."""
  path = tmp_path / 'answers.jsonl'
  ledger = Ledger(path)
  ledger.add_scores('task', ['own'], ['a', 'b'], [[0.1], [2.0]], [[True], [False]])
  ledger.add_texts('task', 'own', ['p'], ['said\n'], [3])
  with path.open('a') as file:
    file.write('{"task": "task", "arms": ["ow')
  again = Ledger(path)
  assert again.score('task', 'own', 'a') == (0.1, True)
  assert again.text('task', 'own', 'p') == ('said\n', 3)
  again.add_texts('task', 'own', ['q'], ['more'], [1])
  assert Ledger(path).text('task', 'own', 'q') == ('more', 1)
  assert len(path.read_text().splitlines()) == 3


def test_damage(tmp_path):
  path = tmp_path / 'answers.jsonl'
  path.write_text('{"task": "x"}\n')
  with pytest.raises(UserError, match='answers.jsonl is damaged'):
    Ledger(path)


def test_keys():
  """Keys tell everything that a score depends on."""
  requests = [Request((1, 2), (3,), 1, 'a'), Request((1,), (2, 3), 1, 'a'),
              Request((1, 2), (3,), 0, 'a'), Request((1, 2), (3,), 1, 'b')]
  assert len(set(map(request_key, requests))) == 4
  assert request_key(requests[0]) == request_key(Request((1, 2), (3,), 1, 'a'))
  assert len({prompt_key([1], [2]), prompt_key([1], [3]), prompt_key([1], [2], 1),
              prompt_key([1], [2], 2)}) == 4
  assert prompt_key([1], [2]) == prompt_key([1], [2], 0)
