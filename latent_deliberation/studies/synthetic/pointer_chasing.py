"""Pointer chasing: follow the arrows of a cycle k steps on."""

import dataclasses
import string

import numpy as np

from latent_deliberation.studies.synthetic.question import (
  DrawnTask,
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
  take_turns,
)

LETTERS = string.ascii_lowercase
DIGITS = '123456789'


@dataclasses.dataclass(frozen=True)
class PointerChasing(DrawnTask):
  """'acbdca...;' says a->c, b->d, c->a; '3A' asks for the node three hops on from a, one letter.

  The start comes last and as a capital: the token that the answer is predicted from then is the one
  to look up, and no fact looks like a question. With 'a3' a decoder took twice as long to learn.

  All nodes lie on a single random cycle: every other node is the answer to k hops equally often,
  and no walk of fewer than `nodes` hops comes back to its start.

  Attributes:
    nodes: letters of the cycle.
    hops: difficulties are 1 to hops.
    skew: the probability of difficulty k is proportional to exp(-skew * k).
  """
  nodes: int = 8
  hops: int = 5
  skew: float = 0.0

  def __post_init__(self):
    check_integer('nodes', self.nodes, 2, len(LETTERS), ', the letters there are')
    check_integer('hops', self.hops, 1, min(self.nodes - 1, len(DIGITS)),
                  f', one digit and less than nodes = {self.nodes}')
    check_skew(self.skew)

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.hops + 1))

  @property
  def anchors(self) -> str:
    return LETTERS[:self.nodes].upper()

  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """See `DrawnTask.ask`."""
    hops = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    cycle = [LETTERS[node] for node in rng.permutation(self.nodes).tolist()] * 2
    context = ''.join([cycle[place] + cycle[place + 1]
                       for place in rng.permutation(self.nodes).tolist()]) + ';'
    places = take_turns(rng, hops, dict.fromkeys(self.difficulties, self.nodes))
    return [Question(context, f'{k}{cycle[place].upper()}', cycle[place + k], k)
            for place, k in zip(places, hops, strict=True)]
