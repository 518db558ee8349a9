"""Speed of inference against transformers, and the cost of deliberation against plain decoding.

Both sides have the same random weights. They run in turns, transformers in a process of its own.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from latent_deliberation.array_types import Params
from latent_deliberation.benchmarks.baseline import (
  CACHES,
  THREADS,
  Baseline,
  alternate,
  build_programs,
  check_libraries,
  describe_turns,
  seconds_of,
)
from latent_deliberation.benchmarks.speed_plots import plot_speed
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.files import write_json
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.engine import Engine
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import ONCE
from latent_deliberation.inference.session import DecodingOptions, generate, stream
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig

SIZES = {
    'small': TransformerConfig(vocab_size=4096, embed_dim=256, num_layers=4, num_heads=4,
                               num_kv_heads=2, head_dim=64, hidden_dim=1024, window=256),
    'medium': TransformerConfig(vocab_size=8192, embed_dim=512, num_layers=4, num_heads=8,
                                num_kv_heads=4, head_dim=64, hidden_dim=2048, window=256),
    'large': TransformerConfig(vocab_size=16_384, embed_dim=1024, num_layers=4, num_heads=8,
                               num_kv_heads=4, head_dim=128, hidden_dim=4096, window=256),
}
BATCHES = (1, 8)
PROMPT, DECODED = 128, 64  # tokens
LENGTH = PROMPT + DECODED + 1  # tokens of a cache
DTYPES = ('float32', 'bfloat16')  # of both sides, for a decoder that exists
NUM_LATENTS = (8, 32, 64)
FIRST_TOKENS = 40  # pairs of times to the first token


def benchmark(output: Path, repeats: int, decoder: str = '') -> dict[str, Any]:
  """Times every case and writes `output`, and its ratios as a PNG next to it.

  Args:
    output: JSON file to write.
    repeats: turns of each comparison.
    decoder: name, directory or GGUF file of a decoder, which is compared in each of DTYPES; ''
      compares random decoders of SIZES in float32.

  Returns: the content of `output`.

  Raises:
    UserError: torch or transformers is not installed, or there is no such decoder.
  """
  check_libraries()
  dtypes = DTYPES if decoder else ('float32',)
  result: dict[str, Any] = {
      'decode_ratio_vs_transformers': {}, 'prefill_ratio_vs_transformers': {},
      'decode_tokens_per_second': {}, 'prefill_tokens_per_second': {},
      'augmentation_in_decode_steps': {}, 'cache_bytes': {},
      'transformers_seconds': {},
      **describe_turns(repeats)}
  for name, config, params in _decoders(decoder):
    for dtype in dtypes:
      _compare(result, f'{name}_{dtype}' if decoder else name, config, params, dtype, repeats)
    _time_augmentation(result, name, config, params, repeats)
  logging.info('time to the first token')  # with the last size
  result['first_token_ratio_background_vs_plain'] = _first_token_ratio(config, params)
  write_json(output, result)
  plot_speed(result, output.with_suffix('.png'))
  return result


def _decoders(decoder: str) -> Iterator[tuple[str, TransformerConfig, Params]]:
  """Yields name, architecture and float32 weights: of a decoder, or random ones of SIZES."""
  if decoder:
    checkpoint = weights.open_checkpoint(decoder)
    yield Path(decoder).name, checkpoint.config, checkpoint.load(dtype='float32')
    return
  for name, config in SIZES.items():
    tokens = jnp.zeros((1, 1), int)
    yield name, config, nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens))['params']


def _prompts(config: TransformerConfig, batch: int) -> list[list[int]]:
  tokens = np.random.default_rng(batch).integers(4, config.vocab_size, (batch, PROMPT))
  return tokens.tolist()


def _compare(result: dict[str, Any], name: str, config: TransformerConfig, params: Params,
             dtype: str, repeats: int) -> None:
  """Adds tokens per second of prefill and of greedy decoding, with transformers' faster cache."""
  prompts = {f'{name}_batch{batch}': _prompts(config, batch) for batch in BATCHES}
  held = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  with tempfile.TemporaryDirectory() as place:
    weights.save(Path(place) / 'decoder', config, params, format='huggingface')
    with Baseline(build_programs, Path(place) / 'decoder', prompts, DECODED, THREADS,
                  dtype) as baseline:
      for case, batch in prompts.items():
        logging.info('%s: against transformers', case)
        theirs = {program: functools.partial(baseline.seconds, f'{case} {program}')
                  for program in ('prefill', *CACHES)}
        engine = Engine(config, held, length=LENGTH, dtype=dtype)
        _compare_batch(result, case, batch, engine, theirs, repeats)


def _compare_batch(result: dict[str, Any], case: str, prompts: list[list[int]],
                   engine: Engine, theirs: Mapping[str, Callable[[], float]],
                   repeats: int) -> None:
  """Adds one batch's tokens per second, and the ratios of ours to transformers'."""

  def read() -> None:
    jax.block_until_ready(engine.read(prompts).logits)

  def whole() -> None:
    generate(engine, prompts, DecodingOptions(DECODED))

  seconds = alternate({
      'our prefill': functools.partial(seconds_of, read),
      'our whole': functools.partial(seconds_of, whole), **theirs}, repeats)

  # Decoding alone is the time of the whole less that of the prefill.
  median = {name: statistics.median(taken) for name, taken in seconds.items()}
  result['transformers_seconds'][case] = {cache: median[cache] for cache in CACHES}
  faster = min(CACHES, key=median.__getitem__)
  decode = {'ours': _median_difference(seconds['our whole'], seconds['our prefill']),
            'transformers': _median_difference(seconds[faster], seconds['prefill'])}
  prefill = {'ours': median['our prefill'], 'transformers': median['prefill']}
  for name, taken, tokens in (('decode', decode, DECODED), ('prefill', prefill, PROMPT)):
    result[f'{name}_tokens_per_second'][case] = {
        library: len(prompts) * tokens / time for library, time in taken.items()}
    result[f'{name}_ratio_vs_transformers'][case] = taken['transformers'] / taken['ours']


def _time_augmentation(result: dict[str, Any], size: str, config: TransformerConfig,
                       params: Params, repeats: int) -> None:
  """Adds the time of an augmentation in decode steps, and the bytes of the cache."""
  for num_latents in NUM_LATENTS:
    for batch in BATCHES:
      case = f'{size}_batch{batch}_latents{num_latents}'
      logging.info('%s: an augmentation', case)
      engine = _augmented(config, params, num_latents)
      state = engine.read(_prompts(config, batch))

      def augment(engine: Engine = engine, state: State = state) -> None:
        jax.block_until_ready(engine.attach(state, engine.augment(state)))

      def decode(engine: Engine = engine, state: State = state) -> None:
        generate(engine, state, DecodingOptions(DECODED))

      seconds = alternate({'augment': functools.partial(seconds_of, augment),
                           'decode': functools.partial(seconds_of, decode)}, repeats)
      result['augmentation_in_decode_steps'][case] = DECODED * (
          statistics.median(seconds['augment']) / statistics.median(seconds['decode']))
      result['cache_bytes'][case] = {
          'held': sum(leaf.nbytes for leaf in (*state.cache.keys, *state.cache.values)),
          'formula': _cache_bytes(config, batch, num_latents)}


def _augmented(config: TransformerConfig, params: Params, num_latents: int) -> Engine:
  """Returns an engine with the coprocessor that training starts from."""
  choices = DeliberationConfig(num_latents=num_latents, num_ahead=8, num_traces=1)
  trained = nn.unbox(jax.jit(Coprocessor(config, choices).init)(jax.random.key(1), params))
  return Engine(config, params, length=LENGTH, coprocessor=(choices, trained))


def _cache_bytes(config: TransformerConfig, batch: int, num_latents: int) -> int:
  """Returns the bytes of a cache: 2 x B x K x H x 4 for each slot.

  A layer has min(reach, length) + Z slots.
  """
  reach = {'local': config.window + num_latents - 1, 'global': LENGTH}
  slots = sum(min(reach[kind], LENGTH) + num_latents for kind in config.layer_kinds)
  return 2 * slots * batch * config.num_kv_heads * config.head_dim * 4


def _first_token_ratio(config: TransformerConfig, params: Params) -> float:
  """Returns the time to the first token with a coprocessor in the background over that without.

  It is the median over pairs, whose order alternates. Each run waits for its latents at the end.
  So no coprocessor is still at work during the next run.
  """
  engine = _augmented(config, params, NUM_LATENTS[0])
  prompts = _prompts(config, 1)
  background = DecodingOptions(8, policy=ONCE, timing=LatentTiming(delay=7))

  def first(options: DecodingOptions) -> float:
    begun = time.perf_counter()
    tokens = stream(engine, prompts, options)
    next(tokens)
    taken = time.perf_counter() - begun
    _drain(tokens)
    return taken

  ratios = []
  pair = (DecodingOptions(8), background)
  for number in range(2 + FIRST_TOKENS):
    order = pair if number % 2 else pair[::-1]
    taken = {options: first(options) for options in order}
    if number >= 2:  # the first two compile
      ratios.append(taken[background] / taken[pair[0]])
  return statistics.median(ratios)


def _drain(tokens: Iterator) -> None:
  for _ in tokens:
    pass


def _median_difference(whole: list[float], part: list[float]) -> float:
  """Returns the median of whole less part, of the same turn: a slow turn is slow in both."""
  return statistics.median(one - other for one, other in zip(whole, part, strict=True))
