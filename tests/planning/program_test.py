"""The text of an optimised program: what runs, how often, and how large it is."""

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.planning.program import array_bytes, parse
from tests.planning.programs import LOOPS


def test_loops_multiply_and_what_is_inside_a_fusion_does_not_run_by_itself():
  program = parse(LOOPS)
  assert program.runs == {'main': 1, 'outer_body': 3, 'inner_body': 15}
  assert sum(times * (each.cycles or 0) for each, times in program) == 3 * 100 + 15 * 7
  assert program.loops_of_unknown_length == ()


def test_a_loop_without_a_bound_is_named_and_counted_once():
  program = parse(LOOPS.replace('constant(3)', 'add(%p.4)'))
  assert program.runs['inner_body'] == 5
  assert program.loops_of_unknown_length == ('while.2',)


def test_a_kernel_spans_lines_and_costs_what_its_author_states():
  kernel, = (each for each, _ in parse(LOOPS) if each.name == 'kernel')
  assert (kernel.opcode, kernel.operands) == ('custom-call', ('p.3',))
  assert kernel.kernel_cost == (1000, 64)
  assert 'copy.1' in [each.name for each, _ in parse(LOOPS)]


def test_an_instruction_says_where_it_comes_from():
  fusion, = (each for each, _ in parse(LOOPS) if each.name == 'fusion.1')
  assert fusion.op_name == 'jit(step)/jvp(Decoder)/while/body/blocks/feed_forward/mul'
  assert fusion.called('calls') == ('fused',)
  assert fusion.shape == '(s32[], f32[8]{0})'


@pytest.mark.parametrize('shape, bytes_', [
    ('f32[2,3]{1,0:T(8,128)}', [24]), ('bf16[]', [2]), ('pred[8]{0}', [8]), ('s4[3]', [2]),
    ('(f32[4]{0:T(128)}, /*index=1*/u32[]{:S(2)}, bf16[0,5]{1,0})', [16, 4, 0]),
    ('f8e4m3fn[16]{0}', [16])])
def test_bytes_of_arrays(shape, bytes_):
  assert array_bytes(shape) == bytes_


def test_what_lies_in_an_inner_memory_is_not_in_hbm():
  assert array_bytes('(f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)})', hbm_only=True) == [0, 16]


def test_other_text_is_refused():
  with pytest.raises(UserError, match="no ENTRY: 'module {}'"):
    parse('module {}')
