"""A ledger of scores and texts, so that nothing is computed twice.

A batch is a line of a file, which is written as soon as the batch is done. A run that was stopped
reads them again, and goes on after them.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.files import explain_failed_write, read_lines

Score = tuple[float, bool]  # nats of a continuation, and whether it is greedy


def request_key(request: Request) -> str:
  """Returns a short name of a request, by its tokens, its item and its place of the latents."""
  return _key([request.context, request.continuation, request.anchor, str(request.item)])


def prompt_key(prompt: Sequence[int], settings: Any, draw: int = 0) -> str:
  """Returns a short name of a prompt that is continued with some settings.

  Args:
    draw: number of the text, where several are drawn after the same prompt.
  """
  return _key([list(prompt), settings, *([draw] if draw else [])])


def _key(value: Any) -> str:
  return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


class Ledger:
  """Scores and texts by task, arm and key.

  Args:
    path: file to keep them in; None for memory alone. What it holds already is read.

  Raises:
    UserError: the file holds something else.
  """

  def __init__(self, path: Path | None = None):
    self._path = path
    self._scores: dict[tuple[str, str, str], Score] = {}
    self._texts: dict[tuple[str, str, str], tuple[str, int]] = {}
    if path is not None and path.exists():
      self._read(path)

  def score(self, task: str, arm: str, key: str) -> Score | None:
    """Returns the score of a request, or None if there is none yet."""
    return self._scores.get((task, arm, key))

  def text(self, task: str, arm: str, key: str) -> tuple[str, int] | None:
    """Returns the text after a prompt and its number of tokens, or None if there is none yet."""
    return self._texts.get((task, arm, key))

  def add_scores(self, task: str, arms: Sequence[str], keys: Sequence[str],
                 nats: Sequence[Sequence[float]], greedy: Sequence[Sequence[bool]]) -> None:
    """Adds the scores of a batch, [keys, arms] each."""
    self._add({'task': task, 'arms': list(arms), 'keys': list(keys),
               'nats': [list(map(float, row)) for row in nats],
               'greedy': [list(map(int, row)) for row in greedy]})

  def add_texts(self, task: str, arm: str, keys: Sequence[str], texts: Sequence[str],
                tokens: Sequence[int]) -> None:
    """Adds the texts of a batch."""
    self._add({'task': task, 'arm': arm, 'keys': list(keys), 'texts': list(texts),
               'tokens': list(map(int, tokens))})

  def _add(self, line: dict[str, Any]) -> None:
    self._take(line)
    if self._path is not None:
      with explain_failed_write(self._path):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open('a') as file:
          file.write(json.dumps(line) + '\n')

  def _take(self, line: dict[str, Any]) -> None:
    task = line['task']
    if 'texts' in line:
      for key, text, tokens in zip(line['keys'], line['texts'], line['tokens'], strict=True):
        self._texts[task, line['arm'], key] = text, tokens
      return
    for key, nats, greedy in zip(line['keys'], line['nats'], line['greedy'], strict=True):
      for arm, value, is_greedy in zip(line['arms'], nats, greedy, strict=True):
        self._scores[task, arm, key] = value, bool(is_greedy)

  def _read(self, path: Path) -> None:
    try:
      for line in read_lines(path):
        self._take(line)
    except UserError:
      raise
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{path} is damaged ({type(error).__name__}: {error}): remove it, and the '
                      'answers are scored again') from error
