"""Speed of a pretrained decoder: its coprocessor's train step, and its loss against transformers.

All programs have the same weights and texts, and run in turns. Only the ratios of times of the same
turn may be quoted.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import linen as nn

from latent_deliberation.array_types import Params
from latent_deliberation.benchmarks.baseline import (
  THREADS,
  Baseline,
  build_steps,
  check_libraries,
  describe_turns,
)
from latent_deliberation.benchmarks.step_speed import compiled, random_batch, ratios_of_turns
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.experiment import Computation
from latent_deliberation.files import write_json
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.training.objectives import augmentation, language_modelling
from latent_deliberation.training.step import sum_gradients

# The sizes of configs/gemma3_270m.py.
CHOICES = DeliberationConfig(
    num_latents=4, num_ahead=8, num_traces=32, trainable='lora', lora_rank=16)
TEXTS, LENGTH, CHUNK = 4, 256, 256
ACCUMULATION = 4  # microbatches, of a text each
DECODER_TEXTS = 2  # when the decoder alone is timed
DTYPES = ('float32', 'bfloat16')  # of transformers; the better one counts


def benchmark_decoder(name: str, output: Path, repeats: int) -> dict[str, Any]:
  """Times a pretrained decoder and writes `output`.

  Args:
    name: name, directory or GGUF file of the decoder.
    output: JSON file to write.
    repeats: turns of each comparison.

  Returns: the content of `output`. 'step' compares our train step with other ways of it, 'decoder'
    compares the decoder alone with transformers in each dtype.

  Raises:
    UserError: torch or transformers is not installed, or there is no such decoder.
  """
  check_libraries()
  checkpoint = weights.open_checkpoint(name)
  params = checkpoint.load(dtype='float32')
  computation = Computation(dtype='auto', scan=False).on(jax.default_backend())
  result = {
      'step': {'train step': _compare_steps(checkpoint.config, params, computation, repeats)},
      'decoder': _compare_decoders(checkpoint.config, params, computation, repeats),
      'sizes': {'texts': TEXTS, 'accumulation': ACCUMULATION, 'decoder_texts': DECODER_TEXTS,
                'length': LENGTH,
                'deliberation': dataclasses.asdict(CHOICES)},
      'decoder_name': name, 'dtype': computation.dtype, **describe_turns(repeats)}
  write_json(output, result)
  return result


def _build(config: TransformerConfig, computation: Computation) -> Decoder:
  return Decoder(config, dtype=computation.dtype, activations=computation.activations, scan=False)


def _compare_steps(config: TransformerConfig, params: Params, computation: Computation,
                      repeats: int) -> dict[str, Any]:
  """Times a step's forward and backward in the chosen dtype and in float32.

  Each is timed with one text at a time, and with all texts at once.
  """
  batch = random_batch(TEXTS, LENGTH, config.vocab_size)
  keys, programs = jax.random.split(jax.random.key(2), TEXTS), {}
  float32 = Computation(scan=False).on(jax.default_backend())
  for choice, one_by_one, at_once in ((computation, 'ours', 'all texts at once'),
                                      (float32, 'float32', 'float32, all texts at once')):
    coprocessor = Coprocessor(config, CHOICES, dtype=choice.dtype, activations=choice.activations,
                              scan=False)
    adapters = nn.unbox(jax.jit(coprocessor.init)(jax.random.key(1), params))
    frozen = jax.tree.map(lambda leaf, dtype=choice.dtype: leaf.astype(dtype), params)
    loss = augmentation(Deliberator(_build(config, choice), coprocessor), CHUNK)
    for way, accumulation in ((one_by_one, ACCUMULATION), (at_once, 1)):
      programs[way] = compiled(
          functools.partial(sum_gradients, loss, accumulation=accumulation), adapters, frozen,
          batch, keys)
  logging.info('train step in %s against other ways', computation.dtype)
  return ratios_of_turns(programs, repeats)


def _compare_decoders(config: TransformerConfig, params: Params, computation: Computation,
                      repeats: int) -> dict[str, Any]:
  """Times the decoder's loss, and with the gradient of all weights, against transformers."""
  batch = random_batch(DECODER_TEXTS, LENGTH, config.vocab_size)
  loss = language_modelling(_build(config, computation), CHUNK)
  keys = jax.random.split(jax.random.key(0), DECODER_TEXTS)
  ours: dict[str, Callable[[], float]] = {
      'loss': compiled(loss, params, {}, batch, keys),
      'forward_backward': compiled(jax.value_and_grad(loss, has_aux=True), params, {}, batch, keys)}
  result: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as place:
    weights.save(Path(place) / 'decoder', config, params, format='huggingface')
    for dtype in DTYPES:
      with Baseline(build_steps, Path(place) / 'decoder', batch.tokens.tolist(), THREADS,
                    dtype) as baseline:
        for name, program in ours.items():
          logging.info('%s: against transformers in %s', name, dtype)
          result[f'{name}, {dtype}'] = ratios_of_turns(
              {'ours': program, 'transformers': functools.partial(baseline.seconds, name)}, repeats)
  return result
