"""Packs answers to be scored: contexts in trunk rows, and traces after them in rows of their own.

`plan` cuts contexts into calls of few shapes. `pack` writes a call as arrays. All of it is on the
host, and does not depend on weights or devices. answer_contexts.py says what a context is.

A trunk row holds many contexts, a segment each. A row of traces holds, one after the other, the
latents of a trace and the tokens that it reads after them. It sees its context in the trunk row.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flax import struct

from latent_deliberation.array_types import Array, Batch, Bool, Int
from latent_deliberation.evaluation.answer_contexts import (
  SHARED,
  Context,
  by_beginning,
  in_packing_order,
  length_size,
)
from latent_deliberation.inference.prompt_arrays import padded_length

# These change scores by rounding alone.
SMALLEST_CLUSTER = 8  # contexts; fewer with a common prefix are packed as those without
SMALLEST_PART = 64  # contexts; fewer of a size are compiled with those of the next size
ROW_TOKENS = 1024  # tokens and latents of a row, those of its traces included
CALL_TOKENS = 4096  # tokens and latents of all rows of a call
FEW_CALLS = 3  # that share their contexts evenly; of more, the last one hardly counts
PREFIX_TOKENS = 8192  # tokens of a call whose contexts share a prefix, with the prefix of each
SLACKS = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5)  # see _fill_evenly
WINDOW = 64  # contexts that are tried, where one does not fit


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of the arrays of a call. Each one is compiled once.

  Attributes:
    rows: B, trunk rows.
    prefix: P, tokens that all contexts of the call begin with, padding included; 0 for none.
    length: T, tokens of a row after the prefix.
    contexts: C, contexts of a row; 1 with a prefix, since the row then is one document.
    fresh: F, latents and ahead tokens of a row.
    latents: Z, latents of a trace; 1 where there are none, see `pack`.
    targets: N, targets of the call.
  """
  rows: int
  prefix: int
  length: int
  contexts: int
  fresh: int
  latents: int
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


def plan(contexts: Sequence[Context], chosen: Sequence[int], *, num_latents: int, shards: int,
         partners: bool) -> list[Call]:
  """Cuts contexts into calls.

  Args:
    contexts: all contexts, of which `find_partners` has set the partners.
    chosen: numbers of those to score.
    num_latents: Z, latents of each trace; 1 for none.
    shards: number that must divide the rows of a call.
    partners: whether each scored context needs its partner in the same call.
  """
  alone, calls = [], []
  for members in by_beginning(contexts, chosen).values():
    needed = _with_partners(contexts, members, partners)
    prefix = _common_prefix([contexts[number] for number in needed])
    rest = np.mean([len(contexts[number].ids) for number in members]) - len(prefix)
    # Alone in its row, a context costs padding, which a long prefix is worth.
    if len(members) >= SMALLEST_CLUSTER and len(prefix) >= max(SHARED, rest):
      for part in _split(contexts, members):
        shape = _prefix_shape(contexts, part, prefix, num_latents, shards, partners)
        calls += _fill(contexts, part, shape, prefix, partners)
    else:
      alone += members
  for part in _split(contexts, alone):
    calls += _fill_evenly(contexts, part, num_latents, shards, partners)
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


def _split(contexts: Sequence[Context], members: Sequence[int]) -> Iterator[list[int]]:
  """Yields parts of similar lengths, each in the order of packing, which are compiled once.

  A part of few contexts is joined with that of longer ones.
  """
  by_size = collections.defaultdict(list)
  for number in members:
    by_size[length_size(len(contexts[number].ids))].append(number)
  waiting: list[int] = []
  for size in sorted(by_size):
    waiting += by_size[size]
    if len(waiting) >= max(len(members) / 8, SMALLEST_PART) or size == max(by_size):
      yield in_packing_order(contexts, waiting)
      waiting = []


def _fill_evenly(contexts: Sequence[Context], members: Sequence[int], num_latents: int,
                 shards: int, partners: bool) -> list[Call]:
  """Returns calls of many contexts a row, of the shape that computes the least padding.

  Rows with no room to spare leave contexts for one more call. So several sizes are tried, each a
  multiple of what the contexts of a row take on the average.
  """

  def computed(calls: list[Call]) -> int:
    shape = calls[0].shape
    in_row = shape.length + shape.fresh + shape.contexts * shape.latents
    return len(calls) * (shape.rows * in_row + shape.targets)

  shapes = _packed_shapes(contexts, members, num_latents, shards, partners)
  return min((_fill(contexts, members, shape, (), partners) for shape in shapes), key=computed)


def _packed_shapes(contexts: Sequence[Context], members: Sequence[int], num_latents: int,
                   shards: int, partners: bool) -> list[Shape]:
  """Returns shapes of rows of many contexts, where each call has the same share of them."""
  sizes = np.array([_sizes(contexts[number], num_latents) for number in members])
  (tokens, fresh, targets), most = sizes.mean(axis=0), sizes.max(axis=0)
  # A row has room for its longest context, and for a partner that is not scored there.
  least = most[0] + partners * max(
      len(contexts[number].ids) for number in _with_partners(contexts, members, partners))
  # Contexts that a row holds at most, then those that it has when calls are equal.
  in_row = max(ROW_TOKENS / (tokens + fresh), least / tokens / 2)
  rows = max(1, round(CALL_TOKENS / shards / (in_row * (tokens + fresh)))) * shards
  in_call = len(members) / np.ceil(len(members) / (in_row * rows))
  rows = max(1, round(in_call / in_row / shards)) * shards
  in_row = in_call / rows
  return list(dict.fromkeys(Shape(
      rows, 0, _round(max(slack * in_row * tokens, least), 32),
      _round(slack * in_row + 2 + partners, 4),
      _round(max(slack * in_row * fresh, most[1]), 32), num_latents,
      _round(max(slack * in_call * targets, most[2]), 32 * shards)) for slack in SLACKS))


def _prefix_shape(contexts: Sequence[Context], members: Sequence[int], prefix: Sequence[int],
                  num_latents: int, shards: int, partners: bool) -> Shape:
  """Returns the shape of rows of one context each, after a common prefix."""
  needed = _with_partners(contexts, members, partners)
  length = padded_length(max(len(contexts[number].ids) for number in needed) - len(prefix))
  _, fresh, most = np.max([_sizes(contexts[number], num_latents) for number in members], axis=0)
  mean = np.mean([len(contexts[number].targets) for number in members])
  padded = padded_length(len(prefix))
  # Two rows at least, for a context and its partner.
  rows = max(PREFIX_TOKENS // (padded + length) // shards, -(-2 // shards)) * shards
  calls = -(-len(members) // (rows - partners))
  if calls <= FEW_CALLS:
    rows = min(rows, max(_round(len(members) / calls + partners, shards), 2))
  return Shape(rows, padded, length, 1, padded_length(int(fresh)), num_latents,
               _round(max(rows * mean, most), 8 * shards))


def _sizes(context: Context, num_latents: int) -> tuple[int, int, int]:
  """Returns the numbers of tokens, of tokens and latents of its traces, and of targets."""
  return (len(context.ids), sum(num_latents + len(trace) for trace in context.traces),
          len(context.targets))


def _round(size: float, step: int) -> int:
  return int(-(-size // step) * step)


def _fill(contexts: Sequence[Context], members: Sequence[int], shape: Shape,
          prefix: tuple[int, ...], partners: bool) -> list[Call]:
  """Puts contexts into calls. Where one does not fit, some of those after it may."""
  calls, left = [], list(members)
  while left:
    filler = _Filler(contexts, shape, len(prefix), partners)
    later = []
    for number in left:
      if len(later) >= WINDOW or not filler.put(number):
        later.append(number)
    assert len(later) < len(left), f'context {left[0]} does not fit {shape}'
    calls.append(Call(shape, prefix, filler.rows))
    left = later
  return calls


class _Filler:
  """Puts contexts into the rows of one call."""

  def __init__(self, contexts: Sequence[Context], shape: Shape, prefix: int, partners: bool):
    self.rows: list[list[tuple[int, bool]]] = [[] for _ in range(shape.rows)]
    self._contexts, self._prefix, self._partners = contexts, prefix, partners
    self._room = np.tile([shape.length, shape.fresh, shape.contexts], (shape.rows, 1))
    self._latents, self._targets = shape.latents, shape.targets
    self._there: set[int] = set()

  def put(self, number: int) -> bool:
    """Puts a context and, unless it is there, its partner. Returns whether both fit."""
    partner, targets = self._contexts[number].partner, len(self._contexts[number].targets)
    lent = self._partners and partner != number and partner not in self._there
    before = self._room.copy()
    placed = [self._find(each, scored) for each, scored in (
        *([(partner, False)] if lent else []), (number, True))]
    if None in placed or targets > self._targets:
      self._room = before
      return False
    self._targets -= targets
    for row, entry in placed:
      self.rows[row].append(entry)
      self._there.add(entry[0])
    return True

  def _find(self, number: int, scored: bool) -> tuple[int, tuple[int, bool]] | None:
    """Returns a row with room for a context, of which it takes the room."""
    tokens, fresh, _ = _sizes(self._contexts[number], self._latents)
    size = np.array([tokens - self._prefix, fresh * scored, 1])
    fits = (self._room >= size).all(axis=1)
    if not fits.any():
      return None
    row = int(fits.argmax())
    self._room[row] -= size
    return row, (number, scored)


@struct.dataclass
class AnswerBatch:
  """The arrays of a call.

  Attributes:
    prefix: [1, P] the common prefix at its end, after padding; P may be 0.
    batch: [B, T] packed contexts, a segment each; with a prefix, what follows it.
    anchors: index of the anchor of each context in its row, the prefix included.
    contexts: False where a row has fewer contexts.
    partners: context of another example, as row * C + context.
    tokens: ids of ahead tokens, 0 for latents and padding.
    owner: context of each latent and ahead token; -1 for padding.
    latent: number of each latent in its trace; -1 for ahead tokens.
    ahead: number of ahead tokens of the trace before this one.
    first: index of the first latent of the trace.
    source: place of the state that predicts each target, as row * F + index.
    targets: id of each target.
  """
  prefix: Batch
  batch: Batch
  anchors: Int[Array | np.ndarray, 'B C']
  contexts: Bool[Array | np.ndarray, 'B C']
  partners: Int[Array | np.ndarray, 'B C']
  tokens: Int[Array | np.ndarray, 'B F']
  owner: Int[Array | np.ndarray, 'B F']
  latent: Int[Array | np.ndarray, 'B F']
  ahead: Int[Array | np.ndarray, 'B F']
  first: Int[Array | np.ndarray, 'B F']
  source: Int[Array | np.ndarray, ' N']
  targets: Int[Array | np.ndarray, ' N']


def pack(contexts: Sequence[Context], call: Call) -> tuple[AnswerBatch, dict[int, int]]:
  """Returns the arrays of a call, and the place of the first target of each scored context.

  The last latent of a trace predicts its first ahead token. Without latents, a place is left for
  one, where the state of the anchor will be.
  """
  shape, skipped = call.shape, len(call.prefix)
  ints = functools.partial(np.zeros, dtype=np.int32)
  of_contexts, of_fresh = (shape.rows, shape.contexts), (shape.rows, shape.fresh)
  arrays = AnswerBatch(
      _pack_prefix(call), Batch(*ints((3, shape.rows, shape.length))),
      ints(of_contexts), np.zeros(of_contexts, bool), ints(of_contexts), tokens=ints(of_fresh),
      owner=ints(of_fresh) - 1, latent=ints(of_fresh) - 1, ahead=ints(of_fresh),
      first=ints(of_fresh), source=ints(shape.targets), targets=ints(shape.targets))
  where = {number: row * shape.contexts + slot
           for row, numbers in enumerate(call.rows) for slot, (number, _) in enumerate(numbers)}
  first, target = {}, 0
  for row, numbers in enumerate(call.rows):
    start = fresh = 0
    for slot, (number, scored) in enumerate(numbers):
      # The context itself. With a prefix, it goes on with the prefix's segment and positions.
      context, at = contexts[number], (row, slot)
      ids = context.ids[skipped:]
      inside = slice(start, start + len(ids))
      arrays.batch.tokens[row, inside], arrays.batch.segments[row, inside] = ids, slot + 1
      arrays.batch.positions[row, inside] = skipped + np.arange(len(ids))
      arrays.anchors[at] = shape.prefix + start + context.anchor - skipped
      arrays.contexts[at], arrays.partners[at] = True, where.get(context.partner, where[number])
      start += len(ids)
      if not scored:
        continue
      # Its traces, and the states of them that predict its targets.
      source: dict[int, int] = {}  # beginning -> place of the state after it
      for ahead in context.traces:
        at_latent = row * shape.fresh + fresh + shape.latents - 1
        for read, beginning in enumerate(context.follow(ahead)):
          source.setdefault(beginning, at_latent + read)
        fresh += _pack_trace(arrays, row, fresh, slot, shape.latents, ahead)
      first[number] = target
      for beginning, token in context.targets:
        arrays.source[target], arrays.targets[target] = source[beginning], token
        target += 1
  return arrays, first


def _pack_trace(arrays: AnswerBatch, row: int, start: int, slot: int, num_latents: int,
                ahead: Sequence[int]) -> int:
  """Writes a trace from `start` on; returns its number of latents and ahead tokens."""
  size = num_latents + len(ahead)
  inside, after = slice(start, start + size), slice(start + num_latents, start + size)
  arrays.owner[row, inside], arrays.first[row, inside] = slot, start
  arrays.latent[row, start:start + num_latents] = np.arange(num_latents)
  arrays.tokens[row, after], arrays.ahead[row, after] = ahead, np.arange(len(ahead))
  return size


def _pack_prefix(call: Call) -> Batch:
  padding = call.shape.prefix - len(call.prefix)
  order = np.arange(call.shape.prefix, dtype=np.int32)[None] - padding
  inside = order >= 0
  tokens = np.concatenate([np.zeros(padding, np.int32), np.array(call.prefix, np.int32)])[None]
  return Batch(tokens, inside.astype(np.int32), np.where(inside, order, 0))
