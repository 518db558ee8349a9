"""Routers: which expert a text should get, or none.

A router gives each text a score for each expert. The expert with the highest score is attached, and
none where no score is above zero. `ROUTERS` lists them, from the simplest on:

  bm25      words of the prompt that the expert's card has as keywords; needs no model
  centroid  the decoder's final hidden state at the end of the prompt, near the expert's mean
  gain      nats that the expert is predicted to save, by a linear head on the same state
  arrow     the same text's inputs to each layer, along what the expert's adapters amplify most;
            needs no data, and never says none
"""

import collections
import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import Card
from latent_deliberation.experts.package import Routing
from latent_deliberation.inference.passes import State, Weights

_WORD = re.compile(r'[^\W\d_]{3,}')  # three letters or more


@dataclasses.dataclass(frozen=True)
class Query:
  """Texts at whose ends latents may be made.

  Attributes:
    texts: the prompts, or [] where they are not known.
    hidden: float [B, D], the decoder's final hidden state at the end of each.
    state: the texts as the decoder has read them.
  """
  texts: Sequence[str]
  hidden: np.ndarray
  state: State


@dataclasses.dataclass(frozen=True)
class Known:
  """What routers may know of an expert; None for what its package lacks."""
  card: Card | None
  routing: Routing | None
  weights: Weights | None


class Router(Protocol):
  """Attributes:
    names: names of the experts, in the order of the scores.
  """
  names: Sequence[str]

  def scores(self, query: Query) -> np.ndarray:
    """Returns float [B, E]; above zero where the expert should help."""


def choose(router: Router, scores: np.ndarray) -> list[str | None]:
  """Returns the expert with the highest score of each text; None where none is above zero."""
  if not scores.shape[1]:
    return [None] * len(scores)
  best = np.argmax(np.where(np.isfinite(scores), scores, -np.inf), axis=1)
  return [router.names[expert] if row[expert] > 0 else None
          for row, expert in zip(scores, best, strict=True)]


def words_of(text: str) -> list[str]:
  """Returns the words of a text, in small letters."""
  return _WORD.findall(text.lower())


class KeywordRouter:
  """BM25 over the cards (Robertson and Zaragoza 2009), by the library bm25s."""

  def __init__(self, experts: Mapping[str, Known]):
    if importlib.util.find_spec('bm25s') is None:
      raise UserError("the router 'bm25' needs the library bm25s: pip install -e '.[experts]'")
    import bm25s
    self.names = list(experts)
    self._index = None
    documents = [_words_of_card(known.card) for known in experts.values()]
    if any(documents):
      self._index = bm25s.BM25()
      self._index.index([document or ['-'] for document in documents], show_progress=False)

  def scores(self, query: Query) -> np.ndarray:
    """Returns the BM25 score of each card; 0 where the prompt has none of its words."""
    if len(query.texts) < len(query.hidden):
      raise UserError("the router 'bm25' reads the prompts, which are not known here: choose "
                      'another router')
    scores = np.zeros((len(query.hidden), len(self.names)))
    for row, text in enumerate(query.texts):
      words = words_of(text)
      if words and self._index is not None:
        scores[row] = self._index.get_scores(words)
    return scores


def _words_of_card(card: Card | None) -> list[str]:
  if card is None:
    return []
  return [word for text in (card.name, card.description, *card.keywords) for word in words_of(text)]


class CentroidRouter:
  """Cosine of the hidden state and the expert's centroid, less the expert's threshold."""

  def __init__(self, experts: Mapping[str, Known]):
    self.names, self._routing = list(experts), [known.routing for known in experts.values()]

  def scores(self, query: Query) -> np.ndarray:
    """Returns the cosines above the thresholds; an expert without a centroid is never chosen."""
    columns = [np.full(len(query.hidden), -np.inf) if routing is None
               else cosines(query.hidden, routing.origin, routing.centroid) - routing.threshold
               for routing in self._routing]
    return _stack(columns, len(query.hidden))


def cosines(hidden: np.ndarray, origin: np.ndarray, centroid: np.ndarray) -> np.ndarray:
  """Returns the cosines [n] of hidden states [n, D], less `origin`, with a centroid of length 1."""
  moved = np.asarray(hidden, np.float32) - origin
  return moved @ centroid / np.maximum(np.linalg.norm(moved, axis=-1), 1e-12)


class GainRouter:
  """Nats that an expert is predicted to save, by its ridge head (see `evaluation.gating`)."""

  def __init__(self, experts: Mapping[str, Known]):
    self.names, self._routing = list(experts), [known.routing for known in experts.values()]

  def scores(self, query: Query) -> np.ndarray:
    """Returns predicted nats; an expert without a head is never chosen."""
    columns = [np.full(len(query.hidden), -np.inf) if routing is None
               else np.asarray(query.hidden, np.float32) @ routing.gain_weight + routing.gain_bias
               for routing in self._routing]
    return _stack(columns, len(query.hidden))


def _stack(columns: Sequence[np.ndarray], rows: int) -> np.ndarray:
  return np.stack(columns, axis=1) if columns else np.zeros((rows, 0))


ROUTERS: Mapping[str, Callable[[Mapping[str, Known]], Router]] = {
    'bm25': KeywordRouter, 'centroid': CentroidRouter, 'gain': GainRouter}


def make_router(name: str, experts: Mapping[str, Known]) -> Router:
  """Returns a router over experts, which are not weighed against each other in any other way.

  Raises:
    UserError: there is no router of this name, or it needs a library that is not installed.
  """
  if name not in ROUTERS:
    raise UserError(f'router = {name!r}: choose one of {list(ROUTERS)}')
  return ROUTERS[name](experts)


# --- Words ---


def keywords_of(own: Sequence[str], general: Sequence[str], number: int = 64) -> list[str]:
  """Returns the words that set a text apart from general text, the most telling ones first.

  A word's weight is p log(p / q), with p its share of all words in `own` and q, smoothed, in
  `general`: its part of the divergence of the two (Kullback and Leibler 1951).

  Args:
    own, general: documents.
    number: largest number of words.
  """
  counts, others = (collections.Counter(word for text in texts for word in words_of(text))
                    for texts in (own, general))
  total, total_others = max(sum(counts.values()), 1), sum(others.values())
  vocabulary = len(counts.keys() | others.keys())

  def weight(word: str) -> float:
    share = counts[word] / total
    return share * math.log(share * (total_others + vocabulary) / (others[word] + 1))

  # A word of one document alone may be a name.
  telling = [word for word in counts if counts[word] > 1 and weight(word) > 0]
  return sorted(telling, key=lambda word: (-weight(word), word))[:number]
