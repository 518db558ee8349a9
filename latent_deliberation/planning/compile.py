"""Compiles the train step for a TPU slice, without a TPU, and plans its memory and time."""

import dataclasses
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch
from latent_deliberation.build import build_deliberator
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import write_json, write_whole
from latent_deliberation.planning.collectives import find_collectives
from latent_deliberation.planning.cost_plots import plot_plans
from latent_deliberation.planning.memory import Memory, divide_memory, peak_bytes, shard_bytes
from latent_deliberation.planning.plan import (
  DOES_NOT_FIT,
  ESTIMATE,
  NO_ESTIMATE,
  ONE_SLICE,
  Plan,
  Times,
  advise,
  estimate_times,
  largest_operations,
)
from latent_deliberation.planning.program import parse
from latent_deliberation.planning.table import name_mesh, write_csv
from latent_deliberation.planning.topology import Topology
from latent_deliberation.progress import announced
from latent_deliberation.sharding import MeshConfig, batch_sharding, make_mesh
from latent_deliberation.training.objectives import augmentation
from latent_deliberation.training.run import Run
from latent_deliberation.training.step import LossFn
from latent_deliberation.training.train import describe_training

# The compiler refuses a step that is too large before it assigns memory, or afterwards.
_NEEDED = re.compile(r'\(([\d.]+)([KMG])\) exceeds available HBM|Used ([\d.]+)([KMG]) of .* hbm')


def plan_training(experiment: Experiment, topology: Topology, meshes: Sequence[MeshConfig],
                  rule_sets: Sequence[Mapping[str, Sequence[str]]], output: Path) -> list[Plan]:
  """Plans the step of launch/train.py on each mesh under each set of rules.

  All shardings are checked before anything is compiled. `output` is written after each plan.

  Args:
    experiment: the experiment to plan.
    topology: machine to plan for; see `planning.topology.find_topology`.
    meshes: meshes to plan; empty for the experiment's mesh.
    rule_sets: changes of the experiment's rules, one set a plan; empty for no change.
    output: JSON file for one plan, or for a list of plans with a CSV and a PNG next to it.

  Raises:
    UserError: a mesh or a rule does not suit the topology or the sizes.
  """
  experiment = dataclasses.replace(
      experiment, computation=experiment.computation.on('tpu' if topology.chip else 'cpu'))
  variants = [
      dataclasses.replace(experiment, mesh=mesh, rules={**experiment.rules, **rules})
      for mesh, rules in itertools.product(meshes or [experiment.mesh], rule_sets or [{}])]
  runs = [describe_run(variant, topology) for variant in variants]
  plans = []
  for number, run in enumerate(runs, 1):
    logging.info('compiling %d of %d: mesh %s on %s; a pod takes minutes', number, len(runs),
                 dict(run.mesh.shape), topology.name)
    plans.append(plan_step(run, topology))
    logging.info('%s: %.0f s, %.2f GB a chip', name_mesh(plans[-1]), plans[-1].compile_seconds,
                 plans[-1].hbm_bytes_per_chip / 1e9)
    _write(plans, len(runs) > 1, output)
  return plans


def describe_run(experiment: Experiment, topology: Topology) -> Run:
  """Returns the run of launch/train.py, with shapes instead of weights.

  Raises:
    UserError: the sizes of the experiment do not suit the topology.
  """
  mesh = make_mesh(experiment.mesh, topology.devices)
  run = describe_training(experiment, Path(), mesh)
  run.check_sizes()
  return run


def _write(plans: Sequence[Plan], are_several: bool, output: Path) -> None:
  """Writes one plan as JSON, or several as JSON, CSV and PNG."""
  records = [dataclasses.asdict(plan) for plan in plans]
  content = records if are_several else records[0]
  write_json(output, content)
  if are_several:
    write_whole(output.with_suffix('.csv'), write_csv(plans))
    names = [f'{number}: {name_mesh(plan)}' for number, plan in enumerate(plans, 1)]
    plot_plans(dict(zip(names, records, strict=True)), output.with_suffix('.png'))


def plan_step(run: Run, topology: Topology,
              objective: Callable[[Deliberator, int], LossFn] = augmentation) -> Plan:
  """Compiles the step of a run, and reads the plan from the compiled program.

  Args:
    run: a run with shapes instead of weights.
    topology: machine of its mesh.
    objective: function of (deliberator, loss_chunk) that returns the loss of a step.
  """
  experiment, mesh, chip = run.experiment, run.mesh, topology.chip
  settings = experiment.training

  # The arguments of the step, which are in memory all the time.
  step = run.make_step(objective(build_deliberator(experiment),
                                 experiment.computation.loss_chunk), run.frozen_shapes)
  batch = batch_shapes(experiment, mesh)
  arguments = {
      'frozen': shard_bytes(run.frozen_shapes),
      'trainable': shard_bytes(run.abstract.params),
      'optimizer': shard_bytes(run.abstract.opt_state),
      'batch': shard_bytes(batch)}

  # The compiler gives a program, or the bytes that a step would need and the chip does not have.
  begun = time.monotonic()
  with announced('compiling the step'):
    lowered = step.lower(run.abstract, batch)
    try:
      compiled, needed = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
      compiled, needed = None, _needed_bytes(error)
  seconds = time.monotonic() - begun

  # Memory, collectives and time of that program.
  times, found, operations, unknown = Times(), [], [], ()
  if compiled is None:
    temporary = max(needed - sum(arguments.values()), 0)
    memory = Memory(**arguments, activations=0, temporary=temporary, peak=needed)
  else:
    program = parse(compiled.as_text())
    memory = divide_memory(peak_bytes(compiled, on_cpu=chip is None), program, arguments)
    found, unknown = find_collectives(program, mesh, topology), program.loops_of_unknown_length
    if chip:
      times = estimate_times(program, found, chip, run.step_flops)
      operations = largest_operations(program, chip)
  estimate = NO_ESTIMATE if chip is None else DOES_NOT_FIT if compiled is None else ESTIMATE
  if times.mfu is not None and mesh.shape['replica'] > 1:
    estimate += ONE_SLICE
  texts = batch.tokens.sharding.shard_shape(batch.tokens.shape)[0]
  compiler_flags = os.environ.get('LIBTPU_INIT_ARGS', '') if chip else ''
  capacity = chip.hbm_bytes if chip else None
  return Plan(
      topology=topology.name, mesh=dict(mesh.shape), rules=experiment.rules,
      settings={'batch_size': settings.batch_size, 'accumulation': settings.accumulation,
                'num_latents': experiment.deliberation.num_latents,
                **dataclasses.asdict(experiment.computation),
                'libtpu_init_args': compiler_flags},
      fits=None if chip is None else compiled is not None and memory.peak <= capacity,
      hbm_bytes_per_chip=memory.peak, hbm_capacity=capacity, memory=memory,
      remedy=advise(memory, capacity, experiment.computation.remat, settings.accumulation,
                    texts // settings.accumulation,
                    experiment.computation.replicate_frozen) if chip else '',
      model_flops_per_chip=run.step_flops, **dataclasses.asdict(times),
      estimate=estimate, collectives=found, operations=operations, unknown_loops=unknown,
      compile_seconds=seconds)


def batch_shapes(experiment: Experiment, mesh: Mesh) -> Batch:
  """Returns shapes and shardings of a training batch."""
  leaf = jax.ShapeDtypeStruct((experiment.training.batch_size, experiment.data.length), jnp.int32,
                              sharding=batch_sharding(mesh, experiment.rules))
  return Batch(leaf, leaf, leaf)


def _needed_bytes(error: jax.errors.JaxRuntimeError) -> int:
  """Returns the bytes that a step needs by the compiler's error; raises any other error again."""
  found = _NEEDED.search(str(error))
  if found is None:
    raise error
  size, unit = found[1] or found[3], found[2] or found[4]
  return int(float(size) * 1024 ** (1 + 'KMG'.index(unit)))
