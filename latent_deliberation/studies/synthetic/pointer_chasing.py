"""Pointer chasing: follow the arrows of a cycle for k steps."""

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
  """Hops along arrows: 'acbdca...;' says a->c, b->d, c->a; '3A' asks for the node 3 hops after a.

  The start comes last and as a capital. The answer is then predicted from the token to look up, and
  no fact looks like a question. With 'a3' a decoder took twice as long to learn.

  All nodes are on a single random cycle. Every other node is therefore the answer to k hops equally
  often, and no walk of fewer than `nodes` hops returns to its start.

  Attributes:
    nodes: number of nodes of the cycle, each a letter.
    hops: largest difficulty; difficulty k asks for k hops.
    skew: decay of difficulties; the probability of k is proportional to exp(-skew * k).
  """
  nodes: int = 8
  hops: int = 5
  skew: float = 0.0

  def __post_init__(self):
    check_integer('nodes', self.nodes, 2, len(LETTERS), ', the number of letters')
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
    # The cycle twice over, so that k hops from any place stay inside of the list.
    cycle = [LETTERS[node] for node in rng.permutation(self.nodes).tolist()] * 2
    context = ''.join([cycle[place] + cycle[place + 1]
                       for place in rng.permutation(self.nodes).tolist()]) + ';'
    places = take_turns(rng, hops, dict.fromkeys(self.difficulties, self.nodes))
    return [Question(context, f'{k}{cycle[place].upper()}', cycle[place + k], k)
            for place, k in zip(places, hops, strict=True)]
