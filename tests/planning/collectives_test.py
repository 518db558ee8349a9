"""Collectives: axis, bytes, seconds, and how many of them are hidden."""

import numpy as np
import pytest
from jax.sharding import Mesh

from latent_deliberation.errors import UserError
from latent_deliberation.planning.collectives import HOP_SECONDS, find_collectives, read_groups
from latent_deliberation.planning.program import parse
from latent_deliberation.planning.topology import CHIPS, Topology
from tests.planning.machines import AbstractDevice, slice_of

PAIRS = [[0, 1], [2, 3]]
CROSSED = [[0, 2], [1, 3]]
LINK = 45e9


@pytest.mark.parametrize('written, groups', [
    ('replica_groups={{0,1},{2,3}}, dimensions={0}', PAIRS),
    ('replica_groups={{0,2},{1,3}}', CROSSED),
    ('replica_groups=[2,2]<=[4], dimensions={0}', PAIRS),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', CROSSED),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}", PAIRS),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", CROSSED),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", PAIRS),
    ("replica_groups=mesh['a'=4,'b'=1] {'a','b'}", [[0, 1, 2, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]])])
def test_read_groups(written, groups):
  """Groups are read in every form that XLA writes."""
  assert read_groups(f'channel_id=1, {written}', 4).tolist() == groups


def test_unknown_groups_are_refused():
  """Groups in another form are refused."""
  with pytest.raises(UserError, match="replica groups .*'replica_groups=new"):
    read_groups('replica_groups=new', 4)


def step(*lines: str, fused: str = '') -> str:
  body = '\n'.join(f'  {line}' for line in lines)
  return (f'HloModule m\n\n{fused}\nENTRY %main (p: f32[1024,1024]) -> f32[] {{\n'
          f'  %p = f32[1024,1024]{{1,0}} parameter(0)\n{body}\n}}\n')


def only(text: str, shape: tuple[int, int] = (16, 16)):
  topology, mesh = slice_of(shape)
  found, = find_collectives(parse(text), mesh, topology)
  return found


def sync(kind: str, groups: str, result: str = 'f32[1024,1024]{1,0}') -> str:
  return step(f'%c = {result} {kind}(%p), channel_id=1, replica_groups={groups}')


ROWS, COLUMNS = '[16,16]<=[256]', '[16,16]<=[16,16]T(1,0)'
SIZE = 4 * 1024 * 1024


@pytest.mark.parametrize('kind, groups, axis, bytes_, seconds', [
    # A closed ring sends both ways; 15 of 16 shares pass a link.
    ('all-gather', ROWS, 'fsdp', SIZE, SIZE * 15 / 16 / (2 * LINK)),
    ('all-gather', COLUMNS, 'data', SIZE, SIZE * 15 / 16 / (2 * LINK)),
    ('all-gather', '[1,256]<=[256]', 'data+fsdp', SIZE, SIZE * 255 / 256 / (4 * LINK)),
    ('all-reduce', ROWS, 'fsdp', SIZE, 2 * SIZE * 15 / 16 / (2 * LINK)),
    # The result is a share of what is sent.
    ('reduce-scatter', ROWS, 'fsdp', 16 * SIZE, SIZE * 15 / (2 * LINK)),
    ('all-to-all', ROWS, 'fsdp', SIZE, SIZE * 16 / 4 / (2 * LINK)),
    # Half of a row is no ring.
    ('all-gather', '[32,8]<=[256]', 'fsdp', SIZE, SIZE * 7 / 8 / LINK)])
def test_synchronous_is_exposed(kind, groups, axis, bytes_, seconds):
  """A synchronous collective is exposed for as long as its bytes take."""
  found = only(sync(kind, groups))
  assert (found.kind, found.axis, found.bytes, found.count) == (kind, axis, bytes_, 1)
  assert not found.overlapped
  assert found.seconds == found.exposed_seconds == pytest.approx(seconds)


@pytest.mark.parametrize('shape, ways', [((2, 2, 4), 1), ((4, 4, 4), 2)])
def test_small_cubes_have_no_rings(shape, ways):
  """A v5p slice closes along all of its axes or none."""
  devices = np.empty(shape, object)
  for number, place in enumerate(np.ndindex(shape)):
    devices[place] = AbstractDevice(number, place)
  chip, rows = CHIPS['v5p'], devices.size // 4
  topology = Topology('v5p:' + 'x'.join(map(str, shape)), list(devices.flat), chip)
  mesh = Mesh(devices.reshape(rows, 4), ('data', 'fsdp'))
  found, = find_collectives(parse(sync('all-gather', f'[{rows},4]<=[{devices.size}]')), mesh,
                            topology)
  assert found.seconds == pytest.approx(SIZE * 3 / 4 / (ways * chip.link_bandwidth))


def test_small_message_takes_hops():
  """A small message takes the time of its hops."""
  assert only(sync('all-gather', ROWS, 'f32[16]{0}')).seconds == pytest.approx(8 * HOP_SECONDS)


FUSED = '''%start (q: f32[64,1024]) -> f32[1024,1024] {
  %q = f32[64,1024]{1,0} parameter(0)
  %g.1 = f32[1024,1024]{1,0} all-gather(%q), channel_id=7, replica_groups=[16,16]<=[256]
  ROOT %s = f32[1024,1024]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%work (q.1: f32[64,1024]) -> f32[1024,1024] {
  %q.1 = f32[64,1024]{1,0} parameter(0)
  ROOT %g.2 = f32[1024,1024]{1,0} all-gather(%q.1), channel_id=7, replica_groups=[16,16]<=[256]
}
'''
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


@pytest.mark.parametrize('cycles', [0, 15_000, 15_000_000])
def test_computation_hides_fusions(cycles):
  """Fusions of one channel are one collective, and computation between them hides it."""
  found = only(step(
      '%a = f32[1024,1024]{1,0} fusion(%p), calls=%start',
      '%b = f32[1024,1024]{1,0} fusion(%a), calls=%work, ' + CYCLES % cycles,
      '%c = f32[1024,1024]{1,0} fusion(%b), calls=%work, ' + CYCLES % 10**9, fused=FUSED))
  assert found.overlapped and found.count == 1
  assert found.exposed_seconds == pytest.approx(max(found.seconds - cycles / 1.5e9, 0))


def test_start_and_done_are_one():
  """A start and its done are one collective."""
  found = only(step(
      '%s = (f32[64,1024]{1,0}, f32[1024,1024]{1,0}) all-gather-start(%p), replica_groups=' + ROWS,
      '%n = f32[8]{0} negate(%p), ' + CYCLES % 1500,
      '%d = f32[1024,1024]{1,0} all-gather-done(%s)'))
  assert (found.kind, found.bytes, found.overlapped) == ('all-gather', SIZE, True)
  assert found.exposed_seconds == pytest.approx(found.seconds - 1e-6)


@pytest.mark.parametrize('start, kind, size', [
    ('((f32[64,1024]{1,0}, f32[32,1024]{1,0}), (f32[1024,1024]{1,0}, f32[512,1024]{1,0})) '
     'all-gather-start', 'all-gather', SIZE * 3 // 2),
    ('(f32[64,1024]{1,0}, f32[1024,1024]{1,0}, u32[], u32[]{:S(2)}) all-gather-start',
     'all-gather', SIZE),
    ('(f32[1024,1024]{1,0}, f32[512,1024]{1,0}) all-reduce-start', 'all-reduce', SIZE * 3 // 2),
    ('f32[1024,1024]{1,0} all-reduce-start', 'all-reduce', SIZE)])
def test_combined_arrays_all_count(start, kind, size):
  """XLA may gather or reduce several arrays at once."""
  found = only(step(f'%s = {start}(%p), replica_groups={ROWS}',
                    f'%d = f32[1024,1024]{{1,0}} {kind}-done(%s)'))
  assert (found.kind, found.bytes) == (kind, size)


def test_kernels_hide_collectives():
  """A kernel has no cycles; it hides a collective for the time of the cost that it states."""
  kernel = ('%k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config='
            '{"custom_call_config":{"cost_estimate": {"flops":"0","bytes_accessed":"81900"}}}')
  found = only(step(
      '%s = (f32[64,1024]{1,0}, f32[1024,1024]{1,0}) all-gather-start(%p), replica_groups=' + ROWS,
      kernel, '%d = f32[1024,1024]{1,0} all-gather-done(%s)'))
  assert found.exposed_seconds == pytest.approx(found.seconds - 1e-7)  # at 819 GB/s


def test_wrapped_lasts_until_done():
  """A wrapped collective lasts until its done."""
  found = only(step(
      '%s = (f32[64,1024]{1,0}, f32[1024,1024]{1,0}) async-start(%p), calls=%wrapped',
      '%n = f32[8]{0} negate(%p), ' + CYCLES % 1500,
      '%d = f32[1024,1024]{1,0} async-done(%s)', fused=FUSED.replace('%work', '%wrapped')))
  assert found.overlapped
  assert found.exposed_seconds == pytest.approx(found.seconds - 1e-6)


def test_fused_reduce_scatter():
  """An all-reduce that keeps only its share is a reduce-scatter."""
  found = only(step('%f = f32[64,1024]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1',
                    fused='''%all-reduce-scatter.1 (q: f32[1024,1024]) -> f32[64,1024] {
  %q = f32[1024,1024]{1,0} parameter(0)
  %r = f32[1024,1024]{1,0} all-reduce(%q), channel_id=2, replica_groups=[16,16]<=[256]
  ROOT %s = f32[64,1024]{1,0} dynamic-slice(%r)
}
'''))
  assert (found.kind, found.bytes, found.overlapped) == ('reduce-scatter', SIZE, False)
  assert found.seconds == pytest.approx(SIZE * 15 / 16 / (2 * LINK))
