"""Joins the answers of each context, and says which context lends its latents to which.

A context is read once, whatever the number of its continuations. Continuations that begin alike
share what they share: a trace that two of them need is one trace, and the token that both predict
after the same tokens is one target. So ' A', ' B', ' C' and ' D' are one trace and four targets.
"""

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Sequence

from latent_deliberation.errors import UserError

# It decides partners, and which contexts may be read after one common prefix.
SHARED = 64  # tokens; contexts that begin with the same ones are alike


@dataclasses.dataclass(frozen=True)
class Request:
  """A continuation to be scored after a context.

  Attributes:
    context: ids, of which the first one begins every text.
    continuation: ids, one or more; none of a prompt that is to be continued.
    anchor: index in the context of the last token before the latents; None for its last token.
      The tokens after it are read again, after the latents.
    item: question that the request belongs to. The latents of another example are never those of
      the same item.
  """
  context: tuple[int, ...]
  continuation: tuple[int, ...]
  anchor: int | None = None
  item: Hashable = None


@dataclasses.dataclass
class Context:
  """A context with all of its continuations.

  Attributes:
    ids: ids of the context.
    anchor: see Request.
    item: see Request.
    traces: ids that are read after the anchor, a trace each. None of them begins another one.
    targets: (beginning, the id that is predicted after it) -> number of the target. A beginning is
      what is read after the anchor; `beginnings` has the number of each.
    beginnings: (beginning without its last id, that id) -> beginning; 0 is the empty one.
    requests: number of each request -> numbers of its targets.
    partner: number of the context whose latents are another example's; see `find_partners`.
  """
  ids: tuple[int, ...]
  anchor: int
  item: Hashable
  traces: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
  targets: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
  beginnings: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
  requests: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  partner: int | None = None

  @property
  def before_latents(self) -> tuple[int, ...]:
    """The ids that the latents are made from."""
    return self.ids[:self.anchor + 1]

  def add(self, number: int, continuation: tuple[int, ...]) -> None:
    """Adds the continuation of a request."""
    rest = self.ids[self.anchor + 1:]
    read = (*rest, *continuation)[:-1]
    self.requests[number] = [
        self.targets.setdefault((beginning, token), len(self.targets))
        for beginning, token in zip(self.follow(read)[len(rest):], continuation, strict=True)]
    # Keep only the traces that no other one continues.
    if not any(trace[:len(read)] == read for trace in self.traces):
      self.traces = [trace for trace in self.traces if read[:len(trace)] != trace] + [read]

  def follow(self, read: Sequence[int]) -> list[int]:
    """Returns the beginnings of ids that are read after the anchor, from the empty one on."""
    found = [0]
    for token in read:
      found.append(self.beginnings.setdefault((found[-1], token), len(self.beginnings) + 1))
    return found


def group(requests: Sequence[Request]) -> list[Context]:
  """Joins the requests that have the same context, anchor and item, in their order.

  Raises:
    UserError: a context or a continuation is empty, or an anchor is not in its context.
  """
  contexts: dict[tuple, Context] = {}
  for number, request in enumerate(requests):
    if not request.context or not request.continuation:
      part = 'continuation' if request.context else 'context'
      raise UserError(f'the {part} of request {number} (item {request.item}) is empty: there is '
                      'nothing to score. Give it at least one token')
    anchor = len(request.context) - 1 if request.anchor is None else request.anchor
    if not 0 <= anchor < len(request.context):
      raise UserError(f'request {number} has anchor {anchor}, but its context has '
                      f'{len(request.context)} tokens: give the index of one of them')
    key = request.context, anchor, request.item
    contexts.setdefault(key, Context(*key)).add(number, tuple(request.continuation))
  return list(contexts.values())


def find_partners(contexts: Sequence[Context], members: Sequence[int]) -> None:
  """Sets each context's partner: the nearest earlier context of another item, else the next one.

  Nearest is in the order of packing, first among `members` that begin alike, as those with the same
  examples do. So another example's latents do not depend on the number of contexts in a call, or on
  which are scored. An item with an equal text up to the anchor, which has the same latents, counts
  as the same. Without any other item, and outside of `members`, a context is its own partner.
  """
  for alike in by_beginning(contexts, members).values():
    _pair(contexts, alike)
  # Those that are alone with their beginning pair up. One that still is alone takes any.
  _pair(contexts, [number for number in members if contexts[number].partner is None])
  _pair(contexts, members)
  for number, context in enumerate(contexts):
    context.partner = number if context.partner is None else context.partner


def _pair(contexts: Sequence[Context], members: Sequence[int]) -> None:
  order = in_packing_order(contexts, members)
  for place, number in enumerate(order):
    if contexts[number].partner is None:
      nearest = itertools.chain(range(place)[::-1], range(place + 1, len(order)))
      others = (order[at] for at in nearest)
      contexts[number].partner = next(
          (other for other in others if contexts[other].item != contexts[number].item
           and contexts[other].before_latents != contexts[number].before_latents), None)


def by_beginning(contexts: Sequence[Context], members: Iterable[int]) -> dict[tuple, list[int]]:
  """Returns contexts by the tokens that they begin with."""
  alike = collections.defaultdict(list)
  for number in members:
    alike[contexts[number].ids[:SHARED]].append(number)
  return alike


def in_packing_order(contexts: Sequence[Context], members: Iterable[int]) -> list[int]:
  """Returns contexts in the order of packing: by size, so that rows fill up, then as they come."""
  return sorted(members, key=lambda number: (length_size(len(contexts[number].ids)), number))


def length_size(length: int) -> int:
  """Rounds up to 64, 256, 1024, ..."""
  return next(64 * 4**power for power in itertools.count() if length <= 64 * 4**power)
