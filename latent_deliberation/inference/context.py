"""A text that is read and augmented once, ahead of time, for many prompts to go on behind."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from latent_deliberation.directories import make_writable
from latent_deliberation.files import read_text
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.generators import NONE
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.prompts import Prompts
from latent_deliberation.inference.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Context:
  """One text in the decoder's cache, without latents and with them; neither is ever changed."""
  plain: State
  augmented: State


def check_context(output: Path, document: Path, coprocessor: str) -> str:
  """The text of a document, if it can be read and its cache written; before a decoder is loaded.

  Raises:
    FileExistsError: there is something at `output`.
    FileNotFoundError: there is no such document.
    OSError: `output` cannot be written.
    ValueError: the document is empty or no UTF-8, or no coprocessor is given.
  """
  if coprocessor in ('', NONE):
    raise ValueError(f'--coprocessor={coprocessor}: latents for the text are made by one: give the '
                     'directory of a trained coprocessor')
  if output.exists():
    raise FileExistsError(f'{output} exists already and is not written over: give another')
  text = read_text(document, 'the text to read ahead of time')
  if not text:
    raise ValueError(f'{document} is empty: give a text')
  make_writable(output.absolute().parent)
  return text


def save_context(text: str, output: Path, generator: Generator, tokenizer: Tokenizer) -> int:
  """Reads a text, makes latents for its end and writes both; returns its number of tokens.

  Raises:
    ValueError: the text is longer than the generator's cache, or too short for latents.
  """
  ids = tokenizer.encode(text)
  state = generator.read([ids])
  prefix_cache.save(output, generator, state, generator.augment(state))
  return len(ids)


def open_context(directory: Path, generator: Generator) -> Context:
  """What `save_context` has written.

  Raises:
    ValueError: it has several texts or no latents, or see `prefix_cache.load`.
  """
  state, latents = prefix_cache.load(directory, generator)
  if len(state.position) != 1 or latents is None:
    raise ValueError(f'the cache in {directory} has {len(state.position)} texts '
                     f'{"without" if latents is None else "with"} latents beside them, 1 with '
                     'latents is expected: write one with launch/augment.py')
  return Context(state, generator.attach(state, latents))


def read_behind(generator: Generator, context: Context, prompts: Prompts,
                plain: bool = False) -> State:
  """The state of each prompt behind the context; `plain` leaves its latents out."""
  state = context.plain if plain else context.augmented
  repeated = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, len(prompts), axis=0) if leaf.ndim else leaf, state)
  return generator.read_on(repeated, prompts)
