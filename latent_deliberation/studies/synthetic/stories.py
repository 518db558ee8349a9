"""Word problems in a few sentences, generated: how many there are after one change and the next."""

import dataclasses

import numpy as np

LARGEST = 9  # of all quantities: one digit, so that what is hard is the number of steps

NAMES = ('Mia', 'Tom', 'Ann', 'Ben', 'Eva', 'Sam', 'Lily', 'Max')
THINGS = ('apples', 'marbles', 'coins', 'stickers', 'books', 'cards', 'pens', 'shells')
BEGINNINGS = ('{name} has {number} {things}.', '{name} starts with {number} {things}.',
              'There are {number} {things} on the desk of {name}.')
ENDS = ('How many {things} does {name} have now?', 'How many {things} are there in the end?',
        'How many {things} are left for {name}?')
# What can happen to a quantity, as sign, operand (0 for one that is drawn) and sentences.
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
    text: of the question.
    chain: what leads to the answer, such as '<<2+7=9>> <<9-5=4>>'; '' where it is not known.
    answer: a number.
    steps: equations of the chain, at least 1.
  """
  text: str
  chain: str
  answer: str
  steps: int


def tell_story(rng: np.random.Generator, steps: int) -> Problem:
  """A problem of that many equations; its quantities are whole numbers from 0 to LARGEST."""
  name, things = _choose(rng, NAMES), _choose(rng, THINGS)
  quantity = int(rng.integers(1, LARGEST + 1))
  sentences = [_choose(rng, BEGINNINGS).format(name=name, things=things, number=quantity)]
  equations = []
  for _ in range(steps):
    sign, operand, result, choices = _change(rng, quantity)
    sentences.append(_choose(rng, choices).format(name=name, things=things, number=operand))
    equations.append(f'<<{quantity}{sign}{operand}={result}>>')
    quantity = result
  sentences.append(_choose(rng, ENDS).format(name=name, things=things))
  return Problem(' '.join(sentences), ' '.join(equations), str(quantity), steps)


def _change(rng: np.random.Generator, quantity: int) -> tuple[str, int, int, tuple[str, ...]]:
  """Sign, operand, result and sentences of something that can happen to this quantity."""
  possible = {'+': quantity < LARGEST, '-': quantity > 0, '/': quantity > 0 and quantity % 2 == 0}
  changes = [(sign, operand, sentences) for sign, operand, sentences in CHANGES
             if (0 < quantity * operand <= LARGEST if sign == '*' else possible[sign])]
  sign, operand, sentences = changes[rng.integers(len(changes))]
  if not operand:
    operand = int(rng.integers(1, 1 + (LARGEST - quantity if sign == '+' else quantity)))
  result = {'+': quantity + operand, '-': quantity - operand, '*': quantity * operand,
            '/': quantity // operand}[sign]
  return sign, operand, result, sentences


def _choose(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
  return choices[rng.integers(len(choices))]
