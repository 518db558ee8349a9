"""Graphs: reachability in directed graphs, drawn in the style of ProsQA or read from its files."""

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

FORM = ("an object with lists 'idx_to_symbol' and 'steps', a list 'edges' of pairs of nodes, and "
        "nodes 'root', 'target' and 'neg_target', all nodes as numbers; edges lead from root to "
        "target in that many steps, and not to neg_target")


@dataclasses.dataclass(frozen=True, slots=True)
class AskedGraph:
  """The graph of a question such as 'Is Sally a sterpus or a hilpus?', without its words.

  Sally is the root, sterpus the target and hilpus the other.

  Attributes:
    nodes: number of nodes, which are numbered from 0.
    arrows: (tail, head) of each arrow.
    root, target, other: nodes; arrows lead from the root to the target, and not to the other.
    steps: smallest number of arrows from the root to the target.
  """
  nodes: int
  arrows: tuple[tuple[int, int], ...]
  root: int
  target: int
  other: int
  steps: int


def read_prosqa(path: str | Path) -> list[AskedGraph]:
  """Returns the graphs of a JSON file of the ProsQA release, in the order of the file.

  Raises:
    UserError: there is no such file, it is not JSON or empty, or an item has another form.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise UserError(f'no file {path}: give a JSON file of the ProsQA release')
  try:
    items = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): give a file of the ProsQA release') from error
  if not isinstance(items, list) or not items:
    raise UserError(f'{path} holds no list of questions, but {str(items)[:100]}: give a file of '
                    'the ProsQA release')
  graphs = []
  for number, item in enumerate(items):
    try:
      # An item of another form raises one of these errors, wherever it differs.
      graphs.append(_graph_of(item))
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f'{path}, item {number}: not {FORM}, but {str(item)[:200]}: give a file of '
                      'the ProsQA release') from error
  return graphs


def _graph_of(item: Mapping[str, Any]) -> AskedGraph:
  """Returns the graph of an item. Raises KeyError, TypeError or ValueError for another form."""
  if not isinstance(item['idx_to_symbol'], list) or not isinstance(item['steps'], list):
    raise TypeError
  graph = AskedGraph(
      nodes=len(item['idx_to_symbol']), arrows=tuple((tail, head) for tail, head in item['edges']),
      root=item['root'], target=item['target'], other=item['neg_target'],
      steps=len(item['steps']))
  named = [graph.root, graph.target, graph.other, *sum(graph.arrows, ())]
  if not all(type(node) is int and 0 <= node < graph.nodes for node in named):
    raise ValueError
  # The stated answer must be right, in the stated number of steps.
  distance = _distances(graph)
  if graph.other in distance or not 0 < distance[graph.target] == graph.steps:
    raise ValueError
  return graph


def _distances(graph: AskedGraph) -> dict[int, int]:
  """Returns the smallest number of arrows from the root to each node that it reaches."""
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
  """Reachability: 'acbd...;' says a->c, b->d; 'dk?A' asks which of d and k a leads to, one letter.

  The start comes last and as a capital, as in `PointerChasing`. The answer is then predicted from
  the token to look up, and no arrow looks like a question. '?' tells a question from a link.

  Nodes come in pairs of twins. A graph of nodes / 2 is drawn and every node is doubled. An arrow
  leads either from each twin to its own counterpart, or crosswise. If all twins change places, the
  graph stays the same. The two candidates are twins, so that only the arrows from the start on tell
  them apart. Their degrees and depths are equal. If arrows cross, both may even be connected to the
  start when directions are ignored.

  Attributes:
    nodes: number of nodes, an even number.
      Among the pairs, the first steps + 1 form a path, and each later pair has two parents.
    steps: largest difficulty; difficulty k has a shortest path of k arrows.
    skew: decay of difficulties; the probability of k is proportional to exp(-skew * k).
    links: number of links among the questions of a training document.
      A link is 'Ac', a node and any node that one of its arrows leads to. A decoder that learns
      from answers alone, each one of two, does not find the arrows.
    asked: path of a JSON file of ProsQA whose graphs are asked in the end; '' asks drawn ones.
      They are written in letters. Graphs of more than `nodes` nodes are left out. ProsQA's
      candidates are not twins: the one that fewer arrows lead to is right on 66% of its test file.
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
      raise UserError(f'nodes = {self.nodes} is odd, but nodes come in pairs: take one more')
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
    """See `Task.examine`; with a file, its first graphs of each number of steps.

    Raises:
      UserError: no graph of the file is small enough; see also `read_prosqa`.
    """
    if not self.asked:
      return super().examine(rng, per_difficulty)
    small = [graph for graph in read_prosqa(self.asked) if graph.nodes <= self.nodes]
    if not small:
      raise UserError(f'{self.asked} has no graph of at most nodes = {self.nodes} nodes: raise '
                      f'nodes, to {len(LETTERS)} at most')
    return first_of_each([self._pose(rng, graph) for graph in small], per_difficulty)

  def document(self, rng: np.random.Generator, count: int, held_out: bool = False) -> str:
    """See `DrawnTask.document`. Links are mixed with the questions."""
    if not self.links:
      return super().document(rng, count, held_out)
    questions, arrows = self._ask(rng, count)
    # A link looks like the end of a question and its answer, one arrow apart.
    links = [f'{tail.upper()}{head}' for tail, head in (
        arrows[place] for place in rng.integers(len(arrows), size=self.links).tolist())]
    items = [*links, *[asked.question + asked.answer for asked in questions]]
    return questions[0].context + ''.join([items[place] for place in rng.permutation(len(items))])

  def _ask(self, rng: np.random.Generator, count: int, difficulty: int | None = None,
           ) -> tuple[list[Question], list[tuple[str, str]]]:
    """Returns questions, and the arrows of their graph."""
    lengths = draw_difficulties(rng, count, self.difficulties, difficulty, self.skew)
    pairs = self.nodes // 2
    tails, heads = self._draw_arrows(rng)
    letters, arrows, context = self._write(rng, np.stack([tails, heads], axis=1))

    # Routes begin at the first twin of a pair, and reach only one of two twins. Each of them is two
    # questions, since all twins may change places.
    routes = {k: [] for k in self.difficulties}
    for start, target, length in _find_routes(tails, heads, pairs):
      if length <= self.steps:
        routes[length].append((start, target))
    # Equal questions come as late as possible, and candidates in random order.
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
    """Returns a graph of a file as a question of this task."""
    letters, _, context = self._write(rng, graph.arrows)
    start, target, other = (letters[node] for node in (graph.root, graph.target, graph.other))
    return _question(context, start, target, other, rng.integers(2), graph.steps)

  def _write(self, rng: np.random.Generator, arrows: Sequence[Sequence[int]],
             ) -> tuple[list[str], list[tuple[str, str]], str]:
    """Returns a letter for each node, the arrows in random order, and the context of these."""
    letters = [LETTERS[node] for node in rng.permutation(self.nodes).tolist()]
    written = [(letters[tail], letters[head]) for tail, head in rng.permutation(arrows).tolist()]
    return letters, written, ''.join([tail + head for tail, head in written]) + ';'

  def _draw_arrows(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns tails and heads of arrows, where the twin of node n is n + nodes / 2.

    The first steps + 1 pairs are a path, so every graph has questions of each difficulty. Each
    later pair has two parents among the pairs before it. Only one of these two arrows may cross,
    which is enough because twins have no order.
    """
    pairs = self.nodes // 2
    late = np.arange(self.steps + 1, pairs)
    first = rng.integers(late)
    # An offset from 1 to late - 1 makes the second parent differ from the first.
    second = (first + rng.integers(1, late)) % late
    crossed = pairs * rng.integers(2, size=len(late))
    tails = np.concatenate([np.arange(self.steps), first, second])
    heads = np.concatenate([np.arange(1, self.steps + 1), late, late + crossed])
    # The twins repeat every arrow.
    return (np.concatenate([tails, tails + pairs]),
            np.concatenate([heads, (heads + pairs) % self.nodes]))


def _question(context: str, start: str, target: str, other: str, order: int, steps: int,
              ) -> Question:
  """Returns a question that names the target first if `order` is 0, and the other if it is 1."""
  candidates = other + target if order else target + other
  return Question(context, f'{candidates}?{start.upper()}', target, steps)


def _find_routes(tails: np.ndarray, heads: np.ndarray, pairs: int) -> list[list[int]]:
  """Returns [start, target, distance] wherever the start reaches the target and not its twin."""
  arrows = np.zeros((2 * pairs, 2 * pairs), bool)
  arrows[tails, heads] = True
  # Breadth-first search from the first twin of each pair at once.
  unreached = pairs  # longer than any path
  reached = np.eye(pairs, 2 * pairs, dtype=bool)
  distance = np.where(reached, 0, unreached)
  for length in range(1, pairs):
    reached = reached @ arrows
    np.minimum(distance, length, out=distance, where=reached)
  # The distance to the twin of each node, in the place of the node.
  twins = distance.reshape(pairs, 2, pairs)[:, ::-1].reshape(pairs, -1)
  starts, targets = np.nonzero((0 < distance) & (distance < unreached) & (twins == unreached))
  return np.stack([starts, targets, distance[starts, targets]], axis=1).tolist()
