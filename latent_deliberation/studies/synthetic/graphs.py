"""Reachability in directed graphs, in the style of ProsQA, and ProsQA's own graphs in its form."""

import dataclasses
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.studies.synthetic.question import (
  DrawnTask,
  Question,
  check_integer,
  check_skew,
  draw_difficulties,
  first_of_each,
  take_turns,
)

FORM = ("an object with 'idx_to_symbol' and 'steps' (lists), 'edges' (pairs of numbers of "
        "symbols) and 'root', 'target' and 'neg_target' (such numbers), where edges lead from the "
        "root to the target, in so many steps, and not to the other")


@dataclasses.dataclass(frozen=True, slots=True)
class AskedGraph:
  """'Is Sally (the root) a sterpus (the target) or a hilpus (the other)?', without its words.

  Attributes:
    nodes: how many; they are numbered from 0.
    arrows: (tail, head) of each.
    root, target, other: nodes; arrows lead from the root to the target, and not to the other.
    steps: least number of arrows from the root to the target.
  """
  nodes: int
  arrows: tuple[tuple[int, int], ...]
  root: int
  target: int
  other: int
  steps: int


def read_prosqa(path: str | Path) -> list[AskedGraph]:
  """The graphs of a JSON file of the ProsQA release, in its order.

  Raises:
    UserError: there is no such file.
    UserError: it is not JSON, is empty, or an item has not the form of the release.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise UserError(f'no file {path}: give a JSON file of the ProsQA release')
  try:
    items = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): give a file of the ProsQA release') from error
  if not isinstance(items, list) or not items:
    raise UserError(f'{path} holds no list of questions, but {str(items)[:100]}: give a file of '
                     'the ProsQA release')
  graphs = []
  for number, item in enumerate(items):
    try:
      graphs.append(_graph_of(item))
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f'{path}, item {number}: not {FORM}, but {str(item)[:200]}: give a file of '
                       'the ProsQA release') from error
  return graphs


def _graph_of(item: Mapping[str, Any]) -> AskedGraph:
  if not isinstance(item['idx_to_symbol'], list) or not isinstance(item['steps'], list):
    raise TypeError
  graph = AskedGraph(
      nodes=len(item['idx_to_symbol']), arrows=tuple((tail, head) for tail, head in item['edges']),
      root=item['root'], target=item['target'], other=item['neg_target'],
      steps=len(item['steps']))
  named = [graph.root, graph.target, graph.other, *sum(graph.arrows, ())]
  if not all(type(node) is int and 0 <= node < graph.nodes for node in named):
    raise ValueError
  distance = _distances(graph)
  if graph.other in distance or not 0 < distance[graph.target] == graph.steps:
    raise ValueError
  return graph


def _distances(graph: AskedGraph) -> dict[int, int]:
  """Least number of arrows from the root to every node that is reached."""
  found, front = {graph.root: 0}, [graph.root]
  for node in front:
    for tail, head in graph.arrows:
      if tail == node and head not in found:
        found[head] = found[node] + 1
        front.append(head)
  return found


LETTERS = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class Graphs(DrawnTask):
  """'acbd...;' says a->c, b->d; 'dk?A' asks whether d or k can be reached from a, one letter.

  The start comes last and as a capital, as in `PointerChasing`: the token that the answer is predicted from
  is the one to look up, and no arrow looks like a question. '?' tells a question from a link.

  Nodes come in pairs of twins: a graph of nodes / 2 is drawn, every node is doubled, and an arrow
  leads either from each twin to its own counterpart, or crosswise. To exchange all twins leaves the
  graph as it is. The two candidates are twins, so that nothing but the arrows from the start on
  tells them apart: neither degree, nor depth, nor, where arrows cross, being connected at all.

  Attributes:
    nodes: even; the pairs without arrows among the first steps + 1 have two parents each.
    steps: difficulties are shortest paths of 1 to steps arrows.
    skew: the probability of difficulty k is proportional to exp(-skew * k).
    links: of a training document, among its questions: 'Ac', a node and any that an arrow of it
      leads to. A decoder that has only answers, one of two, to learn from does not find arrows.
    asked: path of a JSON file of ProsQA, whose graphs are asked in the end, in letters; those of
      more than `nodes` nodes are left out. '' asks drawn ones. ProsQA's candidates are no twins: to
      name the one that fewer arrows lead to is right on 66% of its test file.
  """
  nodes: int = 16
  steps: int = 4
  skew: float = 0.0
  links: int = 0
  asked: str = dataclasses.field(default='', metadata={'text': False})

  def __post_init__(self):
    check_integer('steps', self.steps, 1, len(LETTERS) // 2 - 2)
    check_integer('nodes', self.nodes, 2 * self.steps + 4, len(LETTERS),
                  f', letters enough for steps = {self.steps} and branches')
    if self.nodes % 2:
      raise UserError(f'nodes = {self.nodes} is odd, and nodes come in pairs: take one more')
    check_skew(self.skew)
    check_integer('links', self.links, 0, 1000)
    if not isinstance(self.asked, str):
      raise UserError(f"asked = {self.asked!r}: write a path, or ''")

  @property
  def difficulties(self) -> tuple[int, ...]:
    return tuple(range(1, self.steps + 1))

  @property
  def anchors(self) -> str:
    return LETTERS[:self.nodes].upper()

  def ask(self, rng: np.random.Generator, count: int,
          difficulty: int | None = None) -> list[Question]:
    """See `DrawnTask.ask`."""
    return self._ask(rng, count, difficulty)[0]

  def examine(self, rng: np.random.Generator, per_difficulty: int) -> list[Question]:
    """See `Task.examine`; of a file, the first of each number of steps.

    Raises:
      UserError: see `read_prosqa`; or no graph of the file is small enough.
    """
    if not self.asked:
      return super().examine(rng, per_difficulty)
    small = [graph for graph in read_prosqa(self.asked) if graph.nodes <= self.nodes]
    if not small:
      raise UserError(f'{self.asked} has no graph of at most nodes = {self.nodes} nodes: raise '
                       f'nodes, to {len(LETTERS)} at most')
    return first_of_each([self._pose(rng, graph) for graph in small], per_difficulty)

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """See `DrawnTask.document`; with links among the questions."""
    if not self.links:
      return super().document(rng, count, held_out)
    questions, arrows = self._ask(rng, count)
    links = [f'{tail.upper()}{head}' for tail, head in (
        arrows[place] for place in rng.integers(len(arrows), size=self.links).tolist())]
    items = [*links, *[asked.question + asked.answer for asked in questions]]
    return questions[0].context + ''.join([items[place] for place in rng.permutation(len(items))])

  def _ask(self, rng: np.random.Generator, count: int, difficulty: int | None = None,
           ) -> tuple[list[Question], list[tuple[str, str]]]:
    """Questions, and the arrows of their graph."""
    lengths = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    pairs = self.nodes // 2
    tails, heads = self._draw_arrows(rng)
    letters, arrows, context = self._write(rng, np.stack([tails, heads], axis=1))

    routes = {k: [] for k in self.difficulties}  # from the first twin of a pair, to one twin alone
    for start, target, length in _find_routes(tails, heads, pairs):
      if length <= self.steps:
        routes[length].append((start, target))
    turns = take_turns(rng, lengths, {k: 2 * len(routes[k]) for k in self.difficulties})
    questions = []
    for k, turn, order in zip(lengths, turns, rng.integers(2, size=count).tolist(), strict=True):
      route, exchanged = divmod(turn, 2)
      start, target = routes[k][route]
      start, target, twin = (letters[(node + pairs * twins) % self.nodes] for node, twins in (
          (start, exchanged), (target, exchanged), (target, 1 - exchanged)))
      questions.append(_question(context, start, target, twin, order, k))
    return questions, arrows

  def _pose(self, rng: np.random.Generator, graph: AskedGraph) -> Question:
    """A graph of a file as a question of this task."""
    letters, _, context = self._write(rng, graph.arrows)
    start, target, other = (letters[node] for node in (graph.root, graph.target, graph.other))
    return _question(context, start, target, other, rng.integers(2), graph.steps)

  def _write(self, rng: np.random.Generator, arrows: Sequence[Sequence[int]],
             ) -> tuple[list[str], list[tuple[str, str]], str]:
    """A letter for each node; arrows between letters in random order; and these as a context."""
    letters = [LETTERS[node] for node in rng.permutation(self.nodes).tolist()]
    written = [(letters[tail], letters[head]) for tail, head in rng.permutation(arrows).tolist()]
    return letters, written, ''.join([tail + head for tail, head in written]) + ';'

  def _draw_arrows(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tails and heads; nodes are numbered so that the twin of n is n + nodes / 2.

    The first steps + 1 pairs are a path, which gives every graph a question of each difficulty;
    every later pair has two parents among those before it. Only one of the two needs a chance to
    cross, since twins have no order.
    """
    pairs = self.nodes // 2
    late = np.arange(self.steps + 1, pairs)
    first = rng.integers(late)
    second = (first + rng.integers(1, late)) % late
    crossed = pairs * rng.integers(2, size=len(late))
    tails = np.concatenate([np.arange(self.steps), first, second])
    heads = np.concatenate([np.arange(1, self.steps + 1), late, late + crossed])
    return (np.concatenate([tails, tails + pairs]),
            np.concatenate([heads, (heads + pairs) % self.nodes]))


def _question(context: str, start: str, target: str, other: str, order: int, steps: int,
              ) -> Question:
  """Whether the target or the other comes first is `order`, 0 or 1."""
  candidates = other + target if order else target + other
  return Question(context, f'{candidates}?{start.upper()}', target, steps)


def _find_routes(tails: np.ndarray, heads: np.ndarray, pairs: int) -> list[list[int]]:
  """[start, target, arrows between] where the target can be reached and its twin cannot."""
  arrows = np.zeros((2 * pairs, 2 * pairs), bool)
  arrows[tails, heads] = True
  unreached = pairs  # longer than any path
  reached = np.eye(pairs, 2 * pairs, dtype=bool)
  distance = np.where(reached, 0, unreached)
  for length in range(1, pairs):
    reached = reached @ arrows
    np.minimum(distance, length, out=distance, where=reached)
  twins = distance.reshape(pairs, 2, pairs)[:, ::-1].reshape(pairs, -1)
  starts, targets = np.nonzero((0 < distance) & (distance < unreached) & (twins == unreached))
  return np.stack([starts, targets, distance[starts, targets]], axis=1).tolist()
