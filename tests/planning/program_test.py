"""Compiled programs: which instructions run, how often, and their bytes."""

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.planning.program import array_bytes, parse
from tests.planning.programs import LOOPS


def test_runs():
  """Runs of nested loops multiply. Instructions inside a fusion do not run by themselves."""
  program = parse(LOOPS)
  assert program.runs == {'main': 1, 'outer_body': 3, 'inner_body': 15}
  assert sum(times * (each.cycles or 0) for each, times in program) == 3 * 100 + 15 * 7
  assert program.loops_of_unknown_length == ()


def test_loop_of_unknown_length():
  """A loop without a bound is named, and counts once."""
  program = parse(LOOPS.replace('constant(3)', 'add(%p.4)'))
  assert program.runs['inner_body'] == 5
  assert program.loops_of_unknown_length == ('while.2',)


def test_kernel_cost():
  """A kernel spans lines, and has the cost that it states."""
  kernel, = (each for each, _ in parse(LOOPS) if each.name == 'kernel')
  assert (kernel.opcode, kernel.operands) == ('custom-call', ('p.3',))
  assert kernel.kernel_cost == (1000, 64)
  assert 'copy.1' in [each.name for each, _ in parse(LOOPS)]


def test_instruction():
  """An instruction has its name in our code, the computations it calls, and its shape."""
  fusion, = (each for each, _ in parse(LOOPS) if each.name == 'fusion.1')
  assert fusion.op_name == 'jit(step)/jvp(Decoder)/while/body/blocks/feed_forward/mul'
  assert fusion.called('calls') == ('fused',)
  assert fusion.shape == '(s32[], f32[8]{0})'


@pytest.mark.parametrize('shape, bytes_', [
    ('f32[2,3]{1,0:T(8,128)}', [24]), ('bf16[]', [2]), ('pred[8]{0}', [8]), ('s4[3]', [2]),
    ('(f32[4]{0:T(128)}, /*index=1*/u32[]{:S(2)}, bf16[0,5]{1,0})', [16, 4, 0]),
    ('f8e4m3fn[16]{0}', [16])])
def test_array_bytes(shape, bytes_):
  """Bytes of arrays, by their printed shapes."""
  assert array_bytes(shape) == bytes_


def test_hbm_only():
  """An array in an inner memory is not in HBM."""
  assert array_bytes('(f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)})', hbm_only=True) == [0, 16]


def test_other_text_is_refused():
  """Text that is not an HLO module is refused."""
  with pytest.raises(UserError, match="no ENTRY: 'module {}'"):
    parse('module {}')
