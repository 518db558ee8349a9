"""Seconds and utilisation of a plan, and its advice on a step that does not fit."""

import dataclasses

import pytest

from latent_deliberation.model.transformer import REMAT_POLICIES
from latent_deliberation.planning.collectives import Collective
from latent_deliberation.planning.memory import Memory
from latent_deliberation.planning.plan import (
  REMATS,
  advise,
  estimate_times,
  largest_operations,
)
from latent_deliberation.planning.program import parse
from latent_deliberation.planning.topology import CHIPS
from tests.planning.programs import LOOPS

GB = 10**9
MEMORY = Memory(frozen=2 * GB, trainable=2 * GB, optimizer=4 * GB, batch=0, activations=9 * GB,
                temporary=3 * GB, peak=20 * GB)
V5E = CHIPS['v5e']
KERNEL_SECONDS = 64 / 819e9  # of its bytes, which take longer than its operations


def collective(seconds: float, exposed: float) -> Collective:
  return Collective('all-gather', 'fsdp', 8, 1, exposed < seconds, seconds, exposed, '')


def test_estimate_times():
  """A step takes its cycles, its kernels and its exposed collectives."""
  times = estimate_times(parse(LOOPS), [collective(3e-6, 1e-6), collective(2e-6, 2e-6)], V5E, 1e6)
  compute = (3 * 100 + 15 * 7) / 1.5e9 + 3 * KERNEL_SECONDS
  assert times.compute_seconds == pytest.approx(compute)
  assert times.exposed_seconds == pytest.approx(3e-6)
  assert times.overlapped_seconds == pytest.approx(2e-6)
  assert times.estimated_step_seconds == pytest.approx(compute + 3e-6)
  assert times.mfu == pytest.approx(1e6 / 197e12 / (compute + 3e-6))
  assert times.mfu_without_collectives == pytest.approx(1e6 / 197e12 / compute)


def test_largest_operations():
  """Operations are summed by part of the model, the largest first."""
  first, second, third = largest_operations(parse(LOOPS), V5E)
  assert (first.what, first.count, first.seconds) == ('copy', 3, pytest.approx(300 / 1.5e9))
  assert (second.what, second.count) == ('jvp(Decoder)/feed_forward', 15)
  assert (third.what, third.seconds) == ('custom-call', pytest.approx(3 * KERNEL_SECONDS))


def advice(remat: str = 'full', texts: int = 4, capacity: float = 16e9, **changes: int) -> str:
  return advise(dataclasses.replace(MEMORY, **changes), capacity, remat, 1, texts)


def test_all_remats_are_advised():
  """Every remat policy can be advised."""
  assert sorted(REMATS) == sorted(REMAT_POLICIES)


def test_no_advice_if_it_fits():
  """A step that fits gets no advice."""
  assert advice(capacity=20e9) == ''


def test_advice():
  """Advice names the largest part and the settings that help."""
  text = advice('none')
  assert '20.0 GB' in text and '16.0 GB' in text and 'activations (9.0 GB)' in text
  assert 'computation.remat=dots or mid or full keeps' in text
  assert 'training.accumulation=2 ' in text
  assert '2 times as many chips in mesh.fsdp' in text


def test_advice_where_possible():
  """Remat and accumulation are advised only while more of them is possible."""
  assert 'remat' not in advice('full')
  assert 'computation.remat=full keeps' in advice('mid')
  assert 'accumulation' not in advice(texts=1)
  # 12 GB of work leave 8 - 2 GB of room in two microbatches, in 13 GB only 3 GB, for four.
  assert 'training.accumulation=4 ' in advice(capacity=13e9)


def test_advice_of_chips():
  """More chips divide weights, and texts only where a chip has several."""
  assert '2 times as many chips' in advice(texts=1)  # 4 + 12 GB
  assert '3 times as many chips' in advice(texts=1, capacity=15e9)  # 8 / 3 + 12
  assert '2 times as many chips' in advice(texts=2, capacity=15e9)  # 4 + 6
  hopeless = advice(texts=1, capacity=12e9)
  assert 'Neither remat, accumulation nor more chips' in hopeless and 'data.length' in hopeless


def test_advice_of_shards():
  """Weights that do not fit need more shards."""
  text = advice('none', frozen=40 * GB, peak=58 * GB)
  assert 'frozen (40.0 GB)' in text and '46.0 GB' in text
  assert 'Neither remat nor accumulation helps' in text and '3 times as many shards' in text
