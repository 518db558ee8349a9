"""Continuations of one context share what they share, and contexts find their partners."""

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import answer_contexts
from latent_deliberation.evaluation.answer_contexts import Request, find_partners, group

RANDOM = np.random.default_rng(0)


def ids(size):
  return tuple(RANDOM.integers(1, 100, size).tolist())


def test_partners_have_room():
  """A partner is looked for among contexts with room for latents, and any is better than none."""
  contexts = group([Request((1, *ids(size)), (2,), item=item)
                    for item, size in enumerate((8, 2, 8, 2, 8))])
  find_partners(contexts, [0, 2, 4])
  assert [context.partner for context in contexts] == [2, 1, 0, 3, 2]


def test_alone_with_its_beginning(monkeypatch):
  """The only context that begins otherwise takes latents of the others, which do not take its."""
  monkeypatch.setattr(answer_contexts, 'SHARED', 2)
  contexts = group([Request((*begin, *ids(4)), (2,), item=item)
                    for item, begin in enumerate(((1, 1), (1, 1), (5, 5)))])
  find_partners(contexts, range(3))
  assert [context.partner for context in contexts] == [1, 0, 1]


def test_equal_texts_are_no_partners():
  """Their latents are those of the item itself."""
  same, other = ids(6), ids(6)
  contexts = group([Request(context, (2,), item=item)
                    for item, context in enumerate((same, same, other, same))])
  find_partners(contexts, range(4))
  assert [context.partner for context in contexts] == [2, 2, 1, 2]
  # Texts that part after the anchor have the same latents, too.
  contexts = group([Request((*same, *ids(2)), (2,), anchor=5, item=item) for item in range(2)]
                   + [Request((*other, *ids(2)), (2,), anchor=5, item=2)])
  find_partners(contexts, range(3))
  assert [context.partner for context in contexts] == [2, 2, 1]


@pytest.mark.parametrize('request_, said', [
    (Request((1, 2), ()), 'continuation of request 0'), (Request((), (1,)), 'context of request 0'),
    (Request((1, 2), (3,), anchor=2), 'anchor 2')])
def test_bad_requests(request_, said):
  with pytest.raises(UserError, match=said):
    group([request_])


def test_alike_continuations():
  """Continuations that begin alike share traces and targets."""
  context = group(
      [Request((1, 2, 3), continuation) for continuation in ((4,), (5,), (4, 6), (4, 6, 7))])[0]
  assert context.traces == [(4, 6)]
  after_4, after_46 = context.follow((4, 6))[1:]
  assert list(context.targets) == [(0, 4), (0, 5), (after_4, 6), (after_46, 7)]
  assert context.requests == {0: [0], 1: [1], 2: [0, 2], 3: [0, 2, 3]}
