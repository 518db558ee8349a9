"""The text of an optimised program: what runs, how often, and how large it is."""

import pytest

from latent_deliberation.planning.program import array_bytes, parse

# A loop of 3 whose body has a loop of 5; the inner length is XLA's own, the outer a bound.
LOOPS = '''HloModule jit_step, is_scheduled=true

%fused (p.9: f32[8]) -> f32[8] {
  %p.9 = f32[8]{0} parameter(0)
  ROOT %neg.1 = f32[8]{0} negate(%p.9), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%inner_body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %g.1 = f32[8]{0} get-tuple-element(%p.1), index=1
  ROOT %fusion.1 = (s32[], f32[8]{0}) fusion(%g.1), kind=kLoop, calls=%fused,
 metadata={op_name="jit(step)/mul"}, backend_config={"window_config":{"estimated_cycles":"7"}}
}

%inner_condition (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt.1 = pred[] custom-call(%p.2), custom_call_target="opaque"
}

%outer_body (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.3 = (s32[], f32[8]{0}) parameter(0)
  %kernel = f32[8]{0} custom-call(%p.3), custom_call_target="tpu_custom_call",
 frontend_attributes={kernel_metadata={
 "block": {
}}
}, backend_config={"custom_call_config":{"cost_estimate":
 {"flops":"1000","transcendentals":"0","bytes_accessed":"64"}}}
  %copy.1 = f32[8]{0} copy(%kernel), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %while.1 = (s32[], f32[8]{0}) while(%p.3), condition=%inner_condition, body=%inner_body,
 backend_config={"known_trip_count":{"n":"5"}}
}

%outer_condition (p.4: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  %p.4 = (s32[], f32[8]{0}) parameter(0)
  %g.4 = s32[] get-tuple-element(%p.4), index=0
  ROOT %lt.2 = pred[] compare(%g.4, %constant.1), direction=LT
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.2 = (s32[], f32[8]{0}) while(%p), condition=%outer_condition, body=%outer_body
}
'''


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
  assert fusion.op_name == 'jit(step)/mul'
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
  with pytest.raises(ValueError, match="no ENTRY: 'module {}'"):
    parse('module {}')
