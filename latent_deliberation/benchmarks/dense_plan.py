"""Plans of a train step, and of the same step under one dense mask, for a TPU slice."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.benchmarks.dense_mask import check_dense, check_weights, dense_mask
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import write_json
from latent_deliberation.planning.compile import describe_run, plan_step
from latent_deliberation.planning.cost_plots import plot_plans
from latent_deliberation.planning.topology import Topology
from latent_deliberation.sharding import batch_shards, make_mesh
from latent_deliberation.training.objectives import augmentation

WAYS = {'ours': augmentation, 'dense mask': dense_mask}


def benchmark(experiment: Experiment, topology: Topology, output: Path) -> dict[str, Any]:
  """Plans both steps and writes `output`, and a PNG next to it.

  Args:
    experiment: the experiment to plan; `as_dense` changes it for the mask.
    topology: machine to plan for; see `planning.topology.find_topology`.
    output: JSON file to write.

  Returns:
    'plans' by name, and 'over_ours': seconds, and bytes of a chip, of the mask over those of ours.
    Seconds are None if the mask does not fit, or the topology has no seconds.

  Raises:
    UserError: a mesh or a rule does not suit the topology or the sizes.
    UserError: the dense mask is not written for this experiment; see `check_dense`.
  """
  check_dense(experiment.decoder, experiment.deliberation)
  check_weights(experiment.computation.frozen_dtype, 'the dense mask')
  ours = dataclasses.replace(
      experiment, computation=experiment.computation.on('tpu' if topology.chip else 'cpu'))
  runs = {'ours': describe_run(ours, topology),
          'dense mask': describe_run(as_dense(ours, topology), topology)}
  plans = {}
  for way, run in runs.items():
    logging.info('compiling %s for %s; a pod takes minutes', way, topology.name)
    plans[way] = dataclasses.asdict(plan_step(run, topology, WAYS[way]))
  seconds, memory = ([plans[way][key] for way in WAYS]
                     for key in ('estimated_step_seconds', 'hbm_bytes_per_chip'))
  result = {'plans': plans,
            'over_ours': {'seconds': None if None in seconds else seconds[1] / seconds[0],
                          'memory': memory[1] / memory[0]}}
  write_json(output, result)
  plot_plans(plans, output.with_suffix('.png'))
  return result


def as_dense(experiment: Experiment, topology: Topology) -> Experiment:
  """Returns the experiment with which a dense mask needs the least memory.

  Nothing is kept of a block, and each shard of a batch has one text at a time if there are enough.
  Attention is plain, since the fused kernels have no such mask.
  """
  training, computation = experiment.training, experiment.computation
  shards = batch_shards(make_mesh(experiment.mesh, topology.devices), experiment.rules)
  return dataclasses.replace(
      experiment,
      computation=dataclasses.replace(computation, attention='plain', remat='full'),
      training=dataclasses.replace(
          training, accumulation=max(training.batch_size // shards, 1)))
