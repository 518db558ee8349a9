"""Memory of a chip, by purpose."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from latent_deliberation.planning.memory import (
  activation_bytes,
  divide_memory,
  peak_bytes,
  shard_bytes,
)
from latent_deliberation.planning.program import parse
from latent_deliberation.sharding import MeshConfig, make_mesh

# The forward loop returns the activations (400 bytes) and 40 bytes that only the loss reads.
STEP = '''HloModule m

%body (b: (f32[100], f32[10])) -> (f32[100], f32[10]) {
  ROOT %b = (f32[100]{0}, f32[10]{0}) parameter(0)
}

%condition (c: (f32[100], f32[10])) -> pred[] {
  %bound = s32[] constant(2)
  %c = (f32[100]{0}, f32[10]{0}) parameter(0)
  ROOT %lt = pred[] compare(%c, %bound), direction=LT
}

ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %kept = f32[25]{0} negate(%p)
  %inner = f32[25]{0:T(128)S(1)} negate(%p)
  %moving = (f32[50]{0}, f32[50]{0}, u32[]) copy-start(%p)
  %moved = f32[50]{0} copy-done(%moving)
  %zeros = f32[100]{0} broadcast(%kept)
  %few = f32[10]{0} slice(%p)
  %into = (f32[100]{0}, f32[10]{0}) tuple(%zeros, %few)
  %forward = (f32[100]{0}, f32[10]{0}) while(%into), condition=%condition, body=%body
  %stacked = f32[100]{0} get-tuple-element(%forward), index=0
  %seen = f32[10]{0} get-tuple-element(%forward), index=1
  %loss = f32[] reduce(%seen)
  %back = (f32[100]{0}, f32[100]{0}) tuple(%stacked, %p)
  %backward = (f32[100]{0}, f32[100]{0}) while(%back), condition=%condition, body=%body,
 metadata={op_name="jit(step)/transpose(jvp(x))/while"}
  %gradient = f32[100]{0} get-tuple-element(%backward), index=1
  ROOT %sum = f32[100]{0} fusion(%gradient, %kept, %moved, %inner), kind=kLoop
}
'''


def test_activations():
  """Activations are the buffers alive when the backward pass begins."""
  assert activation_bytes(parse(STEP)) == 4 * (100 + 25 + 50)


def test_no_backward_no_activations():
  """A program without a backward pass has no activations."""
  assert activation_bytes(parse(STEP.replace('transpose', 'forward'))) == 0


def test_shard_bytes():
  """A sharded array counts by the shard of one device."""
  mesh = make_mesh(MeshConfig(2, 4))
  shape = lambda spec, kind: jax.ShapeDtypeStruct(  # noqa: E731
      (8, 8), kind, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
  assert shard_bytes([shape(('fsdp',), jnp.float32), shape((), jnp.bfloat16)]) == 64 + 128


def test_peak_on_cpu():
  """On a CPU the peak has the temporaries of the computation, which the compiler leaves out."""
  x = jnp.zeros((64, 64))
  # A donated argument is its own result; the sine and the product are temporary.
  compiled = jax.jit(lambda x: jnp.sin(jnp.cos(x) @ x) @ x, donate_argnums=0).lower(x).compile()
  reported = compiled.memory_analysis().peak_memory_in_bytes
  assert peak_bytes(compiled, on_cpu=False) == reported < 2 * x.nbytes
  assert peak_bytes(compiled, on_cpu=True) >= 2 * x.nbytes


def test_parts_add_up():
  """The parts add up to the peak."""
  x = jnp.zeros((64, 64))
  compiled = jax.jit(lambda x: jnp.sin(x) @ x).lower(x).compile()
  arguments = {'frozen': x.nbytes, 'trainable': 0, 'optimizer': 0, 'batch': 0}
  memory = divide_memory(x.nbytes + 100, parse(compiled.as_text()), arguments)
  assert memory.frozen + memory.activations + memory.temporary == memory.peak == x.nbytes + 100
  assert memory.state == x.nbytes
  assert memory.largest == 'frozen'
