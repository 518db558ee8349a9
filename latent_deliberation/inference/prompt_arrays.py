"""Prompts as the arrays that the decoder reads, and what is wrong with prompts."""

from collections.abc import Sequence

import numpy as np

from latent_deliberation.errors import UserError

Prompts = Sequence[Sequence[int]]
SHORTEST = 16  # padded length of the shortest prompts


def check_prompts(prompts: Prompts, before: np.ndarray, vocab_size: int) -> None:
  """Raises UserError where there is no prompt, an empty text, or an unknown token.

  Args:
    before: [B] tokens that each text has already. A text that has some may get an empty prompt.
  """
  if not len(prompts):
    raise UserError('there is no prompt: give at least one')
  for number, prompt in enumerate(prompts):
    # Some token must predict the first decoded one.
    if not len(prompt) and not before[number]:
      raise UserError(f'prompt {number} is empty: give at least the token that begins a text')
    unknown = [token for token in prompt if not 0 <= token < vocab_size]
    if unknown:
      raise UserError(f'prompt {number} has the token {unknown[0]}, but the decoder knows 0 to '
                      f'{vocab_size - 1}: use the vocabulary that it was trained with')


def check_room(lengths: np.ndarray, more: int, room: int, names: Sequence[str] = ()) -> None:
  """Raises UserError where a text of `lengths` [B] and `more` tokens does not fit a cache.

  Args:
    names: names of the texts in errors; default 'text 0', 'text 1', ...
  """
  longest = int(np.argmax(lengths))
  if int(lengths[longest]) + more > room:
    name = names[longest] if names else f'text {longest}'
    raise UserError(
        f'{name} has {lengths[longest]} tokens, {more} more are requested, and the cache '
        f'has room for {room}: shorten the text, request fewer (--max_tokens), or raise length '
        '(--length)')


def check_anchors(lengths: np.ndarray, first_anchor: int, names: Sequence[str] = ()) -> None:
  """Raises UserError where a text is too short for latents at its end; see `check_room`."""
  shortest = int(np.argmin(lengths))
  if lengths[shortest] <= first_anchor:
    name = names[shortest] if names else f'text {shortest}'
    raise UserError(
        f'{name} has {lengths[shortest]} tokens, but refining latents replace its last '
        f'{first_anchor + 1}: give a longer prompt')


def align(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens int32 [B, T], with each text at the end of its row, and the lengths [B]."""
  count = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), padded_length(int(count.max()))), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[len(row) - len(prompt):] = prompt
  return tokens, count


def padded_length(length: int) -> int:
  """Rounds up to one of 16, 24, 32, 48, 64, 96, ..., so that few shapes are compiled."""
  # The next power of two, or three quarters of it where that is enough.
  padded = max(SHORTEST, 1 << (length - 1).bit_length()) if length else SHORTEST
  return padded * 3 // 4 if padded > SHORTEST and length <= padded * 3 // 4 else padded
