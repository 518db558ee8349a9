"""Plans a train step on a TPU slice that is not there, and the same step under one dense mask.

  python launch/benchmark_plan.py --config=configs/gemma2_2b.py --topology=v5e:16x16 \\
      --output=dense.json

The mask is over trunk and traces as one sequence, the formulation that shared-prefix attention
replaces. It gets remat 'full' and one text of a chip at a time. See launch/compile.py for what the
estimates are. A pod takes minutes for each of the two. Next, plan meshes with launch/compile.py.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.benchmarks.dense_plan import benchmark
from latent_deliberation.cli import app
from latent_deliberation.experiment import define_config, read_config
from latent_deliberation.planning import topology

define_config(__file__)
_TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:16x16', 'Chip and shape of the slice, such as v5e:16x16, or cpu:8.')
_OUTPUT = app.define_json('output', 'JSON file to write, with a PNG beside it.')


def main() -> None:
  result = benchmark(read_config(),
                     topology.find_topology(_TOPOLOGY.value), Path(_OUTPUT.value))
  for way, plan in result['plans'].items():
    seconds = plan['estimated_step_seconds']
    print(f'{way:<11} {"no estimate" if seconds is None else f"{seconds:.3g} s"}, '
          f'{plan["hbm_bytes_per_chip"] / 1e9:.2f} GB a chip'
          f'{", DOES NOT FIT" if plan["fits"] is False else ""}')
  ratios = result['over_ours']
  if ratios['seconds'] is not None:
    print(f'ours is {ratios["seconds"]:.2f} x faster, by the estimate')
  print(f'ours needs {ratios["memory"]:.2f} x less memory')


if __name__ == '__main__':
  recipe = Path(__file__).parent / 'recipes/tpu.env'
  app.run(main, prepare=lambda: topology.prepare(_TOPOLOGY.value, recipe))
