"""Decoded tokens as pieces of text, of which nothing is taken back once it is given out."""

from collections.abc import Sequence

from latent_deliberation.inference.tokenizer import Tokenizer

_LONGEST = 8  # tokens of one character at most; longer ones are no text at all


class TextStream:
  """The text of one completion, token by token.

  Attributes:
    text: text so far, without what ended it.
  """

  def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()):
    """Begins after the prompt whose ids are `before`, for a text that one of `stop` may end."""
    self.text = ''
    self._tokenizer, self._before, self._stop = tokenizer, list(before), tuple(stop)
    self._open: list[int] = []  # ids whose character is not complete
    self._given = 0
    self._held = max((len(string) - 1 for string in stop), default=0)

  def add(self, token: int) -> str:
    """Adds a token; returns the text that it completes, '' where a character is not complete."""
    self._open.append(token)
    piece = self._tokenizer.decode(self._open, self._before)
    if piece.endswith('\ufffd') and len(self._open) < _LONGEST:
      return ''
    self._before += self._open  # the tokenizer takes the last of them
    self._open = []
    self.text += piece
    return piece

  def give(self) -> str:
    """Returns the text since the last call that can be no beginning of a stop string."""
    end = max(self._given, len(self.text) - self._held)
    new, self._given = self.text[self._given:end], end
    return new

  def end(self, ended_by: str) -> str:
    """Returns the last text, after what ended it is cut off.

    Args:
      ended_by: see `session.Completion.finish_reason`.
    """
    if self._open:
      self.text += self._tokenizer.decode(self._open, self._before)
    self._open = []
    if ended_by == 'stop':
      found = [at for string in self._stop if (at := self.text.find(string)) >= 0]
      self.text = self.text[:min(found, default=None)]
    new, self._given = self.text[self._given:], len(self.text)
    return new
