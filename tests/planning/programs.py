"""An optimised program, as XLA would print it."""

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
 metadata={op_name="jit(step)/jvp(Decoder)/while/body/blocks/feed_forward/mul"},
 backend_config={"window_config":{"estimated_cycles":"7"}}
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
