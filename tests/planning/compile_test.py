"""Plans of the step that training runs, for machines that need not exist."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from matplotlib.image import imread

from latent_deliberation.build import build_decoder, frozen_shapes
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.plots import DPI
from latent_deliberation.experiment import Computation, Experiment
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


def test_virtual_devices(planned):
  """Virtual devices give memory and collectives, and the reason why there are no seconds."""
  plan, _ = planned[0]
  assert plan.mesh == {'replica': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}
  assert plan.hbm_bytes_per_chip == plan.memory.peak > plan.memory.state > 0
  assert plan.memory.activations + plan.memory.temporary > 2e5  # the computation needs memory
  assert plan.settings['libtpu_init_args'] == ''
  assert plan.fits is plan.estimated_step_seconds is plan.mfu is None
  assert 'only a TPU topology gives seconds' in plan.estimate
  assert {'fsdp', 'tensor'} <= {row.axis for row in plan.collectives}
  assert plan.unknown_loops == ()


def test_memory_is_that_of_training(planned):
  """The planned state has the bytes of the arrays that training makes."""
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


def test_frozen_dtype():
  """Weights are planned in the dtype and shards in which they are loaded."""
  experiment = dataclasses.replace(small(), computation=Computation(frozen_dtype='bfloat16'))
  mesh = make_mesh(MESHES[0])
  table = frozen_shapes(experiment, mesh)['embedder']['table']
  assert table.dtype == jnp.bfloat16
  assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1] // 4)


def test_frozen_int8():
  """Weights in int8 are planned with their scales."""
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


def test_replicate_frozen():
  """Replicated frozen weights are divided over tensor alone."""
  experiment, mesh = small(computation__replicate_frozen=True), make_mesh(MESHES[0])
  table = frozen_shapes(experiment, mesh)['embedder']['table']
  assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1])
  soft_tokens = describe_training(experiment, Path(), mesh).abstract.params['soft_tokens']
  assert soft_tokens.sharding.shard_shape(soft_tokens.shape)[1] == soft_tokens.shape[1] // 4


@pytest.mark.parametrize('chip, chosen', [(None, 'plain'), (CHIPS['v5e'], 'fused')])
def test_auto_attention(chip, chosen, tmp_path, monkeypatch):
  """'auto' attention is planned as it runs on the chip."""
  seen = []

  def look(run, topology):
    seen.append(run.experiment.computation.attention)
    raise InterruptedError

  monkeypatch.setattr('latent_deliberation.planning.compile.plan_step', look)
  with pytest.raises(InterruptedError):
    plan_training(small(computation__attention='auto'), dataclasses.replace(EIGHT, chip=chip), [],
                  [], tmp_path / 'plan.json')
  assert seen == [chosen]


def test_several_plans(planned):
  """Several plans are a list, a table and a plot."""
  plans, output = planned
  records = json.loads(output.read_text())
  assert [record['mesh']['fsdp'] for record in records] == [4, 1]
  for key in ('topology', 'mesh', 'fits', 'hbm_bytes_per_chip', 'model_flops_per_chip',
              'estimated_step_seconds', 'mfu', 'collectives'):
    assert key in records[0]
  rows = list(csv.DictReader(output.with_suffix('.csv').open()))
  assert [int(row['hbm_bytes_per_chip']) for row in rows] == [
      plan.hbm_bytes_per_chip for plan in plans]
  # Without seconds, the picture has no panel for them.
  assert imread(output.with_suffix('.png')).shape[1] == 7 * DPI
  assert compare(plans).splitlines()[1].split()[:6] == [
      '1:', 'cpu:8', '1', '1', '4', '2']


def test_describe_plan(planned):
  """A plan is printed with its memory and its collectives."""
  text = describe(planned[0][0])
  assert 'cpu:8, mesh replica=1,data=1,fsdp=4,tensor=2: unknown whether it fits' in text
  for word in ('frozen', 'optimizer', 'activations', 'all-gather', 'Model FLOPs', 'Compiled in'):
    assert word in text


@pytest.mark.parametrize('mesh, rules, message', [
    (MeshConfig(fsdp=3), {}, "'fsdp': 3.* 3 devices, and not 8"),
    (MeshConfig(data=1, fsdp=2, tensor=4), {}, "'kv_heads' of 2 .* 4 "),
    (MeshConfig(), {'embed': ('rows',)}, r"'embed' .*\['rows'\]"),
    (MeshConfig(data=4, tensor=2), {'head_dim': ('tensor',)}, "'tensor' for more than one")])
def test_bad_sharding_is_refused(mesh, rules, message, tmp_path, monkeypatch):
  """A mesh or rule that does not fit is refused before anything is compiled."""
  monkeypatch.setattr('latent_deliberation.planning.compile.plan_step',
                      lambda run, topology: pytest.fail('too late'))
  with pytest.raises(UserError, match=message):
    plan_training(small(), EIGHT, [MeshConfig(), mesh], [rules], tmp_path / 'plan.json')


@pytest.mark.parametrize('said', [
    'the total memory required for HLO temporaries (24.00G) exceeds available HBM (15.75G).',
    'Ran out of memory in memory space hbm. Used 24.00G of 15.75G hbm. Exceeded hbm capacity.'])
def test_step_does_not_fit(said, tmp_path, monkeypatch):
  """A step that the compiler refuses as too large is a plan that does not fit."""

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


def test_other_compiler_error(tmp_path, monkeypatch):
  """Another error of the compiler is raised."""

  def break_down(lowered):
    raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

  monkeypatch.setattr(jax.stages.Lowered, 'compile', break_down)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL: a bug'):
    plan_training(small(), EIGHT, [], [], tmp_path / 'plan.json')


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="pip install -e '.[tpu]'")
def test_plan_with_libtpu(tmp_path):
  """The compiler for TPUs gives seconds, memory and utilisation."""
  experiment = small(deliberation__latents='paper')
  plan, = plan_training(experiment, find_topology('v5e:2x2'),
                        [MeshConfig(replica=2, data=1, fsdp=2)], [], tmp_path / 'plan.json')
  record = json.loads((tmp_path / 'plan.json').read_text())
  assert record['topology'] == 'v5e:2x2' and record['fits'] is True
  assert plan.memory.state < plan.hbm_bytes_per_chip < 1e9
  assert 0 < plan.compute_seconds < plan.estimated_step_seconds < 0.1
  assert plan.mfu == pytest.approx(
      plan.model_flops_per_chip / 197e12 / plan.estimated_step_seconds)
  assert 'replica' in plan.estimate and 'assumed to be in one slice' in plan.estimate
  assert any(row.overlapped for row in plan.collectives)
  assert plan.operations[0].seconds >= plan.operations[-1].seconds > 0
  assert plan.unknown_loops == ()
