"""Word problems, from files of lines 'question||chain #### answer' or generated as stories.

The chain is the equations that lead to the answer. https://github.com/da03 has GSM8K and products
of long numbers in this form (Deng et al., From Explicit CoT to Implicit CoT: Learning to
Internalize CoT Step by Step, 2024).
"""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

import numpy as np

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.studies.synthetic.question import (
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
  first_of_each,
)

LARGEST = 9  # largest quantity: one digit, so that only the number of steps makes it hard

NAMES = ('Mia', 'Tom', 'Ann', 'Ben', 'Eva', 'Sam', 'Lily', 'Max')
THINGS = ('apples', 'marbles', 'coins', 'stickers', 'books', 'cards', 'pens', 'shells')
BEGINNINGS = ('{name} has {number} {things}.', '{name} starts with {number} {things}.',
              'There are {number} {things} on the desk of {name}.')
ENDS = ('How many {things} does {name} have now?', 'How many {things} are there in the end?',
        'How many {things} are left for {name}?')
# Changes of a quantity: sign, operand (0: it is drawn) and sentences.
CHANGES = (
    ('+', 0, ('{name} buys {number} more.', '{name} finds {number} {things}.',
              'A friend brings {number} more.')),
    ('-', 0, ('{name} loses {number} of them.', '{name} gives {number} to a friend.',
              'Then {number} {things} are sold.')),
    ('*', 2, ('Then the number of {things} doubles.', '{name} gets as many again.')),
    ('*', 3, ('Then the number of {things} triples.',)),
    ('/', 2, ('Half of the {things} are sold.', '{name} gives away half of them.')),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """A question in words.

  Attributes:
    text: the question.
    chain: equations that lead to the answer, such as '<<2+7=9>> <<9-5=4>>'; '' if not known.
    answer: the answer, a number.
    steps: number of equations in the chain, at least 1.
  """
  text: str
  chain: str
  answer: str
  steps: int


def tell_story(rng: np.random.Generator, steps: int) -> Problem:
  """Returns a problem of `steps` equations, whose quantities are integers from 0 to LARGEST."""
  name, things = _choose(rng, NAMES), _choose(rng, THINGS)
  quantity = int(rng.integers(1, LARGEST + 1))
  sentences = [_choose(rng, BEGINNINGS).format(name=name, things=things, number=quantity)]
  equations = []
  # Each step changes the quantity, by a sentence and by an equation.
  for _ in range(steps):
    sign, operand, result, choices = _change(rng, quantity)
    sentences.append(_choose(rng, choices).format(name=name, things=things, number=operand))
    equations.append(f'<<{quantity}{sign}{operand}={result}>>')
    quantity = result
  sentences.append(_choose(rng, ENDS).format(name=name, things=things))
  return Problem(' '.join(sentences), ' '.join(equations), str(quantity), steps)


def _change(rng: np.random.Generator, quantity: int) -> tuple[str, int, int, tuple[str, ...]]:
  """Returns sign, operand, result and sentences of a possible change of this quantity."""
  # Changes that keep the quantity an integer from 0 to LARGEST.
  possible = {'+': quantity < LARGEST, '-': quantity > 0, '/': quantity > 0 and quantity % 2 == 0}
  changes = [(sign, operand, sentences) for sign, operand, sentences in CHANGES
             if (0 < quantity * operand <= LARGEST if sign == '*' else possible[sign])]
  sign, operand, sentences = changes[rng.integers(len(changes))]
  # A drawn operand must not leave the range either.
  if not operand:
    operand = int(rng.integers(1, 1 + (LARGEST - quantity if sign == '+' else quantity)))
  result = {'+': quantity + operand, '-': quantity - operand, '*': quantity * operand,
            '/': quantity // operand}[sign]
  return sign, operand, result, sentences


def _choose(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
  return choices[rng.integers(len(choices))]


DIRECT, CHAIN = '\n', ' ||'  # signs after a question: give the answer, or give the chain first
ANSWER, END = ' ####', ';'  # signs between chain and answer, and after every answer
HELD_OUT = 20  # one in so many lines of a training file is for validation
FORM = 'question||chain #### answer'

_MARKED = re.compile(r'<<(.+?)>>')
_NUMBER = r'\$?\d[\d,]*(?:\.\d+)?%?'
_OPERAND = rf'\(*{_NUMBER}\)*'
_SPACED = re.compile(r'\s*([-+*/x×÷=()])\s*')
_IN_PROSE = re.compile(rf'{_OPERAND}(?:[-+*/x×÷]{_OPERAND})+=-?{_NUMBER}')


@dataclasses.dataclass(frozen=True)
class WordProblems:
  """Word problems, asked in two forms; a decoder learns both, and a sign tells it which is wanted.

  'Tom has 3 pens. ... now?\\n' asks for '4;'. With ' ||' in place of the newline it asks for
  ' <<3+1=4>> #### 4;'.

  Attributes:
    train: path of the file for training documents; '' if all are stories.
    asked: path of the file of questions for the final test; '' asks stories.
    chains: share of the documents that write out the chain, 0 to 1.
    stories: share of the documents that are generated stories, 0 to 1; see `tell_story`.
    equations: whether chains are reduced to their equations.
      They are found as '<<3+1=4>>', or as '3 + 1 = $4' in prose. A line without any teaches only
      its answer. False keeps chains as they are, for files without equations.
    steps: largest difficulty, in equations.
      Questions of more equations count as this difficulty, those of unknown equations as 1.
    skew: decay of difficulties of stories; the probability of k is proportional to exp(-skew * k).
  """
  train: str = ''
  asked: str = ''
  chains: float = 0.5
  stories: float = 0.0
  equations: bool = True
  steps: int = 5
  skew: float = 0.0

  def __post_init__(self):
    for option in ('chains', 'stories'):
      value = getattr(self, option)
      if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f'{option} = {value!r}: it is a share, so it must be between 0 and 1')
    for option in ('train', 'asked'):
      if not isinstance(getattr(self, option), str):
        raise UserError(f"{option} = {getattr(self, option)!r}: write a path, or ''")
    if not isinstance(self.equations, bool):
      raise UserError(f'equations = {self.equations!r}: it must be True or False')
    check_integer('steps', self.steps, 1, 100)
    check_skew(self.skew)
    # Documents that are no stories come from a file.
    if not self.train and self.stories < 1:
      raise UserError(f"train = '' with stories = {self.stories}: give the path of a file of "
                      f'lines {FORM!r}, or set stories = 1.0 to train on stories alone')

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.steps + 1))

  @property
  def anchors(self) -> str:
    return DIRECT

  @property
  def contents(self) -> str:
    """See `Task.contents`. The file of questions for the final test is no part of the texts."""
    if not self.train:
      return ''
    return hashlib.sha256(repr(self._train).encode()).hexdigest()

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """See `Task.document`."""
    return ''.join([self._write(rng, self._draw(rng, held_out)) for _ in range(count)])

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """See `Task.examine`; with a file, its first questions of each difficulty.

    Raises:
      UserError: see `read_problems`.
    """
    if not self.asked:
      problems = [tell_story(rng, steps) for steps in self.difficulties
                  for _ in range(per_difficulty)]
      return [self._ask(problem) for problem in problems]
    return first_of_each(map(self._ask, read_problems(self.asked, self.equations)), per_difficulty)

  def ask_for_chain(self, question: Question) -> Question:
    """Returns the same question in the form that asks for a chain, which ends in ANSWER, first."""
    return dataclasses.replace(question, question=question.question.removesuffix(DIRECT) + CHAIN,
                               answer=f' {question.answer}')

  def _ask(self, problem: Problem) -> Question:
    return Question('', problem.text + DIRECT, problem.answer + END,
                    min(problem.steps, self.steps))

  def _write(self, rng: np.random.Generator, problem: Problem) -> str:
    asked = self._ask(problem)
    if rng.random() >= self.chains or not problem.chain:
      return asked.question + asked.answer
    asked = self.ask_for_chain(asked)
    return f'{asked.question} {problem.chain}{ANSWER}{asked.answer}'

  def _draw(self, rng: np.random.Generator, held_out: bool) -> Problem:
    if rng.random() < self.stories:
      return tell_story(rng, draw_difficulties(rng, 1, self.difficulties, None, self.skew)[0])
    # The lines for validation are those that `_taught` leaves out.
    problems = self._train[::HELD_OUT] if held_out else self._taught
    return problems[rng.integers(len(problems))]

  @functools.cached_property
  def _train(self) -> list[Problem]:
    problems = read_problems(self.train, self.equations)
    if len(problems) < 2:
      raise UserError(f'{self.train} has {len(problems)} question: give at least 2, one to train '
                      'on and one for validation')
    return problems

  @functools.cached_property
  def _taught(self) -> list[Problem]:
    return [problem for number, problem in enumerate(self._train) if number % HELD_OUT]


def read_problems(path: str | Path, equations: bool = True) -> list[Problem]:
  """Returns the problems of a file of lines 'question||chain #### answer', in its order.

  Empty lines and spaces around each part are left out.

  Args:
    path: path of the file.
    equations: see `WordProblems`; if True, commas of answers are left out too.

  Raises:
    MissingError: there is no such file.
    UserError: it has no problem, is not UTF-8 text, or a line has another form.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise MissingError(f'no file {path}: give the path of a file of lines {FORM!r}')
  try:
    # Not splitlines, which would also split at a U+2028 in a question.
    lines = path.read_text(encoding='utf-8-sig').split('\n')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 text at byte {error.start}: convert it '
                    '(iconv -t utf-8)') from error
  problems = [_read_line(line, f'{path}:{number}', equations)
              for number, line in enumerate(lines, 1) if line.strip()]
  if not problems:
    raise UserError(f'{path} is empty: give a file of lines {FORM!r}')
  return problems


def _read_line(line: str, where: str, equations: bool) -> Problem:
  text, bars, rest = line.partition('||')
  chain, sign, answer = rest.partition('####')
  text, chain, answer = text.strip(), chain.strip(), answer.strip()
  if not (bars and sign and text and answer) or '||' in rest or '####' in answer:
    raise UserError(f'{where}: not of the form {FORM!r}, but {line[:100]!r}: repair the line, or '
                    'leave it out')
  # Signs with a meaning of their own must not occur in the text.
  if END in answer:
    raise UserError(f'{where}: the answer {answer!r} holds {END!r}, which ends an answer: repair '
                    'the line, or leave it out')
  for character, name in (('\0', 'NUL'), ('▁', "SentencePiece's own sign for a space")):
    if character in line:
      raise UserError(f'{where}: it holds {character!r}, {name}, which a vocabulary cannot '
                      'express: repair the line, or leave it out')
  if not equations:
    return Problem(text, chain, answer, 1)
  # A problem of unknown equations has one step.
  found = find_equations(chain)
  return Problem(text, ' '.join(f'<<{equation}>>' for equation in found), answer.replace(',', ''),
                 max(1, len(found)))


def find_equations(chain: str) -> list[str]:
  """Returns the equations of a chain, such as '3+1=4': between '<<' and '>>', or else in prose.

  In about one of seven chains in prose none is found. Found equations are not checked.
  """
  marked = _MARKED.findall(chain)
  if marked:
    return marked
  # In prose: drop spaces, currencies and commas, and write signs as Python does.
  plain = [re.sub('[$,]', '', found) for found in _IN_PROSE.findall(_SPACED.sub(r'\1', chain))]
  return [each.translate(str.maketrans('x×÷', '**/')) for each in plain
          if each.count('(') == each.count(')')]
