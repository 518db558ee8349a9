"""Plans training on a TPU slice, without a TPU: memory, time, utilisation and collectives.

  python launch/compile.py --config=configs/gemma2_2b.py --topology=v5e:16x16 --output=plan.json \\
      --mesh=data=16,fsdp=16 --mesh=fsdp=256

Compiles the train step of launch/train.py with the compiler for TPUs (pip install -e '.[tpu]').
Nothing is run. --topology=cpu:8 plans memory and collectives on eight virtual devices instead.

Each --mesh is planned under each --rules. Several plans make a table, with a CSV and a PNG next to
--output. The seconds are estimates, by the compiler's cycles and the bandwidth of the links. They
leave out contention in the network and the input from the host. The compiler's flags are those of
LIBTPU_INIT_ARGS. If that is not set, they are those of launch/recipes/tpu.env.
Next, train on the best mesh: launch/train.py --config.mesh.fsdp=...
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_sizes
from latent_deliberation.files import as_path
from latent_deliberation.planning import table, topology
from latent_deliberation.planning.compile import plan_training
from latent_deliberation.sharding import parse_mesh, parse_rules

define_config(__file__)
_TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:16x16',
    'Chip and shape of a TPU slice, such as v5e:16x16, or virtual devices, such as cpu:8.')
_MESHES = flags.DEFINE_multi_string(
    'mesh', [], "Sizes of mesh axes, such as data=16,fsdp=16. Default: the config's mesh")
_RULES = flags.DEFINE_multi_string(
    'rules', [],
    "Changes of the config's sharding rules, such as embed=fsdp+tensor. Default: no change")
_OUTPUT = app.define_json('output', 'JSON file to write the plan to.', 'plan.json')


def main() -> None:
  experiment = read_sizes()
  meshes = [parse_mesh(text) for text in _MESHES.value]
  rules = [parse_rules(text) for text in _RULES.value]
  plans = plan_training(experiment, topology.find_topology(_TOPOLOGY.value), meshes, rules,
                        as_path(_OUTPUT.value))
  print('\n\n'.join(table.describe(plan) for plan in plans))
  if len(plans) > 1:
    print(f'\n{table.compare(plans)}')
  print(f'\nPlan: {_OUTPUT.value}')


if __name__ == '__main__':
  recipe = Path(__file__).parent / 'recipes/tpu.env'
  app.run(main, prepare=lambda: topology.prepare(_TOPOLOGY.value, recipe))
