"""Packs answers to be scored: many contexts in a trunk row, and each answer after its context once.

`group` joins the requests of one context. `plan` cuts contexts into calls of few shapes. `pack`
writes a call as arrays. All of it is on the host, and does not depend on weights or devices.

A context is read once, whatever the number of its continuations. Continuations that begin alike
share what they share: a trace that two of them need is one trace, and the token that both predict
after the same tokens is one target. So ' A', ' B', ' C' and ' D' are one trace and four targets.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
from flax import struct

from latent_deliberation.array_types import Array, Batch, Bool, Int
from latent_deliberation.errors import UserError
from latent_deliberation.inference.tokenizer import padded_length

SHARED = 64  # tokens that contexts must begin with alike, so that they are read once
ROW_TOKENS = 1024  # tokens of a row, those of its traces included
SMALLEST_PART = 64  # contexts that are worth a compilation of their own
CALL_TOKENS = 8192  # tokens of a call whose contexts share a prefix, with the prefix of each


@dataclasses.dataclass(frozen=True)
class Request:
  """A continuation to be scored after a context.

  Attributes:
    context: ids, of which the first one begins every text.
    continuation: ids, one or more.
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
    targets: (ids after the anchor, the id that is predicted after them) -> number of the target.
    requests: number of each request -> numbers of its targets.
    partner: number of the context whose latents are another example's; see `find_partners`.
  """
  ids: tuple[int, ...]
  anchor: int
  item: Hashable
  traces: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
  targets: dict[tuple[tuple[int, ...], int], int] = dataclasses.field(default_factory=dict)
  requests: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  partner: int | None = None

  @property
  def num_ahead(self) -> int:
    """Number of ahead tokens of the longest trace, with the one that it predicts last."""
    return max(map(len, self.traces)) + 1

  def add(self, number: int, continuation: tuple[int, ...]) -> None:
    """Adds the continuation of a request."""
    rest = self.ids[self.anchor + 1:]
    ahead = (*rest, *continuation)
    self.requests[number] = [
        self.targets.setdefault((ahead[:place], ahead[place]), len(self.targets))
        for place in range(len(rest), len(ahead))]
    # Keep only the traces that no other one continues.
    read = ahead[:-1]
    if not any(trace[:len(read)] == read for trace in self.traces):
      self.traces = [trace for trace in self.traces if read[:len(trace)] != trace] + [read]


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


def find_partners(contexts: Sequence[Context]) -> None:
  """Gives each context the one of another item that is nearest in length, before it if possible.

  Contexts that begin alike, such as those with the same examples, are partners of each other. So
  another example's latents do not depend on how contexts are packed, or on their number in a call.
  A context without any other item is its own partner.
  """
  for members in _alike(contexts, range(len(contexts))).values():
    _pair(contexts, members)
  # Those that are alone with their beginning.
  _pair(contexts, [number for number, context in enumerate(contexts) if context.partner is None])
  for number, context in enumerate(contexts):
    context.partner = number if context.partner is None else context.partner


def _pair(contexts: Sequence[Context], members: Sequence[int]) -> None:
  order = _by_length(contexts, members)
  for place, number in enumerate(order):
    others = (order[at] for at in itertools.chain(range(place - 1, -1, -1),
                                                  range(place + 1, len(order))))
    contexts[number].partner = next(
        (other for other in others if contexts[other].item != contexts[number].item), None)


def _alike(contexts: Sequence[Context], members: Iterable[int]) -> dict[tuple, list[int]]:
  """Returns contexts by the tokens that they begin with."""
  alike = collections.defaultdict(list)
  for number in members:
    alike[contexts[number].ids[:SHARED]].append(number)
  return alike


def _by_length(contexts: Sequence[Context], members: Iterable[int]) -> list[int]:
  return sorted(members, key=lambda number: (len(contexts[number].ids), number))


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of the arrays of a call. Each one is compiled once.

  Attributes:
    rows: B, trunk rows.
    prefix: P, tokens that all contexts of the call begin with, padding included; 0 for none.
    length: T, tokens of a row after the prefix.
    contexts: C, contexts of a row; 1 with a prefix, since the row then is one document.
    traces: M, traces of a row.
    num_ahead: A, ahead tokens of a trace.
    targets: N, targets of a row.
  """
  rows: int
  prefix: int
  length: int
  contexts: int
  traces: int
  num_ahead: int
  targets: int


@dataclasses.dataclass
class Call:
  """Contexts that are scored together.

  Attributes:
    shape: sizes of its arrays.
    prefix: ids that all of its contexts begin with.
    rows: contexts of each row: their numbers, and whether they are scored. Those that are not only
      lend their latents to others.
  """
  shape: Shape
  prefix: tuple[int, ...]
  rows: list[list[tuple[int, bool]]]


def plan(contexts: Sequence[Context], chosen: Sequence[int], *, num_latents: int, rows: int,
         partners: bool) -> list[Call]:
  """Cuts contexts into calls.

  Args:
    contexts: all contexts, of which `find_partners` has set the partners.
    chosen: numbers of those to score.
    num_latents: Z, latents of each trace.
    rows: trunk rows of a call. It must divide over the mesh.
    partners: whether each scored context needs its partner in the same call.
  """
  alone, calls = [], []
  for members in _alike(contexts, chosen).values():
    needed = _with_partners(contexts, members, partners)
    prefix = _common_prefix([contexts[number] for number in needed])
    rest = np.mean([len(contexts[number].ids) for number in members]) - len(prefix)
    # Alone in its row, a context costs padding, which a long prefix is worth.
    if len(members) > 1 and len(prefix) >= max(SHARED, rest):
      for part in _split_by_ahead(contexts, members):
        shape = _prefix_shape(contexts, part, len(prefix), rows, partners)
        calls += _fill(contexts, part, shape, prefix, partners)
    else:
      alone += members
  for part in _split_by_ahead(contexts, sorted(alone)):
    shape = _packed_shape(contexts, part, num_latents, rows, partners)
    calls += _fill(contexts, part, shape, (), partners)
  return calls


def _with_partners(contexts: Sequence[Context], members: Iterable[int],
                   partners: bool) -> list[int]:
  return sorted({*members, *(contexts[number].partner for number in members if partners)})


def _common_prefix(contexts: Sequence[Context]) -> tuple[int, ...]:
  """Returns the ids before any anchor that all contexts begin with."""
  # The first and the last one in order differ soonest.
  first, last = (of(context.ids for context in contexts) for of in (min, max))
  limit = min(context.anchor for context in contexts)
  same = [one == other for one, other in zip(first[:limit], last, strict=False)]
  return first[:same.index(False) if False in same else len(same)]


def _split_by_ahead(contexts: Sequence[Context], members: Sequence[int]) -> Iterator[list[int]]:
  """Yields parts with ahead tokens of similar number, in the order of their lengths.

  A part of few contexts is joined with the one of more ahead tokens.
  """
  by_ahead = collections.defaultdict(list)
  for number in members:
    by_ahead[_ahead_size(contexts[number].num_ahead)].append(number)
  waiting: list[int] = []
  for size in sorted(by_ahead):
    waiting += by_ahead[size]
    if len(waiting) >= max(len(members) / 8, SMALLEST_PART) or size == max(by_ahead):
      yield _by_length(contexts, waiting)
      waiting = []


def _ahead_size(num_ahead: int) -> int:
  """Rounds up to 1, 2, 4, 8, 16, 24, 32, 48, 64, ..."""
  return padded_length(num_ahead) if num_ahead > 8 else 1 << (num_ahead - 1).bit_length()


def _packed_shape(contexts: Sequence[Context], members: Sequence[int], num_latents: int, rows: int,
                  partners: bool) -> Shape:
  """Returns the shape of rows of many contexts, which fills up evenly on the average."""
  sizes = np.array([_sizes(contexts[number]) for number in members])
  num_ahead = _ahead_size(max(contexts[number].num_ahead for number in members))
  tokens, traces, targets = sizes.mean(axis=0)
  # Contexts of a row, with their share of everything. Few contexts make small rows.
  count = ROW_TOKENS / (tokens + traces * (num_latents + num_ahead - 1))
  count = min(max(count, 1), -(-len(members) // rows) + 1)
  length, traces, targets = (
      max(count * mean, most) for mean, most in zip((tokens, traces, targets), sizes.max(axis=0),
                                                    strict=True))
  # The first row of a call also holds a partner that is not scored there.
  longest = [max(len(contexts[number].ids) for number in numbers)
             for numbers in (members, _with_partners(contexts, members, partners))]
  length, traces = max(length, sum(longest) if partners else 0), _round(traces, 2)
  return Shape(rows, 0, _round(length, 32), traces + partners, traces, num_ahead,
               _round(targets, 16))


def _prefix_shape(contexts: Sequence[Context], members: Sequence[int], prefix: int, rows: int,
                  partners: bool) -> Shape:
  """Returns the shape of rows of one context each, after a common prefix."""
  needed = _with_partners(contexts, members, partners)
  length = padded_length(max(len(contexts[number].ids) for number in needed) - prefix)
  _, traces, targets = np.max([_sizes(contexts[number]) for number in members], axis=0)
  padded = padded_length(prefix)
  # Two rows at least, for a context and its partner.
  count = max(CALL_TOKENS // (padded + length) // rows, -(-2 // rows)) * rows
  return Shape(count, padded, length, 1, int(traces),
               _ahead_size(max(contexts[number].num_ahead for number in members)),
               _round(targets, 4))


def _sizes(context: Context) -> tuple[int, int, int]:
  """Returns the numbers of tokens, traces and targets of a context."""
  return len(context.ids), len(context.traces), len(context.targets)


def _round(size: float, step: int) -> int:
  return int(-(-size // step) * step)


def _fill(contexts: Sequence[Context], members: Sequence[int], shape: Shape,
          prefix: tuple[int, ...], partners: bool) -> list[Call]:
  """Puts contexts into rows one after the other, and each one's partner before it."""
  room = np.array([shape.length, shape.traces, shape.targets, shape.contexts])
  calls: list[Call] = []
  there: set[int] = set()  # contexts of the last call
  used = np.zeros(4, int)  # of the last row

  def arrange(new: Sequence[tuple[int, bool]]) -> tuple[list[list[tuple[int, bool]]], np.ndarray]:
    """Returns what goes to the end of the last row, then further rows; and what the last uses."""
    rows, taken = [[]], used
    for number, scored in new:
      tokens, traces, targets = _sizes(contexts[number])
      size = np.array([tokens - len(prefix), traces * scored, targets * scored, 1])
      assert (size <= room).all(), f'context {number} of sizes {size} does not fit {shape}'
      if (taken + size > room).any():
        rows.append([])
        taken = np.zeros(4, int)
      rows[-1].append((number, scored))
      taken = taken + size
    return rows, taken

  for number in members:
    partner = contexts[number].partner
    lent = [(partner, False)] if partners and partner != number else []
    rows, taken = arrange([*(each for each in lent if partner not in there), (number, True)])
    if not calls or len(calls[-1].rows) + len(rows) - 1 > shape.rows:
      calls.append(Call(shape, prefix, [[]]))
      used, there = np.zeros(4, int), set()
      rows, taken = arrange([*lent, (number, True)])
    calls[-1].rows[-1] += rows[0]
    calls[-1].rows += rows[1:]
    used = taken
    there |= {each for row in rows for each, _ in row}
  return calls


@struct.dataclass
class AnswerBatch:
  """The arrays of a call.

  Attributes:
    prefix: [1, P] the common prefix at its end, after padding; P may be 0.
    batch: [B, T] packed contexts, a segment each; with a prefix, what follows it.
    anchors: index of the anchor of each context in its row, the prefix included.
    contexts: False where a row has fewer contexts.
    partners: context of another example, as row * C + context.
    owner: context of each trace.
    ahead: ids that a trace reads after its anchor. The last one is not read.
    trace, place: trace and ahead position of each target.
    targets: id of each target.
    scored: False where a row has fewer targets.
  """
  prefix: Batch
  batch: Batch
  anchors: Int[Array | np.ndarray, 'B C']
  contexts: Bool[Array | np.ndarray, 'B C']
  partners: Int[Array | np.ndarray, 'B C']
  owner: Int[Array | np.ndarray, 'B M']
  ahead: Int[Array | np.ndarray, 'B M A']
  trace: Int[Array | np.ndarray, 'B N']
  place: Int[Array | np.ndarray, 'B N']
  targets: Int[Array | np.ndarray, 'B N']
  scored: Bool[Array | np.ndarray, 'B N']


def pack(contexts: Sequence[Context],
         call: Call) -> tuple[AnswerBatch, dict[int, tuple[int, int]]]:
  """Returns the arrays of a call, and the row and first target of each scored context."""
  shape, skipped = call.shape, len(call.prefix)
  ints = functools.partial(np.zeros, dtype=np.int32)
  bools = functools.partial(np.zeros, dtype=bool)
  tokens, segments, positions = ints((3, shape.rows, shape.length))
  arrays = AnswerBatch(
      _pack_prefix(call), Batch(tokens, segments, positions),
      anchors=ints((shape.rows, shape.contexts)), contexts=bools((shape.rows, shape.contexts)),
      partners=ints((shape.rows, shape.contexts)), owner=ints((shape.rows, shape.traces)),
      ahead=ints((shape.rows, shape.traces, shape.num_ahead)),
      trace=ints((shape.rows, shape.targets)), place=ints((shape.rows, shape.targets)),
      targets=ints((shape.rows, shape.targets)), scored=bools((shape.rows, shape.targets)))
  where = {number: row * shape.contexts + slot
           for row, numbers in enumerate(call.rows) for slot, (number, _) in enumerate(numbers)}
  first = {}
  for row, numbers in enumerate(call.rows):
    start = trace = target = 0
    for slot, (number, scored) in enumerate(numbers):
      # The context itself. With a prefix, it goes on with the prefix's segment and positions.
      context = contexts[number]
      ids = context.ids[skipped:]
      inside = slice(start, start + len(ids))
      tokens[row, inside], segments[row, inside] = ids, slot + 1
      positions[row, inside] = skipped + np.arange(len(ids))
      arrays.anchors[row, slot] = shape.prefix + start + context.anchor - skipped
      arrays.contexts[row, slot] = True
      arrays.partners[row, slot] = where.get(context.partner, where[number])
      start += len(ids)
      if not scored:
        continue
      # Its traces, and its targets in them.
      first[number] = row, target
      for offset, ahead in enumerate(context.traces):
        arrays.ahead[row, trace + offset, :len(ahead)] = ahead
        arrays.owner[row, trace + offset] = slot
      for offset, (before, token) in enumerate(context.targets):
        found = next(at for at, ahead in enumerate(context.traces)
                     if ahead[:len(before)] == before)
        arrays.trace[row, target + offset] = trace + found
        arrays.place[row, target + offset] = len(before)
        arrays.targets[row, target + offset] = token
        arrays.scored[row, target + offset] = True
      trace, target = trace + len(context.traces), target + len(context.targets)
  return arrays, first


def _pack_prefix(call: Call) -> Batch:
  padding = call.shape.prefix - len(call.prefix)
  order = np.arange(call.shape.prefix, dtype=np.int32)[None] - padding
  inside = order >= 0
  tokens = np.concatenate([np.zeros(padding, np.int32), np.array(call.prefix, np.int32)])[None]
  return Batch(tokens, inside.astype(np.int32), np.where(inside, order, 0))
