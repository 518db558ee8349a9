"""Speed of a train step against one dense mask, a text a trace, and transformers.

All have the same random weights. They run in turns, transformers in a process of its own. Only the
ratios of times of the same turn may be quoted.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.benchmarks.baseline import (
  THREADS,
  Baseline,
  alternate,
  build_steps,
  check_libraries,
  describe_turns,
  seconds_of,
)
from latent_deliberation.benchmarks.dense_mask import dense_mask, separate_traces
from latent_deliberation.benchmarks.speed_plots import plot_step_ratios
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.files import write_json
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.training.objectives import augmentation, language_modelling

CONFIG = TransformerConfig(vocab_size=4096, embed_dim=256, num_layers=4, num_heads=4,
                           num_kv_heads=2, head_dim=64, hidden_dim=1024, window=256)
TRUNK, AHEAD = 256, 16
# Traces and latents. 16 traces are the paper's number for each token of the text (128 on 2048), 64
# are the quickstart's, and 128 are the paper's for each text. A dense mask of 128 traces and 64
# latents would take over 25 GB.
CASES = ((16, 16), (16, 64), (32, 16), (32, 64), (64, 16), (64, 64), (128, 16))
TEXTS, LENGTH = 4, 512  # when the decoder alone is timed
WAYS = {'ours': augmentation, 'dense mask': dense_mask, 'text a trace': separate_traces}


def benchmark(output: Path, repeats: int) -> dict[str, Any]:
  """Times every case and writes `output`, and its ratios as a PNG next to it.

  Args:
    output: JSON file to write.
    repeats: turns of each comparison.

  Returns: the content of `output`.

  Raises:
    UserError: torch or transformers is not installed.
  """
  check_libraries()
  params = nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), int)))[
      'params']
  result: dict[str, Any] = {
      'step': {f'{num_traces} traces, {num_latents} latents':
               _compare_ways(params, num_traces, num_latents, repeats)
               for num_traces, num_latents in CASES},
      'decoder': _compare_decoders(params, repeats),
      'sizes': {'trunk': TRUNK, 'ahead': AHEAD, 'decoder_texts': TEXTS,
                'decoder_length': LENGTH},
      **describe_turns(repeats)}
  write_json(output, result)
  plot_step_ratios(result, output.with_suffix('.png'))
  return result


def _compare_ways(decoder_params: Params, num_traces: int, num_latents: int,
                  repeats: int) -> dict[str, Any]:
  """Times forward and backward of one text's traces in each of the three ways."""
  choices = DeliberationConfig(
      num_latents=num_latents, num_ahead=AHEAD, num_traces=num_traces, latents='paper',
      positions='shift', soft_tokens='free')
  coprocessor = Coprocessor(CONFIG, choices, scan=False)
  deliberator = Deliberator(Decoder(CONFIG, scan=False), coprocessor)
  params = nn.unbox(jax.jit(coprocessor.init)(jax.random.key(1), decoder_params))
  batch, keys = random_batch(1, TRUNK, CONFIG.vocab_size), jax.random.split(jax.random.key(2), 1)
  logging.info('%d traces, %d latents', num_traces, num_latents)
  programs = {}
  for way, objective in WAYS.items():
    loss = objective(deliberator, num_traces * AHEAD)
    programs[way] = compiled(jax.value_and_grad(loss, has_aux=True), params, decoder_params,
                             batch, keys)
  return ratios_of_turns(programs, repeats)


def _compare_decoders(params: Params, repeats: int) -> dict[str, Any]:
  """Times our decoder and transformers': forward, and with the gradient of all weights."""
  decoder = Decoder(CONFIG, scan=False)
  batch = random_batch(TEXTS, LENGTH, CONFIG.vocab_size)
  loss = language_modelling(decoder, LENGTH)
  forward = lambda params, tokens: decoder.apply({'params': params}, tokens)[0]  # noqa: E731
  ours = {
      'forward': compiled(forward, params, batch.tokens),
      'forward_backward': compiled(jax.value_and_grad(loss, has_aux=True), params, {}, batch,
                                   jax.random.split(jax.random.key(0), TEXTS))}
  with tempfile.TemporaryDirectory() as place:
    weights.save(Path(place) / 'decoder', CONFIG, params, format='huggingface')
    with Baseline(build_steps, Path(place) / 'decoder', batch.tokens.tolist(), THREADS) as baseline:
      result = {}
      for name, program in ours.items():
        logging.info('%s: against transformers', name)
        result[name] = ratios_of_turns(
            {'ours': program, 'transformers': functools.partial(baseline.seconds, name)}, repeats)
      return result


def random_batch(num_texts: int, length: int, vocab_size: int) -> Batch:
  """Returns texts of random tokens, each one document."""
  tokens = np.random.default_rng(0).integers(4, vocab_size, (num_texts, length))
  positions = np.broadcast_to(np.arange(length), tokens.shape)
  return Batch(*(jnp.asarray(leaf, jnp.int32)
                 for leaf in (tokens, np.ones_like(tokens), positions)))


def compiled(function: Callable[..., Any], *arguments: Params | Batch | Array,
             ) -> Callable[[], float]:
  """Returns a program that runs the function once and returns the seconds."""
  compiled = jax.jit(function)
  return lambda: seconds_of(lambda: jax.block_until_ready(compiled(*arguments)))


def ratios_of_turns(programs: dict[str, Callable[[], float]], repeats: int) -> dict[str, Any]:
  """Returns median seconds of each program, and median ratios to 'ours' of the same turn."""
  seconds = alternate(programs, repeats)
  over_ours = {name: statistics.median(one / ours for one, ours in
                                       zip(taken, seconds['ours'], strict=True))
               for name, taken in seconds.items() if name != 'ours'}
  logging.info('over ours: %s', over_ours)
  return {'seconds': {name: statistics.median(taken) for name, taken in seconds.items()},
          'over_ours': over_ours}
