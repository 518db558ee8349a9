"""Prompts of the command line, of files and of a terminal, with their names for people."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from latent_deliberation.errors import UserError
from latent_deliberation.files import JSON_LINES, read_text
from latent_deliberation.inference.tokenizer import check_unicode

WELCOME = 'Type a prompt, then Enter. Ctrl-C ends a text, and Ctrl-D leaves.'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text to continue.

  Attributes:
    text: the text.
    name: its name in errors and headings, such as 'prompt 2' or 'a.txt, line 7'.
    line: number of its line in a file, from 1; None if it is from no file.
  """
  text: str
  name: str
  line: int | None = None


def read_prompts(prompts: Sequence[str], file: str) -> list[Prompt]:
  """Returns the prompts of the command line, then those of a file.

  Args:
    file: path of a file with a prompt on each line, or of JSON lines with a key 'prompt'; ''
      for none. Empty lines are skipped.

  Raises:
    UserError: the file is absent or has no prompt, a line of a .jsonl has none, or a prompt is
      empty or not Unicode.
  """
  given = [Prompt(text, f'prompt {number}') for number, text in enumerate(prompts, 1)]
  given += _read_lines(Path(file)) if file else []
  for prompt in given:
    if not prompt.text:
      raise UserError(f'{prompt.name} is empty: write something, or leave it out')
    check_unicode(prompt.text, prompt.name)
  return given


def _read_lines(path: Path) -> list[Prompt]:
  # Not splitlines, which also splits at some characters within a text.
  lines = read_text(path, 'a prompt on each line').split('\n')
  found = [Prompt(line, f'{path}, line {number}', number) for number, line in enumerate(lines, 1)
           if line.strip()]
  if not found:
    raise UserError(f'{path} is empty: write a prompt on each line, or leave --prompts_file out')
  if path.suffix.lower() in JSON_LINES:
    found = [dataclasses.replace(prompt, text=_read_object(prompt)) for prompt in found]
  return found


def _read_object(line: Prompt) -> str:
  try:
    prompt = json.loads(line.text)['prompt']
    if not isinstance(prompt, str):
      raise TypeError(f'it is {prompt!r}')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{line.name}: every line must be an object with a text as "prompt" '
                    f'({type(error).__name__}: {error})') from error
  return prompt


def read_stop(written: str) -> str:
  r"""Returns a stop string as it was meant in a shell: \n, \t and \\ stand for one character."""
  meanings = {'n': '\n', 't': '\t', '\\': '\\'}
  return re.sub(r'\\([nt\\])', lambda found: meanings[found[1]], written)


def ask(terminal: bool) -> Iterator[str]:
  """Yields the lines that someone types, until the end of the input."""
  while True:
    try:
      if terminal:
        print('prompt> ', end='', flush=True)
      line = sys.stdin.readline()
    except KeyboardInterrupt:
      if not terminal:
        raise
      print('\nCtrl-D leaves.', file=sys.stderr)
      continue
    if not line:
      return
    if line.strip():
      yield line.rstrip('\n')
