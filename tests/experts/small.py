"""The tiny decoder as inference loads it, and coprocessors for it as training writes them."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.card import Card
from latent_deliberation.experts.package import Expert, Routing
from latent_deliberation.inference import passes
from latent_deliberation.inference.engine import Engine, LoadedDecoder
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.model.transformer_config import TransformerConfig
from tests import tiny

LENGTH, VOCABULARY = 48, 'v0'


@functools.cache
def decoder(config: TransformerConfig = tiny.CONFIG, seed: int = 0) -> LoadedDecoder:
  """Returns a decoder in memory; its tokenizer is nothing but a hash."""
  params = tiny.decoder_params(config, seed)
  unstacked = {**params, 'transformer': passes.unstack(params['transformer'])}
  return LoadedDecoder(config, unstacked, fingerprint(params), SimpleNamespace(hash=VOCABULARY))


def coprocessor(seed: int = 1, **choices: Any) -> CoprocessorCheckpoint:
  """Returns a coprocessor of that decoder, random as if trained."""
  deliberator = tiny.deliberator(**choices)
  return CoprocessorCheckpoint(
      tiny.CONFIG, deliberator.config, decoder().fingerprint, VOCABULARY, steps=7,
      params=tiny.coprocessor_params(deliberator, tiny.decoder_params(), seed))


def lora(seed: int, **choices: Any) -> CoprocessorCheckpoint:
  """Returns adapters of that decoder."""
  return coprocessor(seed, trainable='lora', **choices)


def card(name: str = 'stars', **changes: Any) -> Card:
  """Returns a card for `lora(1)`, with a gain of 0.2 nats."""
  own = {'gain': {'own': {'nats': 0.2, 'ci95': [0.1, 0.3]},
                  'shuffled': {'nats': -0.1, 'ci95': [-0.2, -0.05]}},
         'texts': 40, 'num_ahead': 4, 'positions': [1, 2]}
  values = dict(
      name=name, description='Stars and planets', licence='CC0-1.0',
      base={'name': 'tiny', 'fingerprint': decoder().fingerprint}, vocabulary=VOCABULARY,
      latents={'number': 3, 'form': 'refining', 'trainable': 'lora', 'parameters': 500},
      recipe={'steps': 7, 'seed': 0}, scores={name: own}, keywords=('comet', 'orbit'), files={})
  return Card(**{**values, **changes})


def routing(seed: int = 0) -> Routing:
  """Returns a random centroid and gain head."""
  width = tiny.CONFIG.embed_dim
  random = np.random.default_rng(seed)
  centroid, origin, weight = random.standard_normal((3, width)).astype(np.float32)
  return Routing(centroid / np.linalg.norm(centroid), origin, 0.1, weight, 0.05)


def expert(name: str = 'stars', seed: int = 1) -> Expert:
  """Returns a whole expert."""
  return Expert(card(name), lora(seed), routing(seed))


def experts(**named: CoprocessorCheckpoint | Expert) -> Experts:
  """Returns these experts on the tiny decoder."""
  return Experts(decoder(), named, length=LENGTH, strict=True)


def engine_of(trained: CoprocessorCheckpoint) -> Engine:
  """Returns an engine with one coprocessor, as without experts."""
  return Engine(tiny.CONFIG, decoder().params, length=LENGTH,
                coprocessor=(trained.config, trained.params))


def broken(trained: CoprocessorCheckpoint) -> CoprocessorCheckpoint:
  """Returns a coprocessor whose gate is not a number."""
  params = jax.tree.map(lambda leaf: leaf, trained.params)
  return CoprocessorCheckpoint(**{**vars(trained), 'params': {
      **params, 'gate': params['gate'].at[0, 0].set(np.nan)}})
