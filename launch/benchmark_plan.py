"""Plans a train step for a TPU slice, without a TPU, and the same step under one dense mask.

  python launch/benchmark_plan.py --config=configs/gemma2_2b.py --topology=v5e:16x16 \\
      --output=dense.json

The dense mask has trunk and traces as one sequence. Shared-prefix attention replaces it. The plan
of the mask has remat 'full' and one text a chip at a time. launch/compile.py --help explains the
estimates. Each of the two plans takes minutes for a pod. Next, plan meshes with launch/compile.py.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.benchmarks.dense_plan import benchmark
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_sizes
from latent_deliberation.files import as_path
from latent_deliberation.planning import topology

define_config(__file__)
_TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:16x16',
    'Chip and shape of a TPU slice, such as v5e:16x16, or virtual devices, such as cpu:8.')
_OUTPUT = app.define_json('output', 'JSON file to write, with a PNG next to it.')


def main() -> None:
  result = benchmark(read_sizes(),
                     topology.find_topology(_TOPOLOGY.value), as_path(_OUTPUT.value))
  for way, plan in result['plans'].items():
    seconds = plan['estimated_step_seconds']
    print(f'{way:<11} {"no estimate" if seconds is None else f"{seconds:.3g} s"}, '
          f'{plan["hbm_bytes_per_chip"] / 1e9:.2f} GB a chip'
          f'{", DOES NOT FIT" if plan["fits"] is False else ""}')
  ratios = result['over_ours']
  if ratios['seconds'] is not None:
    print(f'The dense mask takes {ratios["seconds"]:.2f} x the time of ours, by the estimate.')
  print(f'The dense mask takes {ratios["memory"]:.2f} x the memory of ours.')


if __name__ == '__main__':
  recipe = Path(__file__).parent / 'recipes/tpu.env'
  app.run(main, prepare=lambda: topology.prepare(_TOPOLOGY.value, recipe))
