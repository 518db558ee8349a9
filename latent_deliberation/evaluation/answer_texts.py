"""Texts to requests: tokens of a context and of an answer, as lm-evaluation-harness has them.

Three things differ from its Hugging Face model. Every context begins with the token that begins a
text. A text that is too long loses tokens after that one. Where an answer merges with the last
token of its context, the merged token is scored, and no character is lost.
"""

import dataclasses
from collections.abc import Hashable, Sequence

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.inference.tokenizer import Tokenizer

END, BEFORE = 'end', 'before:'


@dataclasses.dataclass
class EncodedCounts:
  """Requests out of the ordinary.

  Attributes:
    requests: number of all requests.
    truncated: number of those that lost tokens at the left, since they do not fit.
    merged: number of those whose answer merges with the last token of the context.
  """
  requests: int = 0
  truncated: int = 0
  merged: int = 0


class AnswerEncoder:
  """Turns contexts and continuations into requests.

  Attributes:
    counts: what happened so far.
  """

  def __init__(self, tokenizer: Tokenizer, max_length: int, place: str = END):
    """Checks the place.

    Args:
      tokenizer: tokenizer of the decoder.
      max_length: largest number of tokens that the decoder reads of a text.
      place: place of the latents in a context: 'end', or 'before:TEXT' for the last token before
        the last TEXT in it. 'before:Answer:' is the end of the question in many tasks.

    Raises:
      UserError: the place is neither of the two.
    """
    if place != END and not place.removeprefix(BEFORE).strip() or not (
        place == END or place.startswith(BEFORE)):
      raise UserError(f"place = {place!r}: give {END!r}, or '{BEFORE}TEXT' such as "
                      f"'{BEFORE}Answer:' for the end of the text before it")
    self.counts = EncodedCounts()
    self._tokenizer, self._max_length = tokenizer, max_length
    self._mark = place.removeprefix(BEFORE).strip() if place != END else None
    self._heads: dict[str, tuple[list[int], int]] = {}  # ids and anchor of the last context

  def encode(self, context: str, continuation: str, item: Hashable = None) -> Request:
    """Returns the request for a continuation of a context, which may be empty.

    Spaces at the end of the context belong to the continuation, as in lm-evaluation-harness.

    Raises:
      UserError: the continuation is empty or longer than the cache, or the context lacks the text
        before which the latents should come.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped):] + continuation
    if not continuation.strip('\0').strip():
      raise UserError(f'the continuation of item {item} is empty, or white space: there is nothing '
                      f'to score. Its context ends with {context[-40:]!r}')
    head, anchor = self._head(context, item)
    whole = self._tokenizer.encode(context + continuation)
    # Tokens of the context that the answer does not change.
    kept = _common(head, whole)
    self.counts.requests += 1
    self.counts.merged += kept < len(head)
    return self._fit(whole[:kept], whole[kept:], min(anchor, kept - 1), item)

  def encode_prompt(self, prompt: str, max_tokens: int, item: Hashable = None) -> Request:
    """Returns a prompt without a continuation, cut at the left to leave room for `max_tokens`.

    Raises:
      UserError: there is no room for any token of the prompt, or it lacks the text before which
        the latents should come.
    """
    (ids, anchor), room = self._head(prompt, item), self._max_length - max_tokens
    if room < 2:
      raise UserError(f'{max_tokens} tokens after a prompt do not fit max_length = '
                      f'{self._max_length}: request fewer (max_gen_toks), or raise max_length')
    self.counts.requests += 1
    return self._cut(ids, (), anchor, len(ids) - room, item)

  def _head(self, context: str, item: Hashable) -> tuple[list[int], int]:
    """Returns the ids of a context, and the index of its anchor."""
    if context not in self._heads:
      ids = self._tokenizer.encode(context)
      # Only the last one is kept: the choices of a question follow each other.
      self._heads = {context: (ids, self._find_anchor(context, ids, item))}
    return self._heads[context]

  def _find_anchor(self, context: str, ids: Sequence[int], item: Hashable) -> int:
    if self._mark is None:
      return len(ids) - 1
    at = context.rfind(self._mark)
    if at < 0:
      raise UserError(f'place = {BEFORE}{self._mark}: the context of item {item} has no such text. '
                      f'It ends with {context[-60:]!r}')
    return _common(self._tokenizer.encode(context[:at].rstrip()), ids) - 1

  def _fit(self, context: Sequence[int], continuation: Sequence[int], anchor: int,
           item: Hashable) -> Request:
    # The last token of an answer is predicted, and never read.
    if len(continuation) > self._max_length:
      raise UserError(f'the continuation of item {item} has {len(continuation)} tokens, and '
                      f'max_length = {self._max_length}: raise max_length')
    excess = len(context) + len(continuation) - 1 - self._max_length
    return self._cut(context, continuation, anchor, excess, item)

  def _cut(self, context: Sequence[int], continuation: Sequence[int], anchor: int, excess: int,
           item: Hashable) -> Request:
    """Returns a request without the first `excess` tokens after the one that begins a text."""
    if excess > 0:
      self.counts.truncated += 1
      context, anchor = [context[0], *context[1 + excess:]], max(anchor - excess, 0)
    return Request(tuple(context), tuple(continuation), anchor, item)


def rolling_windows(ids: Sequence[int],
                    length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Cuts a whole text into contexts and continuations of which each token is scored once.

  As in lm-evaluation-harness, a context is as long as there is room for. But each one begins with
  the token that begins a text. It takes the place of a scored token in all windows but the first.

  Args:
    ids: ids of the text, of which the first one begins every text.
    length: largest number of tokens that the decoder reads of a window, 2 or more.
  """
  (bos, *rest), windows, first = ids, [], 0
  while first < len(rest):
    # The first window has one more, since nothing stands before it.
    end = min(first + length - bool(first), len(rest))
    windows.append(((bos, *rest[max(end - length, 0):first]), tuple(rest[first:end])))
    first = end
  return windows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
  """Returns the number of ids that both begin with."""
  shorter = min(len(first), len(second))
  return next((at for at in range(shorter) if first[at] != second[at]), shorter)
