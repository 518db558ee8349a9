"""Routers: which expert a text should get, or none.

A router gives each text a score for each expert. The expert with the highest score is attached, and
none where no score is above zero. `ROUTERS` lists them, from the simplest on:

  bm25      words of the prompt that the expert's card has, too; needs no model
  centroid  the decoder's final hidden state at the end of the prompt, near the expert's mean
  gain      odds that the text is the expert's own, above those at which its gain and its harm
            balance, by a linear head on the same state
  arrow     inputs of each layer, along the direction that the expert's adapters amplify most
            (Ostapenko et al. 2024); needs no data, and never says none
"""

import abc
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import Card, words_of
from latent_deliberation.experts.package import Routing
from latent_deliberation.inference import passes
from latent_deliberation.inference.passes import Layers, Model, State, Weights
from latent_deliberation.model.attention import AttentionMaskSpec
from latent_deliberation.model.layers import RMSNorm
from latent_deliberation.model.transformer import Block, layer_traits

LEAST_SHARE = 0.03  # of a prompt's words that must be a card's: any text has one of them by chance


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
  model: Model | None = None
  weights: Weights | None = None


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


class KeywordRouter:
  """BM25 over the cards (Robertson and Zaragoza 2009), by the library bm25s."""

  def __init__(self, experts: Mapping[str, Known]):
    if importlib.util.find_spec('bm25s') is None:
      raise UserError("the router 'bm25' needs the library bm25s: pip install -e '.[experts]'")
    import bm25s
    self.names = list(experts)
    self._index = None
    documents = [_words_of_card(known.card) for known in experts.values()]
    self._words = [set(document) for document in documents]
    if any(documents):
      self._index = bm25s.BM25()
      self._index.index([document or ['-'] for document in documents], show_progress=False)

  def scores(self, query: Query) -> np.ndarray:
    """Returns the BM25 score of each card; 0 where too few words of the prompt are its."""
    if len(query.texts) < len(query.hidden):
      raise UserError("the router 'bm25' reads the prompts, which are not known here: choose "
                      'another router')
    scores = np.zeros((len(query.hidden), len(self.names)))
    for row, text in enumerate(query.texts):
      words = words_of(text)
      if words and self._index is not None:
        share = np.array([sum(word in known for word in words) for known in self._words])
        scores[row] = self._index.get_scores(words) * (share >= LEAST_SHARE * len(words))
    return scores


def _words_of_card(card: Card | None) -> list[str]:
  if card is None:
    return []
  return [word for text in (card.name, card.description, *card.keywords) for word in words_of(text)]


class HiddenRouter(abc.ABC):
  """Scores the hidden state by what the package of each expert has for it."""

  def __init__(self, experts: Mapping[str, Known]):
    self.names, self._routing = list(experts), [known.routing for known in experts.values()]

  def scores(self, query: Query) -> np.ndarray:
    """Returns `score` by expert; one without routing is never chosen."""
    hidden = np.asarray(query.hidden, np.float32)
    scores = np.full((len(hidden), len(self.names)), -np.inf)
    for column, routing in enumerate(self._routing):
      if routing is not None:
        scores[:, column] = self.score(hidden, routing)
    return scores

  @abc.abstractmethod
  def score(self, hidden: np.ndarray, routing: Routing) -> np.ndarray:
    """Returns the scores [B] of an expert for hidden states [B, D]."""


class CentroidRouter(HiddenRouter):
  """Cosine of the hidden state and the expert's centroid, less the expert's threshold."""

  def score(self, hidden: np.ndarray, routing: Routing) -> np.ndarray:
    """Returns the cosines above the threshold."""
    return cosines(hidden, routing.origin, routing.centroid) - routing.threshold


def cosines(hidden: np.ndarray, origin: np.ndarray, centroid: np.ndarray) -> np.ndarray:
  """Returns the cosines [n] of hidden states [n, D], less `origin`, with a centroid of length 1."""
  moved = np.asarray(hidden, np.float32) - origin
  return moved @ centroid / np.maximum(np.linalg.norm(moved, axis=-1), 1e-12)


class GainRouter(HiddenRouter):
  """Log-odds of own text, above those at which an expert saves nothing; see `fit_routing`."""

  def score(self, hidden: np.ndarray, routing: Routing) -> np.ndarray:
    """Returns the log-odds above the balance."""
    return hidden @ routing.gain_weight + routing.gain_bias


class ArrowRouter:
  """Arrow, for one choice a text: how much the inputs of layers point along an expert's prototypes.

  The prototype of a layer is the direction of its input that the adapters of queries, keys and
  values together amplify most: the first singular vector of their product. The decoder reads the
  last tokens once more, for what its layers are given, which costs about a decoded token.
  """

  def __init__(self, experts: Mapping[str, Known]):
    usable = {name: known for name, known in experts.items()
              if known.weights is not None and known.weights.coprocessor_layers is not None
              and 'lora' in known.weights.coprocessor_layers.blocks[-1]}
    self.names = list(experts)
    self._columns = [self.names.index(name) for name in usable]
    self._prototypes = self._known = None
    if usable:
      self._known = next(iter(usable.values()))
      self._prototypes = jnp.stack([
          _prototypes(known.weights.coprocessor_layers, len(known.weights.layers.blocks))
          for known in usable.values()])

  def scores(self, query: Query) -> np.ndarray:
    """Returns the mean cosine, without its sign, over adapted layers and tokens; from 0 to 1."""
    scores = np.full((len(query.hidden), len(self.names)), -np.inf)
    if self._known is not None:
      scores[:, self._columns] = _along(self._known.model, self._known.weights, query.state,
                                        self._prototypes)
    return scores


def _prototypes(layers: Layers, depth: int) -> Array:
  """Returns the first singular vector of the adapters of each layer, [depth, D].

  It is 0 where a layer has none. An expert of fewer layers has the decoder's last ones.
  """
  found = [jnp.zeros(layers.final_norm['scale'].shape[0])] * (depth - len(layers.blocks))
  for block in layers.blocks:
    adapters = [block['lora']['attention'][name] for name in ('query', 'key', 'value')
                ] if 'lora' in block else []
    width = layers.final_norm['scale'].shape[0]
    if not adapters:
      found.append(jnp.zeros(width))
      continue
    # The vectors are in the span of all A, which is thin.
    basis, _ = jnp.linalg.qr(jnp.concatenate([each['a'] for each in adapters], axis=1))
    product = jnp.concatenate([
        basis.T @ each['a'] @ each['b'].reshape(len(each['b']), -1) for each in adapters], axis=1)
    found.append(basis @ jnp.linalg.svd(product, full_matrices=False)[0][:, 0])
  return jnp.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _along(model: Model, weights: Weights, state: State, prototypes: Array) -> Array:
  """Returns [B, E], the mean cosine of inputs of layers with prototypes [E, L, D]."""
  config, count = model.decoder.config, model.coprocessor.config.num_latents
  with nn.logical_axis_rules(model.rules):
    newest = state.cache.newest(count)
    cache = state.cache.hide(jnp.where(newest.segments > 0, newest.positions, -1))
    # As in `passes.run`, but for the inputs of each layer.
    x = passes.embed(model, weights, newest.tokens)[:, None].astype(
        model.decoder.activations or model.decoder.dtype)
    mask_spec = AttentionMaskSpec(newest.segments[:, None],
                                  jnp.full((len(x), 1), np.iinfo(np.int32).max))
    traits, found = layer_traits(config), []
    norm = RMSNorm(config.norm_epsilon, config.norm_offset)
    for number, block in enumerate(weights.layers.blocks):
      inputs = norm.apply({'params': block['params']['attention_in']}, x).astype(jnp.float32)
      inputs = inputs[:, 0] / (jnp.linalg.norm(inputs[:, 0], axis=-1, keepdims=True) + 1e-12)
      found.append(jnp.abs(jnp.einsum('BZD,ED->BZE', inputs, prototypes[:, number])))
      x, _ = Block(config, dtype=model.decoder.dtype).apply(
          block, x, (traits.layer(number), cache.layer(number)), newest.positions[:, None],
          mask_spec)
    seen = (newest.segments > 0)[None, :, :, None]
    adapted = jnp.any(prototypes != 0, axis=-1).T[:, None, None]  # by layer and expert
    return jnp.mean(jnp.stack(found), axis=(0, 2), where=seen & adapted)


ROUTERS: Mapping[str, Callable[[Mapping[str, Known]], Router]] = {
    'bm25': KeywordRouter, 'centroid': CentroidRouter, 'gain': GainRouter, 'arrow': ArrowRouter}


def make_router(name: str, experts: Mapping[str, Known]) -> Router:
  """Returns the router of this name over experts.

  Raises:
    UserError: there is no router of this name, or it needs a library that is not installed.
  """
  if name not in ROUTERS:
    raise UserError(f'router = {name!r}: choose one of {list(ROUTERS)}')
  return ROUTERS[name](experts)
