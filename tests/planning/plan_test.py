"""What a plan concludes: seconds, utilisation, and what would make a step fit."""

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
KERNEL_SECONDS = 64 / 819e9  # which its bytes take, longer than its operations


def collective(seconds: float, exposed: float) -> Collective:
  return Collective('all-gather', 'fsdp', 8, 1, exposed < seconds, seconds, exposed, '')


def test_a_step_takes_its_cycles_its_kernels_and_what_is_exposed():
  times = estimate_times(parse(LOOPS), [collective(3e-6, 1e-6), collective(2e-6, 2e-6)], V5E, 1e6)
  compute = (3 * 100 + 15 * 7) / 1.5e9 + 3 * KERNEL_SECONDS
  assert times.compute_seconds == pytest.approx(compute)
  assert times.exposed_seconds == pytest.approx(3e-6)
  assert times.overlapped_seconds == pytest.approx(2e-6)
  assert times.estimated_step_seconds == pytest.approx(compute + 3e-6)
  assert times.mfu == pytest.approx(1e6 / 197e12 / (compute + 3e-6))
  assert times.mfu_without_collectives == pytest.approx(1e6 / 197e12 / compute)


def test_the_largest_operations_are_by_part_of_the_model_and_come_first():
  first, second, third = largest_operations(parse(LOOPS), V5E)
  assert (first.what, first.count, first.seconds) == ('copy', 3, pytest.approx(300 / 1.5e9))
  assert (second.what, second.count) == ('jvp(Decoder)/feed_forward', 15)
  assert (third.what, third.seconds) == ('custom-call', pytest.approx(3 * KERNEL_SECONDS))


def advice(remat: str = 'full', texts: int = 4, capacity: float = 16e9, **changes: int) -> str:
  return advise(dataclasses.replace(MEMORY, **changes), capacity, remat, 1, texts)


def test_every_way_to_keep_less_of_a_block_can_be_advised():
  assert sorted(REMATS) == sorted(REMAT_POLICIES)


def test_nothing_is_advised_for_what_fits():
  assert advice(capacity=20e9) == ''


def test_what_does_not_fit_names_its_largest_part_and_the_ways_out():
  text = advice('none')
  assert '20.0 GB do not fit into 16.0 GB; the largest part is activations (9.0 GB)' in text
  assert 'computation.remat=dots or mid or full keeps' in text
  assert 'training.accumulation=2 ' in text
  assert '2 times as many chips in mesh.fsdp' in text


def test_remat_and_accumulation_are_advised_only_where_they_are_left():
  assert 'remat' not in advice('full')
  assert 'computation.remat=full keeps' in advice('mid')
  assert 'accumulation' not in advice(texts=1)
  # 12 GB of work leave 8 - 2 GB of room in two microbatches, in 13 GB only 3 GB, for four.
  assert 'training.accumulation=4 ' in advice(capacity=13e9)


def test_more_chips_divide_weights_and_only_texts_that_a_chip_has_several_of():
  assert '2 times as many chips' in advice(texts=1)  # 4 + 12 GB
  assert '3 times as many chips' in advice(texts=1, capacity=15e9)  # 8 / 3 + 12
  assert '2 times as many chips' in advice(texts=2, capacity=15e9)  # 4 + 6
  assert advice(texts=1, capacity=12e9).endswith(
      'Neither remat, accumulation nor more chips would help: lower data.length, '
      'deliberation.num_traces or num_latents.')


def test_weights_that_do_not_fit_need_more_shards_and_nothing_else():
  text = advice('none', frozen=40 * GB, peak=58 * GB)
  assert 'largest part is frozen (40.0 GB)' in text
  assert 'need 46.0 GB: remat and accumulation do not help; shard them 3 times as far' in text
