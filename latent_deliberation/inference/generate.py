"""Decoding behind prompts: what is asked for is checked, then a session decodes it."""

from collections.abc import Iterator, Sequence

import numpy as np

from latent_deliberation.inference.completion import Completion, Decoding
from latent_deliberation.inference.generator import Generator, copied
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import NEVER
from latent_deliberation.inference.prompts import (
  Prompts,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.session import Session


def generate(generator: Generator, texts: Prompts | State, how: Decoding,
             seeds: Sequence[int] | None = None) -> list[Completion]:
  """Decodes to the end; see `stream`."""
  *_, completions = stream(generator, texts, how, seeds)
  return completions


def stream(generator: Generator, texts: Prompts | State, how: Decoding,
           seeds: Sequence[int] | None = None) -> Iterator[list[Completion]]:
  """Checks everything, then decodes a block of tokens at a time.

  Args:
    generator: the decoder.
    texts: prompts; or a state, which stays as it is.
    how: what to do.
    seeds: of the texts; default 0, 1, 2, ... A text is drawn by its own seed, whatever the others.

  Returns: an iterator over the same growing completions; the first has one token.

  Raises:
    ValueError: a prompt is bad (see `Generator.read`), too short for latents, or too long for what
      is to be decoded; the gate is of another width; or there is not one seed for each.
  """
  given = isinstance(texts, State)
  lengths = np.asarray(texts.lengths) if given else np.array([len(prompt) for prompt in texts])
  if not given:
    check_prompts(texts, np.zeros(len(texts)), generator.model.decoder.config.vocab_size)
  check_room(lengths, how.max_tokens, generator.model.plan.global_slots)
  if generator.model.coprocessor is not None and how.policy != NEVER:
    check_anchors(lengths, generator.model.coprocessor.config.first_anchor)
  width, gate = generator.model.decoder.config.embed_dim, how.policy.gate
  if gate is not None and gate.weight.shape != (width,):
    raise ValueError(f'the weight of the gate has shape {gate.weight.shape}, the decoder asks for '
                     f'{(width,)}: give a gate that was fitted on this decoder')
  seeds = list(range(len(lengths))) if seeds is None else list(seeds)
  if len(seeds) != len(lengths) or not all(0 <= seed < 2**32 for seed in seeds):
    raise ValueError(f'{len(seeds)} seeds {seeds[:4]} for {len(lengths)} texts: give one for each, '
                     'between 0 and 2**32 - 1')
  if given:
    return Session(generator, copied(texts), how, seeds).run()
  filler = [texts[0]] * (-len(texts) % generator.shards)
  return Session(generator, generator.read([*texts, *filler]), how, seeds).run()
