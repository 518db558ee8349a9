"""Reads the graphs of ProsQA.

ProsQA: Hao et al., Training Large Language Models to Reason in a Continuous Latent Space, 2024.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    FileNotFoundError: there is no such file.
    ValueError: it is not JSON, is empty, or an item has not the form of the release.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}: give a JSON file of the ProsQA release')
  try:
    items = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}): give a file of the ProsQA release') from error
  if not isinstance(items, list) or not items:
    raise ValueError(f'{path} holds no list of questions, but {str(items)[:100]}: give a file of '
                     'the ProsQA release')
  graphs = []
  for number, item in enumerate(items):
    try:
      graphs.append(_graph_of(item))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{path}, item {number}: not {FORM}, but {str(item)[:200]}: give a file of '
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
