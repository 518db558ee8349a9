"""A plan is of the very step that training runs, on devices that need not be there."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Computation, Experiment
from latent_deliberation.models import build_decoder, frozen_shapes
from latent_deliberation.planning.compile import plan_training
from latent_deliberation.planning.table import compare, describe
from latent_deliberation.planning.topology import CHIPS, find_topology
from latent_deliberation.sharding import MeshConfig, make_mesh, shardings_of
from latent_deliberation.training.train import describe_training
from tests import finished

EIGHT = find_topology('cpu:8')
MESHES = [MeshConfig(fsdp=4, tensor=2), MeshConfig()]


def small(**overrides) -> Experiment:
  """An experiment that compiles in seconds."""
  return finished.experiment(decoder__num_layers=1, **overrides)


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
  """Two plans on virtual devices, and the directory of their files."""
  output = tmp_path_factory.mktemp('plans') / 'plan.json'
  return plan_training(small(), EIGHT, MESHES, [], output), output


def test_virtual_devices_give_memory_and_collectives_and_say_why_no_seconds(planned):
  plan, _ = planned[0]
  assert plan.mesh == {'replica': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}
  assert plan.hbm_bytes_per_chip == plan.memory.peak > plan.memory.state > 0
  assert plan.fits is plan.estimated_step_seconds is plan.mfu is None
  assert 'only a TPU topology gives seconds' in plan.estimate
  assert {'fsdp', 'tensor'} <= {row.axis for row in plan.collectives}
  assert plan.unknown_loops == ()


def test_the_parts_of_memory_are_those_of_the_arrays_that_training_puts_there(planned):
  experiment, mesh = small(), make_mesh(MESHES[0])
  boxed = build_decoder(experiment).init(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  frozen = jax.device_put(nn.unbox(boxed), shardings_of(boxed, mesh, experiment.rules))
  state = describe_training(experiment, Path(), mesh).create_state(frozen)
  on_first = lambda tree: sum(  # noqa: E731
      leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
  memory = planned[0][0].memory
  assert memory.frozen == on_first(frozen)
  assert memory.trainable == on_first(state.params)
  assert memory.optimizer == on_first(state.opt_state)


def test_weights_are_planned_as_they_are_loaded():
  experiment = dataclasses.replace(small(), computation=Computation(frozen_dtype='bfloat16'))
  mesh = make_mesh(MESHES[0])
  table = frozen_shapes(experiment, mesh)['embedder']['table']
  assert table.dtype == jnp.bfloat16
  assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1] // 4)


def test_weights_in_int8_are_planned_with_their_scales():
  experiment, mesh = small(computation__frozen_dtype='int8'), make_mesh(MESHES[0])
  shapes = frozen_shapes(experiment, mesh)
  table = shapes['embedder']['table']
  assert (table.values.dtype, table.scale.dtype) == (jnp.int8, jnp.float32)
  assert table.values.sharding.shard_shape(table.values.shape) == (130, 8)
  assert table.scale.sharding.shard_shape(table.scale.shape) == (130,)
  assert shapes['transformer']['final_norm']['scale'].dtype == jnp.float32
  run = describe_training(experiment, Path(), mesh)
  plain = describe_training(small(), Path(), mesh)
  assert jax.tree.map(jax.typeof, run.abstract) == jax.tree.map(jax.typeof, plain.abstract)


def test_frozen_weights_may_be_whole_on_every_device_but_for_its_share_of_tensor():
  experiment, mesh = small(computation__replicate_frozen=True), make_mesh(MESHES[0])
  table = frozen_shapes(experiment, mesh)['embedder']['table']
  assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1])
  soft_tokens = describe_training(experiment, Path(), mesh).abstract.params['soft_tokens']
  assert soft_tokens.sharding.shard_shape(soft_tokens.shape)[1] == soft_tokens.shape[1] // 4


@pytest.mark.parametrize('chip, chosen', [(None, 'plain'), (CHIPS['v5e'], 'fused')])
def test_automatic_attention_is_planned_as_it_will_run_there(chip, chosen, tmp_path, monkeypatch):
  seen = []

  def look(run, topology):
    seen.append(run.experiment.computation.attention)
    raise InterruptedError

  monkeypatch.setattr('latent_deliberation.planning.compile.plan_step', look)
  with pytest.raises(InterruptedError):
    plan_training(small(computation__attention='auto'), dataclasses.replace(EIGHT, chip=chip), [],
                  [], tmp_path / 'plan.json')
  assert seen == [chosen]


def test_several_plans_are_a_list_a_table_and_a_plot(planned):
  plans, output = planned
  records = json.loads(output.read_text())
  assert [record['mesh']['fsdp'] for record in records] == [4, 1]
  for key in ('topology', 'mesh', 'fits', 'hbm_bytes_per_chip', 'model_flops_per_chip',
              'estimated_step_seconds', 'mfu', 'collectives'):
    assert key in records[0]
  rows = list(csv.DictReader(output.with_suffix('.csv').open()))
  assert [int(row['hbm_bytes_per_chip']) for row in rows] == [
      plan.hbm_bytes_per_chip for plan in plans]
  assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
  assert compare(plans).splitlines()[1].split()[:6] == [
      '1:', 'cpu:8', '1', '1', '4', '2']


def test_a_plan_is_printed_with_its_memory_and_its_collectives(planned):
  text = describe(planned[0][0])
  assert 'cpu:8, mesh replica=1,data=1,fsdp=4,tensor=2: unknown whether it fits' in text
  for word in ('frozen', 'optimizer', 'activations', 'all-gather', 'Model FLOPs', 'Compiled in'):
    assert word in text


@pytest.mark.parametrize('mesh, rules, message', [
    (MeshConfig(fsdp=3), {}, 'for 8 devices: the sizes must multiply'),
    (MeshConfig(data=1, fsdp=2, tensor=4), {}, "its axis 'kv_heads' of 2 does not divide by the 4"),
    (MeshConfig(), {'embed': ('rows',)}, r"\['rows'\] are not mesh axes"),
    (MeshConfig(data=4, tensor=2), {'head_dim': ('tensor',)}, "'tensor' for more than one")])
def test_what_cannot_be_sharded_is_refused_before_anything_is_compiled(
    mesh, rules, message, tmp_path, monkeypatch):
  monkeypatch.setattr('latent_deliberation.planning.compile.plan_step',
                      lambda run, topology: pytest.fail('too late'))
  with pytest.raises(UserError, match=message):
    plan_training(small(), EIGHT, [MeshConfig(), mesh], [rules], tmp_path / 'plan.json')


@pytest.mark.parametrize('said', [
    'the total memory required for HLO temporaries (24.00G) exceeds available HBM (15.75G).',
    'Ran out of memory in memory space hbm. Used 24.00G of 15.75G hbm. Exceeded hbm capacity.'])
def test_a_step_that_the_compiler_finds_too_large_is_a_plan_that_does_not_fit(
    said, tmp_path, monkeypatch):

  def refuse(lowered):
    raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {said}')

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  topology = dataclasses.replace(EIGHT, chip=CHIPS['v5e'])
  plan, = plan_training(small(training__batch_size=32), topology, [], [], tmp_path / 'plan.json')
  assert plan.fits is False
  assert plan.hbm_bytes_per_chip == 24 * 2 ** 30
  assert plan.mfu is plan.estimated_step_seconds is None
  assert 'the largest part is temporary' in plan.remedy and 'accumulation=2' in plan.remedy
  assert 'DOES NOT FIT' in describe(plan)


def test_another_error_of_the_compiler_is_not_hidden(tmp_path, monkeypatch):

  def break_down(lowered):
    raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

  monkeypatch.setattr(jax.stages.Lowered, 'compile', break_down)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL: a bug'):
    plan_training(small(), EIGHT, [], [], tmp_path / 'plan.json')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="pip install -e '.[tpu]'")
def test_the_compiler_of_tpus_gives_seconds_memory_and_utilisation(tmp_path):
  experiment = small(deliberation__latents='paper')
  plan, = plan_training(experiment, find_topology('v5e:2x2'),
                        [MeshConfig(replica=2, data=1, fsdp=2)], [], tmp_path / 'plan.json')
  record = json.loads((tmp_path / 'plan.json').read_text())
  assert record['topology'] == 'v5e:2x2' and record['fits'] is True
  assert plan.memory.state < plan.hbm_bytes_per_chip < 1e9
  assert 0 < plan.compute_seconds < plan.estimated_step_seconds < 0.1
  assert plan.mfu == pytest.approx(
      plan.model_flops_per_chip / 197e12 / plan.estimated_step_seconds)
  assert 'replica' in plan.estimate and 'taken to lie in one slice' in plan.estimate
  assert any(row.overlapped for row in plan.collectives)
  assert plan.operations[0].seconds >= plan.operations[-1].seconds > 0
  assert plan.unknown_loops == ()
