"""Calls have little padding, and every context is in one of them."""

import numpy as np
import pytest

from latent_deliberation.evaluation import answer_contexts, answer_packing
from latent_deliberation.evaluation.answer_contexts import Request, find_partners, group
from latent_deliberation.evaluation.answer_packing import plan

COMMON = tuple(range(1, 13))


def ids(random, size):
  return tuple(random.integers(1, 100, size).tolist())


@pytest.mark.parametrize('partners', [False, True])
@pytest.mark.parametrize('count', [15, 33, 100])
def test_calls_share_evenly(count, partners, monkeypatch):
  """Every context is scored once, and a last call of few contexts is not mostly padding."""
  monkeypatch.setattr(answer_packing, 'ROW_TOKENS', 512)
  monkeypatch.setattr(answer_packing, 'CALL_TOKENS', 2048)
  random = np.random.default_rng(count)
  sizes = random.integers((20, 20), (60, 100), (count, 2)).tolist()
  contexts = group([Request(ids(random, context), ids(random, answer), item=item)
                    for item, (context, answer) in enumerate(sizes)])
  find_partners(contexts, range(count))
  calls = plan(contexts, range(count), num_latents=4, shards=1, partners=partners)
  scored = [number for call in calls for row in call.rows for number, own in row if own]
  assert sorted(scored) == list(range(count))
  needed = sum(len(context.ids) + 4 + len(context.traces[0]) for context in contexts)
  computed = sum(call.shape.rows * (call.shape.length + call.shape.fresh) for call in calls)
  assert needed < computed < 1.3 * needed


@pytest.mark.parametrize('partners', [False, True])
def test_prefix_calls_share_evenly(partners, monkeypatch):
  """After a common prefix, too, calls are of the same size."""
  monkeypatch.setattr(answer_packing, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_contexts, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_packing, 'PREFIX_TOKENS', 10 * 32)
  random = np.random.default_rng(0)
  contexts = group([Request((*COMMON, *ids(random, 6)), ids(random, 3), item=item)
                    for item in range(11)])
  find_partners(contexts, range(11))
  calls = plan(contexts, range(11), num_latents=1, shards=1, partners=partners)
  scored = [sum(own for row in call.rows for _, own in row) for call in calls]
  assert scored == [6, 5] and calls[0].shape.rows == 6 + partners


def test_planning_is_linear(monkeypatch):
  """Of contexts that do not fit a call, a few are tried and not all that are left."""
  random, tried = np.random.default_rng(0), []
  put = answer_packing._Filler.put
  monkeypatch.setattr(answer_packing._Filler, 'put',
                      lambda filler, number: tried.append(number) or put(filler, number))
  monkeypatch.setattr(answer_packing, 'SLACKS', (1.1,))
  contexts = group([Request((1, *ids(random, 30)), ids(random, 60), item=item)
                    for item in range(800)])
  calls = plan(contexts, range(800), num_latents=1, shards=1, partners=False)
  assert len(tried) <= 800 + answer_packing.WINDOW * len(calls)
