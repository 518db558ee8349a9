"""Prompts as arrays of few shapes, and what is wrong with them before anything is computed."""

from collections.abc import Sequence

import numpy as np

Prompts = Sequence[Sequence[int]]
SHORTEST = 16


def check_prompts(prompts: Prompts, before: np.ndarray, vocab_size: int) -> None:
  """Raises ValueError where there is no prompt, an empty text, or an unknown token.

  Args:
    before: [B] tokens that each text has already; one that has some may get an empty prompt.
  """
  if not len(prompts):
    raise ValueError('there is no prompt: give at least one')
  for number, prompt in enumerate(prompts):
    if not len(prompt) and not before[number]:
      raise ValueError(f'prompt {number} is empty: give at least the token that begins a text')
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
      raise ValueError(f'prompt {number} has the token {unknown[0]}, the decoder knows 0 to '
                       f'{vocab_size - 1}: use the vocabulary that it was trained with')


def check_room(lengths: np.ndarray, more: int, room: int) -> None:
  """Raises ValueError where a text of `lengths` [B] and `more` tokens does not fit a cache."""
  longest = int(np.argmax(lengths))
  if lengths[longest] + more > room:
    raise ValueError(
        f'text {longest} has {lengths[longest]} tokens, {more} more are asked for, and the cache '
        f'has room for {room}: shorten it, ask for less, or give the generator more length')


def check_anchors(lengths: np.ndarray, first_anchor: int) -> None:
  """Raises ValueError where a text is too short for latents at its end."""
  shortest = int(np.argmin(lengths))
  if lengths[shortest] <= first_anchor:
    raise ValueError(
        f'text {shortest} has {lengths[shortest]} tokens, but refining latents stand in the place '
        f'of its last {first_anchor + 1}: give a longer prompt')


def align(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 [B, T], each text at the end of its row, and the lengths [B] of the texts."""
  count = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), padded_length(int(count.max()))), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt):] = prompt
  return tokens, count


def padded_length(length: int) -> int:
  """The least of 16, 24, 32, 48, 64, 96, ... that is `length` or more: few shapes to compile."""
  padded = max(SHORTEST, 1 << (length - 1).bit_length()) if length else SHORTEST
  return padded * 3 // 4 if padded > SHORTEST and length <= padded * 3 // 4 else padded
