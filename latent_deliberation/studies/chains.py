"""What a decoder writes itself before it answers: chains, decoded greedily."""

from collections.abc import Sequence

import numpy as np

from latent_deliberation.inference.completion import Decoding
from latent_deliberation.inference.generate import generate
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.prompts import Prompts
from latent_deliberation.progress import Progress


def write_chains(generator: Generator, prompts: Prompts, sign: Sequence[int], max_tokens: int,
                 batch_size: int, eos: int) -> list[list[int]]:
  """The chain that the decoder writes behind each prompt, and `sign` at its end.

  Args:
    generator: the plain decoder.
    prompts: [N] ids.
    sign: ids that end a chain. Behind one that ends otherwise (by `eos`, which is taken away, or
      after max_tokens) they are put, so that an answer can be asked for all the same.
    max_tokens: of a chain.
    batch_size: prompts at a time, of similar lengths.
    eos: id that ends a text.

  Raises:
    ValueError: see `generate`.
  """
  sign = list(sign)
  how = Decoding(max_tokens, eos=eos, stop=lambda tokens: list(tokens[-len(sign):]) == sign)
  order = np.argsort([len(prompt) for prompt in prompts], kind='stable').tolist()
  chains: list[list[int]] = [[] for _ in prompts]
  progress = Progress('Writing chains', 'questions', len(prompts))
  for first in range(0, len(order), batch_size):
    chosen = order[first:first + batch_size]
    filler = [chosen[0]] * (batch_size - len(chosen))  # one shape for all batches
    written = generate(generator, [prompts[number] for number in [*chosen, *filler]], how)
    for number, completion in zip(chosen, written, strict=False):
      ended = completion.ended == 'stop'
      chains[number] = completion.tokens if ended else [
          *(token for token in completion.tokens if token != eos), *sign]
    progress.update(first + len(chosen))
  return chains
