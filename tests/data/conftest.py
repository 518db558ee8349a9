"""A tiny corpus of Python-like text, packed once for the tests that only read."""

import json
from pathlib import Path

import pytest


def document(number: int) -> str:
  """A text of its own for each number, 40 to 250 characters, with indentation and umlauts."""
  lines = [f'def größe_{number}(x):', '    if x:', f'        return x + {number}', '', '\t# ☃ done']
  return '\n'.join(lines * (1 + number % 3))[:40 + 13 * (number % 17)]


@pytest.fixture(scope='session')
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """40 documents: 30 .txt files in two folders, and 10 lines of one .jsonl file."""
  directory = tmp_path_factory.mktemp('corpus')
  for number in range(30):
    path = directory / ('even' if number % 2 == 0 else 'odd') / f'{number}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(document(number), encoding='utf-8')
  lines = (json.dumps({'text': document(number), 'id': number}) for number in range(30, 40))
  (directory / 'more.jsonl').write_text('\n'.join(lines) + '\n\n')
  return directory
