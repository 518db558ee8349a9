"""Plans of a train step and of the same under one dense mask, for a machine that is not there."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.benchmarks.dense_mask import check_dense, dense_mask
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import write_json
from latent_deliberation.planning.compile import describe_run, plan_step
from latent_deliberation.planning.cost_plots import plot_plans
from latent_deliberation.planning.topology import Topology
from latent_deliberation.training.objectives import augmentation

WAYS = {'ours': augmentation, 'dense mask': dense_mask}


def benchmark(experiment: Experiment, topology: Topology, output: Path) -> dict[str, Any]:
  """Plans both and writes `output`, and a PNG beside it.

  Args:
    experiment: for ours as it is; for the mask see `as_dense`.
    topology: see `planning.topology.find_topology`.

  Returns:
    'plans', and 'over_ours': times the seconds and times the bytes of a chip that the mask takes;
    seconds are None where it does not fit, or the topology gives none.

  Raises:
    UserError: a mesh or a rule does not suit the topology or the sizes; or see `check_dense`.
  """
  check_dense(experiment.decoder, experiment.deliberation)
  ours = dataclasses.replace(
      experiment, computation=experiment.computation.on('tpu' if topology.chip else 'cpu'))
  runs = {'ours': describe_run(ours, topology),
          'dense mask': describe_run(as_dense(ours, len(topology.devices)), topology)}
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


def as_dense(experiment: Experiment, num_devices: int) -> Experiment:
  """What a dense mask needs least memory by: nothing kept of a block, few texts at a time.

  The kernels are not for it. Texts are divided over all devices, as far as there are any.
  """
  training, computation = experiment.training, experiment.computation
  return dataclasses.replace(
      experiment,
      computation=dataclasses.replace(computation, attention='plain', remat='full'),
      training=dataclasses.replace(
          training, accumulation=max(training.batch_size // num_devices, 1)))
