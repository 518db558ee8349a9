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


def test_prefix_calls_share_evenly(monkeypatch):
  """After a common prefix, too, calls are of the same size."""
  monkeypatch.setattr(answer_packing, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_contexts, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_packing, 'PREFIX_TOKENS', 10 * 128)
  random = np.random.default_rng(0)
  contexts = group([Request((*COMMON, *ids(random, 6)), ids(random, 3), item=item)
                    for item in range(12)])
  calls = plan(contexts, range(12), num_latents=1, shards=1, partners=False)
  assert len({call.shape for call in calls}) == 1
  assert sum(call.shape.rows for call in calls) == 12
